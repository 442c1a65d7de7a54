// Tiles and splits of the INT4 product: pure functions of shapes and of the device.
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

// Tiles of 16 rows of a block.
inline int int4_tiles(int64_t M) { return M <= 16 ? 1 : M <= 32 ? 2 : 4; }
FASTOPS_SHARED constexpr size_t int4_stage_bytes(int tiles) {
  return static_cast<size_t>(tiles * 16 * kInt4Depth * 2 + kInt4Columns * kInt4Depth / 2);
}
FASTOPS_SHARED constexpr size_t int4_int8_stage_bytes(int tiles) {
  return static_cast<size_t>(tiles * 16 * kInt4Depth + kInt4Columns * kInt4Depth / 2);
}
FASTOPS_SHARED constexpr int int4_blocks_per_sm(int tiles) { return tiles == 1 ? 3 : tiles == 2 ? 2 : 1; }
// Parts that K is split into, so that few output tiles fill the device: two blocks for each multiprocessor, and at
// least four stages each.
inline int64_t int4_splits(int64_t blocks, int64_t K, int sm_count) {
  const int64_t chunks = (K + kInt4Depth - 1) / kInt4Depth, want = 2 * static_cast<int64_t>(sm_count);
  if (blocks <= 0 || blocks >= want) return 1;
  int64_t splits = want / blocks;
  if (splits > chunks / 4) splits = chunks / 4;
  return splits < 1 ? 1 : splits > 16 ? 16 : splits;
}

}  // namespace fastops::cuda
