// Attention's backward for sm_80 and later: FlashAttention-2 (Dao 2023, algorithm 2) as two kernels without atomics, so
// that the same call gives the same bits. Both are one pattern: a block owns 64 rows of one side and walks over tiles
// of the other; each warp owns 16 of the rows and keeps scores, weights and sums in registers.
//
//   attention_bwd_keys   owns keys:  x = k q^T, y = v dout^T  ->  p, ds  ->  dv += p dout, dk += ds q
//   attention_bwd_rows   owns rows:  x = q k^T, y = dout v^T  ->     ds  ->  dq += ds k
//
// with p = exp(s - lse) and ds = p (y - delta) ds/dx, delta = sum(dout out) - dlse. Scores are made twice (seven
// products a tile instead of five); in return dq needs neither atomics nor a buffer in fp32.
#pragma once
#include "core/attention_backward.h"
#include "cuda/attention/attention_products.cuh"
#include "cuda/attention/attention_rows.cuh"
#include "cuda/layout/row.h"

namespace fastops::cuda {

struct BackwardArgs {
  AttentionArgs a;  // of the forward, keys not split
  BackwardParams g;
  float* delta;        // [Hq][all rows of q]
  int64_t total_rows;  // of q: B Sq, or those of a ragged batch
};

// Rows of a tile that walks by: fewer where the sums of two tensors fill the registers, and at head size 256 shared
// memory.
FASTOPS_SHARED constexpr int backward_walk(int dim, bool keys) { return dim <= (keys ? 64 : 128) ? 64 : 32; }
// Per row of the tile: lse, delta, slope, position (floats), first and last key seen (ints).
FASTOPS_SHARED constexpr size_t backward_shared(int dim, bool keys) {
  return static_cast<size_t>(128 + 2 * backward_walk(dim, keys)) * static_cast<size_t>(dim) * 2 + 64 * 24;
}

// kRows rows of `dim` elements to shared memory; from(r) is nullptr for a row that is not there. kDim columns, zeros
// beyond.
template <class T, int kRows, int kDim, class From>
FASTOPS_DEVICE void load_rows(T* to, int dim, const From& from) {
  constexpr int kPerRow = kDim / kChunk;
  FASTOPS_UNROLL_BY(2)
  for (int i = thread_index(); i < kRows * kPerRow; i += kAttentionThreads) {
    const int r = i / kPerRow, c = i % kPerRow;
    const T* row = c * kChunk < dim ? from(r) : nullptr;
    cp_async16(to + Swizzled<kDim>::at(r, c), row ? row + c * kChunk : to, row != nullptr);
  }
}

// A thread's two rows of sums, in T, to rows of `dim` elements.
template <class T, int kOut>
FASTOPS_DEVICE void store_sums(const float (&o)[kOut][4], int i, T* to, int dim) {
  FASTOPS_UNROLL
  for (int n = 0; n < kOut; ++n) {
    const int d = 8 * n + 2 * (lane_index() % 4);
    if (d < dim) *reinterpret_cast<uint32_t*>(to + d) = pack2<T>(o[n][2 * i], o[n][2 * i + 1]);
  }
}

// What a row of q brings to its scores and their gradients.
struct BackwardRow {
  float lse, delta, slope, position;  // lse and slope in units of log 2
  FASTOPS_DEVICE BackwardRow() : lse(0.0f), delta(0.0f), slope(0.0f), position(0.0f) {}
  FASTOPS_DEVICE BackwardRow(const BackwardArgs& args, const Sequence& s, int64_t b, int64_t hkv, int64_t row)
      : BackwardRow() {
    const AttentionParams& p = args.a.p;
    if (row >= s.Sq * p.G) return;
    const int64_t head = hkv * p.G + row % p.G, q = s.q0 + row / p.G;
    lse = p.lse[b * p.lse_sb + head * p.lse_sh + q * p.lse_ss] * kLog2e;
    delta = args.delta[head * args.total_rows + (p.cu_q ? q : b * p.Sq + q)];
    if (p.alibi) slope = p.alibi[b * p.alibi_sb + head * p.alibi_sh] * kLog2e;
    position = static_cast<float>(row / p.G + s.offset);
  }
};

// From the raw product x and the gradient y of the weight: the weight, and the gradient of the raw product.
FASTOPS_DEVICE void weigh(const AttentionParams& p, bool seen, const BackwardRow& row, float key, float& x, float& y) {
  float s = x * p.scale, slope = p.scale;
  if (p.softcap > 0.0f) {
    const float t = tanh_precise(s / p.softcap);
    s = p.softcap * t;
    slope *= 1.0f - t * t;
  }
  s = s * kLog2e - row.lse;
  if (p.alibi) s -= row.slope * absolute(row.position - key);
  x = seen ? ex2(s) : 0.0f;
  y = seen ? x * (y - row.delta) * slope : 0.0f;
}

template <class T, int kDim, bool kK, bool kV>
FASTOPS_KERNEL(kAttentionThreads, 1)
attention_bwd_keys(const BackwardArgs args) {
  constexpr int kWalk = backward_walk(kDim, true), kTiles = kWalk / 8, kOut = kDim / 8;
  const AttentionParams& p = args.a.p;
  const BackwardParams& g = args.g;
  const int64_t b = block_z(), hkv = block_y(), key0 = block_x() * 64;
  const DeviceSequence found = device_sequence(p, b);
  const Sequence& s = found.s;
  if (key0 >= s.Sk) return;
  T* k = reinterpret_cast<T*>(dynamic_shared());
  T* v = k + 64 * kDim;
  T* q = v + 64 * kDim;
  T* dout = q + kWalk * kDim;
  auto* stats = reinterpret_cast<BackwardRow*>(dout + kWalk * kDim);
  int *lo = reinterpret_cast<int*>(stats + kWalk), *hi = lo + kWalk;
  load_rows<T, 64, kDim>(k, p.D, [&](int r) {
    return key0 + r < s.Sk ? reinterpret_cast<const T*>(p.k) + b * p.k_sb + (s.k0 + key0 + r) * p.k_ss + hkv * p.k_sh
                           : nullptr;
  });
  load_rows<T, 64, kDim>(v, p.Dv, [&](int r) {
    return key0 + r < s.Sk ? reinterpret_cast<const T*>(p.v) + b * p.v_sb + (s.k0 + key0 + r) * p.v_ss + hkv * p.v_sh
                           : nullptr;
  });
  cp_async_commit();

  float dk[kK ? kOut : 1][4], dv[kV ? kOut : 1][4];
  clear(dk);
  clear(dv);
  const int lane = lane_index(), key = warp_index() * 16 + lane / 4;
  const int64_t rows = s.Sq * p.G;
  for (int64_t row0 = 0; row0 < rows; row0 += kWalk) {
    const int64_t last = (row0 + kWalk < rows ? row0 + kWalk : rows) - 1;
    if (visible_keys(p, s, last / p.G).hi <= key0) continue;  // both ends grow with the row
    if (visible_keys(p, s, row0 / p.G).lo >= key0 + 64) break;
    const auto at = [&](const char* data, int64_t sb, int64_t ss, int64_t sh, int r) -> const T* {
      const int64_t row = row0 + r;
      return row < rows ? packed_row<T>(p, s, b, hkv, row, data, sb, ss, sh) : nullptr;
    };
    load_rows<T, kWalk, kDim>(q, p.D, [&](int r) { return at(p.q, p.q_sb, p.q_ss, p.q_sh, r); });
    load_rows<T, kWalk, kDim>(dout, p.Dv, [&](int r) { return at(g.dout, g.do_sb, g.do_ss, g.do_sh, r); });
    cp_async_commit();
    if (const int r = thread_index(); r < kWalk) {
      stats[r] = BackwardRow(args, s, b, hkv, row0 + r);
      KeyRange sees{0, 0};
      if (row0 + r < rows) sees = visible_keys(p, s, (row0 + r) / p.G);
      lo[r] = static_cast<int>(sees.lo > key0 ? sees.lo - key0 : 0);
      hi[r] = static_cast<int>(sees.hi < key0 + 64 ? sees.hi - key0 : 64);
    }
    cp_async_wait<0>();
    block_sync();
    float x[kTiles][4], y[kTiles][4];
    products<T, kDim>(x, k, q);
    if constexpr (kK) products<T, kDim>(y, v, dout);
    FASTOPS_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      FASTOPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int c = 8 * n + 2 * (lane % 4) + i % 2, j = key + i / 2 * 8;
        float unused = 0.0f;
        weigh(p, j >= lo[c] && j < hi[c], stats[c], static_cast<float>(key0 + j), x[n][i], kK ? y[n][i] : unused);
      }
    }
    if constexpr (kV) accumulate<T, kDim>(dv, x, dout);
    if constexpr (kK) accumulate<T, kDim>(dk, y, q);
    block_sync();
  }
  cp_async_wait<0>();
  FASTOPS_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int64_t j = key0 + key + i * 8;
    if (j >= s.Sk) continue;
    if constexpr (kK)
      store_sums(dk, i, reinterpret_cast<T*>(g.dk) + b * g.dk_sb + (s.k0 + j) * g.dk_ss + hkv * g.dk_sh, p.D);
    if constexpr (kV)
      store_sums(dv, i, reinterpret_cast<T*>(g.dv) + b * g.dv_sb + (s.k0 + j) * g.dv_ss + hkv * g.dv_sh, p.Dv);
  }
}

