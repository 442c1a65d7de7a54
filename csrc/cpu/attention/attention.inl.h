// The attention tile loop, once for every instruction set, K/V source and epilogue (FlashAttention-2, algorithm 1).
//
//   for each tile of keys          source.rows -> mode.prepare
//     for each group of rows       mode.scores -> softmax_rows -> mode.accumulate
//   epilogue                       normalise into out/lse, or emit a partial (O, LSE)
#include "cpu/attention/attention_source.inl.h"
// (order matters: each builds on the one before)
#include "cpu/attention/attention_softmax.inl.h"
// (modes need RowState)
#include "cpu/attention/attention_modes.inl.h"
// (all of those)
#include "cpu/attention/attention_direct.inl.h"
#include "cpu/attention/attention_packed_tiles.inl.h"
#include "cpu/attention/attention_lanes.inl.h"
// (a variant of that)
#include "cpu/attention/attention_lane_tiles.inl.h"
// (decoding needs kIsBf16)
#include "cpu/attention/attention_quant.inl.h"
#include "cpu/attention/attention_scales.inl.h"
// (and two more, over their scales)
#include "cpu/attention/attention_lane_kinds.inl.h"
#include "cpu/attention/attention_lane_codes.inl.h"
#include "cpu/attention/attention_lane_groups.inl.h"
#include "cpu/attention/attention_codes.inl.h"

