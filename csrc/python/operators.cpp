// The operators that have direct calls: what each argument is.
#include <cmath>

#include "python/direct.h"
#include "torch/halves.h"

namespace fastops::direct {
namespace {

using Norm = fastops_norm_desc;
using Gated = fastops_gated_desc;
using Rope = fastops_rope_desc;
using Int4 = fastops_int4_linear_desc;
using Attention = fastops_attention_desc;

bool in_place(Norm& d) {
  d.out = d.x;
  d.sum = d.residual;
  return true;
}
bool layer(Norm& d) {
  d.layer = 1;
  return true;
}
template <fastops_activation Kind>
bool whole(Gated& d) {
  d.activation = Kind;
  return true;
}
template <fastops_activation Kind>
bool halves(Gated& d) {
  d.activation = Kind;
  return binding::halve(&d.gate, &d.up);
}

template <bool (*Finish)(Norm&), class... Fields>
constexpr auto norm = &operate<Norm, &fastops_norm, &fastops_norm_workspace, Finish, Fields...>;
template <bool (*Finish)(Gated&), class... Fields>
constexpr auto gated = &operate<Gated, &fastops_gated, nullptr, Finish, Fields...>;
template <class... Fields>
constexpr auto rope = &operate<Rope, &fastops_rope, nullptr, &nothing<Rope>, Fields...>;

constexpr auto rms_norm = norm<&nothing<Norm>, Input<&Norm::x>, Optional<&Norm::weight>, Number<&Norm::eps>,
                               Number<&Norm::weight_offset>, Result<&Norm::out, 0>>;
constexpr auto fused_add_rms_norm = norm<&in_place, Updated<&Norm::x>, Updated<&Norm::residual>,
                                         Optional<&Norm::weight>, Number<&Norm::eps>, Number<&Norm::weight_offset>>;
constexpr auto layer_norm = norm<&layer, Input<&Norm::x>, Optional<&Norm::weight>, Optional<&Norm::bias>,
                                 Number<&Norm::eps>, Result<&Norm::out, 0>>;

template <fastops_activation Kind>
constexpr auto and_mul = gated<&halves<Kind>, Input<&Gated::gate>, Result<&Gated::out, 1>>;
template <fastops_activation Kind>
constexpr auto pair = gated<&whole<Kind>, Input<&Gated::gate>, Input<&Gated::up>, Result<&Gated::out, 0>>;

constexpr auto apply_rope =
    rope<Input<&Rope::q>, Optional<&Rope::k>, Input<&Rope::cos>, Input<&Rope::sin>, Optional<&Rope::positions>,
         Flag<&Rope::interleaved>, Result<&Rope::q_out, 0>, Result<&Rope::k_out, 1>>;
constexpr auto qk_norm_rope =
    rope<Input<&Rope::q>, Optional<&Rope::k>, Optional<&Rope::q_weight>, Optional<&Rope::k_weight>, Input<&Rope::cos>,
         Input<&Rope::sin>, Number<&Rope::eps>, Number<&Rope::weight_offset>, Optional<&Rope::positions>,
         Flag<&Rope::interleaved>, Optional<&Rope::v>, Optional<&Rope::slots>, OptionalUpdated<&Rope::k_cache>,
         OptionalUpdated<&Rope::v_cache>, Result<&Rope::q_out, 0>, Result<&Rope::k_out, 1>>;

constexpr auto int4_linear =
    &operate<Int4, &fastops_int4_linear, &fastops_int4_linear_workspace, &nothing<Int4>, Rows<&Int4::x>,
             Columns<&Int4::x>, Ignored, Input<&Int4::codes>, Input<&Int4::scales>, Optional<&Int4::zeros>,
             Optional<&Int4::mins>, Optional<&Int4::perm>, Optional<&Int4::column_scales>,
             Optional<&Int4::column_zeros>, Flag<&Int4::eight>, Optional<&Int4::bias>, Flag<&Int4::int8>,
             RowsResult<&Int4::out, 0, 2>>;

// What the contract has beyond the kernels (csrc/torch/attention.cpp), and the scale that was not given.
bool attend(Attention& d) {
  const int64_t head = d.q.size[d.q.ndim - 1], head_v = d.v.size[d.v.ndim - 1];
  if (head <= 0 || head % 8 != 0 || head_v % 8 != 0) return false;
  if (std::isnan(d.scale)) d.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head)));
  return true;
}

template <class... Fields>
constexpr auto attention_of =
    &operate<Attention, &fastops_attention_fwd, &fastops_attention_workspace, &attend, Input<&Attention::q>,
             Input<&Attention::k>, Input<&Attention::v>, Fields..., OptionalNumber<&Attention::scale>,
             Whole<&Attention::window_left>, Whole<&Attention::window_right>, Number<&Attention::softcap>,
             Optional<&Attention::sinks>, Optional<&Attention::alibi_slopes>,
             ResultWith<&Attention::out, 0, &Attention::q, &Attention::v>>;
constexpr auto attention = attention_of<>;
constexpr auto attention_paged =
    attention_of<Input<&Attention::block_table>, Input<&Attention::seq_lens>, Optional<&Attention::cu_seqlens_q>>;

using Function = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
PyMethodDef method(const char* name, Function function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

}  // namespace

PyMethodDef* methods() {
  static PyMethodDef all[] = {method("direct_begin", &begin),
                              method("direct_rms_norm", rms_norm),
                              method("direct_fused_add_rms_norm", fused_add_rms_norm),
                              method("direct_layer_norm", layer_norm),
                              method("direct_silu_and_mul", and_mul<FASTOPS_SILU>),
                              method("direct_gelu_and_mul_tanh", and_mul<FASTOPS_GELU_TANH>),
                              method("direct_gelu_and_mul_none", and_mul<FASTOPS_GELU>),
                              method("direct_swiglu", pair<FASTOPS_SILU>),
                              method("direct_geglu_tanh", pair<FASTOPS_GELU_TANH>),
                              method("direct_geglu_none", pair<FASTOPS_GELU>),
                              method("direct_apply_rope", apply_rope),
                              method("direct_qk_norm_rope", qk_norm_rope),
                              method("direct_int4_linear", int4_linear),
                              method("direct_attention", attention),
                              method("direct_attention_paged", attention_paged),
                              {nullptr, nullptr, 0, nullptr}};
  return all;
}

}  // namespace fastops::direct
