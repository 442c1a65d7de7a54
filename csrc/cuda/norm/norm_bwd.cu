// Backward of RMS norm and layer norm on a GPU. With h = (s - mean) rstd and m = dout (weight + offset), over a row of
// N:
//   ds = rstd (m - mean(m h) h - mean(m)) + dsum      (mean(m): layer norm only)
//   dweight = sum over rows of dout h,  dbias = sum over rows of dout
// A block walks over every groups-th row, its threads always over the same columns, and keeps their sums; a second
// kernel adds up the groups in order. No atomics: the same bits every time.
#include "core/op_checks.h"
#include "core/rows.h"
#include "cuda/launch.h"
#include "cuda/layout/row.h"

namespace fastops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHeld = 2;  // pieces of a row whose sums a thread keeps in registers; the others lie in the workspace
constexpr int64_t kGroups = 264;  // of rows at most: two blocks for each multiprocessor of a large device

struct NormBackwardArgs {
  Rows dout, s, dsum, ds;
  const void* weight;
  const float *mean, *rstd;
  float *dweight, *dbias;                // or nullptr
  float *weight_partial, *bias_partial;  // [groups][n]
  int64_t n, rows, groups;
  float offset;
  bool layer, weight_f32;
};

}  // namespace

template <class T, int kElements>
FASTOPS_KERNEL(kThreads, 2)
norm_bwd_rows(const NormBackwardArgs a) {
  auto* room = reinterpret_cast<float*>(dynamic_shared());
  const int64_t n = a.n, pieces = n / kElements;
  float* const weights = a.dweight ? a.weight_partial + block_x() * n : nullptr;
  float* const biases = a.dbias ? a.bias_partial + block_x() * n : nullptr;
  float dw[kHeld][kElements], db[kHeld][kElements];
  FASTOPS_UNROLL
  for (int h = 0; h < kHeld; ++h) {
    FASTOPS_UNROLL
    for (int i = 0; i < kElements; ++i) dw[h][i] = db[h][i] = 0.0f;
  }
  for (int64_t row = block_x(), round = 0; row < a.rows; row += a.groups, ++round) {
    const float mean = a.layer ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    const char *dout = a.dout.at(row), *s = a.s.at(row), *dsum = a.dsum ? a.dsum.at(row) : nullptr;
    char* const ds = a.ds.at(row);
    // f(dout, h, m) of a piece.
    const auto read = [&](int64_t piece, float (&g)[kElements], float (&h)[kElements], float (&m)[kElements]) {
      load_elements<T>(dout, piece * kElements, g);
      load_elements<T>(s, piece * kElements, h);
      if (a.weight) load_vector<T>(a.weight, a.weight_f32, piece * kElements, m);
      FASTOPS_UNROLL
      for (int i = 0; i < kElements; ++i) {
        h[i] = (h[i] - mean) * rstd;
        m[i] = a.weight ? g[i] * (m[i] + a.offset) : g[i];
      }
    };
    float along = 0.0f, flat = 0.0f;
    for (int64_t piece = thread_index(); piece < pieces; piece += kThreads) {
      float g[kElements], h[kElements], m[kElements];
      read(piece, g, h, m);
      FASTOPS_UNROLL
      for (int i = 0; i < kElements; ++i) {
        along += m[i] * h[i];
        flat += m[i];
      }
    }
    along = block_sum(along, room) / static_cast<float>(n);
    flat = a.layer ? block_sum(flat, room) / static_cast<float>(n) : 0.0f;
    const auto finish = [&](int64_t piece, float (&g)[kElements], float (&h)[kElements]) {
      float m[kElements], y[kElements];
      read(piece, g, h, m);
      FASTOPS_UNROLL
      for (int i = 0; i < kElements; ++i) y[i] = rstd * (m[i] - along * h[i] - flat);
      if (dsum) {
        load_elements<T>(dsum, piece * kElements, m);
        FASTOPS_UNROLL
        for (int i = 0; i < kElements; ++i) y[i] += m[i];
      }
      store_elements<T>(ds, piece * kElements, y);
    };
    FASTOPS_UNROLL
    for (int held = 0; held < kHeld; ++held) {
      const int64_t piece = thread_index() + held * kThreads;
      if (piece >= pieces) continue;
      float g[kElements], h[kElements];
      finish(piece, g, h);
      FASTOPS_UNROLL
      for (int i = 0; i < kElements; ++i) {
        dw[held][i] += g[i] * h[i];
        db[held][i] += g[i];
      }
    }
    for (int64_t piece = thread_index() + kHeld * kThreads; piece < pieces; piece += kThreads) {
      float g[kElements], h[kElements];
      finish(piece, g, h);
      FASTOPS_UNROLL
      for (int i = 0; i < kElements; ++i) {
        const int64_t at = piece * kElements + i;
        if (weights) weights[at] = (round ? weights[at] : 0.0f) + g[i] * h[i];
        if (biases) biases[at] = (round ? biases[at] : 0.0f) + g[i];
      }
    }
  }
  FASTOPS_UNROLL
  for (int held = 0; held < kHeld; ++held) {
    const int64_t piece = thread_index() + held * kThreads;
    if (piece >= pieces) continue;
    FASTOPS_UNROLL
    for (int i = 0; i < kElements; ++i) {
      if (weights) weights[piece * kElements + i] = dw[held][i];
      if (biases) biases[piece * kElements + i] = db[held][i];
    }
  }
}

