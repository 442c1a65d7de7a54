// The operators that have direct calls: what each argument is.
#include <cmath>
#include <utility>

#include "python/direct.h"
#include "torch/halves.h"
#include "torch/mask.h"

namespace fastops::direct {
namespace {

using Norm = fastops_norm_desc;
using Gated = fastops_gated_desc;
using Rope = fastops_rope_desc;
using Int4 = fastops_int4_linear_desc;
using Lut = fastops_lut_linear_desc;
using Attention = fastops_attention_desc;
using ScaleAdd = fastops_scale_add_desc;

bool in_place(Norm& d) {
  d.out = d.x;
  d.sum = d.residual;
  return true;
}
bool layer(Norm& d) {
  d.layer = 1;
  return true;
}
bool sum_in_place(Norm& d) {
  d.sum = d.residual;
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
constexpr auto norm = &operate<Norm, Norm, &fastops_norm, &fastops_norm_workspace, Finish, Fields...>;
template <bool (*Finish)(Gated&), class... Fields>
constexpr auto gated = &operate<Gated, Gated, &fastops_gated, nullptr, Finish, Fields...>;
template <class... Fields>
constexpr auto rope = &operate<Rope, Rope, &fastops_rope, nullptr, &nothing<Rope>, Fields...>;

constexpr auto rms_norm = norm<&nothing<Norm>, Input<&Norm::x>, Optional<&Norm::weight>, Number<&Norm::eps>,
                               Number<&Norm::weight_offset>, Result<&Norm::out, 0>>;
constexpr auto fused_add_rms_norm = norm<&in_place, Updated<&Norm::x>, Updated<&Norm::residual>,
                                         Optional<&Norm::weight>, Number<&Norm::eps>, Number<&Norm::weight_offset>>;
constexpr auto layer_norm = norm<&layer, Input<&Norm::x>, Optional<&Norm::weight>, Optional<&Norm::bias>,
                                 Number<&Norm::eps>, Result<&Norm::out, 0>>;

// New codes of the given torch.dtype, and a scale for each row.
struct Codes {
  static bool take(Call& call, Norm& d, PyObject* object) {
    const fastops_dtype dtype = dtype_from(object);
    if (dtype == FASTOPS_DTYPE_NONE) return false;
    return call.result(Py_None, [&] { return empty(d.x.size, d.x.ndim, dtype); }) && view(call.results[0], &d.out) &&
           call.result(Py_None, [&] { return empty(d.x.size, d.x.ndim - 1); }) && view(call.results[1], &d.scales);
  }
};

constexpr auto rms_norm_quantised = norm<&nothing<Norm>, Input<&Norm::x>, Optional<&Norm::weight>, Number<&Norm::eps>,
                                         Number<&Norm::weight_offset>, Codes>;
constexpr auto fused_add_rms_norm_quantised =
    norm<&sum_in_place, Input<&Norm::x>, Updated<&Norm::residual>, Optional<&Norm::weight>, Number<&Norm::eps>,
         Number<&Norm::weight_offset>, Codes>;
constexpr auto layer_norm_quantised =
    norm<&layer, Input<&Norm::x>, Optional<&Norm::weight>, Optional<&Norm::bias>, Number<&Norm::eps>, Codes>;

struct HalfResult {
  static bool take(Call& call, Gated& d, PyObject* object) {
    return call.result(object, [&] { return like_with(d.gate, d.gate.size[d.gate.ndim - 1] / 2); }) &&
           view(call.results[0], &d.out);
  }
};

template <fastops_activation Kind>
constexpr auto and_mul = gated<&halves<Kind>, Input<&Gated::gate>, HalfResult>;
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
    &operate<Int4, Int4, &fastops_int4_linear, &fastops_int4_linear_workspace, &nothing<Int4>, Rows<&Int4::x>,
             Columns<&Int4::x>, Ignored, Input<&Int4::codes>, Input<&Int4::scales>, Optional<&Int4::zeros>,
             Optional<&Int4::mins>, Optional<&Int4::perm>, Optional<&Int4::column_scales>,
             Optional<&Int4::column_zeros>, Flag<&Int4::eight>, Optional<&Int4::bias>, Whole<&Int4::activations>,
             RowsResult<&Int4::out, 0, 2>>;

constexpr auto lut_linear =
    &operate<Lut, Lut, &fastops_lut_linear, &fastops_lut_linear_workspace, &nothing<Lut>, Rows<&Lut::x>,
             Columns<&Lut::x>, Ignored, Input<&Lut::codes>, Input<&Lut::table>, Optional<&Lut::row_starts>,
             Optional<&Lut::columns>, Optional<&Lut::values>, Optional<&Lut::bias>, RowsResult<&Lut::out, 0, 2>>;

// What the contract has beyond the kernels (csrc/torch/attention.cpp), and the scale that was not given.
bool attend(Attention& d) {
  const int64_t head = d.q.size[d.q.ndim - 1], head_v = d.v.size[d.v.ndim - 1];
  if (head <= 0 || head % 8 != 0 || head_v % 8 != 0) return false;
  if (std::isnan(d.scale)) d.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head)));
  return true;
}

