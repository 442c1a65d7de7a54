// The two products of attention on mma.m16n8k16: tiles in shared memory (layout/tile.h), sixteen rows a warp.
#pragma once
#include "cuda/layout/numbers.h"
#include "cuda/layout/tile.h"

namespace fastops::cuda {

// x = own tile^T: rows 16 warp to 16 warp + 15 of `own` times all 8 kTiles rows of `tile`.
template <class T, int kDim, int kTiles>
FASTOPS_DEVICE void products(float (&x)[kTiles][4], const T* own, const T* tile) {
  using Layout = Swizzled<kDim>;
  const int lane = lane_index(), row = warp_index() * 16;
  clear(x);
  FASTOPS_UNROLL_BY(8)
  for (int d = 0; d < kDim / 16; ++d) {
    uint32_t a[4];
    ldmatrix_x4(a, own + Layout::at(row + FragmentA::row(lane), 2 * d + FragmentA::chunk(lane)));
    FASTOPS_UNROLL
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, tile + Layout::at(8 * n + FragmentB::row(lane), 2 * d + FragmentB::chunk(lane)));
      mma_m16n8k16<T>(x[n], a, b[0], b[1]);
      mma_m16n8k16<T>(x[n + 1], a, b[2], b[3]);
    }
  }
}
// o += x tile.
template <class T, int kDim, int kTiles, int kOut>
FASTOPS_DEVICE void accumulate(float (&o)[kOut][4], const float (&x)[kTiles][4], const T* tile) {
  const int lane = lane_index();
  FASTOPS_UNROLL
  for (int n = 0; n < kTiles; n += 2) {
    const uint32_t a[4] = {pack2<T>(x[n][0], x[n][1]), pack2<T>(x[n][2], x[n][3]), pack2<T>(x[n + 1][0], x[n + 1][1]),
                           pack2<T>(x[n + 1][2], x[n + 1][3])};
    FASTOPS_UNROLL
    for (int d = 0; d < kOut; d += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(
          b, tile + Swizzled<kDim>::at(8 * n + FragmentBTransposed::row(lane), d + FragmentBTransposed::chunk(lane)));
      mma_m16n8k16<T>(o[d], a, b[0], b[1]);
      mma_m16n8k16<T>(o[d + 1], a, b[2], b[3]);
    }
  }
}

}  // namespace fastops::cuda
