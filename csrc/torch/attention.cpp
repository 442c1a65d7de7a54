// attention, attention_varlen, attention_paged: tensors to descriptors, nothing else.
#include <cmath>
#include <tuple>

#include "torch/mask.h"
#include "torch/register.h"

namespace fastops::binding {
namespace {

struct Options {
  bool causal;
  std::optional<double> scale;
  int64_t window_left, window_right;
  double softcap;
  const OptTensor &sinks, &alibi;
};

constexpr Function<fastops_attention_desc> kForward{&fastops_attention_fwd, &fastops_attention_workspace,
                                                    kCudaAttention};
constexpr Function<fastops_attention_bwd_desc> kBackward{&fastops_attention_bwd, &fastops_attention_bwd_workspace,
                                                         kCudaAttentionBwd};

fastops_attention_desc describe(const Place& at, const Tensor& q, const Tensor& k, const Tensor& v, const Options& o,
                                int64_t head_v) {
  fastops_attention_desc d{};
  d.struct_size = sizeof d;
  d.q = at.view(q, "q");
  d.k = at.view(k, "k");
  d.v = at.view(v, "v");
  d.sinks = at.view(o.sinks, "sinks");
  d.alibi_slopes = at.view(o.alibi, "alibi_slopes");
  const int64_t head = d.q.ndim > 0 ? d.q.size[d.q.ndim - 1] : 1;
  if (head % 8 != 0 || head_v % 8 != 0)  // the kernels take any size (sdpa needs it); the contract of these does not
    raise(FASTOPS_ERR_VALUE, "attention: head sizes D and Dv must be multiples of 8");
  d.scale = static_cast<float>(o.scale ? *o.scale : 1.0 / std::sqrt(static_cast<double>(head > 0 ? head : 1)));
  d.softcap = static_cast<float>(o.softcap);
  d.window_left = o.window_left;
  d.window_right = o.causal ? 0 : o.window_right;
  return d;
}

fastops_attention_desc describe(const Place& at, const Tensor& q, const Tensor& k, const Tensor& v, const Options& o) {
  return describe(at, q, k, v, o, v.dim() > 0 ? v.size(v.dim() - 1) : 8);
}

void run(const Place& at, fastops_attention_desc& d, const Tensor& out, const OptTensor& lse) {
  d.out = at.view(out, "out");
  d.lse = at.view(lse, "lse");
  at.call(kForward, d);
}

fastops_tensor mask_of(const Place& at, const OptTensor& mask, const fastops_attention_desc& d) {
  fastops_tensor m = at.view(mask, "attn_mask");
  if (mask && d.q.ndim == 4 && d.k.ndim == 4 && !broadcast_mask(d, &m))
    raise(FASTOPS_ERR_VALUE, "attention: attn_mask must have 2 to 4 dimensions [B, Hq, Sq, Sk]");
  return m;
}

using Pair = std::tuple<Tensor, Tensor>;

int64_t dim(const Tensor& t, int64_t i) { return t.dim() > i ? t.size(i) : 0; }

Tensor empty_lse(const Place& at) { return at.empty({0}, ScalarType::Float); }

Pair attention(Tensor q, Tensor k, Tensor v, bool causal, std::optional<double> scale, int64_t wl, int64_t wr,
               double softcap, OptTensor sinks, OptTensor alibi, OptTensor mask, bool top_left, bool return_lse) {
  const Place at(q);
  fastops_attention_desc d = describe(at, q, k, v, {causal, scale, wl, wr, softcap, sinks, alibi});
  d.align = top_left ? FASTOPS_ALIGN_TOP_LEFT : FASTOPS_ALIGN_BOTTOM_RIGHT;
  d.bias = mask_of(at, mask, d);
  Tensor out = at.empty({dim(q, 0), dim(q, 1), dim(q, 2), dim(v, 3)}, scalar_type(q));
  Tensor lse = return_lse ? at.empty({dim(q, 0), dim(q, 2), dim(q, 1)}, ScalarType::Float) : empty_lse(at);
  run(at, d, out, return_lse ? OptTensor(lse) : std::nullopt);
  return {out, lse};
}

void attention_out(Tensor q, Tensor k, Tensor v, bool causal, std::optional<double> scale, int64_t wl, int64_t wr,
                   double softcap, OptTensor sinks, OptTensor alibi, OptTensor mask, bool top_left, Tensor out,
                   OptTensor lse) {
  const Place at(q);
  fastops_attention_desc d = describe(at, q, k, v, {causal, scale, wl, wr, softcap, sinks, alibi});
  d.align = top_left ? FASTOPS_ALIGN_TOP_LEFT : FASTOPS_ALIGN_BOTTOM_RIGHT;
  d.bias = mask_of(at, mask, d);
  run(at, d, out, lse);
}

fastops_attention_desc describe_varlen(const Place& at, const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& cu_q, const Tensor& cu_k, const Options& o) {
  fastops_attention_desc d = describe(at, q, k, v, o);
  d.cu_seqlens_q = at.view(cu_q, "cu_seqlens_q");
  d.cu_seqlens_k = at.view(cu_k, "cu_seqlens_k");
  return d;
}

struct PagedArguments {
  fastops_attention_desc d;
  fastops_kv_quant kv{};
  int64_t head_v;  // channels of a value
};

// A whole paged call: quantised when the cache is not q's dtype, or has anything that only such a cache has.
struct Quant {
  const OptTensor &k_scale, &k_zero, &k_min, &v_scale, &v_zero, &v_min, &k_recent, &v_recent, &packed_lens;
  int64_t k_bits, v_bits;
};

bool is_plain(const Tensor& q, const Tensor& k, const Tensor& v, const Quant& x) {
  const int32_t dtype = dtype_of(q);
  return dtype_of(k) == dtype && dtype_of(v) == dtype && !x.k_scale && !x.v_scale && !x.k_recent && !x.v_recent &&
         !x.packed_lens;
}

void describe_paged(const Place& at, PagedArguments& a, const Tensor& q, const Tensor& k, const Tensor& v,
                    const Tensor& table, const Tensor& lens, const OptTensor& cu_q, const Options& o, const Quant& x) {
  const int64_t columns = v.dim() > 0 ? v.size(v.dim() - 1) : 0;
  a.head_v = x.v_bits == 4 ? 2 * columns : x.v_bits == 2 ? 4 * columns : columns;
  a.d = describe(at, q, k, v, o, a.head_v);
  a.d.block_table = at.view(table, "block_table");
  a.d.seq_lens = at.view(lens, "seq_lens");
  a.d.cu_seqlens_q = at.view(cu_q, "cu_seqlens_q");
  if (is_plain(q, k, v, x)) return;
  a.kv.struct_size = sizeof a.kv;
  a.kv.k_bits = static_cast<int32_t>(x.k_bits);
  a.kv.v_bits = static_cast<int32_t>(x.v_bits);
  a.kv.k_scale = at.view(x.k_scale, "k_scale");
  a.kv.k_zero = at.view(x.k_zero, "k_zero");
  a.kv.k_min = at.view(x.k_min, "k_min");
  a.kv.v_scale = at.view(x.v_scale, "v_scale");
  a.kv.v_zero = at.view(x.v_zero, "v_zero");
  a.kv.v_min = at.view(x.v_min, "v_min");
  a.kv.k_recent = at.view(x.k_recent, "k_recent");
  a.kv.v_recent = at.view(x.v_recent, "v_recent");
  a.kv.packed_lens = at.view(x.packed_lens, "packed_lens");
  a.d.kv = &a.kv;
}

Pair finish_ragged(const Place& at, fastops_attention_desc& d, const Tensor& q, int64_t head_v, bool return_lse) {
  Tensor out = at.empty({dim(q, 0), dim(q, 1), head_v}, scalar_type(q));
  Tensor lse = return_lse ? at.empty({dim(q, 1), dim(q, 0)}, ScalarType::Float) : empty_lse(at);
  run(at, d, out, return_lse ? OptTensor(lse) : std::nullopt);
  return {out, lse};
}

Pair attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, bool causal, std::optional<double> scale,
                      int64_t wl, int64_t wr, double softcap, OptTensor sinks, OptTensor alibi, bool return_lse) {
  const Place at(q);
  auto d = describe_varlen(at, q, k, v, cu_q, cu_k, {causal, scale, wl, wr, softcap, sinks, alibi});
  return finish_ragged(at, d, q, v.dim() > 0 ? v.size(v.dim() - 1) : 0, return_lse);
}

void attention_varlen_out(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, bool causal,
                          std::optional<double> scale, int64_t wl, int64_t wr, double softcap, OptTensor sinks,
                          OptTensor alibi, Tensor out, OptTensor lse) {
  const Place at(q);
  auto d = describe_varlen(at, q, k, v, cu_q, cu_k, {causal, scale, wl, wr, softcap, sinks, alibi});
  run(at, d, out, lse);
}

Pair attention_paged(Tensor q, Tensor k, Tensor v, Tensor table, Tensor lens, OptTensor cu_q, bool causal,
                     std::optional<double> scale, int64_t wl, int64_t wr, double softcap, OptTensor sinks,
                     OptTensor alibi, OptTensor ks, OptTensor kz, OptTensor km, OptTensor vs, OptTensor vz,
                     OptTensor vm, OptTensor kr, OptTensor vr, OptTensor packed, int64_t k_bits, int64_t v_bits,
                     bool return_lse) {
  const Place at(q);
  PagedArguments a;
  describe_paged(at, a, q, k, v, table, lens, cu_q, {causal, scale, wl, wr, softcap, sinks, alibi},
                 {ks, kz, km, vs, vz, vm, kr, vr, packed, k_bits, v_bits});
  return finish_ragged(at, a.d, q, a.head_v, return_lse);
}

void attention_paged_out(Tensor q, Tensor k, Tensor v, Tensor table, Tensor lens, OptTensor cu_q, bool causal,
                         std::optional<double> scale, int64_t wl, int64_t wr, double softcap, OptTensor sinks,
                         OptTensor alibi, OptTensor ks, OptTensor kz, OptTensor km, OptTensor vs, OptTensor vz,
                         OptTensor vm, OptTensor kr, OptTensor vr, OptTensor packed, int64_t k_bits, int64_t v_bits,
                         Tensor out, OptTensor lse) {
  const Place at(q);
  PagedArguments a;
  describe_paged(at, a, q, k, v, table, lens, cu_q, {causal, scale, wl, wr, softcap, sinks, alibi},
                 {ks, kz, km, vs, vz, vm, kr, vr, packed, k_bits, v_bits});
  run(at, a.d, out, lse);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensor like(const Place& at, const Tensor& t) {
  if (t.dim() == 4) return at.empty({t.size(0), t.size(1), t.size(2), t.size(3)}, scalar_type(t));
  if (t.dim() == 3) return at.empty({t.size(0), t.size(1), t.size(2)}, scalar_type(t));
  raise(FASTOPS_ERR_VALUE, "attention_backward: q, k and v must have 3 or 4 dimensions");
}

Gradients run_backward(const Place& at, fastops_attention_desc& fwd, const Tensor& dout, const OptTensor& dlse,
                       const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                       const OptTensor& sinks) {
  fwd.out = at.view(out, "out");
  fwd.lse = at.view(lse, "lse");
  Tensor dq = like(at, q), dk = like(at, k), dv = like(at, v);
  Tensor dsinks = sinks ? at.empty({sinks->size(0)}, ScalarType::Float) : empty_lse(at);
  fastops_attention_bwd_desc d{};
  d.struct_size = sizeof d;
  d.fwd = fwd;
  d.dout = at.view(dout, "dout");
  d.dlse = at.view(dlse, "dlse");
  d.dq = at.view(dq, "dq");
  d.dk = at.view(dk, "dk");
  d.dv = at.view(dv, "dv");
  if (sinks) d.dsinks = at.view(dsinks, "dsinks");
  at.call(kBackward, d);
  return {dq, dk, dv, dsinks};
}

Gradients attention_backward(Tensor dout, OptTensor dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                             bool causal, std::optional<double> scale, int64_t wl, int64_t wr, double softcap,
                             OptTensor sinks, OptTensor alibi, OptTensor mask, bool top_left) {
  const Place at(q);
  fastops_attention_desc d = describe(at, q, k, v, {causal, scale, wl, wr, softcap, sinks, alibi});
  d.align = top_left ? FASTOPS_ALIGN_TOP_LEFT : FASTOPS_ALIGN_BOTTOM_RIGHT;
  d.bias = mask_of(at, mask, d);
  return run_backward(at, d, dout, dlse, out, lse, q, k, v, sinks);
}

Gradients attention_varlen_backward(Tensor dout, OptTensor dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                                    Tensor cu_q, Tensor cu_k, bool causal, std::optional<double> scale, int64_t wl,
                                    int64_t wr, double softcap, OptTensor sinks, OptTensor alibi) {
  const Place at(q);
  auto d = describe_varlen(at, q, k, v, cu_q, cu_k, {causal, scale, wl, wr, softcap, sinks, alibi});
  return run_backward(at, d, dout, dlse, out, lse, q, k, v, sinks);
}

// torch's function: [..., H, S, E], causal from the top left. Views only: heads and positions trade places by stride.
fastops_tensor as_bshd(const Place& at, const Tensor& t, const char* name) {
  fastops_tensor r = at.view(t, name);
  if (r.ndim != 3 && r.ndim != 4)
    raise(FASTOPS_ERR_UNSUPPORTED, "scaled_dot_product_attention: the CPU kernel takes 3 or 4 dimensions");
  fastops_tensor x = r;
  x.ndim = 4;
  const int first = r.ndim - 3;  // [B, H, S, E] from the back; three dimensions are [B, S, E] with one head
  x.size[0] = r.size[0];
  x.stride[0] = r.stride[0];
  x.size[1] = r.size[first + 1];
  x.stride[1] = r.stride[first + 1];
  x.size[2] = r.ndim == 4 ? r.size[1] : 1;
  x.stride[2] = r.ndim == 4 ? r.stride[1] : 0;
  x.size[3] = r.size[first + 2];
  x.stride[3] = r.stride[first + 2];
  return x;
}

Tensor scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, OptTensor mask, double dropout_p,
                                    bool is_causal, std::optional<double> scale, bool enable_gqa) {
  const Place at(query);
  fastops_attention_desc d{};
  d.struct_size = sizeof d;
  d.align = FASTOPS_ALIGN_TOP_LEFT;
  d.q = as_bshd(at, query, "query");
  d.k = as_bshd(at, key, "key");
  d.v = as_bshd(at, value, "value");
  if (dropout_p != 0.0) raise(FASTOPS_ERR_UNSUPPORTED, "scaled_dot_product_attention: the CPU kernel has no dropout");
  if (is_causal && mask)
    raise(FASTOPS_ERR_VALUE, "scaled_dot_product_attention: give attn_mask or is_causal, not both");
  if (!enable_gqa && d.q.size[2] != d.k.size[2])
    raise(FASTOPS_ERR_VALUE, "scaled_dot_product_attention: query and key differ in heads; enable_gqa=True allows it");
  const int64_t head = d.q.size[3];
  d.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(head > 0 ? head : 1)));
  d.window_left = -1;
  d.window_right = is_causal ? 0 : -1;
  if (mask && query.dim() == 3 && mask->dim() == 3) {
    const fastops_tensor m = at.view(mask, "attn_mask");  // [B, Sq, Sk]: one head
    d.bias = m;
    d.bias.ndim = 4;
    for (int i = 3; i > 1; --i) {
      d.bias.size[i] = m.size[i - 1];
      d.bias.stride[i] = m.stride[i - 1];
    }
    d.bias.size[1] = 1;
    broadcast_mask(d, &d.bias);
  } else {
    d.bias = mask_of(at, mask, d);
  }
  const ScalarType dtype = scalar_type(query);
  Tensor out = query.dim() == 4 ? at.empty({d.q.size[0], d.q.size[2], d.q.size[1], d.v.size[3]}, dtype)
                                : at.empty({d.q.size[0], d.q.size[1], d.v.size[3]}, dtype);
  d.out = as_bshd(at, out, "out");
  at.call(kForward, d);
  return out;
}

}  // namespace

#define FASTOPS_OPS(X) \
  X(attention)         \
  X(attention_out)     \
  X(attention_varlen)  \
  X(attention_varlen_out) X(attention_paged) X(attention_paged_out) X(attention_backward) X(attention_varlen_backward)
FASTOPS_REGISTER(FASTOPS_OPS)

STABLE_TORCH_LIBRARY_IMPL(fastops, CPU, m) {
  m.impl("scaled_dot_product_attention", TORCH_BOX(&scaled_dot_product_attention));
}

}  // namespace fastops::binding
