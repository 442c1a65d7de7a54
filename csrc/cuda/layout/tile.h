// Where the elements of a 16-bit matrix lie in shared memory, and which of them a lane holds: constexpr, for host and
// device (tests/cuda checks them exhaustively: no two elements in one place, no bank conflict).
#pragma once
#include "cuda/arch/arch.h"

namespace fastops::cuda {

constexpr int kChunk = 8;  // elements of 16 bytes

// Rows of kColumns elements (a multiple of 64), 16-byte chunks of a row exchanged by its number: the eight rows an
// ldmatrix reads at one column lie in eight different groups of banks.
template <int kColumns>
struct Swizzled {
  static_assert(kColumns % 64 == 0, "a row holds whole groups of eight chunks");
  static constexpr int kChunks = kColumns / kChunk;
  FASTOPS_HOST_DEVICE static constexpr int at(int row, int chunk) {
    return row * kColumns + (chunk ^ (row & 7)) * kChunk;
  }
};

// Columns of 64 elements one behind the other, each kRows rows of 128 bytes, chunks exchanged by the row's number: what
// the copy engine writes and wgmma reads (both know the exchange as "128-byte swizzle"; a column begins at a multiple
// of 1024).
template <int kRows>
struct Columns64 {
  static_assert(kRows % 8 == 0, "the exchange repeats after eight rows");
  FASTOPS_HOST_DEVICE static constexpr int at(int row, int chunk) {
    return chunk / 8 * kRows * 64 + row * 64 + ((chunk ^ row) & 7) * kChunk;
  }
};

// Row and chunk of the 16 bytes whose address a lane gives to ldmatrix_x4.
struct FragmentA {  // 16 rows by 16 columns: registers in mma's order of a
  FASTOPS_HOST_DEVICE static constexpr int row(int lane) { return lane & 15; }
  FASTOPS_HOST_DEVICE static constexpr int chunk(int lane) { return lane >> 4; }
};
struct FragmentB {  // 16 columns of b, stored as rows, by 16 k: b0 b1 of the first eight, then of the others
  FASTOPS_HOST_DEVICE static constexpr int row(int lane) { return (lane & 7) + ((lane >> 4) << 3); }
  FASTOPS_HOST_DEVICE static constexpr int chunk(int lane) { return (lane >> 3) & 1; }
};
struct FragmentBTransposed {  // 16 k, stored as rows, by 16 columns of b; with ldmatrix_x4_trans
  FASTOPS_HOST_DEVICE static constexpr int row(int lane) { return lane & 15; }
  FASTOPS_HOST_DEVICE static constexpr int chunk(int lane) { return lane >> 4; }
};

}  // namespace fastops::cuda
