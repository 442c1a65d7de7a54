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
#include "core/attention_params.h"
#include "cuda/arch/arch.h"
#include "cuda/attention/attention_config.h"
#include "cuda/layout/numbers.h"
#include "cuda/layout/tile.h"

namespace fastops::cuda {

struct AttentionArgs {
  AttentionParams p;
  int64_t splits, split_keys;
  float *partial_out, *partial_lse;  // [B][splits][Hkv][rows][Dv] and [B][splits][Hkv][rows]
  int64_t rows;                      // of a sequence and KV head, at most
};

// A sequence, and whether its indices stay inside the tensors (they are known only here).
struct DeviceSequence {
  Sequence s;
  bool good;
};
FASTOPS_DEVICE DeviceSequence device_sequence(const AttentionParams& p, int64_t b) {
  DeviceSequence d{sequence(p, b), true};
  if (p.cu_q && (d.s.q0 < 0 || d.s.Sq < 0 || d.s.q0 + d.s.Sq > p.q_rows)) d = {Sequence{0, 0, 0, 0, 0}, false};
  if (p.paged && (d.s.Sk < 0 || d.s.Sk > (p.max_pages << p.page_shift))) d.good = false;
  if (p.ragged && (d.s.k0 < 0 || d.s.Sk < 0 || d.s.k0 + d.s.Sk > p.k_rows)) d.good = false;
  if (!d.good) d.s.Sk = 0;
  return d;
}

template <class T>
struct DenseKeys {
  const T *k, *v;
  int64_t ks, vs;
  FASTOPS_DEVICE DenseKeys(const AttentionParams& p, const Sequence& s, int64_t b, int64_t hkv)
      : k(reinterpret_cast<const T*>(p.k) + b * p.k_sb + s.k0 * p.k_ss + hkv * p.k_sh),
        v(reinterpret_cast<const T*>(p.v) + b * p.v_sb + s.k0 * p.v_ss + hkv * p.v_sh),
        ks(p.k_ss),
        vs(p.v_ss) {}
  FASTOPS_DEVICE bool find(int64_t, int64_t*) const { return true; }
  FASTOPS_DEVICE const T* key(int64_t j, int64_t) const { return k + j * ks; }
  FASTOPS_DEVICE const T* value(int64_t j, int64_t) const { return v + j * vs; }
};

template <class T>
struct PagedKeys {
  const T *k, *v;
  const int32_t* table;
  int64_t table_sp, kb, ks, vb, vs, pages;
  int shift, mask;
  FASTOPS_DEVICE PagedKeys(const AttentionParams& p, const Sequence&, int64_t b, int64_t hkv)
      : k(reinterpret_cast<const T*>(p.k) + hkv * p.k_sh),
        v(reinterpret_cast<const T*>(p.v) + hkv * p.v_sh),
        table(p.table + b * p.table_sb),
        table_sp(p.table_sp),
        kb(p.k_sb),
        ks(p.k_ss),
        vb(p.v_sb),
        vs(p.v_ss),
        pages(p.pages),
        shift(p.page_shift),
        mask(p.page_mask) {}
  FASTOPS_DEVICE bool find(int64_t j, int64_t* page) const {  // false: no page of the cache, and not to be read
    *page = table[(j >> shift) * table_sp];
    return *page >= 0 && *page < pages;
  }
  FASTOPS_DEVICE const T* key(int64_t j, int64_t page) const { return k + page * kb + (j & mask) * ks; }
  FASTOPS_DEVICE const T* value(int64_t j, int64_t page) const { return v + page * vb + (j & mask) * vs; }
};

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
      if (there) from += b * p.q_sb + (s.q0 + row / p.G) * p.q_ss + (hkv * p.G + row % p.G) * p.q_sh + c * kChunk;
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
      const T* from = reinterpret_cast<const T*>(p.k);
      if (there) {
        int64_t page = 0;
        there = keys.find(j, &page);
        if (there)
          from = (kValues ? keys.value(j, page) : keys.key(j, page)) + c * kChunk;
        else
          *bad = true;
      }
      cp_async16(to + Layout::at(r, c), from, there);
    }
  }
};

// Two rows of a thread: running maximum (in units of log 2) and sum.
struct RowPair {
  float m[2], l[2];
};

