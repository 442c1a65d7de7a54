// Validity of calls that the CPU and the CUDA library take alike; the first no writes the message.
#pragma once
#include <cstring>

#include "core/checks.h"
#include "core/dtype.h"

namespace fastops {

bool check_norm(const fastops_norm_desc& d, Checks& c);
bool check_norm(const fastops_norm_bwd_desc& d, Checks& c);
bool check_gated(const fastops_gated_desc& d, Checks& c);
// An int32 or int64 of an index tensor.
inline int64_t index_at(int32_t dtype, const char* at) {
  int32_t x32 = 0;
  int64_t x64 = 0;
  if (dtype == FASTOPS_I32) {
    std::memcpy(&x32, at, 4);
    return x32;
  }
  std::memcpy(&x64, at, 8);
  return x64;
}
constexpr int64_t kMaxRopeDim = 1024;
bool check_rope(const fastops_rope_desc& d, Checks& c, bool on_device = false);
fastops_status check_merge_states(const fastops_merge_states_desc& d, char* message);

// Where row (b, s, h) lies in an outs-like tensor of merge_states, and in an lses-like one.
FASTOPS_SHARED int64_t merge_offset(const fastops_tensor& t, int64_t b, int64_t s,
                                    int64_t h) {  // of an outs-like tensor
  const int64_t* st = t.stride + (t.ndim - 3);
  return (t.ndim == 4 ? b * t.stride[0] : 0) + s * st[0] + h * st[1];
}
FASTOPS_SHARED int64_t merge_lse_offset(const fastops_tensor& t, int64_t b, int64_t s, int64_t h) {
  const int64_t* st = t.stride + (t.ndim - 2);
  return (t.ndim == 3 ? b * t.stride[0] : 0) + h * st[0] + s * st[1];
}

}  // namespace fastops
