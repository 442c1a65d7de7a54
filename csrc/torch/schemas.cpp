// Every operator's schema, on one page. Implementations register themselves per file (STABLE_TORCH_LIBRARY_IMPL); fake
// kernels and autograd live in fastops/ops/. Without return_lse the LSE is an empty tensor.
#include "torch/tensor.h"

#define TAIL                                                                                           \
  "bool causal=False, float? scale=None, int window_left=-1, int window_right=-1, float softcap=0.0, " \
  "Tensor? sinks=None, Tensor? alibi_slopes=None"
#define DENSE "Tensor q, Tensor k, Tensor v, *, " TAIL ", Tensor? attn_mask=None, bool top_left=False"
#define VARLEN "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, *, " TAIL
#define PAGED                                                                                                          \
  "Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, Tensor? cu_seqlens_q=None, *, " TAIL \
  ", Tensor? k_scale=None, Tensor? k_zero=None, Tensor? k_min=None, Tensor? v_scale=None, Tensor? v_zero=None, "       \
  "Tensor? v_min=None, Tensor? k_recent=None, Tensor? v_recent=None, Tensor? packed_lens=None, int k_bits=0, "         \
  "int v_bits=0"
#define RETURNS ", bool return_lse=False) -> (Tensor, Tensor)"
#define GRADIENTS ") -> (Tensor, Tensor, Tensor, Tensor)"
#define INT4                                                                                                  \
  "Tensor? zeros=None, Tensor? mins=None, Tensor? perm=None, Tensor? bias=None, Tensor? column_scales=None, " \
  "Tensor? column_zeros=None, *, int activations=0, bool eight=False"
#define LUT                                                                                                    \
  "Tensor x, Tensor codes, Tensor table, Tensor? row_starts=None, Tensor? columns=None, Tensor? values=None, " \
  "Tensor? bias=None"
#define AFFINE "float eps=1e-6, *, float weight_offset=0.0"
#define ROPE \
  "Tensor q, Tensor? k, Tensor cos, Tensor sin, *, Tensor? positions=None, bool interleaved=False, bool inverse=False"
#define QK_NORM                                                                                          \
  "Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, *, float eps=1e-6, " \
  "float weight_offset=0.0, Tensor? positions=None, bool interleaved=False"
#define LOSS                                                                                                         \
  "Tensor x, Tensor weight, Tensor target, Tensor? bias=None, *, int ignore_index=-100, float label_smoothing=0.0, " \
  "float softcap=0.0"
#define INTO ", Tensor(a!) out, Tensor(b!)? lse=None) -> ()"

