// RMS norm and layer norm on a GPU, with a residual added and with int8 or e4m3 results: a block for each row, which is
// read once and held in registers (what of a very long row does not fit is read again, from L2).
#include "core/op_checks.h"
#include "core/rows.h"
#include "cuda/launch.h"
#include "cuda/layout/row.h"

namespace fastops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHeld = 4;  // pieces of a row a thread keeps

struct NormArgs {
  Rows x, residual, sum, out;
  const void *weight, *bias;
  float *scales, *mean, *rstd;
  int64_t n;
  float eps, offset;
  int32_t out_dtype;
  bool layer, weight_f32, bias_f32;
};

}  // namespace

// kElements: those of 16 bytes, or 1 where rows are not aligned to them.
template <class T, int kElements>
FASTOPS_KERNEL(kThreads, 2)
norm_rows(const NormArgs a) {
  auto* room = reinterpret_cast<float*>(dynamic_shared());
  const int64_t row = block_x(), n = a.n, pieces = n / kElements;
  const char* const x = a.x.at(row);
  const char* const residual = a.residual ? a.residual.at(row) : nullptr;
  const auto read = [&](int64_t piece, float (&v)[kElements]) {
    load_elements<T>(x, piece * kElements, v);
    if (residual == nullptr) return;
    float r[kElements];
    load_elements<T>(residual, piece * kElements, r);
    FASTOPS_UNROLL
    for (int i = 0; i < kElements; ++i) v[i] += r[i];
  };
  float held[kHeld][kElements];
  FASTOPS_UNROLL
  for (int h = 0; h < kHeld; ++h) {
    const int64_t piece = thread_index() + h * kThreads;
    if (piece < pieces) read(piece, held[h]);
  }
  const auto each = [&](auto&& f) {  // f(piece, values)
    FASTOPS_UNROLL
    for (int h = 0; h < kHeld; ++h) {
      const int64_t piece = thread_index() + h * kThreads;
      if (piece < pieces) f(piece, held[h]);
    }
    for (int64_t piece = thread_index() + kHeld * kThreads; piece < pieces; piece += kThreads) {
      float v[kElements];
      read(piece, v);
      f(piece, v);
    }
  };

  float mean = 0.0f;
  if (a.layer) {
    float sum = 0.0f;
    each([&](int64_t, const float (&v)[kElements]) {
      FASTOPS_UNROLL
      for (int i = 0; i < kElements; ++i) sum += v[i];
    });
    mean = block_sum(sum, room) / static_cast<float>(n);
  }
  float squares = 0.0f;
  each([&](int64_t, const float (&v)[kElements]) {
    FASTOPS_UNROLL
    for (int i = 0; i < kElements; ++i) squares += (v[i] - mean) * (v[i] - mean);
  });
  const float rstd = 1.0f / sqrt_precise(block_sum(squares, room) / static_cast<float>(n) + a.eps);
  const auto finish = [&](int64_t piece, const float (&v)[kElements], float (&y)[kElements]) {
    const int64_t at = piece * kElements;
    float w[kElements], b[kElements];
    FASTOPS_UNROLL
    for (int i = 0; i < kElements; ++i) {
      w[i] = 1.0f;
      b[i] = 0.0f;
    }
    if (a.weight) {
      load_vector<T>(a.weight, a.weight_f32, at, w);
      FASTOPS_UNROLL
      for (int i = 0; i < kElements; ++i) w[i] += a.offset;
    }
    if (a.bias) load_vector<T>(a.bias, a.bias_f32, at, b);
    FASTOPS_UNROLL
    for (int i = 0; i < kElements; ++i) y[i] = (v[i] - mean) * rstd * w[i] + b[i];
  };

  float inverse = 1.0f;  // of the row's scale
  if (a.scales) {
    float top = 0.0f;
    each([&](int64_t piece, const float (&v)[kElements]) {
      float y[kElements];
      finish(piece, v, y);
      FASTOPS_UNROLL
      for (int i = 0; i < kElements; ++i) top = maximum_or_nan(top, absolute(y[i]));
    });
    top = block_max(top, room);
    const float scale = top == 0.0f ? 1.0f : top / (a.out_dtype == FASTOPS_I8 ? 127.0f : 448.0f);
    inverse = 1.0f / scale;
    if (thread_index() == 0) a.scales[row] = scale;
  }
  if (thread_index() == 0) {
    if (a.mean) a.mean[row] = mean;
    if (a.rstd) a.rstd[row] = rstd;
  }
  char* const out = a.out.at(row);
  char* const sum = a.sum ? a.sum.at(row) : nullptr;
  each([&](int64_t piece, const float (&v)[kElements]) {
    const int64_t at = piece * kElements;
    if (sum) store_elements<T>(sum, at, v);
    float y[kElements];
    finish(piece, v, y);
    if (a.out_dtype == FASTOPS_I8) {
      FASTOPS_UNROLL
      for (int i = 0; i < kElements; ++i) {
        const float code = round_even(y[i] * inverse);
        reinterpret_cast<int8_t*>(out)[at + i] = static_cast<int8_t>(code > 127.0f    ? 127.0f
                                                                     : code < -127.0f ? -127.0f
                                                                                      : code);
      }
    } else if (a.out_dtype == FASTOPS_F8_E4M3) {
      FASTOPS_UNROLL
      for (int i = 0; i < kElements; ++i) reinterpret_cast<uint8_t*>(out)[at + i] = to_f8(y[i] * inverse);
    } else if (a.out_dtype == FASTOPS_F32) {
      FASTOPS_UNROLL
      for (int i = 0; i < kElements; ++i) reinterpret_cast<float*>(out)[at + i] = y[i];
    } else {
      store_elements<T>(out, at, y);
    }
  });
}

}  // namespace fastops::cuda