namespace fastops::cpu::FASTOPS_ISA {
namespace {

// ---- epilogues -----------------------------------------------------------------------------------------------------

template <class To>
inline void store_scaled(To* dst, const float* src, int n, float factor) {
  const vf f = vset(factor);
  int d = 0;
  for (; d + W <= n; d += W) vstore(dst + d, vmul(vload(src + d), f));
  if (d < n) vstoren(dst + d, vmul(vloadn(src + d, n - d), f), n - d);
}

inline void store_row(char* out, int32_t dtype, int64_t at, const float* src, int n, float factor) {
  if (dtype == 1) store_scaled(reinterpret_cast<float*>(out) + at, src, n, factor);
  if (dtype == 2) store_scaled(reinterpret_cast<f16*>(out) + at, src, n, factor);
  if (dtype == 3) store_scaled(reinterpret_cast<bf16*>(out) + at, src, n, factor);
}

// The factor that normalises a row and its LSE, from its maximum (natural units), sum and an optional sink logit.
struct RowEnd {
  float factor, lse;
};
inline RowEnd finish_row(float m, float l, const float* sink) {
  if (sink == nullptr) {
    if (l == 0.0f) return {0.0f, kNegInf};
    return {1.0f / l, m + __builtin_logf(l)};
  }
  const float top = !(m <= *sink) ? m : *sink;  // a NaN maximum stays
  if (top == kNegInf) return {0.0f, kNegInf};
  const float mine = l == 0.0f ? 0.0f : __builtin_expf(m - top);
  const float denom = l * mine + __builtin_expf(*sink - top);
  return {mine / denom, top + __builtin_logf(denom)};
}

struct Normalise {
  static void row(const AttentionParams& p, const AttentionItem& it, const Sequence& seq, int h, int64_t r,
                  const float* o, float m, float l) {
    const int64_t qi = seq.q0 + (it.row0 + r) / p.G, head = (it.hkv + h) * p.G + (it.row0 + r) % p.G;
    const RowEnd e = finish_row(m, l, p.sinks ? p.sinks + head * p.sinks_stride : nullptr);
    store_row(p.out, p.out_dtype, it.b * p.o_sb + qi * p.o_ss + head * p.o_sh, o, p.Dv, e.factor);
    if (p.lse) p.lse[it.b * p.lse_sb + head * p.lse_sh + qi * p.lse_ss] = e.lse;
  }
};

struct Partial {
  static void row(const AttentionParams& p, const AttentionItem& it, const Sequence&, int h, int64_t r, const float* o,
                  float m, float l) {
    const RowEnd e = finish_row(m, l, nullptr);  // the sink joins at the merge
    const int64_t slot = h * it.partial_step + r;
    store_scaled(it.partial_out + slot * p.Dv, o, p.Dv, e.factor);
    it.partial_lse[slot] = e.lse;
  }
};

// Adds to a row what keys seen before gave it. (As merge.h merges.)
inline void join(const AttentionItem& it, int h, int64_t r, int Dv, Row& row) {
  const int64_t at = h * it.rows + r;
  const float lse = it.before_lse[at], top = !(row.m <= lse) ? row.m : lse;
  if (lse == kNegInf) return;
  const float mine = row.l == 0.0f ? 0.0f : __builtin_expf(row.m - top), theirs = __builtin_expf(lse - top);
  const float* x = it.before + at * Dv;
  for (int d = 0; d < Dv; d += W) {
    const vf o = vmul(vload(row.o + d), vset(mine));
    vstore(row.o + d, vfma(Dv - d >= W ? vload(x + d) : vloadn(x + d, Dv - d), vset(theirs), o));
  }
  row.m = top;
  row.l = row.l * mine + theirs;
}

// ---- the loop ------------------------------------------------------------------------------------------------------

template <class Mode, class T>
Row finished(Mode& mode, const Work<T>& w, int h, int r) {
  if constexpr (Mode::kInLanes) {
    return mode.row(h, r);
  } else {
    const RowState st = w.state(h);
    float* o = st.o + static_cast<int64_t>(r) * w.VP;
    mode.finish(o);
    return {o, st.m[r], vsum(vload(st.l + r * kPad))};
  }
}

// Asks `mode` for the first keys of the item that comes next, during the last tile of this one: that hides what it
// costs to begin. Returns how many rows of them stand behind those of the tile.
template <class Source, class Mode, class T>
int expect_next(const AttentionParams& p, const AttentionItem& it, Mode& mode, Work<T>& w) {
  if (it.then == nullptr) return 0;
  const AttentionItem& next = *it.then;
  const Sequence seq = sequence(p, next.b);
  const KeyRange seen = visible_keys(p, seq, next.row0 / p.G);
  const int64_t first = seen.lo > next.key0 ? seen.lo : next.key0, last = seen.hi < next.key1 ? seen.hi : next.key1;
  if (first >= last) return 0;
  const int n = static_cast<int>(last - first < w.tile ? last - first : w.tile);
  const Source source(p, next, seq);
  source.rows(first, n, w.kr + w.tile, w.vr + w.tile);
  if constexpr (Mode::kReadsCodes) mode.expect(next, source.table, first, n);
  return n;
}

// Returns whether the results stand: false where the mode has met numbers that it cannot multiply.
template <class Mode, class Source, class Epilogue, bool kGeneral>
bool tile_loop(const AttentionParams& p, const AttentionItem& it, const Sequence& seq, float* scratch) {
  using T = typename Source::Elem;
  Work<T> w(p, it, scratch);
  const Source source(p, it, seq);
  const int32_t *lo = w.st.lo, *hi = w.st.hi;

  // Visible keys of each row, within this item's split. Both ends grow with the row.
  int64_t first = it.key1, last = it.key0;
  for (int r = 0; r < w.rows; ++r) {
    KeyRange v = visible_keys(p, seq, (it.row0 + r) / p.G);
    if (v.lo < it.key0) v.lo = it.key0;
    if (v.hi > it.key1) v.hi = it.key1;
    if (v.hi < it.key0) v.hi = it.key0;
    if (v.lo > v.hi) v.lo = v.hi;
    w.st.lo[r] = static_cast<int32_t>(v.lo);
    w.st.hi[r] = static_cast<int32_t>(v.hi);
    if (v.lo < v.hi) {
      if (v.lo < first) first = v.lo;
      if (v.hi > last) last = v.hi;
    }
  }

  if (first < last) first -= first % Mode::kKeysTogether;

  Mode mode(w, p);
  size_t all = static_cast<size_t>(w.rows * w.heads);
  if constexpr (Mode::kInLanes) {
    all = static_cast<size_t>(mode.o_rows() * w.heads);
  } else {
    for (size_t r = 0; r < all; ++r) w.st.m[r] = kNegInf;
    std::memset(w.st.l, 0, sizeof(float) * kPad * all);
  }
  std::memset(w.st.o, 0, sizeof(float) * static_cast<size_t>(w.VP) * all);
  const auto run_length = [&](int64_t key) { return static_cast<int>(last - key < w.tile ? last - key : w.tile); };
  if (first < last) {
    if constexpr (!Source::kDecodes) source.rows(first, run_length(first), w.kr + w.tile, w.vr + w.tile);
    if constexpr (Mode::kReadsCodes || Mode::kInLanes) mode.begin(run_length(first));
  }
  for (int h = 0; h < w.heads; ++h) mode.load_q(p, it, seq, h);
  for (int64_t key = first; key < last; key += w.tile) {
    const int n = run_length(key), next = run_length(key + n);
    if constexpr (Source::kDecodes) {
      source.decode(key, n, next, w.raw, w.kr, w.vr);
      mode.prepare(n, 0);
    } else {
      for (int j = 0; j < n; ++j) {
        w.kr[j] = w.kr[w.tile + j];
        w.vr[j] = w.vr[w.tile + j];
      }
      source.rows(key + n, next, w.kr + w.tile, w.vr + w.tile);
      if constexpr (Mode::kReadsCodes) mode.scales(it, source.table, key, n, next);
      int asked = next;
      if constexpr (Mode::kStreams)
        if (next == 0) asked = expect_next<Source>(p, it, mode, w);
      mode.prepare(n, asked);
    }
    if (!mode.sound()) return false;
    if constexpr (Mode::kStreams) mode.asks = true;
    const int step = mode.rows_at_once();
    for (int r0 = 0; r0 < w.rows; r0 += step) {
      const int rows = w.rows - r0 < step ? w.rows - r0 : step, r1 = r0 + rows - 1;
      if (hi[r1] <= key || lo[r0] >= key + n) continue;
      if constexpr (Mode::kInLanes) mode.take(r0);
      const int seen = hi[r1] - key < n ? static_cast<int>(hi[r1] - key) : n;
      const bool masked = lo[r1] > key || hi[r0] < key + seen;
      mode.scores(r0, rows, seen);
      if constexpr (Mode::kInLanes) {
        mode.softmax(p, key, seen, masked);
        if (masked && !mode.v_finite(seen)) {
          mode.accumulate_seen(seen);
          if constexpr (Mode::kStreams) mode.asks = false;
          continue;
        }
      } else {
        for (int h = 0; h < w.heads; ++h) {
          RowState st = w.state(h);
          constexpr int kParts = Mode::kParts;
          const int64_t ldp = kParts * w.BK / 2;
          ScoreTile t{w.s + h * rows * w.BK, w.BK, w.p16 + h * rows * ldp, ldp, w.BK / 2, key, seen, masked};
          softmax_rows<kGeneral, kExpDegree<T>, kParts>(p, it, it.hkv + h, seq, st, r0, rows, t);
        }
      }
      if constexpr (!Mode::kReadsCodes && !Mode::kInLanes) {
        if ((masked || p.bias || Mode::kSeesV) && !mode.v_finite(seen)) {
          for (int h = 0; h < w.heads; ++h) accumulate_seen<T, Mode::kParts>(w, h, r0, rows, seen);
          continue;
        }
      }
      mode.accumulate(r0, rows, seen);
      if constexpr (Mode::kStreams) mode.asks = false;
    }
  }
  for (int h = 0; h < w.heads; ++h) {
    for (int r = 0; r < w.rows; ++r) {
      Row row = finished(mode, w, h, r);
      if ((Source::kDecodes || Mode::kReadsCodes) && it.v_factor != 1.0f)
        for (int d = 0; d < w.VP; d += W) vstore(row.o + d, vmul(vload(row.o + d), vset(it.v_factor)));
      if (!kGeneral) row.m *= p.scale;
      if (it.before) join(it, h, r, p.Dv, row);
      Epilogue::row(p, it, seq, h, r, row.o, row.m, row.l);
    }
  }
  return mode.sound();
}

// ---- choice of instantiation ---------------------------------------------------------------------------------------

template <class Mode, class Source, class Epilogue>
bool run_general(const AttentionParams& p, const AttentionItem& it, const Sequence& s, float* scratch) {
  if constexpr (!Mode::kInLanes)
    if (is_general(p)) return tile_loop<Mode, Source, Epilogue, true>(p, it, s, scratch);
  return tile_loop<Mode, Source, Epilogue, false>(p, it, s, scratch);
}

template <class Mode, class Source>
bool run_epilogue(const AttentionParams& p, const AttentionItem& it, const Sequence& s, float* scratch) {
  if (it.partial_out) return run_general<Mode, Source, Partial>(p, it, s, scratch);
  return run_general<Mode, Source, Normalise>(p, it, s, scratch);
}

template <class Source>
void run_mode(const AttentionParams& p, const AttentionItem& it, const Sequence& s, float* scratch) {
  using T = typename Source::Elem;
  const bool direct = it.rows <= kDirectRows || is_direct(p, s);
#if defined(FASTOPS_HAS_AMX)
  if constexpr (!Source::kDecodes && kDot16<T>)
    if (direct && !is_general(p) && LaneTiles::fits(p, it) && run_epilogue<LaneTiles, Source>(p, it, s, scratch))
      return;
#endif
  if constexpr (!Source::kDecodes && W >= 8)
    if (direct && !is_general(p) && Lanes<T>::fits(it)) {
      run_epilogue<Lanes<T>, Source>(p, it, s, scratch);
      return;
    }
  if (direct) {
    run_epilogue<Direct<T>, Source>(p, it, s, scratch);
    return;
  }
#if defined(FASTOPS_HAS_AMX)
  if (run_epilogue<PackedTiles<T>, Source>(p, it, s, scratch)) return;
#endif
  run_epilogue<Packed<T>, Source>(p, it, s, scratch);
}

template <class T>
void run_source(const AttentionParams& p, const AttentionItem& it, const Sequence& s, float* scratch) {
  if (p.paged) {
    run_mode<PagedSource<T>>(p, it, s, scratch);
  } else {
    run_mode<DenseSource<T>>(p, it, s, scratch);
  }
}

#if defined(FASTOPS_HAS_VNNI)
template <class Mode, int kKind>
void run_codes(const AttentionParams& p, const AttentionItem& it, const Sequence& s, float* scratch) {
  run_epilogue<Mode, PagedSource<Code<kKind>>>(p, it, s, scratch);
}
template <int kKind>
void run_whole(const AttentionParams& p, const AttentionItem& it, const Sequence& s, float* scratch) {
  if (!is_general(p) && LaneCodes<kKind>::fits(p, it)) return run_codes<LaneCodes<kKind>, kKind>(p, it, s, scratch);
  run_codes<Codes<kKind>, kKind>(p, it, s, scratch);
}
// KIVI: keys in pages, then those of the window.
template <int kKind>
bool run_groups(const AttentionParams& p, const AttentionItem& it, const Sequence& s, float* scratch) {
  if (is_general(p) || !LaneGroups<kKind>::fits(p, it)) return false;
  AttentionItem pages = it, recent = it;
  pages.then = recent.then = nullptr;
  const int64_t packed = p.packed ? p.packed[it.b * p.packed_stride] : s.Sk;
  if (packed < pages.key1) pages.key1 = packed;
  if (packed > recent.key0) recent.key0 = packed;
  const bool both = pages.key0 < pages.key1 && recent.key0 < recent.key1;
  if (both) {
    const int rows = kDirectRows * kDirectHeads;
    pages.partial_out = scratch + attention_scratch(p, rows).before;
    pages.partial_lse = pages.partial_out + it.heads * it.rows * p.Dv;
    pages.partial_step = it.rows;
    recent.before = pages.partial_out;
    recent.before_lse = pages.partial_lse;
  }
  if (both || recent.key0 >= recent.key1) run_codes<LaneGroups<kKind>, kKind>(p, pages, s, scratch);
  if (recent.key0 >= recent.key1) return true;
  AttentionParams plain = p;
  plain.quant = false;
  plain.k_sh = p.kq.recent_s[2];
  plain.v_sh = p.vq.recent_s[2];
  if (p.dtype == 2)
    run_mode<RecentSource<f16>>(plain, recent, s, scratch);
  else
    run_mode<RecentSource<bf16>>(plain, recent, s, scratch);
  return true;
}
#endif

void attention_item(const AttentionParams& p, const AttentionItem& it, float* scratch) {
  const Sequence s = sequence(p, it.b);
#if defined(FASTOPS_HAS_AMX)
  [[maybe_unused]] const TileScope tiles;
#endif
  if (p.quant) {  // decoded to what the products take: bf16 where the hardware multiplies it, otherwise fp32
#if defined(FASTOPS_HAS_VNNI)
    if (p.dtype != 1) {
      if (one_scale_a_key(p, it, kKvI8)) return run_whole<kKvI8>(p, it, s, scratch);
      if (one_scale_a_key(p, it, kKvU8)) return run_whole<kKvU8>(p, it, s, scratch);
      if (one_scale_a_key(p, it, kKvU4)) return run_whole<kKvU4>(p, it, s, scratch);
    }
    if (run_groups<kKvU2>(p, it, s, scratch) || run_groups<kKvU4>(p, it, s, scratch)) return;
    if (p.dtype == 3) {
      AttentionParams folded = p;
      AttentionItem item = it;
      fold_scales(folded, item);
      if (codes_of_keys(folded, item, kKvF8) && !is_general(folded) && LaneCodes<kKvF8>::fits(folded, item))
        return run_codes<LaneCodes<kKvF8>, kKvF8>(folded, item, s, scratch);
#if defined(FASTOPS_HAS_BF16_DOT)
      return run_mode<QuantSource<bf16>>(folded, item, s, scratch);
#endif
    }
#endif
    return run_mode<QuantSource<float>>(p, it, s, scratch);
  }
  if (p.dtype == 1) run_source<float>(p, it, s, scratch);
  if (p.dtype == 2) run_source<f16>(p, it, s, scratch);
  if (p.dtype == 3) run_source<bf16>(p, it, s, scratch);
}

// ---- pieces of merging (merge.h) ----------------------------------------------------------------------------------

template <class T>
void add_weighted_as(float* acc, const T* x, int n, float weight) {
  const vf wv = vset(weight);
  int d = 0;
  for (; d + W <= n; d += W) vstore(acc + d, vfma(wv, vload(x + d), vload(acc + d)));
  if (d < n) vstore(acc + d, vfma(wv, vloadn(x + d, n - d), vload(acc + d)));
}

void add_weighted(float* acc, const char* x, int32_t dtype, int32_t n, float weight) {
  if (dtype == 1) add_weighted_as(acc, reinterpret_cast<const float*>(x), n, weight);
  if (dtype == 2) add_weighted_as(acc, reinterpret_cast<const f16*>(x), n, weight);
  if (dtype == 3) add_weighted_as(acc, reinterpret_cast<const bf16*>(x), n, weight);
}

void store_merged(char* out, int32_t dtype, const float* acc, int32_t n, float factor) {
  store_row(out, dtype, 0, acc, n, factor);
}

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA

#include "cpu/attention/attention_bwd.inl.h"

namespace fastops::cpu::FASTOPS_ISA {

extern const AttentionTable attention_table;
const AttentionTable attention_table = {&attention_item, &add_weighted,  &store_merged,
                                        &backward_keys,  &backward_rows, &backward_sinks};

}  // namespace fastops::cpu::FASTOPS_ISA
