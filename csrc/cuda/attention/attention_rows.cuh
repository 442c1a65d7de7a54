// What every forward attention kernel does with a tile of scores and at the end of a row: where sequences and keys lie,
// the modifiers of a call, the running softmax, the two epilogues. Tiles are in the layout of mma's d: a thread has two
// rows.
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
  int64_t rows, blocks;              // of a sequence and KV head, at most
  float unit;  // from modified scores to log2 units: the multiplication that costs nothing in the exponent
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

// Row `row` of a sequence and KV head, a (query, head of the group) pair, in q or a tensor like it.
template <class T>
FASTOPS_DEVICE const T* packed_row(const AttentionParams& p, const Sequence& s, int64_t b, int64_t hkv, int64_t row,
                                   const char* data, int64_t sb, int64_t ss, int64_t sh) {
  return reinterpret_cast<const T*>(data) + b * sb + (s.q0 + row / p.G) * ss + (hkv * p.G + row % p.G) * sh;
}

template <class T>
struct DenseKeys {
  static constexpr bool kDecodes = false;
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
  static constexpr bool kDecodes = false;
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

// The rows of a block, and the keys they see within the split. Both ends of a row's keys grow with the row.
struct BlockRows {
  int b, split, hkv;
  int row0, rows;  // rows: of the sequence and KV head
  DeviceSequence found;
  KeyRange first, last;  // of the block's first and last row
  FASTOPS_DEVICE BlockRows(const AttentionArgs& a, int64_t block, int count)
      : b(static_cast<int>(block_z() / a.splits)),
        split(static_cast<int>(block_z() % a.splits)),
        hkv(static_cast<int>(block_y())),
        found(device_sequence(a.p, b)) {
    row0 = static_cast<int>(block) * count;
    rows = static_cast<int>(found.s.Sq * a.p.G);
    if (empty()) return;
    first = sees(a, row0);
    last = sees(a, (row0 + count < rows ? row0 + count : rows) - 1);
  }
  FASTOPS_DEVICE bool empty() const { return row0 >= rows; }
  FASTOPS_DEVICE KeyRange sees(const AttentionArgs& a, int64_t row) const {
    KeyRange r = visible_keys(a.p, found.s, row / a.p.G);
    const int64_t begin = split * a.split_keys, stop = a.splits == 1 ? found.s.Sk : begin + a.split_keys;
    if (r.lo < begin) r.lo = begin;
    if (r.hi > stop) r.hi = stop;
    if (r.hi < r.lo) r.hi = r.lo;
    return r;
  }
};

// The keys two rows see, and those all rows from `first` to `last` see, counted from key `from`.
struct Sight {
  int lo[2], hi[2], all_lo, all_hi;
  FASTOPS_DEVICE Sight(const AttentionArgs& a, const BlockRows& block, const int (&row)[2], const KeyRange& first,
                       const KeyRange& last, int64_t from)
      : all_lo(static_cast<int>(last.lo - from)), all_hi(static_cast<int>(first.hi - from)) {
    FASTOPS_UNROLL
    for (int i = 0; i < 2; ++i) {
      const KeyRange r = block.sees(a, row[i]);
      lo[i] = static_cast<int>(r.lo - from);
      hi[i] = static_cast<int>(r.hi - from);
    }
  }
  // Scores of keys a row does not see become -inf; the tile begins at `key`.
  template <int kTiles>
  FASTOPS_DEVICE void hide(float (&x)[kTiles][4], int key) const {
    if (key >= all_lo && key + 8 * kTiles <= all_hi) return;
    const int column = key + 2 * (lane_index() % 4);
    FASTOPS_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      FASTOPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int j = column + 8 * n + i % 2;
        if (j < lo[i / 2] || j >= hi[i / 2]) x[n][i] = -infinity();
      }
    }
  }
};

// Two rows of a thread: running maximum (in units of log 2) and sum.
struct RowPair {
  float m[2], l[2];
};

