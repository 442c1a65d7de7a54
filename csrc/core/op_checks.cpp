// Validity of calls that the CPU and the CUDA library take alike.
#include "core/op_checks.h"

#include "core/attention_params.h"
#include "core/status.h"

namespace fastops {

bool check_norm(const fastops_norm_desc& d, Checks& c) {
  if (!c.struct_size(d.struct_size, sizeof d) || !c.floats("x", d.x)) return false;
  if (last(d.x) < 1) return c.fail(FASTOPS_ERR_VALUE, "the last dimension of x is empty");
  const int64_t n = last(d.x);
  if (given(d.residual)) {
    if (!c.floats("residual", d.residual) || !c.same_dtype("residual", d.residual, "x", d.x) ||
        !c.same_shape("residual", d.residual, "x", d.x))
      return false;
    if (!given(d.sum)) return c.fail(FASTOPS_ERR_VALUE, "residual needs sum");
    if (!c.floats("sum", d.sum) || !c.same_dtype("sum", d.sum, "x", d.x) || !c.same_shape("sum", d.sum, "x", d.x))
      return false;
  } else if (given(d.sum)) {
    return c.fail(FASTOPS_ERR_VALUE, "sum needs residual");
  }
  if (given(d.weight) && !(c.vector("weight", d.weight, n) && c.dtype_or_f32("weight", d.weight, "x", d.x)))
    return false;
  if (given(d.bias)) {
    if (!d.layer) return c.fail(FASTOPS_ERR_VALUE, "an RMS norm has no bias");
    if (!c.vector("bias", d.bias, n) || !c.dtype_or_f32("bias", d.bias, "x", d.x)) return false;
  }
  if (!c.well_formed("out", d.out) || !c.same_shape("out", d.out, "x", d.x)) return false;
  const bool quantised = d.out.dtype == FASTOPS_I8 || d.out.dtype == FASTOPS_F8_E4M3;
  if (!quantised && d.out.dtype != d.x.dtype && d.out.dtype != FASTOPS_F32)
    return c.fail(FASTOPS_ERR_TYPE, "out must have x's dtype or be float32, int8 or float8_e4m3fn");
  if (quantised != given(d.scales)) return c.fail(FASTOPS_ERR_VALUE, "scales go with an int8 or float8_e4m3fn out");
  if (quantised && !c.per_row("scales", d.scales, d.x)) return false;
  if (given(d.mean) && !c.per_row("mean", d.mean, d.x)) return false;
  if (given(d.rstd) && !c.per_row("rstd", d.rstd, d.x)) return false;
  if (!(d.eps >= 0.0f)) return c.fail(FASTOPS_ERR_VALUE, "eps is %g, must not be negative", static_cast<double>(d.eps));
  return true;
}

bool check_norm(const fastops_norm_bwd_desc& d, Checks& c) {
  if (!c.struct_size(d.struct_size, sizeof d) || !c.floats("s", d.s)) return false;
  if (last(d.s) < 1) return c.fail(FASTOPS_ERR_VALUE, "the last dimension of s is empty");
  const int64_t n = last(d.s);
  const auto like = [&](const char* name, const fastops_tensor& t) {
    return c.floats(name, t) && c.same_dtype(name, t, "s", d.s) && c.same_shape(name, t, "s", d.s);
  };
  if (!like("dout", d.dout) || !like("ds", d.ds) || (given(d.dsum) && !like("dsum", d.dsum))) return false;
  if (given(d.weight) && !(c.vector("weight", d.weight, n) && c.dtype_or_f32("weight", d.weight, "s", d.s)))
    return false;
  if (!c.per_row("rstd", d.rstd, d.s) || (d.layer && !c.per_row("mean", d.mean, d.s))) return false;
  const fastops_tensor* const sums[] = {&d.dweight, &d.dbias};
  for (const fastops_tensor* t : sums)
    if (given(*t) && !(c.vector("dweight or dbias", *t, n) &&
                       (t->dtype == FASTOPS_F32 || c.fail(FASTOPS_ERR_TYPE, "dweight and dbias must be float32"))))
      return false;
  return true;
}

bool check_gated(const fastops_gated_desc& d, Checks& c) {
  if (!c.struct_size(d.struct_size, sizeof d) || !c.floats("gate", d.gate)) return false;
  if (d.activation < FASTOPS_SILU || d.activation > FASTOPS_GELU)
    return c.fail(FASTOPS_ERR_VALUE, "activation is %d, allowed: 0 (SiLU), 1 (GELU, tanh form), 2 (GELU)",
                  d.activation);
  const auto like = [&](const char* name, const fastops_tensor& t) {
    return c.floats(name, t) && c.same_dtype(name, t, "gate", d.gate) && c.same_shape(name, t, "gate", d.gate);
  };
  if (!like("up", d.up)) return false;
  if (!given(d.dout)) return like("out", d.out);
  return like("dout", d.dout) && like("dgate", d.dgate) && like("dup", d.dup);
}

namespace {

#define REFUSE(status, ...)            \
  do {                                 \
    set_message(message, __VA_ARGS__); \
    return status;                     \
  } while (0)

bool same_size(const fastops_tensor& a, const fastops_tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.size[i] != b.size[i]) return false;
  return true;
}

fastops_status check_out(const char* name, const fastops_tensor& t, const fastops_tensor& like, char* message) {
  if (!same_size(t, like)) REFUSE(FASTOPS_ERR_VALUE, "merge_states: %s differs in shape from outs[0]", name);
  if (t.dtype != like.dtype) REFUSE(FASTOPS_ERR_TYPE, "merge_states: %s differs in dtype from outs[0]", name);
  if (t.size[t.ndim - 1] > 1 && t.stride[t.ndim - 1] != 1)
    REFUSE(FASTOPS_ERR_VALUE, "merge_states: the last dimension of %s must be contiguous", name);
  return FASTOPS_OK;
}

// lse is out's shape without its last dimension, heads before positions.
fastops_status check_lse(const char* name, const fastops_tensor& lse, const fastops_tensor& out, char* message) {
  if (lse.dtype != FASTOPS_F32) REFUSE(FASTOPS_ERR_TYPE, "merge_states: %s must be float32", name);
  const int n = out.ndim;
  if (lse.ndim != n - 1 || lse.size[n - 2] != out.size[n - 3] || lse.size[n - 3] != out.size[n - 2] ||
      (n == 4 && lse.size[0] != out.size[0]))
    REFUSE(FASTOPS_ERR_VALUE, "merge_states: %s must be [B, H, S] for outs [B, S, H, D], or [H, T] for [T, H, D]",
           name);
  return FASTOPS_OK;
}

}  // namespace

