// activation(gate) * up on a GPU, and its gradients: every thread takes 16 bytes of each tensor.
#include "core/op_checks.h"
#include "core/rows.h"
#include "cuda/launch.h"
#include "cuda/layout/row.h"

namespace fastops::cuda {
namespace {

constexpr int kThreads = 256;

struct GatedArgs {
  Rows gate, up, out, dout, dgate, dup;
  int64_t rows, pieces;  // pieces of a row
  int32_t activation;
};

// The activation and its derivative.
FASTOPS_DEVICE void activate(int32_t kind, float x, float* y, float* slope) {
  if (kind == FASTOPS_SILU) {
    const float s = 1.0f / (1.0f + ex2(-x * kLog2e));
    *y = x * s;
    *slope = s * (1.0f + x * (1.0f - s));
  } else if (kind == FASTOPS_GELU_TANH) {
    constexpr float kBeta = 0.797884560802865356f, kKappa = 0.044715f;  // sqrt(2 / pi)
    const float t = tanh_precise(kBeta * (x + kKappa * x * x * x));
    *y = 0.5f * x * (1.0f + t);
    *slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * kBeta * (1.0f + 3.0f * kKappa * x * x);
  } else {
    constexpr float kRoot = 0.707106781186547524f, kDensity = 0.398942280401432678f;  // 1 / sqrt(2), 1 / sqrt(2 pi)
    const float cdf = 0.5f * (1.0f + erf_precise(x * kRoot));
    *y = x * cdf;
    *slope = cdf + x * kDensity * ex2(-0.5f * x * x * kLog2e);
  }
}

}  // namespace

template <class T, int kElements, bool kBackward>
FASTOPS_KERNEL(kThreads, 4)
gated_rows(const GatedArgs a) {
  const int64_t i = block_x() * kThreads + thread_index();
  if (i >= a.rows * a.pieces) return;
  const int64_t row = i / a.pieces, at = i % a.pieces * kElements;
  float gate[kElements], up[kElements], y[kElements];
  load_elements<T>(a.gate.at(row), at, gate);
  load_elements<T>(a.up.at(row), at, up);
  if constexpr (kBackward) {
    float dout[kElements], dup[kElements];
    load_elements<T>(a.dout.at(row), at, dout);
    FASTOPS_UNROLL
    for (int e = 0; e < kElements; ++e) {
      float value, slope;
      activate(a.activation, gate[e], &value, &slope);
      y[e] = dout[e] * up[e] * slope;
      dup[e] = dout[e] * value;
    }
    store_elements<T>(a.dgate.at(row), at, y);
    store_elements<T>(a.dup.at(row), at, dup);
  } else {
    FASTOPS_UNROLL
    for (int e = 0; e < kElements; ++e) {
      float slope;
      activate(a.activation, gate[e], &y[e], &slope);
      y[e] *= up[e];
    }
    store_elements<T>(a.out.at(row), at, y);
  }
}

}  // namespace fastops::cuda

#if !defined(__CUDACC_RTC__)  // the rest is the host's
namespace fastops::cuda {
namespace {

template <class T, bool kBackward>
fastops_status run(GatedArgs& a, int64_t n, bool wide, fastops_cuda_env* env) {
  constexpr int kWide = 16 / sizeof(T);
  a.pieces = wide ? n / kWide : n;
  const Grid grid{(a.rows * a.pieces + kThreads - 1) / kThreads, 1, 1, kThreads, 0};
  return wide ? launch<gated_rows<T, kWide, kBackward>>(grid, env, a)
              : launch<gated_rows<T, 1, kBackward>>(grid, env, a);
}

template <class T>
fastops_status run_direction(GatedArgs& a, int64_t n, bool wide, bool backward, fastops_cuda_env* env) {
  return backward ? run<T, true>(a, n, wide, env) : run<T, false>(a, n, wide, env);
}

}  // namespace

}  // namespace fastops::cuda

using namespace fastops;
using namespace fastops::cuda;

extern "C" fastops_status fastops_cuda_gated(const fastops_gated_desc* desc, fastops_cuda_env* env) {
  const fastops_gated_desc& d = *desc;
  Device device;
  const fastops_status status = device_of(env, &device);
  if (status != FASTOPS_OK) return status;
  Checks c("gated", env->message);
  if (!check_gated(d, c)) return c.status();
  env->variant = "sm80";
  const bool backward = given(d.dout);
  GatedArgs a{};
  a.gate = Rows(d.gate);
  a.up = Rows(d.up);
  a.out = Rows(backward ? fastops_tensor{} : d.out);
  a.dout = Rows(d.dout);
  a.dgate = Rows(d.dgate);
  a.dup = Rows(d.dup);
  a.rows = a.gate.count;
  a.activation = d.activation;
  const int64_t n = last(d.gate);
  bool wide = n * size_of(d.gate.dtype) % 16 == 0;
  for (const Rows* r : {&a.gate, &a.up, &a.out, &a.dout, &a.dgate, &a.dup}) wide = wide && (!*r || r->aligned(16));
  if (d.gate.dtype == FASTOPS_F32) return run_direction<float>(a, n, wide, backward, env);
  return d.gate.dtype == FASTOPS_F16 ? run_direction<f16>(a, n, wide, backward, env)
                                     : run_direction<bf16>(a, n, wide, backward, env);
}
#endif
