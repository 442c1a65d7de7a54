// What makes a quantised paged cache valid.
#include "core/checks.h"
#include "core/attention_check.h"

namespace fastops {
namespace {

using Tensor = fastops_tensor;

bool kind_of(Checks& ok, const char* name, const Tensor& t, int32_t bits, const Tensor& q, int32_t* kind) {
  if (t.dtype == FASTOPS_U8) {
    *kind = bits == 8 ? kKvU8 : bits == 4 ? kKvU4 : kKvU2;
    return bits == 8 || bits == 4 || bits == 2 ||
           ok.fail(FASTOPS_ERR_VALUE, "%s_bits is %d, must be 8, 4 or 2 for a uint8 cache", name, bits);
  }
  *kind = t.dtype == FASTOPS_I8 ? kKvI8 : t.dtype == FASTOPS_F8_E4M3 ? kKvF8 : kKvPlain;
  if (bits != 0) return ok.fail(FASTOPS_ERR_VALUE, "%s_bits is %d, must be 0 unless the cache is uint8", name, bits);
  return *kind != kKvPlain || t.dtype == q.dtype ||
         ok.fail(FASTOPS_ERR_TYPE, "%s must have q's dtype or be int8, float8_e4m3fn or uint8", name);
}

struct Names {
  const char *side, *scale, *zero, *min, *recent;
};
constexpr Names kNames[2] = {{"k", "k_scale", "k_zero", "k_min", "k_recent"},
                             {"v", "v_scale", "v_zero", "v_min", "v_recent"}};

// Strides of a [1], [Hkv], [P,page,Hkv] or [P,page/g,Hkv,D/c] tensor over page, group of keys, head, group of channels.
void spread(const Tensor& t, int64_t strides[4]) {
  for (int i = 0; i < 4; ++i) strides[i] = 0;
  const int first = t.ndim == 1 ? 2 : 0;
  for (int i = 0; i < t.ndim; ++i)
    if (t.size[i] > 1) strides[first + i] = t.stride[i];
}

bool scales(Checks& ok, const Names& name, const Tensor& scale, const Tensor& zero, const Tensor& min,
            const Tensor& cache, int32_t dim, KvSide* side) {
  side->channels = dim;
  if (!given(scale)) {
    if (given(zero) || given(min)) return ok.fail(FASTOPS_ERR_VALUE, "%s is given without %s", name.zero, name.scale);
    return side->kind < kKvU8 || ok.fail(FASTOPS_ERR_VALUE, "a uint8 cache needs %s", name.scale);
  }
  if (side->kind == kKvPlain)
    return ok.fail(FASTOPS_ERR_VALUE, "%s is given, but %s has q's dtype", name.scale, name.side);
  if (given(zero) && given(min)) return ok.fail(FASTOPS_ERR_VALUE, "give %s or %s, not both", name.zero, name.min);
  if (!is_float(scale.dtype)) return ok.fail(FASTOPS_ERR_TYPE, "%s must be float32, float16 or bfloat16", name.scale);
  const Tensor& shift = given(zero) ? zero : min;
  if (given(shift) && !(ok.same_dtype(given(zero) ? name.zero : name.min, shift, name.scale, scale) &&
                        ok.same_shape(given(zero) ? name.zero : name.min, shift, name.scale, scale)))
    return false;
  const int64_t pages = cache.size[0], page = cache.size[1], heads = cache.size[2];
  if (scale.ndim == 1 && scale.size[0] != heads && scale.size[0] != 1)
    return ok.fail(FASTOPS_ERR_VALUE, "%s has %lld elements, must have 1 or one for each of %lld heads", name.scale,
                   static_cast<long long>(scale.size[0]), static_cast<long long>(heads));
  if (scale.ndim == 3) {
    const int64_t want[3] = {pages, page, heads};
    if (!ok.sizes(name.scale, scale, 3, want)) return false;
  }
  if (scale.ndim == 4) {
    const int64_t groups = scale.size[1], columns = scale.size[3];
    if (groups < 1 || page % groups != 0)
      return ok.fail(FASTOPS_ERR_VALUE, "%s has %lld groups of keys, which do not divide a page of %lld", name.scale,
                     static_cast<long long>(groups), static_cast<long long>(page));
    if (columns < 1 || dim % columns != 0 || (columns != dim && dim / columns % 8 != 0))
      return ok.fail(FASTOPS_ERR_VALUE,
                     "%s has %lld groups of %d channels; each must have 1 channel or a multiple of 8", name.scale,
                     static_cast<long long>(columns), dim);
    const int64_t want[4] = {pages, groups, heads, columns};
    if (!ok.sizes(name.scale, scale, 4, want)) return false;
    while ((groups << side->group_shift) < page) ++side->group_shift;
    side->each = columns == dim;
    side->channels = static_cast<int32_t>(dim / columns);
  }
  if (scale.ndim != 1 && scale.ndim != 3 && scale.ndim != 4)
    return ok.fail(FASTOPS_ERR_VALUE, "%s has %d dimensions, must have 1, 3 or 4", name.scale, scale.ndim);
  if (!ok.well_formed(name.scale, scale, false)) return false;
  if (given(shift) && !ok.well_formed(given(zero) ? name.zero : name.min, shift, false)) return false;
  side->scale = static_cast<const char*>(scale.data);
  side->scale_dtype = scale.dtype;
  spread(scale, side->scale_s);
  if (given(shift)) {
    side->shift = static_cast<const char*>(shift.data);
    side->shift_is_zero = given(zero);
    spread(shift, side->shift_s);
  }
  return true;
}

bool recent(Checks& ok, const Names& name, const Tensor& t, const Tensor& q, int64_t B, int64_t R, int64_t heads,
            int32_t dim, KvSide* side) {
  const int64_t want[4] = {B, R, heads, dim};
  if (!ok.same_dtype(name.recent, t, "q", q) || !ok.shape(name.recent, t, 4, want)) return false;
  side->recent = static_cast<const char*>(t.data);
  for (int i = 0; i < 3; ++i) side->recent_s[i] = t.stride[i];
  return true;
}

}  // namespace

bool check_kv_kinds(const KvCache& c, AttentionParams* p, Checks& ok) {
  p->quant = true;
  return ok.struct_size(c.kv.struct_size, sizeof(fastops_kv_quant)) &&
         kind_of(ok, "k", c.k, c.kv.k_bits, c.q, &p->kq.kind) && kind_of(ok, "v", c.v, c.kv.v_bits, c.q, &p->vq.kind);
}

bool check_kv_scales(const KvCache& c, AttentionParams* p, Checks& ok) {
  const fastops_kv_quant& kv = c.kv;
  if (!scales(ok, kNames[0], kv.k_scale, kv.k_zero, kv.k_min, c.k, p->D, &p->kq) ||
      !scales(ok, kNames[1], kv.v_scale, kv.v_zero, kv.v_min, c.v, p->Dv, &p->vq))
    return false;
  const int together = given(kv.k_recent) + given(kv.v_recent) + given(kv.packed_lens);
  if (together == 0) return true;
  if (together != 3) return ok.fail(FASTOPS_ERR_VALUE, "k_recent, v_recent and packed_lens go together");
  const int64_t R = kv.k_recent.ndim == 4 ? kv.k_recent.size[1] : 0;
  if (!recent(ok, kNames[0], kv.k_recent, c.q, p->B, R, p->Hkv, p->D, &p->kq) ||
      !recent(ok, kNames[1], kv.v_recent, c.q, p->B, R, p->Hkv, p->Dv, &p->vq))
    return false;
  if (kv.packed_lens.dtype != FASTOPS_I32) return ok.fail(FASTOPS_ERR_TYPE, "packed_lens must be int32");
  const int64_t want[1] = {p->B};
  if (!ok.sizes("packed_lens", kv.packed_lens, 1, want) || !ok.well_formed("packed_lens", kv.packed_lens, false))
    return false;
  p->packed = static_cast<const int32_t*>(kv.packed_lens.data);
  p->packed_stride = kv.packed_lens.stride[0];
  p->recent = R;
  return true;
}

}  // namespace fastops