STABLE_TORCH_LIBRARY(fastops, m) {
  m.def("attention(" DENSE RETURNS);
  m.def("attention_out(" DENSE INTO);
  m.def("attention_varlen(" VARLEN RETURNS);
  m.def("attention_varlen_out(" VARLEN INTO);
  m.def("attention_paged(" PAGED RETURNS);
  m.def("attention_paged_out(" PAGED INTO);
  // -> dq, dk, dv, dsinks (empty without sinks)
  m.def("attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, " DENSE GRADIENTS);
  m.def("attention_varlen_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, " VARLEN GRADIENTS);
  // -> the new seq_lens
  m.def(
      "kv_append(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor? cu_seqlens=None, *, Tensor(c!)? k_scale=None, Tensor(d!)? k_zero=None, Tensor(e!)? k_min=None, "
      "Tensor(f!)? v_scale=None, Tensor(g!)? v_zero=None, Tensor(h!)? v_min=None, Tensor(i!)? k_recent=None, "
      "Tensor(j!)? v_recent=None, Tensor(k!)? packed_lens=None, int k_bits=0, int v_bits=0) -> Tensor");
  m.def("merge_states(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)");
  m.def(
      "scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
      "float dropout_p=0.0, bool is_causal=False, float? scale=None, bool enable_gqa=False) -> Tensor");
  // codes, scales, zeros and mins as int4_pack and docs/ops/int4_linear.md lay them out
  m.def("int4_pack(Tensor codes) -> Tensor");
  m.def("int4_pack24(Tensor codes, Tensor kept) -> Tensor");
  m.def("int4_linear(Tensor x, Tensor codes, Tensor scales, int n, " INT4 ") -> Tensor");
  m.def("int4_linear_out(Tensor x, Tensor codes, Tensor scales, " INT4 ", Tensor(a!) out) -> ()");
  m.def("lut_linear(" LUT ") -> Tensor");
  m.def("lut_linear_out(" LUT ", *, Tensor(a!) out) -> ()");
  m.def("rms_norm(Tensor x, Tensor? weight=None, " AFFINE ") -> Tensor");
  m.def("rms_norm_out(Tensor x, Tensor? weight=None, " AFFINE ", Tensor(a!) out) -> ()");
  m.def("fused_add_rms_norm(Tensor(a!) x, Tensor(b!) residual, Tensor? weight=None, " AFFINE ") -> ()");
  m.def("layer_norm(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-5) -> Tensor");
  m.def("layer_norm_out(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-5, *, Tensor(a!) out) -> ()");
  // -> out, residual + x, scales, mean, rstd (empty where not asked for); quant: 0 none, 1 int8, 2 float8_e4m3fn
  m.def("norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, " AFFINE
        ", bool layer=False, int quant=0, bool stats=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "norm_backward(Tensor dout, Tensor? dsum, Tensor s, Tensor? weight, Tensor mean, Tensor rstd, *, "
      "float weight_offset=0.0, bool layer=False, bool dweight=True, bool dbias=False) -> (Tensor, Tensor, Tensor)");
  m.def("silu_and_mul(Tensor x) -> Tensor");
  m.def("silu_and_mul_out(Tensor x, *, Tensor(a!) out) -> ()");
  m.def("gelu_and_mul(Tensor x, *, str approximate='tanh') -> Tensor");
  m.def("gelu_and_mul_out(Tensor x, *, str approximate='tanh', Tensor(a!) out) -> ()");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_out(Tensor gate, Tensor up, *, Tensor(a!) out) -> ()");
  m.def("geglu(Tensor gate, Tensor up, *, str approximate='tanh') -> Tensor");
  m.def("geglu_out(Tensor gate, Tensor up, *, str approximate='tanh', Tensor(a!) out) -> ()");
  // activation: 0 SiLU, 1 GELU (tanh form), 2 GELU
  m.def("gated_backward(Tensor dout, Tensor gate, Tensor up, int activation) -> (Tensor, Tensor)");
  m.def("and_mul_backward(Tensor dout, Tensor x, int activation) -> Tensor");
  m.def("apply_rope(" ROPE ") -> (Tensor, Tensor)");
  m.def("apply_rope_out(" ROPE ", Tensor(a!) q_out, Tensor(b!)? k_out=None) -> ()");
  m.def("qk_norm_rope(" QK_NORM ") -> (Tensor, Tensor)");
  m.def("qk_norm_rope_out(" QK_NORM
        ", Tensor? v=None, Tensor? slots=None, Tensor(a!) q_out, Tensor(b!)? k_out=None, Tensor(c!)? k_cache=None, "
        "Tensor(d!)? v_cache=None) -> ()");
  m.def("linear_cross_entropy(" LOSS ") -> (Tensor, Tensor)");
  m.def("linear_cross_entropy_backward(Tensor grad, Tensor lse, " LOSS
        ", bool dx=True, bool dweight=True, bool dbias=False) -> (Tensor, Tensor, Tensor)");
  m.def("scale_add(Tensor x, Tensor y, *, float alpha=1.0) -> Tensor");
  m.def("scale_add_out(Tensor x, Tensor y, *, float alpha=1.0, Tensor(a!) out) -> ()");
}

namespace fastops::binding {
namespace {
thread_local const char* t_variant = "";
}
void remember_variant(const char* name) { t_variant = name ? name : ""; }
extern "C" const char* fastops_torch_last_variant(void) { return t_variant; }
}  // namespace fastops::binding
