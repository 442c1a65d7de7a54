// Many rows of x times a weight of 4-bit codes for sm_90a, on wgmma: the transposed product, so that the weight,
// expanded in registers, is the operand that may stand there, and x goes from the copy engine to shared memory to the
// tensor cores.
//
// A block makes 128 features by 128 rows. One warp group fetches 64 columns of x and codes at a time; two others own 64
// features each. Two blocks of neighbouring features are a cluster, where their number is even: both need the same tile
// of x, so each fetches half of it for both, and a stage costs 12 KiB of L2's traffic instead of 20. While the products
// of one step run, the codes of the next are expanded (two instructions a code pair more than on sm_80: the order of k
// is x's here).
//
//   its word of codes   nibbles hold k 0 4 1 5 2 6 3 7 of an octet; thread t of four needs k 2t, 2t+1: nibbles p, p+2
//   with
//                       p = 4 (t % 2) + t / 2
//
// Scales meet the sums of a group as on sm_80; zeros and minima meet sums of x over the group, which another kernel
// makes.
#pragma once
#include "cuda/int4_linear/int4_linear_sm80.cuh"
#include "cuda/layout/row.h"
#include "cuda/layout/tile.h"

namespace fastops::cuda {

struct Int4HopperArgs {
  Int4Args a;
  TensorMap x;  // [M][Kx], boxes of 128 rows, or of half of them for two blocks
  float* sums;  // [M][groups] of x; with zeros or mins
};
struct Int4HopperBarriers {
  Mbarrier full[kInt4Stages], empty[kInt4Stages];
};

template <class T, bool kShift, int kCluster>
FASTOPS_KERNEL(kInt4HopperThreads, 1)
int4_gemm_sm90(FASTOPS_ARGUMENT Int4HopperArgs args) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kTiles = kInt4HopperRows / 8, kSteps = kInt4Depth / 16, kOctets = kInt4Depth / 8;
  const Int4Args& a = args.a;
  const int64_t column0 = block_x() * kInt4Columns, row0 = block_y() * kInt4HopperRows;
  const int chunks = static_cast<int>((a.K + kInt4Depth - 1) / kInt4Depth);
  char* const xs = dynamic_shared();
  char* const codes = xs + kInt4Stages * kInt4HopperRows * kInt4Depth * 2;
  auto& barriers = *reinterpret_cast<Int4HopperBarriers*>(codes + kInt4Stages * kInt4Columns * kInt4Depth / 2);
  if (thread_index() == 0) {
    for (int i = 0; i < kInt4Stages; ++i) {
      mbarrier_init(&barriers.full[i], 129);            // threads that fetch, and the copy engine's
      mbarrier_init(&barriers.empty[i], 8 * kCluster);  // warps that multiply, of all blocks that get what we fetch
    }
    mbarrier_ready();
  }
  if (kCluster > 1)
    cluster_sync();
  else
    block_sync();
  const int warp_group = uniform(warp_index() / 4);
  if (warp_group == 0) {
    registers_shrink<40>();
    for (int i = 0; i <= chunks; ++i) {
      if (i < chunks) {
        const int at = i % kInt4Stages;
        mbarrier_wait(&barriers.empty[at], (i / kInt4Stages & 1) ^ 1);
        if (thread_index() == 0) {
          mbarrier_arrive_expect(&barriers.full[at], kInt4HopperRows * kInt4Depth * 2);
          const int mine = kCluster > 1 ? cluster_rank() * (kInt4HopperRows / kCluster) : 0;
          char* const to = xs + (at * kInt4HopperRows + mine) * kInt4Depth * 2;
          const int column = static_cast<int>(int64_t{i} * kInt4Depth % a.Kx), row = static_cast<int>(row0) + mine;
          if (kCluster > 1)
            tma_load_all(to, &args.x, &barriers.full[at], (1u << kCluster) - 1, column, row, 0, 0);
          else
            tma_load(to, &args.x, &barriers.full[at], column, row, 0, 0);
        }
        char* to = codes + at * kInt4Columns * kInt4Depth / 2;
        FASTOPS_UNROLL
        for (int j = thread_index(); j < kInt4Columns / 16 * kOctets * 4; j += 128) {
          const int64_t b = column0 / 16 + j / 4 / kOctets, k8 = int64_t{i} * kOctets + j / 4 % kOctets;
          const bool there = b * 16 < a.N && k8 * 8 < a.K;
          cp_async16(to + j * 16, there ? a.codes + (b * (a.K / 8) + k8) * 64 + j % 4 * 16 : a.codes, there);
        }
        cp_async_commit();
      }
      if (i == 0) continue;
      if (i < chunks)
        cp_async_wait<1>();
      else
        cp_async_wait<0>();
      mbarrier_arrive(&barriers.full[(i - 1) % kInt4Stages]);
    }
    if (kCluster > 1) cluster_sync();
    return;
  }

