// What int4_linear's C API (int4_linear.cpp) and its kernels (int4_linear.inl.h, once per instruction set) agree on.
#pragma once
#include <cstdint>

#include "cpu/rows.h"

namespace fastops::cpu {

constexpr int kInt4Block = 16;      // output features that lie together in the packed codes
constexpr int kInt4Panel = 64;      // output features expanded together
constexpr int kInt4StreamRows = 4;  // up to so many rows of x read the codes as they stream by
constexpr int kInt4FewRows = 2;     // up to so many are not worth a tile
constexpr int kInt4ManyRows = 48;   // from so many on codes may be expanded at length
constexpr int kInt4Near = 1024;     // bytes the prefetch of codes that tiles multiply runs ahead
constexpr int kInt4Units = 128;     // 32-bit units of K that a panel expands at a time: 32 KiB
constexpr int kInt4RowBlock = 256;  // rows of x at a time: panels are expanded once for each such block
constexpr int kInt4Wide = 4;        // panels of an item where rows are many: they share the rows they read
constexpr int64_t kInt4Part = 512;  // words of eight features that a part of K has at least, where it is cut: 32 KiB
constexpr int kInt4Word = 64;       // bytes of a word of eight codes for each feature of a block
constexpr int kInt4Word24 = 48;     // the same where two of four columns are kept

struct Int4Params {
  int64_t M, N, K, groups, group;  // K: columns of the codes; group: those that share a scale
  int64_t features;                // columns of x: K, or K / planes
  const char* x;
  int64_t x_sm;
  int32_t dtype;
  char* out;
  int64_t out_sm;
  int32_t out_dtype;
  const uint8_t* codes;               // [N / 16][K / 8][word_bytes]
  int64_t word_bytes;                 // kInt4Word, or kInt4Word24: 2:4 sparse
  const char *scales, *zeros, *mins;  // [N / 16][groups][16]; at most one of zeros and mins
  int32_t scale_dtype;
  const int32_t* perm;  // [K]: column k belongs to feature perm[k] of x; without it to feature k % features
  const float *column_scales, *column_zeros;  // [slices][K], each for N / slices features; NULL: 1, and none
  int64_t slices;                             // 1 without column_scales
  const float* bias;
  bool int8, eight;
  bool rounded;  // x, times column_scales, to bf16
  bool many;     // rows of the whole call: more than kInt4FewRows
  bool wide;     // rows of the block: at least kInt4ManyRows
  // Filled by the C API inside the workspace: x as the kernels read it.
  char* a;  // [M][a_row] bytes
  int64_t a_row;
  float* sums;       // [M][groups] of x over each group (not read by fp32 panels)
  float* row_scale;  // [M], int8 activations
  float* partial;    // [parts][M][blocks][16]: what the parts of K come to, where streams cut it; else NULL

  bool summed() const { return int8 || zeros || mins || column_zeros; }  // something is multiplied with sums of x
};

struct Int4Table {
  // Bytes of a row of `a`, an odd number of cache lines (powers of two would share a few sets); 0: x itself is read.
  int64_t (*row_bytes)(const Int4Params&);
  void (*prepare)(const Int4Params&, int64_t row);
  // Few rows: blocks [first, end); or with p.partial part `part` of `parts` of their K, and what the parts come to.
  void (*stream)(const Int4Params&, int64_t first, int64_t end, int64_t part, int64_t parts);
  void (*join)(const Int4Params&, int64_t parts);
  // More: panels [first, end).
  void (*panels)(const Int4Params&, int64_t first, int64_t end, float* scratch);
  int rows_read;  // together: `a` has room for whole multiples
};

// Panels of a work item of M rows.
inline int64_t int4_item_panels(int64_t M, int64_t N) {
  return M >= 32 && N >= 8 * kInt4Wide * kInt4Panel ? kInt4Wide : 1;
}
// Rows of products a panel makes at once.
inline int64_t int4_product_rows(int64_t M) { return M < 32 ? 32 : M; }
// Rows of totals: tiles write whole multiples.
inline int64_t int4_total_rows(int64_t M) { return (M + 15) / 16 * 16; }
// Floats of scratch a worker needs: an expanded panel, products of one group, sums over groups.
inline int64_t int4_scratch(int64_t M, int64_t N) {
  return M <= kInt4StreamRows
             ? 0
             : (kInt4Units + int4_product_rows(M) + int4_item_panels(M, N) * int4_total_rows(M)) * kInt4Panel;
}

FASTOPS_DECLARE_ANY_TABLES(Int4Table, int4_table)

}  // namespace fastops::cpu
