#include "core/attention_check.h"

#include <cmath>
#include <initializer_list>

#include "core/status.h"

namespace fastops {
namespace {

using Tensor = fastops_tensor;

constexpr int64_t kMaxLength = (int64_t{1} << 31) - 1;  // row and key positions are int32 in the kernels
constexpr int64_t kUnbounded = int64_t{1} << 40;

#define REFUSE(status, ...)            \
  do {                                 \
    set_message(message, __VA_ARGS__); \
    return status;                     \
  } while (0)
#define TRY(expr)                                    \
  do {                                               \
    const fastops_status try_status = (expr);        \
    if (try_status != FASTOPS_OK) return try_status; \
  } while (0)

int64_t count(const Tensor& t) {
  int64_t n = 1;
  for (int i = 0; i < t.ndim; ++i) n *= t.size[i];
  return n;
}

const char* dtype_name(int32_t dtype) {
  switch (dtype) {
    case FASTOPS_F32:
      return "float32";
    case FASTOPS_F16:
      return "float16";
    case FASTOPS_BF16:
      return "bfloat16";
    case FASTOPS_I32:
      return "int32";
    case FASTOPS_I64:
      return "int64";
    case FASTOPS_BOOL:
      return "bool";
    case FASTOPS_F64:
      return "float64";
    default:
      return "an unknown dtype";
  }
}

fastops_status check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> want, char* message) {
  bool same = t.ndim == static_cast<int32_t>(want.size());
  int i = 0;
  for (int64_t w : want) {
    if (same && t.size[i] != w) same = false;
    ++i;
  }
  if (same) {
    if (t.data == nullptr && count(t) != 0) REFUSE(FASTOPS_ERR_VALUE, "attention: %s has no data", name);
    return FASTOPS_OK;
  }
  auto size = [&t](int j) { return j < t.ndim ? static_cast<long long>(t.size[j]) : -1LL; };
  const int64_t* w = want.begin();
  switch (want.size()) {
    case 1:
      REFUSE(FASTOPS_ERR_VALUE, "attention: %s must have shape [%lld], got %d dimensions, first %lld", name,
             static_cast<long long>(w[0]), t.ndim, size(0));
    case 2:
      REFUSE(FASTOPS_ERR_VALUE, "attention: %s must have shape [%lld, %lld], got %d dimensions [%lld, %lld]", name,
             static_cast<long long>(w[0]), static_cast<long long>(w[1]), t.ndim, size(0), size(1));
    case 3:
      REFUSE(FASTOPS_ERR_VALUE,
             "attention: %s must have shape [%lld, %lld, %lld], got %d dimensions [%lld, %lld, %lld]", name,
             static_cast<long long>(w[0]), static_cast<long long>(w[1]), static_cast<long long>(w[2]), t.ndim, size(0),
             size(1), size(2));
    default:
      REFUSE(FASTOPS_ERR_VALUE,
             "attention: %s must have shape [%lld, %lld, %lld, %lld], got %d dimensions [%lld, %lld, %lld, %lld]", name,
             static_cast<long long>(w[0]), static_cast<long long>(w[1]), static_cast<long long>(w[2]),
             static_cast<long long>(w[3]), t.ndim, size(0), size(1), size(2), size(3));
  }
}

fastops_status check_dtype(const char* name, const Tensor& t, int32_t want, char* message) {
  if (t.dtype != want)
    REFUSE(FASTOPS_ERR_TYPE, "attention: %s must be %s, got %s", name, dtype_name(want), dtype_name(t.dtype));
  return FASTOPS_OK;
}

fastops_status check_dense_last(const char* name, const Tensor& t, char* message) {
  if (t.size[t.ndim - 1] > 1 && t.stride[t.ndim - 1] != 1)
    REFUSE(FASTOPS_ERR_VALUE, "attention: the last dimension of %s must be contiguous (stride 1), got stride %lld",
           name, static_cast<long long>(t.stride[t.ndim - 1]));
  return FASTOPS_OK;
}

// int32 [B+1], from 0, never falling, ending at most at `total`.
fastops_status check_cu(const char* name, const Tensor& t, int64_t B, const char* of, int64_t total, char* message,
                        bool on_device) {
  TRY(check_dtype(name, t, FASTOPS_I32, message));
  TRY(check_shape(name, t, {B + 1}, message));
  if (on_device) return FASTOPS_OK;
  const auto* x = static_cast<const int32_t*>(t.data);
  if (x[0] != 0) REFUSE(FASTOPS_ERR_VALUE, "attention: %s[0] must be 0, got %d", name, x[0]);
  for (int64_t i = 0; i < B; ++i) {
    const int32_t a = x[i * t.stride[0]], b = x[(i + 1) * t.stride[0]];
    if (b < a)
      REFUSE(FASTOPS_ERR_VALUE, "attention: %s must not decrease, but [%lld] is %d and [%lld] is %d", name,
             static_cast<long long>(i), a, static_cast<long long>(i + 1), b);
  }
  const int32_t last = x[B * t.stride[0]];
  if (last > total)
    REFUSE(FASTOPS_ERR_VALUE, "attention: %s ends at %d but %s has %lld rows", name, last, of,
           static_cast<long long>(total));
  return FASTOPS_OK;
}

fastops_status check_pages(const fastops_attention_desc& d, const AttentionParams& p, char* message) {
  const int64_t page = d.k.size[1], pages = d.k.size[0], max_pages = d.block_table.size[1];
  for (int64_t b = 0; b < p.B; ++b) {
    int32_t len = p.seq_lens[b * p.seq_stride];
    if (len < 0)
      REFUSE(FASTOPS_ERR_VALUE, "attention: seq_lens[%lld] is %d, must not be negative", static_cast<long long>(b),
             len);
    if (p.packed) {
      const int32_t packed = p.packed[b * p.packed_stride];
      if (packed < 0 || packed > len || packed + p.recent < len)
        REFUSE(FASTOPS_ERR_VALUE, "attention: packed_lens[%lld] is %d, must be from seq_lens - %lld to seq_lens = %d",
               static_cast<long long>(b), packed, static_cast<long long>(p.recent), len);
      len = packed;
    }
    const int64_t need = (len + page - 1) / page;
    if (need > max_pages)
      REFUSE(FASTOPS_ERR_VALUE,
             "attention: seq_lens[%lld] = %d needs %lld pages of %lld, block_table has room for %lld",
             static_cast<long long>(b), len, static_cast<long long>(need), static_cast<long long>(page),
             static_cast<long long>(max_pages));
    const int32_t* row = p.table + b * p.table_sb;
    for (int64_t i = 0; i < need; ++i) {
      const int32_t id = row[i * p.table_sp];
      if (id < 0 || id >= pages)
        REFUSE(FASTOPS_ERR_VALUE, "attention: block_table[%lld, %lld] is %d, pages run from 0 to %lld",
               static_cast<long long>(b), static_cast<long long>(i), id, static_cast<long long>(pages - 1));
    }
  }
  return FASTOPS_OK;
}

fastops_status check_extras(const fastops_attention_desc& d, AttentionParams* p, char* message) {
  if (given(d.sinks)) {
    TRY(check_dtype("sinks", d.sinks, FASTOPS_F32, message));
    TRY(check_shape("sinks", d.sinks, {p->Hq}, message));
    p->sinks = static_cast<const float*>(d.sinks.data);
    p->sinks_stride = d.sinks.stride[0];
  }
  if (given(d.alibi_slopes)) {
    TRY(check_dtype("alibi_slopes", d.alibi_slopes, FASTOPS_F32, message));
    p->alibi = static_cast<const float*>(d.alibi_slopes.data);
    if (d.alibi_slopes.ndim == 2) {
      TRY(check_shape("alibi_slopes", d.alibi_slopes, {p->B, p->Hq}, message));
      p->alibi_sb = d.alibi_slopes.stride[0];
      p->alibi_sh = d.alibi_slopes.stride[1];
    } else {
      TRY(check_shape("alibi_slopes", d.alibi_slopes, {p->Hq}, message));
      p->alibi_sh = d.alibi_slopes.stride[0];
    }
  }
  if (given(d.bias)) {
    if (p->ragged || p->paged) REFUSE(FASTOPS_ERR_VALUE, "attention: attn_mask needs the dense layout [B, S, H, D]");
    const int32_t t = d.bias.dtype;
    if (t != FASTOPS_BOOL && t != FASTOPS_F32 && t != FASTOPS_F16 && t != FASTOPS_BF16)
      REFUSE(FASTOPS_ERR_TYPE, "attention: attn_mask must be bool, float32, float16 or bfloat16, got %s",
             dtype_name(t));
    TRY(check_shape("attn_mask", d.bias, {p->B, p->Hq, p->Sq, p->Sk}, message));
    p->bias = static_cast<const char*>(d.bias.data);
    p->bias_dtype = t;
    for (int i = 0; i < 4; ++i) p->bias_s[i] = d.bias.stride[i];
  }
  return FASTOPS_OK;
}

fastops_status check_layout(const fastops_attention_desc& d, AttentionParams* p, char* message) {
  const bool paged = given(d.block_table) || given(d.seq_lens);
  const bool ragged = !paged && (given(d.cu_seqlens_q) || given(d.cu_seqlens_k));
  const int qdim = paged || ragged ? 3 : 4, kdim = ragged ? 3 : 4;
  if (d.q.ndim != qdim) REFUSE(FASTOPS_ERR_VALUE, "attention: q must have %d dimensions, got %d", qdim, d.q.ndim);
  if (d.k.ndim != kdim) REFUSE(FASTOPS_ERR_VALUE, "attention: k must have %d dimensions, got %d", kdim, d.k.ndim);
  if (d.v.ndim != kdim) REFUSE(FASTOPS_ERR_VALUE, "attention: v must have %d dimensions, got %d", kdim, d.v.ndim);
  for (const Tensor* t : {&d.q, &d.k, &d.v})
    for (int i = 0; i < t->ndim; ++i)
      if (t->size[i] < 0 || t->size[i] > kMaxLength)
        REFUSE(FASTOPS_ERR_VALUE, "attention: a dimension of q, k or v is %lld", static_cast<long long>(t->size[i]));
  p->paged = paged;
  p->ragged = ragged;
  p->Hq = d.q.size[qdim - 2];
  p->D = static_cast<int32_t>(d.q.size[qdim - 1]);
  p->Hkv = d.k.size[kdim - 2];
  const int64_t v_columns = d.v.size[kdim - 1];
  p->Dv = static_cast<int32_t>(v_columns > kMaxHeadDim ? v_columns : kv_channels(p->vq.kind, v_columns));
  p->q_ss = d.q.stride[qdim - 3];
  p->q_sh = d.q.stride[qdim - 2];
  p->k_ss = d.k.stride[kdim - 3];
  p->k_sh = d.k.stride[kdim - 2];
  p->v_ss = d.v.stride[kdim - 3];
  p->v_sh = d.v.stride[kdim - 2];
  if (kdim == 4) {
    p->k_sb = d.k.stride[0];
    p->v_sb = d.v.stride[0];
  }
  if (p->D < 1 || p->D > kMaxHeadDim)
    REFUSE(FASTOPS_ERR_VALUE, "attention: head size D of q is %d, allowed: 1 to 256", p->D);
  if (p->Dv < 1 || p->Dv > kMaxHeadDim)
    REFUSE(FASTOPS_ERR_VALUE, "attention: head size Dv of v is %d, allowed: 1 to 256", p->Dv);
  if (p->Hkv < 1 ? p->Hq != 0 : p->Hq % p->Hkv != 0)
    REFUSE(FASTOPS_ERR_VALUE, "attention: q has %lld heads, k has %lld; need Hq %% Hkv == 0",
           static_cast<long long>(p->Hq), static_cast<long long>(p->Hkv));
  p->G = p->Hkv ? p->Hq / p->Hkv : 1;
  const int64_t D = p->D, Dv = p->Dv, Hkv = p->Hkv;
  if (p->quant) {
    if (!paged) REFUSE(FASTOPS_ERR_VALUE, "attention: quantised keys and values need the paged layout");
    if (D % 8 != 0 || Dv % 8 != 0)
      REFUSE(FASTOPS_ERR_VALUE, "attention: head sizes of a quantised cache must be multiples of 8, got %d and %d",
             p->D, p->Dv);
    TRY(check_shape("k", d.k, {d.k.size[0], d.k.size[1], Hkv, D / kv_channels(p->kq.kind, 1)}, message));
    TRY(check_shape("v", d.v, {d.k.size[0], d.k.size[1], Hkv, v_columns}, message));
  } else if (kdim == 4) {
    TRY(check_shape("k", d.k, {d.k.size[0], d.k.size[1], Hkv, D}, message));
    TRY(check_shape("v", d.v, {d.k.size[0], d.k.size[1], Hkv, Dv}, message));
  } else {
    TRY(check_shape("k", d.k, {d.k.size[0], Hkv, D}, message));
    TRY(check_shape("v", d.v, {d.k.size[0], Hkv, Dv}, message));
  }
  if (!paged && !ragged) {
    p->B = d.q.size[0];
    p->Sq = d.q.size[1];
    p->Sk = d.k.size[1];
    p->q_sb = d.q.stride[0];
    if (d.k.size[0] != p->B)
      REFUSE(FASTOPS_ERR_VALUE, "attention: q has batch size %lld, k has %lld", static_cast<long long>(p->B),
             static_cast<long long>(d.k.size[0]));
    TRY(check_shape("q", d.q, {p->B, p->Sq, p->Hq, D}, message));
    TRY(check_shape("out", d.out, {p->B, p->Sq, p->Hq, Dv}, message));
    p->o_sb = d.out.stride[0];
    if (given(d.lse)) {
      TRY(check_shape("lse", d.lse, {p->B, p->Hq, p->Sq}, message));
      p->lse_sb = d.lse.stride[0];
      p->lse_sh = d.lse.stride[1];
      p->lse_ss = d.lse.stride[2];
    }
  } else {
    const int64_t T = d.q.size[0];
    TRY(check_shape("q", d.q, {T, p->Hq, D}, message));
    TRY(check_shape("out", d.out, {T, p->Hq, Dv}, message));
    if (given(d.lse)) {
      TRY(check_shape("lse", d.lse, {p->Hq, T}, message));
      p->lse_sh = d.lse.stride[0];
      p->lse_ss = d.lse.stride[1];
    }
  }
  p->o_ss = d.out.stride[d.out.ndim - 3];
  p->o_sh = d.out.stride[d.out.ndim - 2];
  return FASTOPS_OK;
}

fastops_status check_indices(const fastops_attention_desc& d, AttentionParams* p, char* message, bool on_device) {
  const int64_t T = d.q.size[0];
  p->q_rows = T;
  p->k_rows = d.k.size[0];
  if (p->paged) {
    TRY(check_dtype("seq_lens", d.seq_lens, FASTOPS_I32, message));
    TRY(check_dtype("block_table", d.block_table, FASTOPS_I32, message));
    p->B = d.seq_lens.ndim == 1 ? d.seq_lens.size[0] : 0;
    TRY(check_shape("seq_lens", d.seq_lens, {p->B}, message));
    if (d.block_table.ndim != 2)
      REFUSE(FASTOPS_ERR_VALUE, "attention: block_table must have 2 dimensions [B, max_pages], got %d",
             d.block_table.ndim);
    TRY(check_shape("block_table", d.block_table, {p->B, d.block_table.size[1]}, message));
    const int64_t page = d.k.size[1];
    if (page < 1 || (page & (page - 1)) != 0)
      REFUSE(FASTOPS_ERR_VALUE, "attention: page size is %lld, must be a power of two", static_cast<long long>(page));
    p->page_mask = static_cast<int32_t>(page - 1);
    for (p->page_shift = 0; (int64_t{1} << p->page_shift) < page; ++p->page_shift) {
    }
    p->pages = d.k.size[0];
    p->max_pages = d.block_table.size[1];
    p->table = static_cast<const int32_t*>(d.block_table.data);
    p->table_sb = d.block_table.stride[0];
    p->table_sp = d.block_table.stride[1];
    p->seq_lens = static_cast<const int32_t*>(d.seq_lens.data);
    p->seq_stride = d.seq_lens.stride[0];
    if (given(d.cu_seqlens_q)) {
      TRY(check_cu("cu_seqlens_q", d.cu_seqlens_q, p->B, "q", T, message, on_device));
      p->cu_q = static_cast<const int32_t*>(d.cu_seqlens_q.data);
      p->cu_q_stride = d.cu_seqlens_q.stride[0];
    } else {
      if (p->B == 0 ? T != 0 : T % p->B != 0)
        REFUSE(FASTOPS_ERR_VALUE,
               "attention: q has %lld rows for %lld sequences; give cu_seqlens_q unless each has the same number",
               static_cast<long long>(T), static_cast<long long>(p->B));
      p->queries_per_seq = p->B ? T / p->B : 0;
    }
    if (p->quant) {
      Checks ok("attention", message);
      if (!check_kv_scales({d.q, d.k, d.v, *d.kv}, p, ok)) return ok.status();
    }
    return on_device ? FASTOPS_OK : check_pages(d, *p, message);
  }
  if (p->ragged) {
    if (!given(d.cu_seqlens_q) || !given(d.cu_seqlens_k))
      REFUSE(FASTOPS_ERR_VALUE, "attention: the ragged layout needs both cu_seqlens_q and cu_seqlens_k");
    if (d.cu_seqlens_q.ndim != 1 || d.cu_seqlens_q.size[0] < 1)
      REFUSE(FASTOPS_ERR_VALUE, "attention: cu_seqlens_q must have shape [B + 1]");
    p->B = d.cu_seqlens_q.size[0] - 1;
    TRY(check_cu("cu_seqlens_q", d.cu_seqlens_q, p->B, "q", T, message, on_device));
    TRY(check_cu("cu_seqlens_k", d.cu_seqlens_k, p->B, "k", d.k.size[0], message, on_device));
    p->cu_q = static_cast<const int32_t*>(d.cu_seqlens_q.data);
    p->cu_q_stride = d.cu_seqlens_q.stride[0];
    p->cu_k = static_cast<const int32_t*>(d.cu_seqlens_k.data);
    p->cu_k_stride = d.cu_seqlens_k.stride[0];
  }
  return FASTOPS_OK;
}

}  // namespace