// Scores to log2 units, with every modifier of the call. `column` is the thread's first column of the tile.
template <int kTiles>
FASTOPS_DEVICE void modify(const AttentionParams& p, const Sequence& s, float (&x)[kTiles][4], const int64_t (&row)[2],
                           int64_t b, int64_t hkv, int64_t column) {
  if (!(p.softcap > 0.0f) && p.alibi == nullptr) {
    const float scale = p.scale * kLog2e;
    FASTOPS_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      FASTOPS_UNROLL
      for (int i = 0; i < 4; ++i) x[n][i] *= scale;
    }
    return;
  }
  float slope[2] = {0.0f, 0.0f}, position[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t head = hkv * p.G + row[i] % p.G;
    if (p.alibi) slope[i] = p.alibi[b * p.alibi_sb + head * p.alibi_sh] * kLog2e;
    position[i] = static_cast<float>(row[i] / p.G + s.offset - column);
  }
  FASTOPS_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    FASTOPS_UNROLL
    for (int i = 0; i < 4; ++i) {
      float y = x[n][i] * p.scale;
      if (p.softcap > 0.0f) y = p.softcap * tanh_precise(y / p.softcap);
      const float distance = absolute(position[i / 2] - static_cast<float>(8 * n + i % 2));
      x[n][i] = y * kLog2e - slope[i / 2] * distance;
    }
  }
}

// x becomes 2^(x - m), m and l go on, and o is brought to the new m. The maximum in use may lag behind by 2^8: o is
// then rescaled a few times a row instead of once a tile (FlashAttention-4, section 3.1).
template <int kTiles, int kOut>
FASTOPS_DEVICE void online_softmax(float (&x)[kTiles][4], RowPair& state, float (&o)[kOut][4]) {
  FASTOPS_UNROLL
  for (int i = 0; i < 2; ++i) {
    float top = -infinity();
    FASTOPS_UNROLL
    for (int n = 0; n < kTiles; ++n) top = maximum(top, maximum(x[n][2 * i], x[n][2 * i + 1]));
    top = maximum(top, shuffle_xor(top, 1));
    top = maximum(top, shuffle_xor(top, 2));
    float alpha = 1.0f;
    if (top > state.m[i] + 8.0f) {  // also from -inf
      alpha = state.m[i] == -infinity() ? 0.0f : ex2(state.m[i] - top);
      state.m[i] = top;
    }
    const float m = state.m[i] == -infinity() ? 0.0f : state.m[i];
    float sum = 0.0f;
    FASTOPS_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      FASTOPS_UNROLL
      for (int j = 2 * i; j < 2 * i + 2; ++j) {
        x[n][j] = ex2(x[n][j] - m);
        sum += x[n][j];
      }
    }
    state.l[i] = state.l[i] * alpha + sum;
    FASTOPS_UNROLL
    for (int n = 0; n < kOut; ++n) {
      o[n][2 * i] *= alpha;
      o[n][2 * i + 1] *= alpha;
    }
  }
}

