// kv_append's C API on the CPU: check (index tensors included), share the new tokens out.
#include "cpu/kv_append/kv_append.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/attention_check.h"
#include "core/parallel.h"

namespace fastops::cpu {
namespace {

constexpr int64_t kUnit = kAppendTokens;   // tokens that leave a window at once
constexpr int64_t kSerialWork = 16 << 10;  // numbers under which waking a thread costs more than it saves

const char* const kSides[2] = {"k", "v"};

// The keys, or the values, of a call.
struct Side {
  const fastops_tensor *rows, *cache, *scale, *recent;
  KvSide kv{};
  int64_t dim = 0, group = 1;  // channels of a row; tokens that share scales
  bool finds = false;          // scales are found, not given
};

struct Append {
  Side sides[2];
  int64_t B = 0, T = 0, H = 0, page = 0, pages = 0, max_pages = 0;
  int64_t window = 0;  // R, or 0
  const fastops_kv_append_desc& d;

  explicit Append(const fastops_kv_append_desc& desc) : d(desc) {
    static const fastops_tensor none{};
    const fastops_kv_quant* kv = desc.kv;
    sides[0] = {&d.k, &d.k_cache, kv ? &kv->k_scale : &none, kv ? &kv->k_recent : &none};
    sides[1] = {&d.v, &d.v_cache, kv ? &kv->v_scale : &none, kv ? &kv->v_recent : &none};
  }
  static int32_t index(const fastops_tensor& t, int64_t i) {
    return static_cast<const int32_t*>(t.data)[i * t.stride[0]];
  }
  int64_t old_length(int64_t b) const { return index(d.seq_lens, b); }
  int64_t first_row(int64_t b) const { return given(d.cu_seqlens) ? index(d.cu_seqlens, b) : b * (B ? T / B : 0); }
  int64_t new_length(int64_t b) const { return old_length(b) + first_row(b + 1) - first_row(b); }
  int64_t page_of(int64_t b, int64_t token) const {
    const fastops_tensor& t = d.block_table;
    return static_cast<const int32_t*>(t.data)[b * t.stride[0] + token / page * t.stride[1]];
  }
  // Tokens [begin, end) of sequence b enter its pages.
  int64_t begin(int64_t b) const { return window ? index(d.kv->packed_lens, b) : old_length(b); }
  int64_t end(int64_t b) const {
    if (!window) return new_length(b);
    const int64_t waiting = new_length(b) - begin(b), stay = window - kUnit;
    return begin(b) + (waiting > stay ? (waiting - stay) / kUnit * kUnit : 0);
  }
  int64_t unit() const { return window ? kUnit : 1; }
};

bool check_tensors(Append& a, Checks& c) {
  const fastops_kv_append_desc& d = a.d;
  if (!c.struct_size(d.struct_size, sizeof d) || !c.floats("k", d.k) || !c.floats("v", d.v) ||
      !c.same_dtype("v", d.v, "k", d.k))
    return false;
  if (d.k.ndim != 3 || d.v.ndim != 3) return c.fail(FASTOPS_ERR_VALUE, "k must be [T,Hkv,D] and v [T,Hkv,Dv]");
  a.T = d.k.size[0];
  a.H = d.k.size[1];
  const int64_t like_k[3] = {a.T, a.H, last(d.v)};
  if (!c.sizes("v", d.v, 3, like_k)) return false;
  if (d.k_cache.ndim != 4) return c.fail(FASTOPS_ERR_VALUE, "k_cache must be [P,page,Hkv,D]");
  a.pages = d.k_cache.size[0];
  a.page = d.k_cache.size[1];
  if (a.page < 1 || (a.page & (a.page - 1)) != 0)
    return c.fail(FASTOPS_ERR_VALUE, "page size is %lld, must be a power of two", static_cast<long long>(a.page));
  AttentionParams p{};
  const bool quant = d.kv != nullptr;
  if (quant && !check_kv_kinds({d.k, d.k_cache, d.v_cache, *d.kv}, &p, c)) return false;
  const KvSide* kinds[2] = {&p.kq, &p.vq};
  for (int i = 0; i < 2; ++i) {
    Side& side = a.sides[i];
    const fastops_tensor& cache = *side.cache;
    side.dim = last(*side.rows);
    if (side.dim < 1 || side.dim > kMaxHeadDim || (quant && side.dim % 8 != 0))
      return c.fail(FASTOPS_ERR_VALUE, "%s has head size %lld, allowed: 1 to 256, in quantised caches multiples of 8",
                    kSides[i], static_cast<long long>(side.dim));
    if (!quant && cache.dtype != side.rows->dtype)
      return c.fail(FASTOPS_ERR_TYPE, "%s_cache must have k's dtype, or be quantised (kv)", kSides[i]);
    const int64_t want[4] = {a.pages, a.page, a.H, quant ? side.dim / kv_channels(kinds[i]->kind, 1) : side.dim};
    if (!c.shape(i ? "v_cache" : "k_cache", cache, 4, want)) return false;
  }
  if (d.seq_lens.dtype != FASTOPS_I32 || d.block_table.dtype != FASTOPS_I32 || d.new_lens.dtype != FASTOPS_I32 ||
      (given(d.cu_seqlens) && d.cu_seqlens.dtype != FASTOPS_I32))
    return c.fail(FASTOPS_ERR_TYPE, "block_table, seq_lens, cu_seqlens and new_lens must be int32");
  if (d.seq_lens.ndim != 1) return c.fail(FASTOPS_ERR_VALUE, "seq_lens must be [B]");
  if (!c.well_formed("seq_lens", d.seq_lens, false)) return false;
  a.B = d.seq_lens.size[0];
  if (!c.sizes("new_lens", d.new_lens, 1, &a.B) || !c.well_formed("new_lens", d.new_lens, false)) return false;
  a.max_pages = d.block_table.ndim == 2 ? d.block_table.size[1] : 0;
  const int64_t table[2] = {a.B, a.max_pages}, cu = a.B + 1;
  if (!c.sizes("block_table", d.block_table, 2, table) || !c.well_formed("block_table", d.block_table, false))
    return false;
  if (given(d.cu_seqlens)) {
    if (!c.sizes("cu_seqlens", d.cu_seqlens, 1, &cu) || !c.well_formed("cu_seqlens", d.cu_seqlens, false)) return false;
  } else if (a.B == 0 ? a.T != 0 : a.T % a.B != 0) {
    return c.fail(FASTOPS_ERR_VALUE, "k has %lld tokens for %lld sequences; give cu_seqlens",
                  static_cast<long long>(a.T), static_cast<long long>(a.B));
  }
  if (!quant) return true;
  p.B = d.kv->packed_lens.ndim == 1 ? d.kv->packed_lens.size[0] : a.B;
  p.Hkv = a.H;
  p.D = static_cast<int32_t>(a.sides[0].dim);
  p.Dv = static_cast<int32_t>(a.sides[1].dim);
  if (!check_kv_scales({d.k, d.k_cache, d.v_cache, *d.kv}, &p, c)) return false;
  a.window = p.recent;
  if (p.packed && (p.B < a.B || a.window < kUnit))
    return c.fail(FASTOPS_ERR_VALUE,
                  "the windows are %lld of %lld rows for %lld sequences, each must have %lld or more",
                  static_cast<long long>(p.B), static_cast<long long>(a.window), static_cast<long long>(a.B),
                  static_cast<long long>(kUnit));
  for (int i = 0; i < 2; ++i) {
    Side& side = a.sides[i];
    side.kv = *kinds[i];
    side.finds = side.scale->ndim > 1;
    side.group = int64_t{1} << side.kv.group_shift;
    const bool codes = side.kv.kind >= kKvU8, shifted = side.kv.shift != nullptr;
    if (side.kv.kind != kKvPlain && (codes ? side.finds && !shifted : shifted))
      return c.fail(FASTOPS_ERR_UNSUPPORTED,
                    codes ? "%s_scale needs %s_zero or %s_min to find codes of uint8"
                          : "%s_cache is int8 or e4m3, whose codes take no %s_zero or %s_min",
                    kSides[i], kSides[i], kSides[i]);
    if (side.group > kUnit || (side.group > 1 && !a.window))
      return c.fail(FASTOPS_ERR_UNSUPPORTED,
                    "%s_scale is shared by %lld tokens, allowed: 1, and with a window of recent tokens up to %lld",
                    kSides[i], static_cast<long long>(side.group), static_cast<long long>(kUnit));
  }
  return true;
}

bool check_contents(const Append& a, Checks& c) {
  const fastops_kv_append_desc& d = a.d;
  using ll = long long;
  if (given(d.cu_seqlens)) {
    int64_t before = 0;
    for (int64_t b = 0; b <= a.B; ++b) {
      const int64_t at = Append::index(d.cu_seqlens, b);
      if (at < before || at > a.T || (b == 0 && at != 0) || (b == a.B && at != a.T))
        return c.fail(FASTOPS_ERR_VALUE, "cu_seqlens[%lld] is %lld, they must rise from 0 to %lld", static_cast<ll>(b),
                      static_cast<ll>(at), static_cast<ll>(a.T));
      before = at;
    }
  }
  for (int64_t b = 0; b < a.B; ++b) {
    const int64_t n = a.old_length(b);
    if (n < 0 || a.new_length(b) > std::numeric_limits<int32_t>::max())
      return c.fail(FASTOPS_ERR_VALUE, "seq_lens[%lld] is %lld, must not be negative nor grow beyond int32",
                    static_cast<ll>(b), static_cast<ll>(n));
    const int64_t begin = a.begin(b), align = std::max(a.sides[0].group, a.sides[1].group);
    if (begin < 0 || begin > n || (a.window && (n - begin > a.window || begin % align != 0)))
      return c.fail(FASTOPS_ERR_VALUE,
                    "packed_lens[%lld] is %lld, must be a multiple of %lld from seq_lens - %lld to seq_lens = %lld",
                    static_cast<ll>(b), static_cast<ll>(begin), static_cast<ll>(align), static_cast<ll>(a.window),
                    static_cast<ll>(n));
    const int64_t end = a.end(b);
    if (end > a.max_pages * a.page)
      return c.fail(FASTOPS_ERR_VALUE, "sequence %lld grows to %lld tokens in pages, block_table has room for %lld",
                    static_cast<ll>(b), static_cast<ll>(end), static_cast<ll>(a.max_pages * a.page));
    for (int64_t t = begin; t < end; t = (t / a.page + 1) * a.page)
      if (const int64_t id = a.page_of(b, t); id < 0 || id >= a.pages)
        return c.fail(FASTOPS_ERR_VALUE, "block_table[%lld, %lld] is %lld, pages run from 0 to %lld",
                      static_cast<ll>(b), static_cast<ll>(t / a.page), static_cast<ll>(id),
                      static_cast<ll>(a.pages - 1));
  }
  return true;
}

bool check(Append& a, Checks& c) { return check_tensors(a, c) && check_contents(a, c); }

// Row (first index, second index, head) of a tensor of [., ., Hkv, D].
char* row_of(const fastops_tensor& t, int64_t i, int64_t j, int64_t head) {
  return static_cast<char*>(t.data) + (i * t.stride[0] + j * t.stride[1] + head * t.stride[2]) * size_of(t.dtype);
}

// Where token j of sequence b stands before the call's windows change: among the new ones, or in its window.
const char* source_of(const Append& a, const Side& side, int64_t b, int64_t j, int64_t head) {
  const int64_t n = a.old_length(b);
  if (j < n) return row_of(*side.recent, b, j % a.window, head);
  const fastops_tensor& t = *side.rows;
  return static_cast<char*>(t.data) + ((a.first_row(b) + j - n) * t.stride[0] + head * t.stride[1]) * size_of(t.dtype);
}

float number_at(const char* base, int32_t dtype, int64_t at) {
  return dtype == FASTOPS_F32   ? reinterpret_cast<const float*>(base)[at]
         : dtype == FASTOPS_F16 ? to_f32(reinterpret_cast<const f16*>(base)[at])
                                : to_f32(reinterpret_cast<const bf16*>(base)[at]);
}

// Tokens [j, j + group) of sequence b enter their page.
void enter(const Append& a, const Side& side, const KvAppendTable& table, int64_t b, int64_t j) {
  const int64_t page = a.page_of(b, j), slot = j % a.page;
  if (side.kv.kind == kKvPlain) {
    // Heads that lie next to each other on both sides are one row.
    const bool dense = side.cache->stride[2] == side.dim && side.rows->stride[1] == side.dim &&
                       (a.window == 0 || side.recent->stride[2] == side.dim);
    const int64_t pieces = dense ? 1 : a.H,
                  bytes = a.H / (pieces > 0 ? pieces : 1) * side.dim * size_of(side.rows->dtype);
    for (int64_t h = 0; h < pieces; ++h)
      for (int64_t t = 0; t < side.group; ++t)
        std::memcpy(row_of(*side.cache, page, slot + t, h), source_of(a, side, b, j + t, h),
                    static_cast<size_t>(bytes));
    return;
  }
  AppendGroup g{};
  g.tokens = static_cast<int>(side.group);
  g.dim = static_cast<int>(side.dim);
  g.dtype = side.rows->dtype;
  const int64_t width = size_of(side.kv.scale_dtype);
  for (int64_t h = 0; h < a.H; ++h) {
    for (int64_t t = 0; t < side.group; ++t) {
      g.rows[t] = source_of(a, side, b, j + t, h);
      g.codes[t] = row_of(*side.cache, page, slot + t, h);
    }
    const auto place = [&](const char* base, const int64_t* strides) {
      const int64_t at = page * strides[0] + (slot >> side.kv.group_shift) * strides[1] + h * strides[2];
      return base ? const_cast<char*>(base) + at * width : nullptr;
    };
    char *scale = place(side.kv.scale, side.kv.scale_s), *shift = place(side.kv.shift, side.kv.shift_s);
    if (side.finds) {
      g.scale = scale;
      g.shift = shift;
    } else {
      g.given_scale = scale ? number_at(scale, side.kv.scale_dtype, 0) : 1.0f;
      const float of = shift ? number_at(shift, side.kv.scale_dtype, 0) : 0.0f;
      g.given_offset = side.kv.shift_is_zero || shift == nullptr ? of : -of / g.given_scale;
    }
    table.group(side.kv, g);
  }
}

}  // namespace
}  // namespace fastops::cpu

