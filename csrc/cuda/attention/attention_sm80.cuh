// Attention for sm_80 and later: FlashAttention-2 (Dao 2023, algorithm 1) on mma.m16n8k16 with cp.async.
//
// A block holds 64 rows (query, head of the group) of one sequence and KV head, so that queries which share keys share
// their tiles (GQA packing), and walks over tiles of 64 (head size 256: 32) keys. Warp w owns rows 16 w to 16 w + 15.
//
//   shared memory      q [64][dim]   k [keys][dim]   v [keys][dim]      swizzled (layout/tile.h)
//   per tile           v_i asked for | k_i there: s = q k^T | k_i+1 asked for | softmax | v_i there: o += p v
//
// Where keys come from is a template parameter (dense and ragged, or pages); the end of a row is one of two epilogues,
// the normalised row or a partial (O, LSE) for the merge.
#pragma once
#include "cuda/attention/attention_products.cuh"
#include "cuda/attention/attention_rows.cuh"

namespace fastops::cuda {

// Tiles of q, k and v on their way to shared memory. Rows and columns that do not exist become zeros.
template <class T, int kDim, class Keys>
struct TileLoader {
  using Layout = Swizzled<kDim>;
  static constexpr int kTile = attention_keys(kDim);
  static constexpr int kPerRow = kDim / kChunk;
  const AttentionParams& p;
  const Keys& keys;
  bool* bad;

  FASTOPS_DEVICE void queries(T* q, const Sequence& s, int64_t b, int64_t hkv, int64_t row0, int64_t rows) const {
    for (int i = thread_index(); i < kAttentionRows * kPerRow; i += kAttentionThreads) {
      const int r = i / kPerRow, c = i % kPerRow;
      const int64_t row = row0 + r;
      const bool there = row < rows && c * kChunk < p.D;
      const T* from = reinterpret_cast<const T*>(p.q);
      if (there) from = packed_row<T>(p, s, b, hkv, row, p.q, p.q_sb, p.q_ss, p.q_sh) + c * kChunk;
      cp_async16(q + Layout::at(r, c), from, there);
    }
  }
  template <bool kValues>
  FASTOPS_DEVICE void tile(T* to, int64_t key0, int64_t end) const {
    const int dim = kValues ? p.Dv : p.D;
    FASTOPS_UNROLL_BY(2)
    for (int i = thread_index(); i < kTile * kPerRow; i += kAttentionThreads) {
      const int r = i / kPerRow, c = i % kPerRow;
      const int64_t j = key0 + r;
      bool there = j < end && c * kChunk < dim;
      if constexpr (Keys::kDecodes) {  // by way of registers
        Bytes16 bytes{};
        if (there && !keys.template load<kValues>(j, c, &bytes)) *bad = true;
        *reinterpret_cast<Bytes16*>(to + Layout::at(r, c)) = bytes;
        continue;
      }
      const T* from = reinterpret_cast<const T*>(p.k);
      if (there) {
        int64_t page = 0;
        if constexpr (!Keys::kDecodes) {
          there = keys.find(j, &page);
          if (there) from = (kValues ? keys.value(j, page) : keys.key(j, page)) + c * kChunk;
        }
        if (!there) *bad = true;
      }
      cp_async16(to + Layout::at(r, c), from, there);
    }
  }
};

template <class T, int kDim, class Keys>
FASTOPS_KERNEL(kAttentionThreads, attention_blocks_per_sm(kDim))
attention_sm80(const AttentionArgs a) {
  constexpr int kTile = attention_keys(kDim), kScores = kTile / 8, kOut = kDim / 8;
  const AttentionParams& p = a.p;
  const BlockRows block(a, block_x(), kAttentionRows);
  if (block.empty()) return;
  const Sequence& s = block.found.s;
  const int row0 = block.row0;
  T* q = reinterpret_cast<T*>(dynamic_shared());
  T* k = q + kAttentionRows * kDim;
  T* v = k + kTile * kDim;
  int* flag = reinterpret_cast<int*>(v + kTile * kDim);
  const int lane = lane_index(), warp = warp_index();
  const int row[2] = {row0 + warp * 16 + lane / 4, row0 + warp * 16 + lane / 4 + 8};

  const int64_t key_begin = block.first.lo, key_end = block.last.hi;
  const Sight sight(a, block, row, block.first, block.last, key_begin);

  bool bad = !block.found.good;
  const Keys keys(p, s, block.b, block.hkv);
  const TileLoader<T, kDim, Keys> load{p, keys, &bad};
  if (thread_index() == 0) *flag = 0;
  load.queries(q, s, block.b, block.hkv, row0, block.rows);
  if (key_begin < key_end) load.template tile<false>(k, key_begin, key_end);
  cp_async_commit();

  float o[kOut][4];
  clear(o);
  RowPair state{{-infinity(), -infinity()}, {0.0f, 0.0f}};
  for (int64_t key = key_begin; key < key_end; key += kTile) {
    load.template tile<true>(v, key, key_end);
    cp_async_commit();
    cp_async_wait<1>();  // k is there
    block_sync();
    float x[kScores][4], alphas[2];
    products<T, kDim>(x, q, k);
    block_sync();
    if (key + kTile < key_end) load.template tile<false>(k, key + kTile, key_end);
    cp_async_commit();

    const int64_t column = key + 2 * (lane % 4);
    modify(a, s, x, row, block.b, block.hkv, column);
    sight.hide(x, static_cast<int>(key - key_begin));
    online_softmax<0>(x, a.unit, state, alphas);
    rescale(o, alphas);

    cp_async_wait<1>();  // v is there
    block_sync();
    accumulate<T, kDim>(o, x, v);
    block_sync();
  }
  cp_async_wait<0>();
  block_sync();
  if (bad) *flag = 1;
  block_sync();
  const bool broken = *flag != 0;

  finish<T>(a, block, row, state, o, broken);
}

}  // namespace fastops::cuda
