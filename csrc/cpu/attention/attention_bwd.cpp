// The backward C API on the CPU: check, then two kinds of independent items (attention_bwd.inl.h).
#include <cstring>

#include "core/parallel.h"
#include "core/status.h"
#include "cpu/attention/attention.h"
#include "core/attention_check.h"

namespace fastops::cpu {

namespace {

int64_t key_items(const BackwardParams& g, const Sequence& s) { return ceil_div(s.Sk, kBackwardKeys) * g.f.Hkv; }
int64_t row_items(const BackwardParams& g, const Sequence& s) {
  return ceil_div(s.Sq * g.f.G, kBackwardRows) * g.f.Hkv;
}

// Workspace: items before each sequence, then one scratch per worker.
struct Layout {
  int64_t prefix_bytes, scratch_bytes, total;
  Layout(const BackwardParams& g, int workers) {
    prefix_bytes = ceil_div((g.f.B + 1) * 8, 64) * 64;
    scratch_bytes = ceil_div(backward_scratch(g.f.D, g.f.Dv) * 4, 64) * 64;
    total = prefix_bytes + scratch_bytes * workers;
  }
};

int workers_of(const fastops_env* env) { return env->num_threads > 1 && env->parallel_for ? env->num_threads : 1; }

int64_t element_size(int32_t dtype) { return dtype == FASTOPS_F32 ? 4 : 2; }

// Rows that belong to no sequence get a zero gradient: the kernels do not come by.
void clear(const fastops_tensor& t, int64_t from) {
  const int64_t size = element_size(t.dtype);
  for (int64_t i = from; i < t.size[0]; ++i)
    for (int64_t h = 0; h < t.size[1]; ++h)
      std::memset(static_cast<char*>(t.data) + (i * t.stride[0] + h * t.stride[1]) * size, 0,
                  static_cast<size_t>(t.size[2] * size));
}

}  // namespace
}  // namespace fastops::cpu

using namespace fastops;
using namespace fastops::cpu;

extern "C" fastops_status fastops_attention_bwd_check(const fastops_attention_bwd_desc* desc, char* message) {
  BackwardParams g;
  return check_attention_backward(*desc, &g, message);
}

extern "C" fastops_status fastops_attention_bwd_workspace(const fastops_attention_bwd_desc* desc,
                                                          const fastops_env* env, size_t* bytes) {
  BackwardParams g;
  const fastops_status status = check_attention_backward(*desc, &g, env->message);
  if (status == FASTOPS_OK) *bytes = static_cast<size_t>(Layout(g, workers_of(env)).total);
  return status;
}

extern "C" fastops_status fastops_attention_bwd(const fastops_attention_bwd_desc* desc, fastops_env* env) {
  BackwardParams g;
  const fastops_status status = check_attention_backward(*desc, &g, env->message);
  if (status != FASTOPS_OK) return status;
  if (const char* refusal = isa_refusal()) {
    set_message(env->message, "%s", refusal);
    return FASTOPS_ERR_UNSUPPORTED;
  }
  const AttentionParams& p = g.f;
  const Layout at(g, workers_of(env));
  if (env->workspace == nullptr || static_cast<int64_t>(env->workspace_size) < at.total) {
    set_message(env->message, "attention_backward: workspace has %zu bytes, needs %lld", env->workspace_size,
                static_cast<long long>(at.total));
    return FASTOPS_ERR_WORKSPACE;
  }
  const auto variant = FASTOPS_CHOOSE_ANY(AttentionTable, attention_table);
  const AttentionTable& table = variant.table;
  env->variant = variant.name;
  char* ws = static_cast<char*>(env->workspace);
  auto* prefix = reinterpret_cast<int64_t*>(ws);
  prefix[0] = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    const Sequence s = sequence(p, b);
    prefix[b + 1] = prefix[b] + key_items(g, s) + row_items(g, s);
  }
  const int64_t items = prefix[p.B], sinks = g.dsinks ? p.Hq : 0;
  fastops_env inner = *env;
  inner.num_threads = workers_of(env);
  parallel_items(inner, items + sinks, [&](int64_t i, int worker) {
    if (i >= items) return table.backward_sinks(g, i - items);
    int64_t lo = 0, hi = p.B - 1;
    while (lo < hi) {
      const int64_t mid = (lo + hi + 1) / 2;
      if (prefix[mid] <= i) {
        lo = mid;
      } else {
        hi = mid - 1;
      }
    }
    float* scratch = reinterpret_cast<float*>(ws + at.prefix_bytes + worker * at.scratch_bytes);
    const int64_t mine = i - prefix[lo], keys = key_items(g, sequence(p, lo));
    if (mine < keys) return table.backward_keys(g, lo, mine % p.Hkv, mine / p.Hkv * kBackwardKeys, scratch);
    table.backward_rows(g, lo, (mine - keys) % p.Hkv, (mine - keys) / p.Hkv * kBackwardRows, scratch);
  });
  if (p.ragged) {
    clear(desc->dq, p.cu_q[p.B * p.cu_q_stride]);
    clear(desc->dk, p.cu_k[p.B * p.cu_k_stride]);
    clear(desc->dv, p.cu_k[p.B * p.cu_k_stride]);
  }
  return FASTOPS_OK;
}