template <class T, int kDim, class Keys>
FASTOPS_KERNEL(kAttentionThreads, attention_blocks_per_sm(kDim))
attention_sm80(const AttentionArgs a) {
  constexpr int kTile = attention_keys(kDim), kScores = kTile / 8, kOut = kDim / 8;
  using Layout = Swizzled<kDim>;
  const AttentionParams& p = a.p;
  const int64_t b = block_z() / a.splits, split = block_z() % a.splits, hkv = block_y();
  const DeviceSequence found = device_sequence(p, b);
  const Sequence& s = found.s;
  const int64_t row0 = block_x() * kAttentionRows, rows = s.Sq * p.G;
  if (row0 >= rows) return;
  T* q = reinterpret_cast<T*>(dynamic_shared());
  T* k = q + kAttentionRows * kDim;
  T* v = k + kTile * kDim;
  int* flag = reinterpret_cast<int*>(v + kTile * kDim);
  const int lane = lane_index(), warp = warp_index();
  const int64_t row[2] = {row0 + warp * 16 + lane / 4, row0 + warp * 16 + lane / 4 + 8};

  // Keys of the block, and of this thread's two rows, within the split. Both ends grow with the row.
  const int64_t begin = split * a.split_keys, stop = a.splits == 1 ? s.Sk : begin + a.split_keys;
  const auto clip = [&](KeyRange r) {
    if (r.lo < begin) r.lo = begin;
    if (r.hi > stop) r.hi = stop;
    if (r.hi < r.lo) r.hi = r.lo;
    return r;
  };
  const int64_t last_row = (row0 + kAttentionRows < rows ? row0 + kAttentionRows : rows) - 1;
  const KeyRange first_sees = clip(visible_keys(p, s, row0 / p.G)),
                 last_sees = clip(visible_keys(p, s, last_row / p.G));
  const KeyRange sees[2] = {clip(visible_keys(p, s, row[0] / p.G)), clip(visible_keys(p, s, row[1] / p.G))};
  const int64_t key_begin = first_sees.lo, key_end = last_sees.hi;

  bool bad = !found.good;
  const Keys keys(p, s, b, hkv);
  const TileLoader<T, kDim, Keys> load{p, keys, &bad};
  if (thread_index() == 0) *flag = 0;
  load.queries(q, s, b, hkv, row0, rows);
  if (key_begin < key_end) load.template tile<false>(k, key_begin, key_end);
  cp_async_commit();

  float o[kOut][4];
  FASTOPS_UNROLL
  for (int n = 0; n < kOut; ++n) {
    FASTOPS_UNROLL
    for (int i = 0; i < 4; ++i) o[n][i] = 0.0f;
  }
  RowPair state{{-infinity(), -infinity()}, {0.0f, 0.0f}};
  for (int64_t key = key_begin; key < key_end; key += kTile) {
    load.template tile<true>(v, key, key_end);
    cp_async_commit();
    cp_async_wait<1>();  // k is there
    block_sync();
    float x[kScores][4];
    FASTOPS_UNROLL
    for (int n = 0; n < kScores; ++n) {
      FASTOPS_UNROLL
      for (int i = 0; i < 4; ++i) x[n][i] = 0.0f;
    }
    FASTOPS_UNROLL
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t qa[4];
      ldmatrix_x4(qa, q + Layout::at(warp * 16 + FragmentA::row(lane), 2 * d + FragmentA::chunk(lane)));
      FASTOPS_UNROLL
      for (int n = 0; n < kScores; n += 2) {
        uint32_t kb[4];
        ldmatrix_x4(kb, k + Layout::at(8 * n + FragmentB::row(lane), 2 * d + FragmentB::chunk(lane)));
        mma_m16n8k16<T>(x[n], qa, kb[0], kb[1]);
        mma_m16n8k16<T>(x[n + 1], qa, kb[2], kb[3]);
      }
    }
    block_sync();
    if (key + kTile < key_end) load.template tile<false>(k, key + kTile, key_end);
    cp_async_commit();

    const int64_t column = key + 2 * (lane % 4);
    modify(p, s, x, row, b, hkv, column);
    if (key < last_sees.lo || key + kTile > first_sees.hi) {  // some row does not see the whole tile
      FASTOPS_UNROLL
      for (int n = 0; n < kScores; ++n) {
        FASTOPS_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int64_t j = column + 8 * n + i % 2;
          if (j < sees[i / 2].lo || j >= sees[i / 2].hi) x[n][i] = -infinity();
        }
      }
    }
    online_softmax(x, state, o);

    cp_async_wait<1>();  // v is there
    block_sync();
    FASTOPS_UNROLL
    for (int n = 0; n < kScores; n += 2) {
      const uint32_t pa[4] = {pack2<T>(x[n][0], x[n][1]), pack2<T>(x[n][2], x[n][3]),
                              pack2<T>(x[n + 1][0], x[n + 1][1]), pack2<T>(x[n + 1][2], x[n + 1][3])};
      FASTOPS_UNROLL
      for (int d = 0; d < kOut; d += 2) {
        uint32_t vb[4];
        ldmatrix_x4_trans(vb,
                          v + Layout::at(8 * n + FragmentBTransposed::row(lane), d + FragmentBTransposed::chunk(lane)));
        mma_m16n8k16<T>(o[d], pa, vb[0], vb[1]);
        mma_m16n8k16<T>(o[d + 1], pa, vb[2], vb[3]);
      }
    }
    block_sync();
  }
  cp_async_wait<0>();
  block_sync();
  if (bad) *flag = 1;
  block_sync();
  const bool broken = *flag != 0;

  FASTOPS_UNROLL
  for (int i = 0; i < 2; ++i) {
    float l = state.l[i];
    l += shuffle_xor(l, 1);
    l += shuffle_xor(l, 2);
    if (row[i] >= rows) continue;
    const int64_t qi = row[i] / p.G, head = hkv * p.G + row[i] % p.G;
    float lse = l == 0.0f ? -infinity() : state.m[i] * kLn2 + log_natural(l);
    float factor = l == 0.0f ? 0.0f : 1.0f / l;
    if (broken) lse = factor = not_a_number();
    if (a.splits > 1) {
      const int64_t slot = ((b * a.splits + split) * p.Hkv + hkv) * a.rows + row[i];
      float* to = a.partial_out + slot * p.Dv;
      FASTOPS_UNROLL
      for (int n = 0; n < kOut; ++n) {
        const int d = 8 * n + 2 * (lane % 4);
        if (d < p.Dv) {
          to[d] = o[n][2 * i] * factor;
          to[d + 1] = o[n][2 * i + 1] * factor;
        }
      }
      if (lane % 4 == 0) a.partial_lse[slot] = lse;
      continue;
    }
    if (p.sinks && !broken) {  // one more logit in the denominator
      const float sink = p.sinks[head * p.sinks_stride], top = maximum(lse, sink);
      if (top == -infinity()) {
        lse = top;
      } else {
        const float mine = ex2((lse - top) * kLog2e), all = mine + ex2((sink - top) * kLog2e);
        factor *= mine / all;
        lse = top + log_natural(all);
      }
    }
    const int64_t at = b * p.o_sb + (s.q0 + qi) * p.o_ss + head * p.o_sh;
    FASTOPS_UNROLL
    for (int n = 0; n < kOut; ++n) {
      const int d = 8 * n + 2 * (lane % 4);
      if (d >= p.Dv) continue;
      if (p.out_dtype == 1) {
        float* to = reinterpret_cast<float*>(p.out) + at + d;
        to[0] = o[n][2 * i] * factor;
        to[1] = o[n][2 * i + 1] * factor;
      } else {
        *reinterpret_cast<uint32_t*>(reinterpret_cast<T*>(p.out) + at + d) =
            pack2<T>(o[n][2 * i] * factor, o[n][2 * i + 1] * factor);
      }
    }
    if (p.lse && lane % 4 == 0) p.lse[b * p.lse_sb + head * p.lse_sh + (s.q0 + qi) * p.lse_ss] = lse;
  }
}