// A mask of q and k, or None.
struct Mask {
  static bool take(Call&, Attention& d, PyObject* object) {
    if (object == Py_None) return true;
    return d.q.ndim == 4 && d.k.ndim == 4 && view(object, &d.bias, true) && binding::broadcast_mask(d, &d.bias);
  }
};

// True for a new LSE as the second result, False for none.
struct Lse {
  static bool take(Call& call, Attention& d, PyObject* object) {
    if (object != Py_True) return object == Py_False;
    const int n = d.q.ndim - 1;
    if (n < 2) return false;
    int64_t size[FASTOPS_MAX_DIMS];  // heads before positions
    for (int i = 0; i < n - 2; ++i) size[i] = d.q.size[i];
    size[n - 2] = d.q.size[n - 1];
    size[n - 1] = d.q.size[n - 2];
    return call.result(Py_None, [&] { return empty(size, n); }) && view(call.results[1], &d.lse);
  }
};

template <class... Fields>
constexpr auto attention_of =
    &operate<Attention, Attention, &fastops_attention_fwd, &fastops_attention_workspace, &attend, Input<&Attention::q>,
             Input<&Attention::k>, Input<&Attention::v>, Fields..., OptionalNumber<&Attention::scale>,
             Whole<&Attention::window_left>, Whole<&Attention::window_right>, Number<&Attention::softcap>,
             Optional<&Attention::sinks>, Optional<&Attention::alibi_slopes>,
             ResultWith<&Attention::out, 0, &Attention::q, &Attention::v>, Lse>;
constexpr auto attention = attention_of<Mask>;
constexpr auto attention_varlen = attention_of<Input<&Attention::cu_seqlens_q>, Input<&Attention::cu_seqlens_k>>;
constexpr auto attention_paged =
    attention_of<Input<&Attention::block_table>, Input<&Attention::seq_lens>, Optional<&Attention::cu_seqlens_q>>;

// With a quantised cache.
struct Quantised : Attention {
  fastops_kv_quant quant{};
};

template <auto Member>
struct Part {
  template <class D>
  static bool take(Call&, D& d, PyObject* object) {
    return object == Py_None || view(object, &(d.quant.*Member), true);
  }
};

template <auto Member>
struct Bits {
  template <class D>
  static bool take(Call& call, D& d, PyObject* object) {
    return Whole<Member>::take(call, d.quant, object);
  }
};

struct QuantisedResult {
  static bool take(Call& call, Quantised& d, PyObject* object) {
    const int bits = d.quant.v_bits == 4 || d.quant.v_bits == 2 ? d.quant.v_bits : 8;
    const int64_t head_v = d.v.size[d.v.ndim - 1] * 8 / bits;
    return call.result(object, [&] { return like_with(d.q, head_v); }) && view(call.results[0], &d.out);
  }
};

bool attend_quantised(Quantised& d) {
  d.struct_size = sizeof(Attention);
  d.quant.struct_size = sizeof d.quant;
  d.kv = &d.quant;
  return d.out.size[d.out.ndim - 1] % 8 == 0 && attend(d);
}

