// The backward C API on the CPU: check, then two kinds of independent items (attention_bwd.inl.h).
#include <cstring>

#include "core/isa.h"
#include "core/parallel.h"
#include "core/status.h"
#include "cpu/attention/attention.h"
#include "core/attention_check.h"

namespace fastops::cpu {

const AttentionTable& attention_table_for(Isa isa);

namespace {

bool same_shape(const fastops_tensor& a, const fastops_tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.size[i] != b.size[i]) return false;
  return true;
}

fastops_status like(const char* name, const fastops_tensor& t, const char* of, const fastops_tensor& want,
                    char* message) {
  if (!same_shape(t, want)) {
    set_message(message, "attention_backward: %s must have the shape of %s", name, of);
    return FASTOPS_ERR_VALUE;
  }
  if (t.dtype != want.dtype) {
    set_message(message, "attention_backward: %s must have the dtype of %s", name, of);
    return FASTOPS_ERR_TYPE;
  }
  if (t.ndim >= 3 && t.size[t.ndim - 1] > 1 && t.stride[t.ndim - 1] != 1 && &want != &t &&
      std::strcmp(name, "dlse") != 0) {
    set_message(message, "attention_backward: the last dimension of %s must be contiguous", name);
    return FASTOPS_ERR_VALUE;
  }
  return FASTOPS_OK;
}

fastops_status check_backward(const fastops_attention_bwd_desc& d, BackwardParams* g, char* message) {
  *g = BackwardParams{};
  if (d.struct_size != sizeof d) {
    set_message(message, "attention_backward: struct_size is %u, this library knows %zu", d.struct_size, sizeof d);
    return FASTOPS_ERR_VALUE;
  }
  fastops_status status = check_attention(d.fwd, &g->f, message);
  if (status != FASTOPS_OK) return status;
  if (g->f.paged) {
    set_message(message, "attention_backward: the paged layout has no backward pass");
    return FASTOPS_ERR_UNSUPPORTED;
  }
  if (g->f.out_dtype != g->f.dtype || d.fwd.lse.ndim == 0) {
    set_message(message, "attention_backward: needs the forward's out, in q's dtype, and its lse");
    return FASTOPS_ERR_VALUE;
  }
  const struct {
    const char* name;
    const fastops_tensor& t;
    const char* of;
    const fastops_tensor& want;
  } pairs[] = {{"dout", d.dout, "out", d.fwd.out},
               {"dq", d.dq, "q", d.fwd.q},
               {"dk", d.dk, "k", d.fwd.k},
               {"dv", d.dv, "v", d.fwd.v}};
  for (const auto& x : pairs) {
    status = like(x.name, x.t, x.of, x.want, message);
    if (status != FASTOPS_OK) return status;
  }
  if (d.dlse.ndim > 0) {
    status = like("dlse", d.dlse, "lse", d.fwd.lse, message);
    if (status != FASTOPS_OK) return status;
    const int n = d.dlse.ndim;
    g->dlse = static_cast<const float*>(d.dlse.data);
    g->dlse_sb = n == 3 ? d.dlse.stride[0] : 0;
    g->dlse_sh = d.dlse.stride[n - 2];
    g->dlse_ss = d.dlse.stride[n - 1];
  }
  if (d.dsinks.ndim > 0) {
    if (d.fwd.sinks.ndim == 0) {
      set_message(message, "attention_backward: dsinks is given without sinks");
      return FASTOPS_ERR_VALUE;
    }
    status = like("dsinks", d.dsinks, "sinks", d.fwd.sinks, message);
    if (status != FASTOPS_OK) return status;
    g->dsinks = static_cast<float*>(d.dsinks.data);
    g->dsinks_stride = d.dsinks.stride[0];
  }
  const int at = d.fwd.q.ndim - 3;
  auto batch = [at](const fastops_tensor& t) { return at == 1 ? t.stride[0] : 0; };
  g->dout = static_cast<const char*>(d.dout.data);
  g->dq = static_cast<char*>(d.dq.data);
  g->dk = static_cast<char*>(d.dk.data);
  g->dv = static_cast<char*>(d.dv.data);
  g->do_sb = batch(d.dout), g->do_ss = d.dout.stride[at], g->do_sh = d.dout.stride[at + 1];
  g->dq_sb = batch(d.dq), g->dq_ss = d.dq.stride[at], g->dq_sh = d.dq.stride[at + 1];
  g->dk_sb = batch(d.dk), g->dk_ss = d.dk.stride[at], g->dk_sh = d.dk.stride[at + 1];
  g->dv_sb = batch(d.dv), g->dv_ss = d.dv.stride[at], g->dv_sh = d.dv.stride[at + 1];
  return FASTOPS_OK;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
  return check_backward(*desc, &g, message);
}

extern "C" fastops_status fastops_attention_bwd_workspace(const fastops_attention_bwd_desc* desc,
                                                          const fastops_env* env, size_t* bytes) {
  BackwardParams g;
  const fastops_status status = check_backward(*desc, &g, env->message);
  if (status == FASTOPS_OK) *bytes = static_cast<size_t>(Layout(g, workers_of(env)).total);
  return status;
}

extern "C" fastops_status fastops_attention_bwd(const fastops_attention_bwd_desc* desc, fastops_env* env) {
  BackwardParams g;
  const fastops_status status = check_backward(*desc, &g, env->message);
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
  const Isa isa = active_isa();
  const AttentionTable& table = attention_table_for(isa);
  env->variant = isa_name(isa);
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
