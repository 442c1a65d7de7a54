// Validity of a rope call. Positions and slots are looked at unless they lie in a device's memory.
#include "core/op_checks.h"
#include "core/rows.h"

namespace fastops {
namespace {

// q and its like: [B,S,H,D] or [T,H,D].
bool heads(const char* name, const fastops_tensor& t, const fastops_tensor& q, int64_t dim, Checks& c) {
  if (!c.floats(name, t) || !c.same_dtype(name, t, "q", q)) return false;
  bool same = t.ndim == q.ndim;
  for (int i = 0; same && i + 2 < q.ndim; ++i) same = t.size[i] == q.size[i];
  if (!same) return c.fail(FASTOPS_ERR_VALUE, "%s must have q's dimensions before the heads", name);
  return dim < 0 || last(t) == dim ||
         c.fail(FASTOPS_ERR_VALUE, "%s has head size %lld, must be %lld", name, static_cast<long long>(last(t)),
                static_cast<long long>(dim));
}

// Shapes that cos, sin and positions may have before their last dimension: per token, or per place in a sequence.
bool per_token(const char* name, const fastops_tensor& t, int trailing, const fastops_tensor& q, Checks& c) {
  const int lead = t.ndim - trailing, full = q.ndim - 2;
  bool same = lead == full || (lead == 1 && full == 2);
  for (int i = 0; same && i < lead; ++i) same = t.size[i] == q.size[full - lead + i];
  return same ||
         c.fail(FASTOPS_ERR_VALUE, "%s must have one row for each token of q, or for each place in a sequence", name);
}

bool check_cache(const char* name, const fastops_tensor& cache, const fastops_tensor& t, const fastops_tensor& q,
                 Checks& c) {
  if (!c.floats(name, cache) || !c.same_dtype(name, cache, "q", q)) return false;
  return (cache.ndim == 4 && cache.size[2] == t.size[t.ndim - 2] && cache.size[3] == last(t)) ||
         c.fail(FASTOPS_ERR_VALUE, "%s must be [pages, page, heads, head size] with k's (v's) heads and head size",
                name);
}

}  // namespace

bool check_rope(const fastops_rope_desc& d, Checks& c, bool on_device) {
  if (!c.struct_size(d.struct_size, sizeof d) || !c.floats("q", d.q)) return false;
  if (d.q.ndim != 3 && d.q.ndim != 4) return c.fail(FASTOPS_ERR_VALUE, "q must be [B,S,H,D] or [T,H,D]");
  const int64_t dim = last(d.q);
  if (dim < 1 || dim > kMaxRopeDim)
    return c.fail(FASTOPS_ERR_VALUE, "the head size is %lld, allowed: 1 to %lld", static_cast<long long>(dim),
                  static_cast<long long>(kMaxRopeDim));
  if (!heads("q_out", d.q_out, d.q, dim, c) || !c.same_shape("q_out", d.q_out, "q", d.q)) return false;
  if (!c.floats("cos", d.cos) || !c.floats("sin", d.sin) || !c.same_dtype("sin", d.sin, "cos", d.cos) ||
      !c.same_shape("sin", d.sin, "cos", d.cos))
    return false;
  if (2 * last(d.cos) > dim)
    return c.fail(FASTOPS_ERR_VALUE, "cos has %lld angles, q's head size %lld has room for %lld",
                  static_cast<long long>(last(d.cos)), static_cast<long long>(dim), static_cast<long long>(dim / 2));
  if (given(d.positions)) {
    if (d.positions.dtype != FASTOPS_I32 && d.positions.dtype != FASTOPS_I64)
      return c.fail(FASTOPS_ERR_TYPE, "positions must be int32 or int64");
    if (!c.well_formed("positions", d.positions) || !per_token("positions", d.positions, 0, d.q, c)) return false;
    if (d.cos.ndim != 2) return c.fail(FASTOPS_ERR_VALUE, "with positions, cos and sin must be [P, R / 2]");
    const Rows rows(d.positions, 0);
    for (int64_t i = 0; i < rows.count && !on_device; ++i) {
      const int64_t p = index_at(d.positions.dtype, rows.at(i));
      if (p < 0 || p >= d.cos.size[0])
        return c.fail(FASTOPS_ERR_VALUE, "a position is %lld, cos and sin have rows 0 to %lld",
                      static_cast<long long>(p), static_cast<long long>(d.cos.size[0]) - 1);
    }
  } else if (!per_token("cos", d.cos, 1, d.q, c)) {
    return false;
  }
  const fastops_tensor* const weights[] = {&d.q_weight, &d.k_weight};
  for (const fastops_tensor* w : weights)
    if (given(*w) &&
        !(c.vector("q_weight or k_weight", *w, dim) && c.dtype_or_f32("q_weight or k_weight", *w, "q", d.q)))
      return false;
  if (given(d.k) && !heads("k", d.k, d.q, dim, c)) return false;
  if (given(d.k_out) && !(heads("k_out", d.k_out, d.q, dim, c) && c.same_shape("k_out", d.k_out, "k", d.k)))
    return false;
  if (given(d.k) && !given(d.k_out) && !given(d.slots)) return c.fail(FASTOPS_ERR_VALUE, "k needs k_out, or slots");
  if (!given(d.slots)) {
    if (given(d.k_cache) || given(d.v_cache) || given(d.v))
      return c.fail(FASTOPS_ERR_VALUE, "k_cache, v and v_cache need slots");
    return true;
  }
  if (!given(d.k) || !given(d.k_cache)) return c.fail(FASTOPS_ERR_VALUE, "slots need k and k_cache");
  if (!check_cache("k_cache", d.k_cache, d.k, d.q, c)) return false;
  if (given(d.v) != given(d.v_cache)) return c.fail(FASTOPS_ERR_VALUE, "v and v_cache go together");
  if (given(d.v)) {
    if (!heads("v", d.v, d.q, -1, c) || !check_cache("v_cache", d.v_cache, d.v, d.q, c)) return false;
    if (d.v_cache.size[0] != d.k_cache.size[0] || d.v_cache.size[1] != d.k_cache.size[1])
      return c.fail(FASTOPS_ERR_VALUE, "k_cache and v_cache differ in pages");
  }
  if (d.slots.dtype != FASTOPS_I64) return c.fail(FASTOPS_ERR_TYPE, "slots must be int64");
  int64_t tokens = 1;
  for (int i = 0; i + 2 < d.q.ndim; ++i) tokens *= d.q.size[i];
  const int64_t room = d.k_cache.size[0] * d.k_cache.size[1];
  if (!c.vector("slots", d.slots, tokens)) return false;
  for (int64_t i = 0; i < tokens && !on_device; ++i) {
    const int64_t slot = static_cast<const int64_t*>(d.slots.data)[i];
    if (slot >= room)
      return c.fail(FASTOPS_ERR_VALUE, "slots[%lld] is %lld, the cache has %lld", static_cast<long long>(i),
                    static_cast<long long>(slot), static_cast<long long>(room));
  }
  return true;
}

}  // namespace fastops
