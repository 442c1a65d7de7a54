// Numbers that several kernels share.
#pragma once
#include "cuda/arch/arch.h"

namespace fastops::cuda {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// Sums of tiles of products, before the first.
template <int kTiles>
FASTOPS_DEVICE void clear(float (&x)[kTiles][4]) {
  FASTOPS_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    FASTOPS_UNROLL
    for (int i = 0; i < 4; ++i) x[n][i] = 0.0f;
  }
}

// The larger one; a NaN wins.
FASTOPS_DEVICE float maximum_or_nan(float a, float b) { return a != a ? a : b != b ? b : maximum(a, b); }

// 2^x for x up to 127 with a relative error below 4e-6, without the unit for ex2: x = n + f, n the nearest whole
// number, and a polynomial for 2^f. Below -127 it is 0; a NaN stays one.
FASTOPS_DEVICE float ex2_polynomial(float x) {
  const float t = x < -127.0f ? -127.0f : x;
  constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 2^23: the sum's last bits are n + 127
  const float shifted = t + kRound, f = t - (shifted - kRound);
  const float y = 0.999999261f + f * (0.693121815f + f * (0.240247448f + f * (0.0559178603f + f * 0.00957010191f)));
  return y * as_float(as_bits(shifted) << 23);
}

// Element i of a tensor of fp32 (1), fp16 (2) or bf16 (3).
FASTOPS_DEVICE float number_at(const void* p, int32_t dtype, int64_t i) {
  if (dtype == 1) return static_cast<const float*>(p)[i];
  return dtype == 2 ? widen(static_cast<const f16*>(p)[i]) : widen(static_cast<const bf16*>(p)[i]);
}

// How attention states join: sum_i exp(lse_i - lse) out_i. A state that saw nothing (LSE -inf) counts for nothing,
// whatever its values. `sink` is one more logit without a value, or -inf.
template <class LseOf>
struct Merge {
  int64_t count;
  const LseOf& lse_of;
  float top, total = 0.0f;
  FASTOPS_DEVICE Merge(int64_t n, const LseOf& lses, float sink = -infinity()) : count(n), lse_of(lses), top(sink) {
    for (int64_t i = 0; i < n; ++i) top = maximum_or_nan(top, lses(i));
    if (top == -infinity()) return;
    total = ex2((sink - top) * kLog2e);
    for (int64_t i = 0; i < n; ++i) total += weight(i);
  }
  FASTOPS_DEVICE float weight(int64_t i) const { return ex2((lse_of(i) - top) * kLog2e); }
  FASTOPS_DEVICE float lse() const { return top == -infinity() ? top : top + log_natural(total); }
  template <class ValueOf>
  FASTOPS_DEVICE float value(const ValueOf& value_of) const {
    if (top == -infinity()) return 0.0f;
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      const float w = weight(i);
      if (w != 0.0f) sum += w * value_of(i);
    }
    return sum / total;
  }
};

}  // namespace fastops::cuda
