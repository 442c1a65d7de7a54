// Ways to multiply a tile. Packed, here, copies it once into a layout the register-blocked gemm streams (many rows:
// prefill, compute bound); Direct (attention_direct.inl.h) and Lanes (attention_lanes.inl.h) read K and V rows in place
// (few rows: decode, memory bound). All offer the tile loop
//   prepare (a tile's row pointers)   scores   accumulate   v_finite   finish (a row of o)
namespace fastops::cpu::FASTOPS_ISA {
namespace {

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16> = true;

// Whether q, k and the probabilities stay bf16 and a dot-product instruction multiplies them.
#if defined(FASTOPS_HAS_BF16_DOT)
template <class T>
constexpr bool kDot16 = kIsBf16<T>;
#else
template <class T>
constexpr bool kDot16 = false;
#endif

// The exp polynomial whose error hides behind the storage type's rounding.
template <class T>
constexpr int kExpDegree = sizeof(T) == 4 ? 6 : 4;

// A finished row of an item: its unnormalised output, and its maximum and sum.
struct Row {
  float *o, m, l;
};

// What a worker's scratch holds for one item. Sizes are those of attention_scratch().
template <class T>
struct Work {
  int D, Dv, VP, BK;
  int rows, heads;
  int64_t k_step, v_step;  // elements between neighbouring heads of K and V
  int64_t ldq;             // 32-bit units between rows of q: fp32 numbers, or bf16 pairs
  int depth;               // units of the q k^T product
  float *q, *k, *v, *s, *p16;
  RowState st;
  const T **kr, **vr;  // rows of this tile, then of the next one at [tile, 2 tile)
  int tile;            // keys per tile, at most BK
  const T* zero_row;
  T* raw;  // decoded rows, where the source makes them
  bool quant;

  Work(const AttentionParams& p, const AttentionItem& it, float* scratch)
      : D(p.D),
        Dv(p.Dv),
        VP(pad_dim(p.Dv)),
        BK(attention_key_tile(p.D, p.Dv)),
        rows(static_cast<int>(it.rows)),
        heads(static_cast<int>(it.heads)),
        k_step(p.quant ? p.D : p.k_sh),
        v_step(p.quant ? p.Dv : p.v_sh) {
    const int rows_max = it.rows > kSharedRows ? p.block_rows : kDirectRows * kDirectHeads;
    const AttentionScratch at = attention_scratch(p, rows_max);
    const int64_t dp = (D + 31) / 32 * 32;
    ldq = kDot16<T> ? dp / 2 : dp;
    depth = kDot16<T> ? (D + 1) / 2 : D;
    q = scratch + at.q;
    k = scratch + at.k;
    v = scratch + at.v;
    s = scratch + at.s;
    p16 = scratch + at.p16;
    st = {scratch + at.m,
          scratch + at.l,
          reinterpret_cast<int32_t*>(scratch + at.lo),
          reinterpret_cast<int32_t*>(scratch + at.hi),
          scratch + at.o,
          VP};
    kr = reinterpret_cast<const T**>(scratch + at.rows);
    vr = kr + 2 * kDirectKeys;
    tile = BK;
    raw = reinterpret_cast<T*>(scratch + at.raw);
    quant = p.quant;
    zero_row = reinterpret_cast<const T*>(vr + 2 * kDirectKeys);
    std::memset(const_cast<T*>(zero_row), 0, kMaxHeadDim * sizeof(float));
  }

