// Every operator's schema, on one page. Implementations register themselves per file (STABLE_TORCH_LIBRARY_IMPL); fake
// kernels and autograd live in fastops/ops/. Without return_lse the LSE is an empty tensor.
#include "torch/tensor.h"

#define TAIL                                                                                           \
  "bool causal=False, float? scale=None, int window_left=-1, int window_right=-1, float softcap=0.0, " \
  "Tensor? sinks=None, Tensor? alibi_slopes=None"
#define DENSE "Tensor q, Tensor k, Tensor v, *, " TAIL ", Tensor? attn_mask=None, bool top_left=False"
#define VARLEN "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, *, " TAIL
#define PAGED \
  "Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, Tensor? cu_seqlens_q=None, *, " TAIL
#define RETURNS ", bool return_lse=False) -> (Tensor, Tensor)"
#define GRADIENTS ") -> (Tensor, Tensor, Tensor, Tensor)"
#define INT4 "Tensor? zeros=None, Tensor? mins=None, Tensor? perm=None, Tensor? bias=None, *, bool int8=False"
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
  m.def("merge_states(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)");
  m.def(
      "scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
      "float dropout_p=0.0, bool is_causal=False, float? scale=None, bool enable_gqa=False) -> Tensor");
  // codes, scales, zeros and mins as int4_pack and docs/ops/int4_linear.md lay them out
  m.def("int4_pack(Tensor codes) -> Tensor");
  m.def("int4_linear(Tensor x, Tensor codes, Tensor scales, int n, " INT4 ") -> Tensor");
  m.def("int4_linear_out(Tensor x, Tensor codes, Tensor scales, " INT4 ", Tensor(a!) out) -> ()");
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
