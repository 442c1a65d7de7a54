// What lut_linear's C API (lut_linear.cpp) and its kernels (lut_linear.inl.h, once per instruction set) agree on.
#pragma once
#include <cstdint>

#include "cpu/rows.h"

namespace fastops::cpu {

constexpr int kLutRun = 32;            // input features in 16 bytes of codes: feature j low in byte j, 16 + j high
constexpr int kLutPanel = 64;          // output features of a work item
constexpr int kLutStreamRows = 4;      // up to so many rows of x look the codes up as they stream by
constexpr int kLutDepth = 128;         // input features a panel expands at a time: 32 KiB
constexpr int64_t kLutRowBlock = 256;  // rows of x at a time

struct LutParams {
  int64_t M, N, K, runs;  // runs: of codes in a row
  const char* x;
  int64_t x_sm;
  int32_t dtype;
  char* out;
  int64_t out_sm;
  int32_t out_dtype;
  const uint8_t* codes;  // [N][runs][16]
  const float* table;    // [N][16]
  const int32_t *row_starts, *columns;
  const float* values;  // NULL: no sparse part
  const float* bias;
  float* a;  // [M][lda]: x in fp32 with zeros up to whole runs
  int64_t lda;
};

struct LutTable {
  void (*prepare)(const LutParams&, int64_t row);
  void (*panel)(const LutParams&, int64_t panel, float* scratch);
};

// Floats of scratch a worker needs: the results of a panel and, for many rows, its expanded weights.
inline int64_t lut_scratch(int64_t M) { return M * kLutPanel + (M > kLutStreamRows ? kLutDepth * kLutPanel : 0); }

FASTOPS_DECLARE_TABLES(LutTable, lut_table)

}  // namespace fastops::cpu
