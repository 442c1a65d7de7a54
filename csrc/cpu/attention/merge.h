// Merging attention states over disjoint key sets, one row at a time: the split-KV reduction and merge_states alike.
//
//   lse = log sum_i exp(lse_i)      out = sum_i exp(lse_i - lse) out_i
//
// Associative and exact in real arithmetic; computed in fp32 against the largest LSE, in the order of i.
#pragma once
#include <cmath>
#include <limits>

#include "cpu/attention/attention.h"

namespace fastops::cpu {

struct MergeInput {
  const char* out;
  float lse;
};

// state(i) -> MergeInput for i in [0, n). `sink`: one more logit without a value, or NULL. Returns the LSE.
template <class State>
float merge_row(const AttentionTable& table, int64_t n, State&& state, int32_t dtype, int32_t Dv, const float* sink,
                char* out, int32_t out_dtype) {
  constexpr float kEmpty = -std::numeric_limits<float>::infinity();
  float top = sink ? *sink : kEmpty;
  for (int64_t i = 0; i < n; ++i) {
    const float lse = state(i).lse;
    if (!(lse <= top)) top = lse;  // a NaN takes over
  }
  alignas(64) float acc[kMaxHeadDim + kPad] = {};
  if (top == kEmpty) {
    table.store(out, out_dtype, acc, Dv, 0.0f);
    return kEmpty;
  }
  float total = sink ? std::exp(*sink - top) : 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const MergeInput x = state(i);
    const float weight = std::exp(x.lse - top);
    total += weight;
    if (weight != 0.0f) table.add_weighted(acc, x.out, dtype, Dv, weight);  // an empty state's values are not read
  }
  table.store(out, out_dtype, acc, Dv, 1.0f / total);
  return top + std::log(total);
}

}  // namespace fastops::cpu