template <class T, int kDim>
FASTOPS_KERNEL(kAttentionThreads, 1)
attention_bwd_rows(const BackwardArgs args) {
  constexpr int kWalk = backward_walk(kDim, false), kTiles = kWalk / 8, kOut = kDim / 8;
  const AttentionParams& p = args.a.p;
  const BackwardParams& g = args.g;
  const BlockRows block(args.a, block_x(), 64);
  if (block.empty()) return;
  const Sequence& s = block.found.s;
  const int64_t b = block.b, hkv = block.hkv;
  T* q = reinterpret_cast<T*>(dynamic_shared());
  T* dout = q + 64 * kDim;
  T* k = dout + 64 * kDim;
  T* v = k + kWalk * kDim;
  const auto at = [&](const char* data, int64_t sb, int64_t ss, int64_t sh, int r) -> const T* {
    const int64_t row = block.row0 + r;
    return row < block.rows ? packed_row<T>(p, s, b, hkv, row, data, sb, ss, sh) : nullptr;
  };
  load_rows<T, 64, kDim>(q, p.D, [&](int r) { return at(p.q, p.q_sb, p.q_ss, p.q_sh, r); });
  load_rows<T, 64, kDim>(dout, p.Dv, [&](int r) { return at(g.dout, g.do_sb, g.do_ss, g.do_sh, r); });
  cp_async_commit();
  const int lane = lane_index();
  const int row[2] = {block.row0 + warp_index() * 16 + lane / 4, block.row0 + warp_index() * 16 + lane / 4 + 8};
  const int64_t key_begin = block.first.lo, key_end = block.last.hi;
  const Sight sight(args.a, block, row, block.first, block.last, key_begin);
  const BackwardRow stats[2] = {BackwardRow(args, s, b, hkv, row[0]), BackwardRow(args, s, b, hkv, row[1])};
  float dq[kOut][4];
  clear(dq);
  for (int64_t key0 = key_begin; key0 < key_end; key0 += kWalk) {
    const auto from = [&](const char* data, int64_t sb, int64_t ss, int64_t sh, int r) -> const T* {
      if (key0 + r >= key_end) return nullptr;
      return reinterpret_cast<const T*>(data) + b * sb + (s.k0 + key0 + r) * ss + hkv * sh;
    };
    load_rows<T, kWalk, kDim>(k, p.D, [&](int r) { return from(p.k, p.k_sb, p.k_ss, p.k_sh, r); });
    load_rows<T, kWalk, kDim>(v, p.Dv, [&](int r) { return from(p.v, p.v_sb, p.v_ss, p.v_sh, r); });
    cp_async_commit();
    cp_async_wait<0>();
    block_sync();
    float x[kTiles][4], y[kTiles][4];
    products<T, kDim>(x, q, k);
    products<T, kDim>(y, dout, v);
    FASTOPS_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      FASTOPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int j = static_cast<int>(key0 - key_begin) + 8 * n + 2 * (lane % 4) + i % 2;
        weigh(p, j >= sight.lo[i / 2] && j < sight.hi[i / 2], stats[i / 2], static_cast<float>(key_begin + j), x[n][i],
              y[n][i]);
      }
    }
    accumulate<T, kDim>(dq, y, k);
    block_sync();
  }
  cp_async_wait<0>();
  FASTOPS_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (row[i] >= block.rows) continue;
    if (!block.found.good) {
      FASTOPS_UNROLL
      for (int n = 0; n < kOut; ++n) dq[n][2 * i] = dq[n][2 * i + 1] = not_a_number();
    }
    const int64_t head = hkv * p.G + row[i] % p.G;
    store_sums(dq, i, reinterpret_cast<T*>(g.dq) + b * g.dq_sb + (s.q0 + row[i] / p.G) * g.dq_ss + head * g.dq_sh, p.D);
  }
}