fastops_status check_merge_states(const fastops_merge_states_desc& d, char* message) {
  if (d.struct_size != sizeof(d))
    REFUSE(FASTOPS_ERR_VALUE, "merge_states: struct_size is %u, this library knows %zu", d.struct_size, sizeof(d));
  if (d.count < 1) REFUSE(FASTOPS_ERR_VALUE, "merge_states: needs at least one state, got %d", d.count);
  const fastops_tensor& first = d.outs[0];
  if (first.ndim != 3 && first.ndim != 4)
    REFUSE(FASTOPS_ERR_VALUE, "merge_states: outs[0] must have 3 or 4 dimensions, got %d", first.ndim);
  if (first.dtype != FASTOPS_F32 && first.dtype != FASTOPS_F16 && first.dtype != FASTOPS_BF16)
    REFUSE(FASTOPS_ERR_TYPE, "merge_states: outs must be float32, float16 or bfloat16");
  const int64_t Dv = first.size[first.ndim - 1];
  if (Dv < 1 || Dv > kMaxHeadDim)
    REFUSE(FASTOPS_ERR_VALUE, "merge_states: head size %lld, allowed: 1 to 256", static_cast<long long>(Dv));
  for (int i = 0; i < d.count; ++i) {
    fastops_status status = check_out("a tensor of outs", d.outs[i], first, message);
    if (status == FASTOPS_OK) status = check_lse("a tensor of lses", d.lses[i], first, message);
    if (status != FASTOPS_OK) return status;
  }
  const fastops_status status = check_out("out", d.out, first, message);
  return status != FASTOPS_OK ? status : check_lse("lse", d.lse, first, message);
}

}  // namespace fastops
