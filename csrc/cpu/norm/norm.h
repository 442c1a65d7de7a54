// What the norms' C API (norm.cpp) and their kernels (norm.inl.h, once per instruction set) agree on.
#pragma once
#include <cstdint>

#include "cpu/rows.h"

namespace fastops::cpu {

struct NormArgs {
  Rows x, residual, sum, out;
  int64_t rows, n;
  const float* weight;  // weight + offset, or null for ones
  const float* bias;    // or null
  float *scales, *mean, *rstd;
  float eps;
  bool layer, stream;
  int32_t dtype, out_dtype;
};

struct NormBwdArgs {
  Rows dout, s, dsum, ds;
  int64_t n;
  const float* weight;
  const float *mean, *rstd;
  bool layer;
  int32_t dtype;
};

struct NormTable {
  // Rows [first, last). `scratch`: n floats, for quantised results only.
  void (*forward)(const NormArgs& a, int64_t first, int64_t last, float* scratch);
  // Rows [first, last); their share of the weight's and bias' gradients is added to dweight and dbias (n floats, or
  // null).
  void (*backward)(const NormBwdArgs& a, int64_t first, int64_t last, float* dweight, float* dbias);
  // out[0, n) = x[0, n) + offset as floats.
  void (*widen)(const void* x, int32_t dtype, float offset, float* out, int64_t n);
};

FASTOPS_DECLARE_TABLES(NormTable, norm_table)

}  // namespace fastops::cpu