  // The rows of one head of the item. Visible keys are the same for every head.
  RowState state(int h) const {
    const int64_t r = static_cast<int64_t>(h) * rows;
    return {st.m + r, st.l + r * kPad, st.lo, st.hi, st.o + r * VP, st.ldo};
  }
};

template <class T, class Q>
void load_q_rows_as(const AttentionParams& p, const AttentionItem& it, const Sequence& seq, Work<T>& w, int h) {
  const Q* base = reinterpret_cast<const Q*>(p.q) + it.b * p.q_sb + seq.q0 * p.q_ss + (it.hkv + h) * p.G * p.q_sh;
  int64_t i = it.row0 / p.G, g = it.row0 % p.G;
  for (int r = 0; r < w.rows; ++r) {
    const Q* src = base + i * p.q_ss + g * p.q_sh;
    float* dst = w.q + (static_cast<int64_t>(h) * w.rows + r) * w.ldq;
    if constexpr (kDot16<T>) {
      std::memset(dst, 0, static_cast<size_t>(w.ldq) * 4);
      std::memcpy(dst, src, static_cast<size_t>(w.D) * sizeof(T));
    } else {
      int d = 0;
      for (; d + W <= w.D; d += W) vstore(dst + d, vload(src + d));
      if (d < w.D) vstore(dst + d, vloadn(src + d, w.D - d));
    }
    if (++g == p.G) {
      g = 0;
      ++i;
    }
  }
}

// q's dtype is that of the rows, or else these are fp32.
template <class T>
void load_q_rows(const AttentionParams& p, const AttentionItem& it, const Sequence& seq, Work<T>& w, int h) {
  if constexpr (sizeof(T) == 4) {
    if (p.dtype == 2) return load_q_rows_as<T, f16>(p, it, seq, w, h);
    if (p.dtype == 3) return load_q_rows_as<T, bf16>(p, it, seq, w, h);
  }
  load_q_rows_as<T, T>(p, it, seq, w, h);
}

// Where a tile is masked for some rows and V holds an inf or NaN, the zero probabilities of unseen keys must not
// multiply it: add key by key, skipping those.
template <class T, int kParts>
__attribute__((noinline)) void accumulate_seen(Work<T>& w, int h, int r0, int rows, int n) {
  for (int i = 0; i < rows; ++i) {
    float* o = w.st.o + static_cast<int64_t>(h * w.rows + r0 + i) * w.VP;
    const float* pr = kParts ? w.p16 + (h * rows + i) * (kParts * w.BK / 2) : w.s + (h * rows + i) * w.BK;
    for (int j = 0; j < n; ++j) {
      float pj = kParts ? 0.0f : pr[j];
      for (int part = kParts; part-- > 0;) pj += to_f32(reinterpret_cast<const bf16*>(pr)[part * w.BK + j]);
      if (pj == 0.0f) continue;
      for (int d = 0; d < w.Dv; d += W) {
        const int left = w.Dv - d;
        const T* v = w.vr[j] + h * w.v_step + d;
        const vf x = left >= W ? vload(v) : vloadn(v, left);
        vstore(o + d, vfma(vset(pj), x, vload(o + d)));
      }
    }
  }
}

// ---- Packed ------------------------------------------------------------------------------------------------------

template <class T>
struct Packed {
  static constexpr int kParts = kDot16<T> ? 1 : 0;  // bf16 that a probability becomes, 0: it stays fp32
  static constexpr bool kReadsCodes = false;        // and needs their scales
  static constexpr bool kStreams = false;           // asks for rows before they are needed
  static constexpr bool kInLanes = false;           // a query row in each lane, and a softmax of its own
  static constexpr int kKeysTogether = 1;           // a tile begins at a multiple of
  static constexpr int kRows = 24;
  static constexpr int kLine = 64 / static_cast<int>(sizeof(T));
  Work<T>& w;
  bool v_is_finite = true;
  static int rows_at_once() { return kRows; }

  Packed(Work<T>& work, const AttentionParams&) : w(work) {}
  static void finish(float*) {}
  static bool sound() { return true; }
  static constexpr bool kSeesV = false;
  void load_q(const AttentionParams& p, const AttentionItem& it, const Sequence& seq, int h) {
    load_q_rows(p, it, seq, w, h);
  }

  static vf load_units(const T* p, int elems) {  // W units of a K row, absent elements zero
#if defined(FASTOPS_HAS_BF16_DOT)
    if constexpr (kDot16<T>) {
      if (elems >= 2 * W) return _mm512_loadu_ps(p);
      return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((1u << (elems < 0 ? 0 : elems)) - 1u, p));
    }
#endif
    return elems >= W ? vload(p) : vloadn(p, elems);
  }