// A thread for each column.
FASTOPS_KERNEL(kThreads, 2)
norm_bwd_sums(const NormBackwardArgs a) {
  const int64_t column = block_x() * kThreads + thread_index();
  if (column >= a.n) return;
  float dw = 0.0f, db = 0.0f;
  for (int64_t g = 0; g < a.groups; ++g) {
    if (a.dweight) dw += a.weight_partial[g * a.n + column];
    if (a.dbias) db += a.bias_partial[g * a.n + column];
  }
  if (a.dweight) a.dweight[column] = dw;
  if (a.dbias) a.dbias[column] = db;
}

}  // namespace fastops::cuda

#if !defined(__CUDACC_RTC__)  // the rest is the host's
namespace fastops::cuda {
namespace {

fastops_status plan_of(const fastops_norm_bwd_desc& d, fastops_cuda_env* env, NormBackwardArgs* a, size_t* bytes) {
  Device device;
  const fastops_status status = device_of(env, &device);
  if (status != FASTOPS_OK) return status;
  Checks c("norm_backward", env->message);
  if (!check_norm(d, c)) return c.status();
  a->dout = Rows(d.dout);
  a->s = Rows(d.s);
  a->dsum = Rows(d.dsum);
  a->ds = Rows(d.ds);
  a->n = last(d.s);
  a->rows = elements(d.s) / a->n;
  a->groups = a->rows < kGroups ? a->rows : kGroups;
  a->weight = d.weight.data;
  a->weight_f32 = d.weight.dtype == FASTOPS_F32;
  a->mean = static_cast<const float*>(d.mean.data);
  a->rstd = static_cast<const float*>(d.rstd.data);
  a->dweight = static_cast<float*>(d.dweight.data);
  a->dbias = static_cast<float*>(d.dbias.data);
  a->offset = d.weight_offset;
  a->layer = d.layer != 0;
  *bytes = static_cast<size_t>((a->dweight != nullptr) + (a->dbias != nullptr)) *
           static_cast<size_t>(a->groups * a->n) * sizeof(float);
  return FASTOPS_OK;
}

template <class T>
fastops_status run(const NormBackwardArgs& a, fastops_cuda_env* env) {
  constexpr int kWide = 16 / sizeof(T);
  const bool wide =
      a.n % kWide == 0 && a.dout.aligned(16) && a.s.aligned(16) && a.ds.aligned(16) && (!a.dsum || a.dsum.aligned(16));
  const Grid grid{a.groups, 1, 1, kThreads, 33 * sizeof(float)};
  fastops_status status =
      wide ? launch<norm_bwd_rows<T, kWide>>(grid, env, a) : launch<norm_bwd_rows<T, 1>>(grid, env, a);
  if (status == FASTOPS_OK && (a.dweight || a.dbias))
    status = launch<norm_bwd_sums>({(a.n + kThreads - 1) / kThreads, 1, 1, kThreads, 0}, env, a);
  return status;
}

}  // namespace

}  // namespace fastops::cuda

using namespace fastops;
using namespace fastops::cuda;

extern "C" fastops_status fastops_cuda_norm_bwd_workspace(const fastops_norm_bwd_desc* desc, fastops_cuda_env* env,
                                                          size_t* bytes) {
  NormBackwardArgs a{};
  *bytes = 0;
  return plan_of(*desc, env, &a, bytes);
}

extern "C" fastops_status fastops_cuda_norm_bwd(const fastops_norm_bwd_desc* desc, fastops_cuda_env* env) {
  NormBackwardArgs a{};
  size_t need = 0;
  const fastops_status status = plan_of(*desc, env, &a, &need);
  if (status != FASTOPS_OK) return status;
  if (need > 0 && (env->workspace == nullptr || env->workspace_size < need)) {
    set_message(env->message, "norm_backward: workspace has %zu bytes, needs %zu", env->workspace_size, need);
    return FASTOPS_ERR_WORKSPACE;
  }
  env->variant = "sm80";
  a.weight_partial = static_cast<float*>(env->workspace);
  a.bias_partial = a.weight_partial + (a.dweight ? a.groups * a.n : 0);
  if (desc->s.dtype == FASTOPS_F32) return run<float>(a, env);
  return desc->s.dtype == FASTOPS_F16 ? run<f16>(a, env) : run<bf16>(a, env);
}
#endif
