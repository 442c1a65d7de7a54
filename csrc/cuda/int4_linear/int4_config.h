// Tiles and stripes of the INT4 product: pure functions of shapes and of the device.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace fastops::cuda {

constexpr int kInt4Threads = 128;
constexpr int kInt4Columns = 128;  // output features of a block, 32 of each warp
constexpr int kInt4Depth = 64;     // input features of a stage
constexpr int kInt4Stages = 4;

// The kernel for sm_90a: one warp group fetches, two multiply 64 features each by 128 rows.
constexpr int kInt4HopperThreads = 384, kInt4HopperRows = 128;
FASTOPS_SHARED constexpr size_t int4_hopper_shared() {
  return static_cast<size_t>(kInt4Stages) * (kInt4HopperRows * kInt4Depth * 2 + kInt4Columns * kInt4Depth / 2) + 1024;
}
// From so many rows on, where groups and planes end with a step of its columns.
inline bool int4_use_hopper(bool sm90a, int64_t M, int64_t K, int64_t Kx, int64_t group_size) {
  return sm90a && M > 64 && (group_size % kInt4Depth == 0 || group_size == K) && (Kx == K || Kx % kInt4Depth == 0);
}

// Blocks of neighbouring features that share their tile of x.
FASTOPS_SHARED constexpr int64_t int4_hopper_blocks(int64_t N) { return (N + kInt4Columns - 1) / kInt4Columns; }
FASTOPS_SHARED constexpr int int4_hopper_cluster(int64_t N) { return int4_hopper_blocks(N) % 2 == 0 ? 2 : 1; }

// Tiles of 16 rows of a block.
inline int int4_tiles(int64_t M) { return M <= 16 ? 1 : M <= 32 ? 2 : 4; }
FASTOPS_SHARED constexpr size_t int4_stage_bytes(int tiles) {
  return static_cast<size_t>(tiles * 16 * kInt4Depth * 2 + kInt4Columns * kInt4Depth / 2);
}
FASTOPS_SHARED constexpr size_t int4_int8_stage_bytes(int tiles) {
  return static_cast<size_t>(tiles * 16 * kInt4Depth + kInt4Columns * kInt4Depth / 2);
}
// Blocks that a multiprocessor must have registers for.
FASTOPS_SHARED constexpr int int4_blocks_per_sm(int tiles) { return tiles == 1 ? 4 : tiles == 2 ? 3 : 2; }
// Marlin's stripes: the steps of all output tiles in one row, tile behind tile, are cut into equal runs, one for each
// block, so that all multiprocessors end together whatever the number of tiles; a tile that a cut goes through is added
// up from its parts. Two runs for each multiprocessor, of at least four steps; where the tiles fill the device many
// times over, one run for each tile.
inline int64_t int4_stripes(int64_t tiles, int64_t chunks, int sm_count) {
  const int64_t resident = 2 * static_cast<int64_t>(sm_count), most = tiles * chunks / 4;
  if (tiles >= 8 * resident || tiles % resident == 0) return tiles;
  if (resident <= most) return resident;
  return most > tiles ? most : tiles;  // runs of one tile where tiles are short
}
// The first step of a run, and the run a step is in.
FASTOPS_SHARED constexpr int64_t int4_stripe_begin(int64_t steps, int64_t stripes, int64_t stripe) {
  return steps * stripe / stripes;
}
FASTOPS_SHARED constexpr int64_t int4_stripe_of(int64_t steps, int64_t stripes, int64_t step) {
  return ((step + 1) * stripes - 1) / steps;
}

}  // namespace fastops::cuda
