// int8 activations times a weight of 4-bit codes (W4A8) for sm_80 and later: integer products by mma.m16n8k32.
//
// One kernel rounds the rows of x to int8 (absmax / 127, as on the CPU) and adds them up over each group; the other
// multiplies. A packed word needs one mask here: its low nibbles are k 0 to 3 of an octet, its high ones k 4 to 7, and
// thread t of four takes octet t of 32 k, for the words as for x. Codes stay as they are, from 0 to 15; zeros and
// minima meet the sums.
#pragma once
#include "cuda/int4_linear/int4_linear_sm80.cuh"
#include "cuda/layout/row.h"

namespace fastops::cuda {

struct Int4Int8Args {
  Int4Args a;
  int8_t* x;                // [M][pitch], zeros behind column Kx
  float *row_scale, *sums;  // [M], [M][groups]
  int64_t pitch;
};

// A block for each row.
template <class T>
FASTOPS_KERNEL(kInt4Threads, 8)
int4_round_rows(const Int4Int8Args args) {
  const Int4Args& a = args.a;
  auto* room = reinterpret_cast<float*>(dynamic_shared());
  const int64_t row = block_x();
  const T* from = reinterpret_cast<const T*>(a.x) + row * a.ldx;
  int8_t* const to = args.x + row * args.pitch;
  float top = 0.0f;
  for (int64_t k = thread_index(); k < a.Kx; k += kInt4Threads) top = maximum_or_nan(top, absolute(widen(from[k])));
  top = block_max(top, room);
  const bool finite = top - top == 0.0f;  // a row with an infinity or a NaN becomes NaN
  const float inverse = finite && top > 0.0f ? 127.0f / top : 0.0f;
  for (int64_t k = thread_index(); k < args.pitch; k += kInt4Threads)
    to[k] = k < a.Kx && inverse > 0.0f ? static_cast<int8_t>(round_even(widen(from[k]) * inverse)) : int8_t{0};
  if (thread_index() == 0) args.row_scale[row] = finite ? top / 127.0f : not_a_number();
  block_sync();
  for (int64_t group = warp_index(); group < a.groups; group += kInt4Threads / 32) {
    float sum = 0.0f;
    for (int64_t k = group * a.group_size + lane_index(); k < (group + 1) * a.group_size; k += 32)
      sum += static_cast<float>(to[k % a.Kx]);
    for (int mask = 16; mask > 0; mask >>= 1) sum += shuffle_xor(sum, mask);
    if (lane_index() == 0) args.sums[row * a.groups + group] = sum;
  }
}

template <class T, int kTiles, bool k24>
FASTOPS_KERNEL(kInt4Threads, int4_blocks_per_sm(kTiles))
int4_gemm_int8(const Int4Int8Args args) {
  constexpr int kRows = 16 * kTiles, kOctets = kInt4Depth / 8, kRowBytes = kInt4Depth;
  const Int4Args& a = args.a;
  const int lane = lane_index(), warp = warp_index(), g = lane / 4, t = lane % 4;
  const int64_t begin = int4_stripe_begin(a.steps, a.stripes, block_x());
  const int64_t end = int4_stripe_begin(a.steps, a.stripes, block_x() + 1);
  Int4Walk<kRows> at(a, begin), ahead(a, begin);
  char* const shared = dynamic_shared();
  const auto x_of = [&](int64_t step) { return shared + step % kInt4Stages * int4_int8_stage_bytes(kTiles); };
  // Sixteen-byte places are exchanged so that four rows of a half warp meet no bank twice.
  const auto x_at = [](int row, int pair) { return row * kRowBytes + (pair ^ (row & 2)) * 16; };
  const uint64_t policy = cache_policy(a.M <= kRows);
  const auto load = [&](int64_t step) {
    char* xs = x_of(step);
    FASTOPS_UNROLL_BY(1)
    for (int i = thread_index(); i < kRows * kOctets / 2; i += kInt4Threads) {
      const int r = i / (kOctets / 2), pair = i % (kOctets / 2);
      const int64_t row = ahead.row0 + r, k = int64_t{ahead.chunk} * kInt4Depth + pair * 16;
      const bool there = row < a.M && k < a.K;
      cp_async16(xs + x_at(r, pair), there ? args.x + row * args.pitch + k % a.Kx : args.x, there);
    }
    int4_load_codes<k24>(a, xs + kRows * kRowBytes, ahead.column0, ahead.chunk, policy);
    ahead.next(a);
  };

  float total[kTiles][4][4];
  int32_t part[kTiles][4][4];
  FASTOPS_UNROLL
  for (int m = 0; m < kTiles; ++m) {
    FASTOPS_UNROLL
    for (int n = 0; n < 4; ++n) {
      FASTOPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        total[m][n][i] = 0.0f;
        part[m][n][i] = 0;
      }
    }
  }
  // A group's products, and, where the group ends, its offsets: of the runs that share a group the last one has them.
  bool open = false;
  const auto flush = [&](int64_t group, bool ends) {
    open = false;
    float sums[kTiles][2];
    FASTOPS_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      FASTOPS_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int64_t row = at.row0 + 16 * m + g + 8 * r;
        sums[m][r] = ends && row < a.M ? args.sums[row * a.groups + group] : 0.0f;
      }
    }
    const int64_t base = ((at.column0 / 16 + 2 * warp) * a.groups + group) * 16 + 2 * t;
    const int step = static_cast<int>(a.groups) * 16, left = static_cast<int>(a.N - at.column0) - warp * 32 - 2 * t;
    FASTOPS_UNROLL
    for (int n = 0; n < 4; ++n) {
      FASTOPS_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (n * 8 + i >= left) continue;
        const int64_t place = base + n / 2 * step + n % 2 * 8 + i;
        const float scale = number_at(a.scales, a.scale_dtype, place);
        const float offset = a.zeros  ? number_at(a.zeros, a.scale_dtype, place) * scale
                             : a.mins ? number_at(a.mins, a.scale_dtype, place)
                                      : 8.0f * scale;
        FASTOPS_UNROLL
        for (int m = 0; m < kTiles; ++m) {
          FASTOPS_UNROLL
          for (int r = 0; r < 2; ++r) {
            total[m][n][2 * r + i] += scale * static_cast<float>(part[m][n][2 * r + i]) - offset * sums[m][r];
            part[m][n][2 * r + i] = 0;
          }
        }
      }
    }
  };

  for (int s = 0; s < kInt4Stages - 1; ++s) {
    if (begin + s < end) load(begin + s);
    cp_async_commit();
  }
  int head = at.chunk;  // where this block begins the tile
  for (int64_t step = begin; step < end; ++step, at.next(a)) {
    cp_async_wait<kInt4Stages - 2>();
    block_sync();  // this step is there, and nobody reads the one before it any more
    if (step + kInt4Stages - 1 < end) load(step + kInt4Stages - 1);
    cp_async_commit();
    const char* xs = x_of(step);
    const char* codes = xs + kRows * kRowBytes;
    FASTOPS_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int octet = 4 * j + t;
      uint32_t xa[kTiles][4];
      FASTOPS_UNROLL
      for (int m = 0; m < kTiles; ++m) {
        FASTOPS_UNROLL
        for (int r = 0; r < 2; ++r) {
          const auto* w = reinterpret_cast<const uint32_t*>(xs + x_at(16 * m + 8 * r + g, octet / 2) + octet % 2 * 8);
          xa[m][r] = w[0];
          xa[m][2 + r] = w[1];
        }
      }
      FASTOPS_UNROLL
      for (int n = 0; n < 4; ++n) {
        const uint32_t word = int4_word<k24>(codes, 2 * warp + n / 2, octet, n % 2 * 8 + g);
        FASTOPS_UNROLL
        for (int m = 0; m < kTiles; ++m)
          mma_m16n8k32_s8u8(part[m][n], xa[m], word & 0x0f0f0f0fu, word >> 4 & 0x0f0f0f0fu);
      }
      const int64_t k = int64_t{at.chunk} * kInt4Depth + 32 * (j + 1);
      open = true;
      if (k % a.group_size == 0 && k < a.K) flush(k / a.group_size - 1, true);
    }
    if (at.chunk + 1 < a.chunks && step + 1 < end) continue;
    if (open) {
      const int64_t whole = int64_t{at.chunk + 1} * kInt4Depth, k = whole < a.K ? whole : a.K;
      flush((k - 1) / a.group_size, k == a.K);
    }
    int4_store<T, kTiles>(a, at, head, at.chunk + 1, [&](int m, int n, int i, int64_t row) {
      const float y = total[m][n][i] * args.row_scale[row];
      total[m][n][i] = 0.0f;
      return y;
    });
    head = 0;
  }
  cp_async_wait<0>();
}

}  // namespace fastops::cuda