  // K -> [depth][BK]: units of the head dimension down, keys across. The same place of the `next` rows behind them is
  // asked for meanwhile: few rows of q would wait for memory at every tile.
  void pack_k(int n, int next) {
    constexpr int kPerUnit = kDot16<T> ? 2 : 1;
    for (int j = 0; j < n; j += W) {
      const int there = next - j < W ? next - j : W;
      for (int u = 0; u < w.depth; u += W) {
        if (u % 16 == 0)  // a line
          for (int i = 0; i < there; ++i) vprefetch_l2(w.kr[w.tile + j + i] + u * kPerUnit);
        vf r[W];
        for (int i = 0; i < W; ++i)
          r[i] = load_units((j + i < n ? w.kr[j + i] : w.zero_row) + u * kPerUnit, w.D - u * kPerUnit);
        vtranspose(r);
        float* dst = w.k + static_cast<int64_t>(u) * w.BK + j;
        if (u + W <= w.depth) {
          for (int i = 0; i < W; ++i) vstore(dst + i * w.BK, r[i]);
        } else {
          for (int i = 0; i < w.depth - u; ++i) vstore(dst + i * w.BK, r[i]);
        }
      }
    }
  }

  // V -> [keys][VP] fp32, or [keys / 2][VP] pairs of bf16 (keys 2i and 2i+1).
  void pack_v([[maybe_unused]] int n, int next, int units) {
    constexpr int kKeys = kDot16<T> ? 2 : 1;
    vf poison = vzero();
    for (int u = 0; u < units; ++u) {
      for (int j = u * kKeys; j < (u + 1) * kKeys && j < next; ++j)
        for (int d = 0; d < w.Dv; d += kLine) vprefetch_l2(w.vr[w.tile + j] + d);
      float* dst = w.v + static_cast<int64_t>(u) * w.VP;
      for (int d = 0; d < w.VP; d += W) {
        const int left = w.Dv - d;
#if defined(FASTOPS_HAS_BF16_DOT)
        if constexpr (kDot16<T>) {
          const T* a = 2 * u < n ? w.vr[2 * u] : w.zero_row;
          const T* b = 2 * u + 1 < n ? w.vr[2 * u + 1] : w.zero_row;
          const __mmask16 m = vfirst(left);
          const __m512i lo = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, a + d));
          const __m512i hi = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, b + d)), 16);
          poison = vfma(_mm512_castsi512_ps(_mm512_slli_epi32(lo, 16)), vzero(), poison);
          poison = vfma(_mm512_castsi512_ps(hi), vzero(), poison);
          vstore(dst + d, _mm512_castsi512_ps(_mm512_or_si512(lo, hi)));
          continue;
        }
#endif
        const vf x = left >= W ? vload(w.vr[u] + d) : vloadn(w.vr[u] + d, left > 0 ? left : 0);
        poison = vfma(x, vzero(), poison);
        vstore(dst + d, x);
      }
    }
    v_is_finite = vall_finite(poison);
  }

  static int value_units(int n) { return kDot16<T> ? (n + 1) / 2 : n; }

  void prepare(int n, int next) {
    pack_k(n, next);
    pack_v(n, next, value_units(n));
  }
  bool v_finite(int) const { return v_is_finite; }

  void scores(int r0, int rows, int n) {
    const int cols = (n + W - 1) / W * W;
    gemm<Dot>(w.q + r0 * w.ldq, w.ldq, w.k, w.BK, w.s, w.BK, rows, cols, w.depth, false);
  }
  void accumulate(int r0, int rows, int n) {
    const int cols = (w.Dv + W - 1) / W * W, units = value_units(n);
    if constexpr (kDot16<T>) {
      gemm<Dot>(w.p16, w.BK / 2, w.v, w.VP, w.st.o + static_cast<int64_t>(r0) * w.VP, w.VP, rows, cols, units, true);
    } else {
      gemm<Dot>(w.s, w.BK, w.v, w.VP, w.st.o + static_cast<int64_t>(r0) * w.VP, w.VP, rows, cols, units, true);
    }
  }

 private:
#if defined(FASTOPS_HAS_BF16_DOT)
  template <bool b, class = void>
  struct Pick {
    using type = DotF32;
  };
  template <class U>
  struct Pick<true, U> {
    using type = DotBf16;
  };
  using Dot = typename Pick<kDot16<T>>::type;
#else
  using Dot = DotF32;
#endif
};

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