  registers_grow<232>();
  const int group = warp_group - 1, warp = warp_index() % 4, lane = lane_index(), g = lane / 4, t = lane % 4;
  const int feature = group * 64 + warp * 16 + g;  // of the block; and the one 8 below
  const int shift = 4 * (4 * (t & 1) + (t >> 1));
  float total[kTiles][4], part[kTiles][4];
  clear(total);
  clear(part);
  uint32_t weights[kSteps][4], next[kSteps][4];
  const auto expand = [&](int i, uint32_t (&to)[kSteps][4]) {
    const char* from = codes + i % kInt4Stages * kInt4Columns * kInt4Depth / 2 + (group * 4 + warp) * kOctets * 64;
    FASTOPS_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      FASTOPS_UNROLL
      for (int r = 0; r < 4; ++r) {  // as mma's a: feature g or g + 8, k of the first or the second octet
        const uint32_t word = *reinterpret_cast<const uint32_t*>(from + (2 * s + r / 2) * 64 + (g + r % 2 * 8) * 4);
        const uint32_t pair = permute_bytes(word >> shift, 0, 0x4140);
        to[s][r] = fma2<T>(and_or(pair, 0x000f000fu, Magic<T>::kBits), Magic<T>::kOne, Magic<T>::kMinus);
      }
    }
  };
  const int rows = static_cast<int>(a.M - row0 < kInt4HopperRows ? a.M - row0 : kInt4HopperRows);
  const auto flush = [&](int at_group) {
    const float* const sums = kShift ? args.sums + row0 * a.groups + at_group : nullptr;
    FASTOPS_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int64_t column = column0 + feature + r * 8;
      if (column >= a.N) continue;
      const int64_t at = (column / 16 * a.groups + at_group) * 16 + column % 16;
      const float scale = number_at(a.scales, a.scale_dtype, at);
      float offset = 0.0f;
      if (kShift)
        offset = a.zeros ? (8.0f - number_at(a.zeros, a.scale_dtype, at)) * scale
                         : 8.0f * scale - number_at(a.mins, a.scale_dtype, at);
      FASTOPS_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        FASTOPS_UNROLL
        for (int i = 0; i < 2; ++i) {
          float& sum = total[n][2 * r + i];
          sum += scale * part[n][2 * r + i];
          const int row = 8 * n + 2 * t + i;
          if (kShift && row < rows) sum += offset * sums[row * static_cast<int>(a.groups)];
        }
      }
    }
  };

  mbarrier_wait(&barriers.full[0], 0);
  expand(0, weights);
  bool begins = true;  // a group of columns
  for (int i = 0; i < chunks; ++i) {
    const char* tile = xs + i % kInt4Stages * kInt4HopperRows * kInt4Depth * 2;
    wgmma_hold(part);
    wgmma_fence();
    FASTOPS_UNROLL
    for (int s = 0; s < kSteps; ++s)
      wgmma_rs_along_k<T>(part, weights[s], wgmma_tile(tile + s * 32, 0, 1024), s > 0 || !begins);
    wgmma_commit();
    if (i + 1 < chunks) {
      mbarrier_wait(&barriers.full[(i + 1) % kInt4Stages], (i + 1) / kInt4Stages & 1);
      expand(i + 1, next);
    }
    wgmma_wait<0>();
    wgmma_hold(part);
    if (lane == 0) {
      if (kCluster > 1) {
        FASTOPS_UNROLL
        for (int rank = 0; rank < kCluster; ++rank) mbarrier_arrive_at(&barriers.empty[i % kInt4Stages], rank);
      } else {
        mbarrier_arrive(&barriers.empty[i % kInt4Stages]);
      }
    }
    FASTOPS_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      FASTOPS_UNROLL
      for (int r = 0; r < 4; ++r) weights[s][r] = next[s][r];
    }
    const int64_t k = int64_t{i + 1} * kInt4Depth;
    begins = k % a.group_size == 0 || i + 1 == chunks;
    if (begins) flush(static_cast<int>(k > a.K ? a.groups - 1 : (k - 1) / a.group_size));
  }
  if (kCluster > 1) cluster_arrive();  // nobody may end while others arrive at its barriers
  if (a.out_wide) {
    // Turned on the way through shared memory (the stages are free once all have multiplied): 16 bytes of a row a lane.
    // Nothing here but the sums lives through the loop, which has no register to spare.
    using Tile = Swizzled<kInt4Columns>;
    T* const tile = reinterpret_cast<T*>(dynamic_shared());
    const int me = uniform(warp_index()) * 32 + lane_index() - 128, corner = (me / 8 & 1) + me / 32 * 2;
    const int64_t right = block_x() * kInt4Columns, down = block_y() * kInt4HopperRows;
    float bias[2] = {0.0f, 0.0f};
    for (int r = 0; r < 2; ++r) {
      const int64_t column = right + me / 32 * 16 + me % 32 / 4 + 8 * r;
      if (a.bias && column < a.N) bias[r] = a.bias[column];
    }
    named_sync(1, 256);
    FASTOPS_UNROLL
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t pairs[4];
      FASTOPS_UNROLL
      for (int i = 0; i < 4; ++i)
        pairs[i] = pack2<T>(total[n + i / 2][i % 2 * 2] + bias[i % 2], total[n + i / 2][i % 2 * 2 + 1] + bias[i % 2]);
      stmatrix_x4_trans(tile + Tile::at(8 * (n + me % 32 / 16) + me % 8, corner), pairs);
    }
    named_sync(1, 256);
    for (int i = me; i < kInt4HopperRows * (kInt4Columns / 8); i += 256) {
      const int row = i / (kInt4Columns / 8), chunk = i % (kInt4Columns / 8);
      if (right + chunk * 8 >= a.N || down + row >= a.M) continue;
      store16(reinterpret_cast<T*>(a.out) + (down + row) * a.ldo + right + chunk * 8,
              *reinterpret_cast<const Bytes16*>(tile + Tile::at(row, chunk)));
    }
  } else {
    FASTOPS_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      FASTOPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int64_t row = row0 + 8 * n + 2 * t + i % 2, column = column0 + feature + i / 2 * 8;
        if (row >= a.M || column >= a.N) continue;
        int4_finish<T>(a, row, column, total[n][i]);
      }
    }
  }
  if (kCluster > 1) cluster_wait();
#endif
}

// Sums of a row of x over each group of columns: a warp for each.
template <class T>
FASTOPS_KERNEL(kInt4Threads, 8)
int4_sums(FASTOPS_ARGUMENT Int4HopperArgs args) {
  const Int4Args& a = args.a;
  const int64_t group = block_x() * (kInt4Threads / 32) + warp_index(), row = block_y();
  if (group >= a.groups) return;
  float sum = 0.0f;
  for (int64_t k = group * a.group_size + lane_index(); k < (group + 1) * a.group_size; k += 32)
    sum += widen(reinterpret_cast<const T*>(a.x)[row * a.ldx + k % a.Kx]);
  for (int mask = 16; mask > 0; mask >>= 1) sum += shuffle_xor(sum, mask);
  if (lane_index() == 0) args.sums[row * a.groups + group] = sum;
}

}  // namespace fastops::cuda