using Kv = fastops_kv_quant;
constexpr auto attention_paged_quantised =
    &operate<Quantised, Attention, &fastops_attention_fwd, &fastops_attention_workspace, &attend_quantised,
             Input<&Attention::q>, Input<&Attention::k>, Input<&Attention::v>, Input<&Attention::block_table>,
             Input<&Attention::seq_lens>, Optional<&Attention::cu_seqlens_q>, Part<&Kv::k_scale>, Part<&Kv::k_zero>,
             Part<&Kv::k_min>, Part<&Kv::v_scale>, Part<&Kv::v_zero>, Part<&Kv::v_min>, Part<&Kv::k_recent>,
             Part<&Kv::v_recent>, Part<&Kv::packed_lens>, Bits<&Kv::k_bits>, Bits<&Kv::v_bits>,
             OptionalNumber<&Attention::scale>, Whole<&Attention::window_left>, Whole<&Attention::window_right>,
             Number<&Attention::softcap>, Optional<&Attention::sinks>, Optional<&Attention::alibi_slopes>,
             QuantisedResult, Lse>;

struct Append : fastops_kv_append_desc {
  fastops_kv_quant quant{};
};

template <auto Member>
struct UpdatedPart {
  static bool take(Call& call, Append& d, PyObject* object) {
    if (object != Py_None) call.written[call.n_written++] = object;
    return Part<Member>::take(call, d, object);
  }
};

bool append(Append& d) {
  d.struct_size = sizeof(fastops_kv_append_desc);
  d.quant.struct_size = sizeof d.quant;
  const fastops_kv_quant& q = d.quant;
  const fastops_tensor* const parts[] = {&q.k_scale, &q.v_scale, &q.k_recent, &q.v_recent, &q.packed_lens};
  bool quantised = d.k_cache.dtype != d.k.dtype || d.v_cache.dtype != d.k.dtype || q.k_bits != 0 || q.v_bits != 0;
  for (const fastops_tensor* part : parts) quantised = quantised || part->data != nullptr;
  if (quantised) d.kv = &d.quant;
  return true;
}

constexpr auto kv_append =
    &operate<Append, fastops_kv_append_desc, &fastops_kv_append, nullptr, &append, Input<&Append::k>, Input<&Append::v>,
             Updated<&Append::k_cache>, Updated<&Append::v_cache>, Input<&Append::block_table>,
             Input<&Append::seq_lens>, Optional<&Append::cu_seqlens>, UpdatedPart<&Kv::k_scale>,
             UpdatedPart<&Kv::k_zero>, UpdatedPart<&Kv::k_min>, UpdatedPart<&Kv::v_scale>, UpdatedPart<&Kv::v_zero>,
             UpdatedPart<&Kv::v_min>, UpdatedPart<&Kv::k_recent>, UpdatedPart<&Kv::v_recent>,
             UpdatedPart<&Kv::packed_lens>, Bits<&Kv::k_bits>, Bits<&Kv::v_bits>, Result<&Append::new_lens, 5>>;

// torch's own order, [B,H,S,D] for [B,S,H,D].
bool swap_heads(fastops_tensor* t) {
  if (t->ndim != 4) return false;
  std::swap(t->size[1], t->size[2]);
  std::swap(t->stride[1], t->stride[2]);
  return true;
}

template <auto Member>
struct Heads {
  static bool take(Call&, Attention& d, PyObject* object) {
    return view(object, &(d.*Member)) && swap_heads(&(d.*Member));
  }
};

struct HeadsResult {
  static bool take(Call& call, Attention& d, PyObject* object) {
    fastops_tensor like = d.q;
    return swap_heads(&like) && call.result(object, [&] { return like_with(like, d.v.size[3]); }) &&
           Heads<&Attention::out>::take(call, d, call.results[0]);
  }
};

struct Causal {
  static bool take(Call&, Attention& d, PyObject* object) {
    d.align = FASTOPS_ALIGN_TOP_LEFT;
    d.window_left = -1;
    d.window_right = object == Py_True ? 0 : -1;
    return object == Py_False || (object == Py_True && d.bias.ndim == 0);
  }
};