// Every modifier of the call, to scores that are log2 units but for a.unit. `column` is the thread's first column of
// the tile.
template <int kTiles>
FASTOPS_DEVICE void modify(const AttentionArgs& a, const Sequence& s, float (&x)[kTiles][4], const int (&row)[2],
                           int64_t b, int64_t hkv, int64_t column) {
  const AttentionParams& p = a.p;
  if (a.unit != 1.0f) return;
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
    const int group = static_cast<int>(p.G);
    const int64_t head = hkv * group + row[i] % group;
    if (p.alibi) slope[i] = p.alibi[b * p.alibi_sb + head * p.alibi_sh] * kLog2e;
    position[i] = static_cast<float>(row[i] / group + s.offset - column);
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

// x becomes 2^(unit x - m), m and l go on; what stands in o is to be multiplied by alpha to fit the new m. The maximum
// in use may lag behind by 2^8: alpha is then 1 for most tiles (FlashAttention-4, section 3.1). One in kPolynomial
// exponents (0: none) is worked out by the units that multiply, where the others' unit is what everything waits for
// (ibid.).
template <int kPolynomial, int kTiles>
FASTOPS_DEVICE void online_softmax(float (&x)[kTiles][4], float unit, RowPair& state, float (&alphas)[2]) {
  FASTOPS_UNROLL
  for (int i = 0; i < 2; ++i) {
    float top = -infinity();
    FASTOPS_UNROLL
    for (int n = 0; n < kTiles; ++n) top = maximum(top, maximum(x[n][2 * i], x[n][2 * i + 1]));
    top = maximum(top, shuffle_xor(top, 1));
    top = maximum(top, shuffle_xor(top, 2)) * unit;
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
        const float y = x[n][j] * unit - m;
        x[n][j] = kPolynomial > 0 && n % kPolynomial == kPolynomial - 1 ? ex2_polynomial(y) : ex2(y);
        sum += x[n][j];
      }
    }
    state.l[i] = state.l[i] * alpha + sum;
    alphas[i] = alpha;
  }
}
// For most tiles there is nothing to do. (The branch asks for registers that head size 256 does not have.)
template <int kOut>
FASTOPS_DEVICE void rescale(float (&o)[kOut][4], const float (&alphas)[2]) {
  if constexpr (kOut < 32) {
    if (!any_lane(alphas[0] != 1.0f || alphas[1] != 1.0f)) return;
  }
  FASTOPS_UNROLL
  for (int n = 0; n < kOut; ++n) {
    FASTOPS_UNROLL
    for (int i = 0; i < 4; ++i) o[n][i] *= alphas[i / 2];
  }
}

// The end of a thread's two rows: normalised, or a partial (O, LSE) of a split.
template <class T, int kOut>
FASTOPS_DEVICE void finish(const AttentionArgs& a, const BlockRows& block, const int (&row)[2], const RowPair& state,
                           const float (&o)[kOut][4], bool broken) {
  const AttentionParams& p = a.p;
  const int lane = lane_index();
  const int64_t b = block.b, hkv = block.hkv;
  const int rows = block.rows, group = static_cast<int>(p.G);
  const Sequence& s = block.found.s;
  FASTOPS_UNROLL
  for (int i = 0; i < 2; ++i) {
    float l = state.l[i];
    l += shuffle_xor(l, 1);
    l += shuffle_xor(l, 2);
    if (row[i] >= rows) continue;
    const int64_t qi = row[i] / group, head = hkv * group + row[i] % group;
    float lse = l == 0.0f ? -infinity() : state.m[i] * kLn2 + log_natural(l);
    float factor = l == 0.0f ? 0.0f : 1.0f / l;
    if (broken) lse = factor = not_a_number();
    if (a.splits > 1) {
      const int64_t slot = ((b * a.splits + block.split) * p.Hkv + hkv) * a.rows + row[i];
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