fastops_status check_attention(const fastops_attention_desc& d, AttentionParams* p, char* message, bool on_device) {
  *p = AttentionParams{};
  if (d.struct_size != sizeof(fastops_attention_desc))
    REFUSE(FASTOPS_ERR_VALUE, "attention: struct_size is %u, this library knows %zu", d.struct_size,
           sizeof(fastops_attention_desc));
  if (d.q.dtype != FASTOPS_F32 && d.q.dtype != FASTOPS_F16 && d.q.dtype != FASTOPS_BF16)
    REFUSE(d.q.dtype == FASTOPS_F64 ? FASTOPS_ERR_UNSUPPORTED : FASTOPS_ERR_TYPE,
           "attention: q is %s, the kernels take float32, float16 and bfloat16", dtype_name(d.q.dtype));
  if (d.kv != nullptr) {
    Checks ok("attention", message);
    if (!check_kv_kinds({d.q, d.k, d.v, *d.kv}, p, ok)) return ok.status();
  } else {
    TRY(check_dtype("k", d.k, d.q.dtype, message));
    TRY(check_dtype("v", d.v, d.q.dtype, message));
  }
  if (d.out.dtype != FASTOPS_F32) TRY(check_dtype("out", d.out, d.q.dtype, message));
  if (given(d.lse)) TRY(check_dtype("lse", d.lse, FASTOPS_F32, message));
  TRY(check_layout(d, p, message));
  TRY(check_indices(d, p, message, on_device));
  TRY(check_extras(d, p, message));
  TRY(check_dense_last("q", d.q, message));
  TRY(check_dense_last("k", d.k, message));
  TRY(check_dense_last("v", d.v, message));
  TRY(check_dense_last("out", d.out, message));
  if (!std::isfinite(d.scale))
    REFUSE(FASTOPS_ERR_VALUE, "attention: scale is %g, must be finite", static_cast<double>(d.scale));
  if (!(d.softcap >= 0.0f) || !std::isfinite(d.softcap))
    REFUSE(FASTOPS_ERR_VALUE, "attention: softcap is %g, must be 0 (off) or positive", static_cast<double>(d.softcap));
  if (d.window_left < -1 || d.window_right < -1)
    REFUSE(FASTOPS_ERR_VALUE, "attention: window is (%lld, %lld), each side must be -1 (unbounded) or more",
           static_cast<long long>(d.window_left), static_cast<long long>(d.window_right));
  p->window_left = d.window_left > kUnbounded ? -1 : d.window_left;
  p->window_right = d.window_right > kUnbounded ? -1 : d.window_right;
  p->q = static_cast<const char*>(d.q.data);
  p->k = static_cast<const char*>(d.k.data);
  p->v = static_cast<const char*>(d.v.data);
  p->out = static_cast<char*>(d.out.data);
  p->lse = static_cast<float*>(d.lse.data);
  p->dtype = d.q.dtype;
  p->out_dtype = d.out.dtype;
  p->top_left = d.align == FASTOPS_ALIGN_TOP_LEFT;
  p->scale = d.scale;
  p->softcap = d.softcap;
  return FASTOPS_OK;
}

}  // namespace fastops