// A warp for each row of q and head. Rows of a ragged batch that belong to no one are never read again.
template <class T>
FASTOPS_KERNEL(kAttentionThreads, 4)
attention_bwd_delta(const BackwardArgs args) {
  const AttentionParams& p = args.a.p;
  const BackwardParams& g = args.g;
  const int64_t row = block_x() * (kAttentionThreads / 32) + warp_index(), head = block_y();
  if (row >= args.total_rows) return;
  const int64_t b = p.cu_q ? 0 : row / p.Sq, q = p.cu_q ? row : row % p.Sq;
  const T* dout = reinterpret_cast<const T*>(g.dout) + b * g.do_sb + q * g.do_ss + head * g.do_sh;
  const T* out = reinterpret_cast<const T*>(p.out) + b * p.o_sb + q * p.o_ss + head * p.o_sh;
  float sum = 0.0f;
  for (int d = lane_index(); d < p.Dv; d += 32) sum += widen(dout[d]) * widen(out[d]);
  for (int mask = 16; mask > 0; mask >>= 1) sum += shuffle_xor(sum, mask);
  if (lane_index() == 0) {
    if (g.dlse) sum -= g.dlse[b * g.dlse_sb + head * g.dlse_sh + q * g.dlse_ss];
    args.delta[head * args.total_rows + row] = sum;
  }
}