struct Grouped {
  static bool take(Call&, Attention& d, PyObject* object) {
    return object == Py_True || (object == Py_False && d.q.size[2] == d.k.size[2]);
  }
};

bool any_head(Attention& d) {
  if (std::isnan(d.scale)) d.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d.q.size[3])));
  return d.q.size[3] > 0;
}

constexpr auto sdpa = &operate<Attention, Attention, &fastops_attention_fwd, &fastops_attention_workspace, &any_head,
                               Heads<&Attention::q>, Heads<&Attention::k>, Heads<&Attention::v>, Mask, Causal,
                               OptionalNumber<&Attention::scale>, Grouped, HeadsResult>;

// The states of one call, as lists: as many outs as lses.
struct Merge : fastops_merge_states_desc {
  static constexpr Py_ssize_t kMost = 16;
  fastops_tensor states[2][kMost];

  bool take(int i, PyObject* list) {
    if (!PyList_CheckExact(list) || PyList_GET_SIZE(list) < 1 || PyList_GET_SIZE(list) > kMost) return false;
    count = static_cast<int32_t>(PyList_GET_SIZE(list));
    for (int n = 0; n < count; ++n)
      if (!view(PyList_GET_ITEM(list, n), &states[i][n])) return false;
    return true;
  }
};

struct Outs {
  static bool take(Call& call, Merge& d, PyObject* object) {
    if (!d.take(0, object)) return false;
    d.outs = d.states[0];
    return call.result(Py_None, [&] { return like(PyList_GET_ITEM(object, 0)); }) && view(call.results[0], &d.out);
  }
};

struct Lses {
  static bool take(Call& call, Merge& d, PyObject* object) {
    const int32_t outs = d.count;
    if (!d.take(1, object) || d.count != outs) return false;
    d.lses = d.states[1];
    const fastops_tensor& first = d.states[1][0];
    return call.result(Py_None, [&] { return empty(first.size, first.ndim); }) && view(call.results[1], &d.lse);
  }
};

bool merge(Merge& d) {
  d.struct_size = sizeof(fastops_merge_states_desc);
  return true;
}

constexpr auto merge_states =
    &operate<Merge, fastops_merge_states_desc, &fastops_merge_states, nullptr, &merge, Outs, Lses>;

constexpr auto scale_add =
    &operate<ScaleAdd, ScaleAdd, &fastops_scale_add, nullptr, &nothing<ScaleAdd>, Input<&ScaleAdd::x>,
             Input<&ScaleAdd::y>, Number<&ScaleAdd::alpha>, Result<&ScaleAdd::out, 0>>;

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
                              method("direct_rms_norm_quantised", rms_norm_quantised),
                              method("direct_fused_add_rms_norm_quantised", fused_add_rms_norm_quantised),
                              method("direct_layer_norm_quantised", layer_norm_quantised),
                              method("direct_silu_and_mul", and_mul<FASTOPS_SILU>),
                              method("direct_gelu_and_mul_tanh", and_mul<FASTOPS_GELU_TANH>),
                              method("direct_gelu_and_mul_none", and_mul<FASTOPS_GELU>),
                              method("direct_swiglu", pair<FASTOPS_SILU>),
                              method("direct_geglu_tanh", pair<FASTOPS_GELU_TANH>),
                              method("direct_geglu_none", pair<FASTOPS_GELU>),
                              method("direct_apply_rope", apply_rope),
                              method("direct_qk_norm_rope", qk_norm_rope),
                              method("direct_int4_linear", int4_linear),
                              method("direct_lut_linear", lut_linear),
                              method("direct_attention", attention),
                              method("direct_attention_varlen", attention_varlen),
                              method("direct_attention_paged", attention_paged),
                              method("direct_attention_paged_quantised", attention_paged_quantised),
                              method("direct_merge_states", merge_states),
                              method("direct_kv_append", kv_append),
                              method("direct_scaled_dot_product_attention", sdpa),
                              method("direct_scale_add", scale_add),
                              {nullptr, nullptr, 0, nullptr}};
  return all;
}

}  // namespace fastops::direct