// Rows of a split sequence put together: a warp for each (sequence, KV head, row). Sinks join here.
template <class T>
FASTOPS_KERNEL(kAttentionThreads, 4)
attention_merge(const AttentionArgs a) {
  const AttentionParams& p = a.p;
  const int64_t b = block_z(), hkv = block_y(), row = block_x() * (kAttentionThreads / 32) + warp_index();
  const DeviceSequence found = device_sequence(p, b);
  if (row >= found.s.Sq * p.G) return;
  const int lane = lane_index();
  const int64_t qi = row / p.G, head = hkv * p.G + row % p.G;
  const auto slot = [&](int64_t i) { return ((b * a.splits + i) * p.Hkv + hkv) * a.rows + row; };
  const auto lse_of = [&](int64_t i) { return a.partial_lse[slot(i)]; };
  const Merge merge(a.splits, lse_of, p.sinks ? p.sinks[head * p.sinks_stride] : -infinity());
  const int64_t at = b * p.o_sb + (found.s.q0 + qi) * p.o_ss + head * p.o_sh;
  for (int d = lane; d < p.Dv; d += 32) {
    const float y = merge.value([&](int64_t i) { return a.partial_out[slot(i) * p.Dv + d]; });
    if (p.out_dtype == 1)
      reinterpret_cast<float*>(p.out)[at + d] = y;
    else
      narrow(y, reinterpret_cast<T*>(p.out) + at + d);
  }
  if (p.lse && lane == 0) p.lse[b * p.lse_sb + head * p.lse_sh + (found.s.q0 + qi) * p.lse_ss] = merge.lse();
}

// Rows of a ragged q behind the last sequence belong to no one: 0 and -inf.
template <class T>
FASTOPS_KERNEL(kAttentionThreads, 4)
attention_tail(const AttentionArgs a) {
  const AttentionParams& p = a.p;
  int64_t first = p.cu_q[p.B * p.cu_q_stride];
  if (first < 0) first = 0;
  const int64_t row = block_x(), head = block_y();
  if (row < first) return;
  const int64_t at = row * p.o_ss + head * p.o_sh;
  for (int d = thread_index(); d < p.Dv; d += kAttentionThreads) {
    if (p.out_dtype == 1)
      reinterpret_cast<float*>(p.out)[at + d] = 0.0f;
    else
      narrow(0.0f, reinterpret_cast<T*>(p.out) + at + d);
  }
  if (p.lse && thread_index() == 0) p.lse[head * p.lse_sh + row * p.lse_ss] = -infinity();
}

}  // namespace fastops::cuda
