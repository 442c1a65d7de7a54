// merge_states on a GPU: a warp for each row joins up to 32 attention states (the formula stands in fastops.h).
#include "core/op_checks.h"
#include "cuda/launch.h"
#include "cuda/layout/numbers.h"

namespace fastops::cuda {
namespace {

constexpr int kMaxStates = 32;
constexpr int kThreads = 128;

struct MergeState {
  const char* out;
  const float* lse;
  int64_t ob, os, oh, lb, lh, ls;  // strides over batch, position, head
};
struct MergeArgs {
  MergeState in[kMaxStates], to;
  int32_t count, Dv;
  int64_t B, S, H;
};

}  // namespace

template <class T>
FASTOPS_KERNEL(kThreads, 8)
merge_rows(const MergeArgs a) {
  const int64_t row = block_x() * (kThreads / 32) + warp_index();
  if (row >= a.B * a.S * a.H) return;
  const int64_t h = row % a.H, s = row / a.H % a.S, b = row / a.H / a.S;
  const auto lse_of = [&](int64_t i) { return a.in[i].lse[b * a.in[i].lb + h * a.in[i].lh + s * a.in[i].ls]; };
  const Merge merge(a.count, lse_of);
  T* to = reinterpret_cast<T*>(const_cast<char*>(a.to.out)) + b * a.to.ob + s * a.to.os + h * a.to.oh;
  for (int d = lane_index(); d < a.Dv; d += 32) {
    const float y = merge.value([&](int64_t i) {
      const MergeState& x = a.in[i];
      return widen(reinterpret_cast<const T*>(x.out)[b * x.ob + s * x.os + h * x.oh + d]);
    });
    narrow(y, to + d);
  }
  if (lane_index() == 0) const_cast<float*>(a.to.lse)[b * a.to.lb + h * a.to.lh + s * a.to.ls] = merge.lse();
}

}  // namespace fastops::cuda

#if !defined(__CUDACC_RTC__)  // the rest is the host's

using namespace fastops;
using namespace fastops::cuda;

extern "C" fastops_status fastops_cuda_merge_states(const fastops_merge_states_desc* desc, fastops_cuda_env* env) {
  Device device;
  fastops_status status = device_of(env, &device);
  if (status == FASTOPS_OK) status = check_merge_states(*desc, env->message);
  if (status != FASTOPS_OK) return status;
  if (desc->count > kMaxStates) {
    set_message(env->message, "merge_states: %d states, the kernel joins up to %d", desc->count, kMaxStates);
    return FASTOPS_ERR_UNSUPPORTED;
  }
  const fastops_tensor& o = desc->out;
  const auto state = [](const fastops_tensor& x, const fastops_tensor& l) {
    const int64_t *xs = x.stride + (x.ndim - 3), *ls = l.stride + (l.ndim - 2);
    return MergeState{static_cast<const char*>(x.data),
                      static_cast<const float*>(l.data),
                      x.ndim == 4 ? x.stride[0] : 0,
                      xs[0],
                      xs[1],
                      l.ndim == 3 ? l.stride[0] : 0,
                      ls[0],
                      ls[1]};
  };
  MergeArgs a{};
  for (int i = 0; i < desc->count; ++i) a.in[i] = state(desc->outs[i], desc->lses[i]);
  a.to = state(o, desc->lse);
  a.count = desc->count;
  a.Dv = static_cast<int32_t>(o.size[o.ndim - 1]);
  a.B = o.ndim == 4 ? o.size[0] : 1;
  a.S = o.size[o.ndim - 3];
  a.H = o.size[o.ndim - 2];
  env->variant = "sm80";
  constexpr int kWarps = kThreads / 32;
  const Grid grid{(a.B * a.S * a.H + kWarps - 1) / kWarps, 1, 1, kThreads, 0};
  if (o.dtype == FASTOPS_F32) return launch<merge_rows<float>>(grid, env, a);
  return o.dtype == FASTOPS_F16 ? launch<merge_rows<f16>>(grid, env, a) : launch<merge_rows<bf16>>(grid, env, a);
}
#endif
