// Validity of backward attention calls, for the CPU and the CUDA library alike.
#include <cstring>

#include "core/attention_check.h"
#include "core/status.h"

namespace fastops {
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

}  // namespace

fastops_status check_attention_backward(const fastops_attention_bwd_desc& d, BackwardParams* g, char* message,
                                        bool on_device) {
  *g = BackwardParams{};
  if (d.struct_size != sizeof d) {
    set_message(message, "attention_backward: struct_size is %u, this library knows %zu", d.struct_size, sizeof d);
    return FASTOPS_ERR_VALUE;
  }
  fastops_status status = check_attention(d.fwd, &g->f, message, on_device);
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

}  // namespace fastops
