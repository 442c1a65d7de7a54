// Tiles and splits of the attention kernels: pure functions of shapes and of the device.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "core/attention_params.h"

namespace fastops::cuda {

// Whether rows of 16-bit elements with these strides all begin at multiples of 16 bytes.
inline bool rows_aligned(const void* data, std::initializer_list<int64_t> strides) {
  for (int64_t s : strides)
    if (s % 8 != 0) return false;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

constexpr int kAttentionThreads = 128;
constexpr int kAttentionRows = 64;  // of a block: (query, head of the group) pairs; sixteen a warp

// Rows of a sequence and KV head, at most: lengths lie on the device, what the tensors have room for stands in for
// them.
inline int64_t attention_rows(const AttentionParams& p) {
  return (p.cu_q ? p.q_rows : p.paged ? p.queries_per_seq : p.Sq) * p.G;
}
inline const char* too_many_rows(const AttentionParams& p) {
  return attention_rows(p) > 2000000000 ? "a KV head has more than 2000000000 rows of queries" : nullptr;
}

FASTOPS_SHARED constexpr int attention_dim(int D, int Dv) {  // the head size a kernel is made for
  const int d = D > Dv ? D : Dv;
  return d <= 64 ? 64 : d <= 128 ? 128 : 256;
}
FASTOPS_SHARED constexpr int attention_keys(int dim) { return dim <= 128 ? 64 : 32; }
FASTOPS_SHARED constexpr size_t attention_shared(int dim) {
  return static_cast<size_t>(kAttentionRows + 2 * attention_keys(dim)) * static_cast<size_t>(dim) * 2 + 16;
}
// Registers allow so many blocks on a multiprocessor at once.
FASTOPS_SHARED constexpr int attention_blocks_per_sm(int dim) { return dim <= 64 ? 3 : dim <= 128 ? 2 : 1; }

// The kernel for sm_90a: one warp group fetches, two multiply 64 rows each.
constexpr int kHopperThreads = 384, kHopperRows = 128, kHopperKeys = 128, kHopperStages = 2;
FASTOPS_SHARED constexpr size_t hopper_shared(int dim) {
  return static_cast<size_t>(kHopperRows + 2 * kHopperStages * kHopperKeys) * static_cast<size_t>(dim) * 2 + 1024;
}

// One exponent in so many by a polynomial; 0: none. For 128 keys a multiprocessor's 16 ex2 a cycle take 1024 cycles,
// its products 983 (head size 64) or 1966 (128).
FASTOPS_SHARED constexpr int hopper_polynomial(int dim) { return dim <= 64 ? 4 : 0; }

// Which kernel, and its tiles. Few rows (decoding) leave the second group of a Hopper block without work.
struct AttentionTile {
  bool hopper;
  int rows, keys, blocks_per_sm;
};
inline AttentionTile attention_tile(bool sm90a, int dim, int64_t rows) {
  if (sm90a && dim <= 128 && rows > kAttentionRows) return {true, kHopperRows, kHopperKeys, 1};
  return {false, kAttentionRows, attention_keys(dim), attention_blocks_per_sm(dim)};
}

// Parts the keys of a sequence are split into, so that a few long sequences fill the device: enough blocks for each
// multiprocessor once, at least four tiles of keys each, at most 32.
inline int64_t attention_splits(int64_t blocks, int64_t keys, const AttentionTile& tile, int sm_count) {
  const int64_t slots = static_cast<int64_t>(sm_count) * tile.blocks_per_sm;
  if (blocks <= 0 || blocks * 2 > slots) return 1;
  const int64_t least = 4 * tile.keys;
  int64_t splits = slots / blocks;
  if (splits > (keys + least - 1) / least) splits = (keys + least - 1) / least;
  return splits < 1 ? 1 : splits > 32 ? 32 : splits;
}

}  // namespace fastops::cuda