#if !defined(__CUDACC_RTC__)  // the rest is the host's
namespace fastops::cuda {
namespace {

template <class T>
fastops_status run(const Grid& grid, fastops_cuda_env* env, const NormArgs& a, bool wide) {
  constexpr int kWide = 16 / sizeof(T);
  return wide ? launch<norm_rows<T, kWide>>(grid, env, a) : launch<norm_rows<T, 1>>(grid, env, a);
}

}  // namespace

}  // namespace fastops::cuda

using namespace fastops;
using namespace fastops::cuda;

extern "C" fastops_status fastops_cuda_norm(const fastops_norm_desc* desc, fastops_cuda_env* env) {
  const fastops_norm_desc& d = *desc;
  Device device;
  const fastops_status status = device_of(env, &device);
  if (status != FASTOPS_OK) return status;
  Checks c("norm", env->message);
  if (!check_norm(d, c)) return c.status();
  env->variant = "sm80";
  NormArgs a{};
  a.x = Rows(d.x);
  a.residual = Rows(d.residual);
  a.sum = Rows(d.sum);
  a.out = Rows(d.out);
  a.n = last(d.x);
  a.weight = d.weight.data;
  a.bias = d.bias.data;
  a.weight_f32 = d.weight.dtype == FASTOPS_F32;
  a.bias_f32 = d.bias.dtype == FASTOPS_F32;
  a.scales = static_cast<float*>(d.scales.data);
  a.mean = static_cast<float*>(d.mean.data);
  a.rstd = static_cast<float*>(d.rstd.data);
  a.eps = d.eps;
  a.offset = d.weight_offset;
  a.layer = d.layer != 0;
  a.out_dtype = d.out.dtype;
  const int64_t rows = elements(d.x) / a.n;
  const bool plain_out = d.out.dtype == d.x.dtype;
  const bool wide = a.n * size_of(d.x.dtype) % 16 == 0 && a.x.aligned(16) && (!a.residual || a.residual.aligned(16)) &&
                    (!a.sum || a.sum.aligned(16)) && (!plain_out || a.out.aligned(16));
  const Grid grid{rows, 1, 1, kThreads, 33 * sizeof(float)};
  if (d.x.dtype == FASTOPS_F32) return run<float>(grid, env, a, wide);
  return d.x.dtype == FASTOPS_F16 ? run<f16>(grid, env, a, wide) : run<bf16>(grid, env, a, wide);
}
#endif