// A block for each head: dsink = -sum over rows of exp(sink - lse) delta.
FASTOPS_KERNEL(kAttentionThreads, 4)
attention_bwd_sinks(const BackwardArgs args) {
  const AttentionParams& p = args.a.p;
  const int64_t head = block_x(), all = p.cu_q ? p.cu_q[p.B * p.cu_q_stride] : args.total_rows;
  const int64_t rows = all < args.total_rows ? all : args.total_rows;
  const float sink = p.sinks[head * p.sinks_stride];
  float sum = 0.0f;
  for (int64_t row = thread_index(); row < rows; row += kAttentionThreads) {
    const int64_t b = p.cu_q ? 0 : row / p.Sq, q = p.cu_q ? row : row % p.Sq;
    const float lse = p.lse[b * p.lse_sb + head * p.lse_sh + q * p.lse_ss];
    sum -= ex2((sink - lse) * kLog2e) * args.delta[head * args.total_rows + row];
  }
  sum = block_sum(sum, reinterpret_cast<float*>(dynamic_shared()));
  if (thread_index() == 0) args.g.dsinks[head * args.g.dsinks_stride] = sum;
}

// Rows behind the last sequence of a ragged tensor get a gradient of zero.
template <class T>
FASTOPS_KERNEL(kAttentionThreads, 4)
attention_bwd_tail(const BackwardArgs args) {
  const AttentionParams& p = args.a.p;
  const BackwardParams& g = args.g;
  const int64_t row = block_x(), head = block_y();
  const auto zero = [&](char* data, int64_t ss, int64_t sh, int dim) {
    for (int d = thread_index(); d < dim; d += kAttentionThreads)
      narrow(0.0f, reinterpret_cast<T*>(data) + row * ss + head * sh + d);
  };
  if (row < p.q_rows && row >= p.cu_q[p.B * p.cu_q_stride]) zero(g.dq, g.dq_ss, g.dq_sh, p.D);
  if (head >= p.Hkv || row >= p.k_rows || row < p.cu_k[p.B * p.cu_k_stride]) return;
  zero(g.dk, g.dk_ss, g.dk_sh, p.D);
  zero(g.dv, g.dv_ss, g.dv_sh, p.Dv);
}

}  // namespace fastops::cuda
