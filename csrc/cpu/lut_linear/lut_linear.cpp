// The lut_linear C API on the CPU: check, widen the rows of x, share the output features out.
#include "cpu/lut_linear/lut_linear.h"

#include <initializer_list>

#include "core/parallel.h"

namespace fastops::cpu {
namespace {

bool dense(Checks& c, const char* name, const fastops_tensor& t, int32_t dtype, const char* type,
           std::initializer_list<int64_t> size) {
  if (t.dtype != dtype) return c.fail(FASTOPS_ERR_TYPE, "%s must be %s", name, type);
  return c.shape(name, t, static_cast<int>(size.size()), size.begin()) && c.contiguous(name, t);
}

bool check(const fastops_lut_linear_desc& d, LutParams* p, Checks& c) {
  if (!c.struct_size(d.struct_size, sizeof d) || !c.floats("x", d.x) || !c.floats("out", d.out)) return false;
  if (d.x.ndim != 2 || d.out.ndim != 2 || d.out.size[0] != d.x.size[0])
    return c.fail(FASTOPS_ERR_VALUE, "x must be [M, K] and out [M, N]");
  if (!c.dtype_or_f32("out", d.out, "x", d.x)) return false;
  const int64_t M = d.x.size[0], K = d.x.size[1], N = d.out.size[1], runs = (K + kLutRun - 1) / kLutRun;
  if (K < 1 || K > INT32_MAX || N > INT32_MAX)
    return c.fail(FASTOPS_ERR_VALUE, "K is %lld, must be from 1 to 2^31 - 1", static_cast<long long>(K));
  if (!dense(c, "codes", d.codes, FASTOPS_U8, "uint8", {N, runs, 16}) ||
      !dense(c, "table", d.table, FASTOPS_F32, "float32", {N, 16}))
    return false;
  if (given(d.bias) && !dense(c, "bias", d.bias, FASTOPS_F32, "float32", {N})) return false;
  const int given_parts = given(d.row_starts) + given(d.columns) + given(d.values);
  if (given_parts != 0 && given_parts != 3)
    return c.fail(FASTOPS_ERR_VALUE, "row_starts, columns and values go together");
  if (given_parts == 3) {
    const int64_t count = d.values.ndim == 1 ? d.values.size[0] : -1;
    if (!dense(c, "row_starts", d.row_starts, FASTOPS_I32, "int32", {N + 1}) ||
        !dense(c, "columns", d.columns, FASTOPS_I32, "int32", {count}) ||
        !dense(c, "values", d.values, FASTOPS_F32, "float32", {count}))
      return false;
    const auto* starts = static_cast<const int32_t*>(d.row_starts.data);
    int32_t before = 0;
    for (int64_t n = 0; n <= N; before = starts[n++])
      if (starts[n] < before || starts[n] > count)
        return c.fail(FASTOPS_ERR_VALUE, "row_starts[%lld] is %d, must rise from 0 to the %lld values",
                      static_cast<long long>(n), starts[n], static_cast<long long>(count));
    const auto* columns = static_cast<const int32_t*>(d.columns.data);
    const auto limit = static_cast<uint32_t>(K);
    bool bad = false;
    for (int64_t i = 0; i < count; ++i) bad |= static_cast<uint32_t>(columns[i]) >= limit;
    if (bad) return c.fail(FASTOPS_ERR_VALUE, "columns hold a number outside 0 to %lld", static_cast<long long>(K - 1));
    if (count > 0) {
      p->row_starts = starts;
      p->columns = columns;
      p->values = static_cast<const float*>(d.values.data);
    }
  }
  p->M = M;
  p->N = N;
  p->K = K;
  p->runs = runs;
  p->x = static_cast<const char*>(d.x.data);
  p->x_sm = d.x.stride[0];
  p->dtype = d.x.dtype;
  p->out = static_cast<char*>(d.out.data);
  p->out_sm = d.out.stride[0];
  p->out_dtype = d.out.dtype;
  p->codes = static_cast<const uint8_t*>(d.codes.data);
  p->table = static_cast<const float*>(d.table.data);
  p->bias = static_cast<const float*>(d.bias.data);
  p->lda = runs * kLutRun + 16;  // not a power of two: those share a few cache sets
  return true;
}

int64_t block_rows(const LutParams& p) { return p.M < kLutRowBlock ? p.M : kLutRowBlock; }
int64_t scratch_at(const LutParams& p) { return (block_rows(p) * p.lda + 15) / 16 * 16; }
int64_t scratch_size(const LutParams& p) { return (lut_scratch(block_rows(p)) + 15) / 16 * 16; }

size_t workspace_of(const LutParams& p, int workers) {
  return static_cast<size_t>(scratch_at(p) + scratch_size(p) * workers) * sizeof(float);
}

}  // namespace
}  // namespace fastops::cpu

using namespace fastops;
using namespace fastops::cpu;

extern "C" fastops_status fastops_lut_linear_check(const fastops_lut_linear_desc* desc, char* message) {
  Checks c("lut_linear", message);
  LutParams p{};
  check(*desc, &p, c);
  return c.status();
}

extern "C" fastops_status fastops_lut_linear_workspace(const fastops_lut_linear_desc* desc, const fastops_env* env,
                                                       size_t* bytes) {
  Checks c("lut_linear", env ? env->message : nullptr);
  LutParams p{};
  if (check(*desc, &p, c)) *bytes = workspace_of(p, linear_workers(env, p.N, p.K));
  return c.status();
}

extern "C" fastops_status fastops_lut_linear(const fastops_lut_linear_desc* desc, fastops_env* env) {
  Checks c("lut_linear", env->message);
  LutParams p{};
  if (!check(*desc, &p, c) || !c.can_run()) return c.status();
  const int workers = linear_workers(env, p.N, p.K);
  const size_t need = workspace_of(p, workers);
  if (need > 0 && (env->workspace == nullptr || env->workspace_size < need)) {
    c.fail(FASTOPS_ERR_WORKSPACE, "workspace has %zu bytes, needs %zu", env->workspace_size, need);
    return c.status();
  }
  const auto variant = FASTOPS_CHOOSE(LutTable, lut_table);
  env->variant = variant.name;
  if (p.M == 0 || p.N == 0) return FASTOPS_OK;
  p.a = static_cast<float*>(env->workspace);
  float* scratch = p.a + scratch_at(p);
  const int64_t size = scratch_size(p), rows = p.M, x_bytes = p.x_sm * size_of(p.dtype);
  const int64_t out_bytes = p.out_sm * size_of(p.out_dtype), block = block_rows(p);
  fastops_env inner = *env;
  inner.num_threads = workers;
  for (int64_t row = 0; row < rows; row += p.M, p.x += p.M * x_bytes, p.out += p.M * out_bytes) {
    p.M = rows - row < block ? rows - row : block;
    fastops_env few = inner;
    if (p.M < 8) few.num_threads = 1;
    parallel_items(few, p.M, [&](int64_t r, int) { variant.table.prepare(p, r); });
    parallel_items(inner, (p.N + kLutPanel - 1) / kLutPanel,
                   [&](int64_t panel, int worker) { variant.table.panel(p, panel, scratch + worker * size); });
  }
  return FASTOPS_OK;
}