using namespace fastops;
using namespace fastops::cpu;

extern "C" fastops_status fastops_kv_append_check(const fastops_kv_append_desc* desc, char* message) {
  Checks c("kv_append", message);
  Append a(*desc);
  check(a, c);
  return c.status();
}

extern "C" fastops_status fastops_kv_append(const fastops_kv_append_desc* desc, fastops_env* env) {
  Checks c("kv_append", env->message);
  Append a(*desc);
  if (!check(a, c) || !c.can_run()) return c.status();
  const auto variant = FASTOPS_CHOOSE(KvAppendTable, kv_append_table);
  env->variant = variant.name;
  const int64_t unit = a.unit();
  int64_t units = 0;
  for (int64_t b = 0; b < a.B; ++b) units += (a.end(b) - a.begin(b)) / unit;
  const int64_t work = unit * a.H * (a.sides[0].dim + a.sides[1].dim);
  fastops_env inner = *env;
  if (units * work < kSerialWork) inner.num_threads = 1;
  const int64_t per = rows_per_item(units, work, inner);
  parallel_items(inner, (units + per - 1) / per, [&](int64_t item, int) {
    int64_t b = 0, at = item * per;  // unit `at` of those of sequence b and later ones
    for (int64_t left = units - at < per ? units - at : per; left > 0; --left, ++at) {
      for (int64_t mine; at >= (mine = (a.end(b) - a.begin(b)) / unit); ++b) at -= mine;
      const int64_t first = a.begin(b) + at * unit;
      for (const Side& side : a.sides)
        for (int64_t j = first; j < first + unit; j += side.group) enter(a, side, variant.table, b, j);
    }
  });
  if (a.window) {
    parallel_items(inner, a.B, [&](int64_t b, int) {
      const int64_t n = a.old_length(b), from = std::max(n, a.end(b)), to = a.new_length(b);
      for (const Side& side : a.sides)
        for (int64_t j = from; j < to; ++j)
          for (int64_t h = 0; h < a.H; ++h)
            std::memcpy(row_of(*side.recent, b, j % a.window, h), source_of(a, side, b, j, h),
                        static_cast<size_t>(side.dim * size_of(side.rows->dtype)));
    });
  }
  for (int64_t b = 0; b < a.B; ++b) {
    const int64_t end = a.end(b), length = a.new_length(b);  // both change with what is written
    if (a.window) {
      const fastops_tensor& packed = desc->kv->packed_lens;
      static_cast<int32_t*>(packed.data)[b * packed.stride[0]] = static_cast<int32_t>(end);
    }
    static_cast<int32_t*>(desc->new_lens.data)[b * desc->new_lens.stride[0]] = static_cast<int32_t>(length);
  }
  return FASTOPS_OK;
}
