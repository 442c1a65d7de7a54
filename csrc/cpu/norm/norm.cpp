// The norms' C API on the CPU: check, weights as floats, share the rows out.
#include "cpu/norm/norm.h"

#include <cstring>

#include "core/op_checks.h"
#include "core/parallel.h"

namespace fastops::cpu {
namespace {

constexpr int64_t kGroups = 64;  // at most so many partial sums of dweight: fixed by the shape, so results are, too

constexpr int64_t kRoom = 3;  // rows of floats for each worker: weight, bias, and results to be quantised

int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

int64_t rows_per_group(const fastops_norm_bwd_desc& d) {
  const int64_t rows = elements(d.s) / last(d.s), least = (rows + kGroups - 1) / kGroups;
  return least > 8 ? least : 8;
}

size_t workspace(const fastops_norm_desc& d, const fastops_env& env) {
  const int64_t threads = env.num_threads > 1 ? env.num_threads : 1;
  return static_cast<size_t>(threads * kRoom * padded(last(d.x)) * 4);
}
size_t workspace(const fastops_norm_bwd_desc& d) {
  const int64_t rows = elements(d.s) / last(d.s), per = rows_per_group(d), groups = (rows + per - 1) / per;
  return static_cast<size_t>((1 + (given(d.dweight) + given(d.dbias)) * groups) * padded(last(d.s)) * 4);
}

// weight + offset as floats: the tensor itself where it is that already.
const float* widened(const NormTable& table, const fastops_tensor& t, float offset, float* room) {
  if (!given(t)) return nullptr;
  if (t.dtype == FASTOPS_F32 && offset == 0.0f) return static_cast<const float*>(t.data);
  table.widen(t.data, t.dtype, offset, room, t.size[0]);
  return room;
}

bool ready(size_t need, fastops_env* env, Checks& c) {
  if (!c.can_run()) return false;
  return env->workspace_size >= need ||
         c.fail(FASTOPS_ERR_WORKSPACE, "the workspace has %zu bytes, needs %zu", env->workspace_size, need);
}

}  // namespace
}  // namespace fastops::cpu

using namespace fastops;
using namespace fastops::cpu;

extern "C" fastops_status fastops_norm_check(const fastops_norm_desc* desc, char* message) {
  Checks c("norm", message);
  check_norm(*desc, c);
  return c.status();
}

extern "C" fastops_status fastops_norm_workspace(const fastops_norm_desc* desc, const fastops_env* env, size_t* bytes) {
  Checks c("norm", env->message);
  if (check_norm(*desc, c)) *bytes = workspace(*desc, *env);
  return c.status();
}

extern "C" fastops_status fastops_norm(const fastops_norm_desc* desc, fastops_env* env) {
  const fastops_norm_desc& d = *desc;
  Checks c("norm", env->message);
  if (!check_norm(d, c) || !ready(workspace(d, *env), env, c)) return c.status();
  const auto variant = FASTOPS_CHOOSE(NormTable, norm_table);
  env->variant = variant.name;
  const int64_t n = last(d.x), rows = elements(d.x) / n;
  if (rows == 0) return FASTOPS_OK;
  auto* room = static_cast<float*>(env->workspace);
  NormArgs a{};
  a.x = Rows(d.x);
  a.residual = Rows(d.residual);
  a.sum = Rows(d.sum);
  a.out = Rows(d.out);
  a.rows = rows;
  a.n = n;
  a.scales = static_cast<float*>(d.scales.data);
  a.mean = static_cast<float*>(d.mean.data);
  a.rstd = static_cast<float*>(d.rstd.data);
  a.eps = d.eps;
  a.layer = d.layer != 0;
  a.dtype = d.x.dtype;
  a.out_dtype = d.out.dtype;
  const int64_t row_bytes = n * size_of(d.out.dtype);
  a.stream = d.out.data != d.x.data && rows * row_bytes >= kStreamBytes && row_bytes % 64 == 0 && a.out.aligned(64);
  const auto widen = [&](NormArgs& args, float* to) {
    args.weight = widened(variant.table, d.weight, d.weight_offset, to);
    args.bias = widened(variant.table, d.bias, 0.0f, to + padded(n));
  };
  // A brief call's workers widen the weights each for itself: that is quicker than fetching them from another core.
  const bool brief = is_brief(rows * n, *env);
  if (!brief) widen(a, room);
  const int64_t threads = env->num_threads > 1 ? env->num_threads : 1;
  const int64_t per = brief ? (rows + threads - 1) / threads : rows_per_item(rows, n, *env);
  const auto run = [&](int64_t item, int worker) {
    const int64_t first = item * per, end = first + per < rows ? first + per : rows;
    float* const own = room + worker * kRoom * padded(n);
    NormArgs mine = a;
    if (brief) widen(mine, own);
    variant.table.forward(mine, first, end, own + 2 * padded(n));
  };
  parallel_items(*env, (rows + per - 1) / per, run, brief);
  return FASTOPS_OK;
}

extern "C" fastops_status fastops_norm_bwd_check(const fastops_norm_bwd_desc* desc, char* message) {
  Checks c("norm_bwd", message);
  check_norm(*desc, c);
  return c.status();
}

extern "C" fastops_status fastops_norm_bwd_workspace(const fastops_norm_bwd_desc* desc, const fastops_env* env,
                                                     size_t* bytes) {
  Checks c("norm_bwd", env->message);
  if (check_norm(*desc, c)) *bytes = workspace(*desc);
  return c.status();
}

extern "C" fastops_status fastops_norm_bwd(const fastops_norm_bwd_desc* desc, fastops_env* env) {
  const fastops_norm_bwd_desc& d = *desc;
  Checks c("norm_bwd", env->message);
  if (!check_norm(d, c) || !ready(workspace(d), env, c)) return c.status();
  const auto variant = FASTOPS_CHOOSE(NormTable, norm_table);
  env->variant = variant.name;
  const int64_t n = last(d.s), rows = elements(d.s) / n, step = padded(n);
  auto* room = static_cast<float*>(env->workspace);
  NormBwdArgs a{};
  a.dout = Rows(d.dout);
  a.s = Rows(d.s);
  a.dsum = Rows(d.dsum);
  a.ds = Rows(d.ds);
  a.n = n;
  a.weight = widened(variant.table, d.weight, d.weight_offset, room);
  a.mean = static_cast<const float*>(d.mean.data);
  a.rstd = static_cast<const float*>(d.rstd.data);
  a.layer = d.layer != 0;
  a.dtype = d.s.dtype;
  const int64_t per = rows_per_group(d), groups = (rows + per - 1) / per;
  float* const weights = given(d.dweight) ? room + step : nullptr;
  float* const biases = given(d.dbias) ? room + (1 + (weights ? groups : 0)) * step : nullptr;
  parallel_items(*env, groups, [&](int64_t g, int) {
    float* w = weights ? weights + g * step : nullptr;
    float* b = biases ? biases + g * step : nullptr;
    if (w) std::memset(w, 0, static_cast<size_t>(n) * 4);
    if (b) std::memset(b, 0, static_cast<size_t>(n) * 4);
    variant.table.backward(a, g * per, (g + 1) * per < rows ? (g + 1) * per : rows, w, b);
  });
  const auto add_up = [&](const float* parts, const fastops_tensor& to) {
    if (parts == nullptr) return;
    auto* out = static_cast<float*>(to.data);
    for (int64_t i = 0; i < n; ++i) out[i] = 0.0f;
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < n; ++i) out[i] += parts[g * step + i];
  };
  add_up(weights, d.dweight);
  add_up(biases, d.dbias);
  return FASTOPS_OK;
}
