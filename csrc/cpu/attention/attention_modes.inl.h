// The two ways to multiply a tile: Direct reads K and V rows in place (few rows: decode, memory bound), Packed copies
// the tile once into a layout the register-blocked gemm streams (many rows: prefill, compute bound). Both offer the
// tile loop
//   load_q   prepare (a tile's row pointers)   scores   accumulate   v_finite
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

  Work(const AttentionParams& p, const AttentionItem& it, float* scratch)
      : D(p.D),
        Dv(p.Dv),
        VP(pad_dim(p.Dv)),
        BK(attention_key_tile(p.D, p.Dv)),
        rows(static_cast<int>(it.rows)),
        heads(static_cast<int>(it.heads)),
        k_step(p.k_sh),
        v_step(p.v_sh) {
    const int rows_max = it.rows > kDirectRows ? p.block_rows : kDirectRows * kDirectHeads;
    const AttentionScratch at = attention_scratch(D, Dv, rows_max, BK);
    const int64_t dp = (D + 31) / 32 * 32;
    ldq = kDot16<T> ? dp / 2 : dp;
#if defined(FASTOPS_HAS_AMX)
    depth = static_cast<int>(kDot16<T> ? ldq : D);  // a tile row holds 16 units
#else
    depth = kDot16<T> ? (D + 1) / 2 : D;
#endif
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
    vr = kr + 2 * BK;
    tile = BK;
    zero_row = reinterpret_cast<const T*>(vr + 2 * BK);
    std::memset(const_cast<T*>(zero_row), 0, kMaxHeadDim * sizeof(float));
  }

  // The rows of one head of the item. Visible keys are the same for every head.
  RowState state(int h) const {
    const int64_t r = static_cast<int64_t>(h) * rows;
    return {st.m + r, st.l + r * kPad, st.lo, st.hi, st.o + r * VP, st.ldo};
  }
};

template <class T>
void load_q_rows(const AttentionParams& p, const AttentionItem& it, const Sequence& seq, Work<T>& w, int h) {
  const T* base = reinterpret_cast<const T*>(p.q) + it.b * p.q_sb + seq.q0 * p.q_ss + (it.hkv + h) * p.G * p.q_sh;
  int64_t i = it.row0 / p.G, g = it.row0 % p.G;
  for (int r = 0; r < w.rows; ++r) {
    const T* src = base + i * p.q_ss + g * p.q_sh;
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

// Where a tile is masked for some rows and V holds an inf or NaN, the zero probabilities of unseen keys must not
// multiply it: add key by key, skipping those.
template <class T, bool kBf16P>
__attribute__((noinline)) void accumulate_seen(Work<T>& w, int h, int r0, int rows, int n) {
  for (int i = 0; i < rows; ++i) {
    float* o = w.st.o + static_cast<int64_t>(h * w.rows + r0 + i) * w.VP;
    const float* pr = kBf16P ? w.p16 + i * (w.BK / 2) : w.s + (h * rows + i) * w.BK;
    for (int j = 0; j < n; ++j) {
      const float pj = kBf16P ? to_f32(reinterpret_cast<const bf16*>(pr)[j]) : pr[j];
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
  static constexpr bool kBf16P = kDot16<T>;
#if defined(FASTOPS_HAS_AMX)
  static constexpr int kRows = 32;
#else
  static constexpr int kRows = 24;
#endif
  Work<T>& w;
  bool v_is_finite = true;

  explicit Packed(Work<T>& work) : w(work) {}

  static vf load_units(const T* p, int elems) {  // W units of a K row, absent elements zero
#if defined(FASTOPS_HAS_BF16_DOT)
    if constexpr (kDot16<T>) {
      if (elems >= 2 * W) return _mm512_loadu_ps(p);
      return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((1u << (elems < 0 ? 0 : elems)) - 1u, p));
    }
#endif
    return elems >= W ? vload(p) : vloadn(p, elems);
  }

  // K -> [depth][BK]: units of the head dimension down, keys across.
  void pack_k(int n) {
    constexpr int kPerUnit = kDot16<T> ? 2 : 1;
    for (int j = 0; j < n; j += W) {
      for (int u = 0; u < w.depth; u += W) {
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
  void pack_v(int n) {
    vf poison = vzero();
    const int units = value_units(n);
    for (int u = 0; u < units; ++u) {
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

  static int value_units(int n) {
#if defined(FASTOPS_HAS_AMX)
    if constexpr (kDot16<T>) return (n + 31) / 32 * 16;
#endif
    return kDot16<T> ? (n + 1) / 2 : n;
  }

  void prepare(int n, int) {
    pack_k(n);
    pack_v(n);
  }
  bool v_finite(int) const { return v_is_finite; }

  void scores(int r0, int rows, int n) {
    const int cols = (n + W - 1) / W * W;
    gemm<Dot>(w.q + r0 * w.ldq, w.ldq, w.k, w.BK, w.s, w.BK, rows, cols, w.depth, false);
  }
  void accumulate(int r0, int rows, int n) {
    const int cols = (w.Dv + W - 1) / W * W, units = value_units(n);
    if constexpr (kDot16<T>) {
#if defined(FASTOPS_HAS_AMX)
      if (n % 32 != 0 && n % 32 <= 16)  // softmax wrote whole vectors of 16 keys; a tile row holds 32
        for (int i = 0; i < rows; ++i) std::memset(w.p16 + i * (w.BK / 2) + units - 8, 0, 32);
#endif
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

// ---- Direct ------------------------------------------------------------------------------------------------------

// Asks for rows a few cache lines at a time, in memory order.
struct RowStream {
  const char* const* rows;
  int row_lines, count;
  int row = 0, line = 0;
  FASTOPS_INLINE void step(int lines) {
    while (lines > 0 && row < count) {
      const int n = row_lines - line < lines ? row_lines - line : lines;
      const char* p = rows[row] + line * 64;
      for (int i = 0; i < n; ++i) vprefetch(p + i * 64);
      lines -= n;
      line += n;
      if (line == row_lines) {
        line = 0;
        ++row;
      }
    }
  }
};

// Memory delivers its full speed to one linear stream. In the [B,S,H,D] layout the rows of one head lie a page apart
// (two thirds of that speed, whatever is prefetched), so an item holds neighbouring heads and takes a few keys of all
// of them at a time, while the next few keys are on their way to L1 (docs/design/003-cpu-attention.md).
template <class T>
struct Direct {
  static constexpr bool kBf16P = false;
  static constexpr int kRows = kDirectRows;
  Work<T>& w;
  int block;  // keys taken together
  int next = 0;
  RowStream ahead{};

  explicit Direct(Work<T>& work) : w(work) {
    const int row_bytes = w.heads * static_cast<int>(sizeof(T)) * (w.D > w.Dv ? w.D : w.Dv);
    const int step = w.heads == 1 ? W : kStep, keys = 8192 / row_bytes / step * step;
    block = keys < step ? step : keys < w.BK ? keys : w.BK;
    const int tile = 65536 / row_bytes / 16 * 16;
    w.tile = tile < 32 ? 32 : tile < w.BK ? tile : w.BK;
  }
  static constexpr int kStep = W / 4;  // keys of a dot-product block that takes four rows or heads

  static int lines(int64_t elems) { return static_cast<int>((elems * static_cast<int64_t>(sizeof(T)) + 63) / 64); }

  // What to ask for while keys up to j of n are worked on: the keys behind them, then the first of `then`.
  void look_ahead(const T* const* rows, int j, int n, const T* const* then, int then_n, int64_t head_step, int dim) {
    const bool same = j < n;
    const int left = same ? n - j : then_n;
    ahead = {reinterpret_cast<const char* const*>(same ? rows + j : then), lines((w.heads - 1) * head_step + dim),
             left < block ? left : block};
  }

  void prepare(int n, int next_n) {
    next = next_n;
    for (int j = n; j < (n + W - 1) / W * W; ++j) w.kr[j] = w.kr[n - 1];  // their scores are masked away
  }

  bool v_finite(int n) const {
    vf poison = vzero();
    for (int j = 0; j < n; ++j) {
      for (int h = 0; h < w.heads; ++h) {
        const T* v = w.vr[j] + h * w.v_step;
        for (int d = 0; d < w.Dv; d += W)
          poison = vfma(w.Dv - d >= W ? vload(v + d) : vloadn(v + d, w.Dv - d), vzero(), poison);
      }
    }
    return vall_finite(poison);
  }

  // HB heads x RB rows x JB keys at once: up to W accumulators, whose horizontal sums are taken together.
  template <int HB, int RB, int JB>
  void dots(int h, int r0, int j0, int j1, int share) {
    static_assert(HB * RB * JB <= W, "one accumulator per lane of the sums");
    const float* q = w.q + (static_cast<int64_t>(h) * w.rows + r0) * w.ldq;
    float* s = w.s + (static_cast<int64_t>(h) * w.rows + r0) * w.BK;
    const int64_t head_q = w.rows * w.ldq, head_s = static_cast<int64_t>(w.rows) * w.BK;
    for (int j = j0; j < j1; j += JB) {
      ahead.step(share * JB);
      vf acc[W];
      for (int i = 0; i < W; ++i) acc[i] = vzero();
      const T* kr[HB * JB];
      for (int hh = 0; hh < HB; ++hh)
        for (int jj = 0; jj < JB; ++jj) kr[hh * JB + jj] = w.kr[j + jj] + (h + hh) * w.k_step;
#if defined(FASTOPS_HAS_BF16_DOT)
      if constexpr (kDot16<T>) {
        for (int d = 0; d < w.D; d += 32) {
          const __mmask32 m = w.D - d >= 32 ? 0xffffffffu : (1u << (w.D - d)) - 1u;
          for (int hh = 0; hh < HB; ++hh) {
            __m512i kv[JB];
            for (int jj = 0; jj < JB; ++jj) kv[jj] = _mm512_maskz_loadu_epi16(m, kr[hh * JB + jj] + d);
            for (int r = 0; r < RB; ++r) {
              const __m512i qv = _mm512_loadu_si512(q + hh * head_q + r * w.ldq + d / 2);
              for (int jj = 0; jj < JB; ++jj) {
                vf& a = acc[(hh * RB + r) * JB + jj];
                a = _mm512_dpbf16_ps(a, (__m512bh)qv, (__m512bh)kv[jj]);
              }
            }
          }
        }
      } else
#endif
      {
        int d = 0;
        for (; d + W <= w.D; d += W) dots_step<HB, RB, JB, true>(acc, kr, q, head_q, d);
        if (d < w.D) dots_step<HB, RB, JB, false>(acc, kr, q, head_q, d);
      }
      float sums[W];
      vstore(sums, vreduce(acc));
      for (int hh = 0; hh < HB; ++hh)
        for (int r = 0; r < RB; ++r)
          std::memcpy(s + hh * head_s + r * w.BK + j, sums + (hh * RB + r) * JB, JB * sizeof(float));
    }
  }

  template <int HB, int RB, int JB, bool kWhole>
  FASTOPS_INLINE void dots_step(vf (&acc)[W], const T* const (&kr)[HB * JB], const float* q, int64_t head_q, int d) {
    for (int hh = 0; hh < HB; ++hh) {
      vf kv[JB];
      for (int jj = 0; jj < JB; ++jj)
        kv[jj] = kWhole ? vload(kr[hh * JB + jj] + d) : vloadn(kr[hh * JB + jj] + d, w.D - d);
      for (int r = 0; r < RB; ++r) {
        const vf qv = vload(q + hh * head_q + r * w.ldq + d);
        for (int jj = 0; jj < JB; ++jj) acc[(hh * RB + r) * JB + jj] = vfma(qv, kv[jj], acc[(hh * RB + r) * JB + jj]);
      }
    }
  }

  // Rows [i, ...) of HB heads in groups of RB; the first group is the one that reads memory, so it looks ahead.
  template <int HB, int RB, int JB>
  int row_groups(int h, int i, int rows, int j, int end, int share) {
    for (; rows - i >= RB; i += RB) dots<HB, RB, JB>(h, i, j, end, i == 0 ? share : 0);
    return i;
  }

  void scores(int, int rows, int n) {
    const int share = lines(w.D);
    for (int j = 0; j < n; j += block) {
      const int end = j + block < n ? j + block : n;
      look_ahead(w.kr, end, n, w.vr, n, w.k_step, w.D);
      if (w.heads == 1) {
        int i = row_groups<1, 4, W / 4>(0, 0, rows, j, end, share);
        i = row_groups<1, 2, W / 2>(0, i, rows, j, end, share);
        row_groups<1, 1, W>(0, i, rows, j, end, share);
        continue;
      }
      int h = 0;
      if (rows == 1)
        for (; h + 4 <= w.heads; h += 4) row_groups<4, 1, kStep>(h, 0, rows, j, end, 4 * share);
      if (rows == 2)
        for (; h + 2 <= w.heads; h += 2) row_groups<2, 2, kStep>(h, 0, rows, j, end, 2 * share);
      for (; h < w.heads; ++h) {
        int i = row_groups<1, 4, kStep>(h, 0, rows, j, end, share);
        i = row_groups<1, 2, kStep>(h, i, rows, j, end, share);
        row_groups<1, 1, kStep>(h, i, rows, j, end, share);
      }
    }
  }

  template <int RB, int NV>
  void weigh(float* o, const float* s, int64_t at, int j0, int j1, int share) {
    vf acc[RB][NV];
    for (int r = 0; r < RB; ++r)
      for (int c = 0; c < NV; ++c) acc[r][c] = vload(o + static_cast<int64_t>(r) * w.VP + c * W);
    for (int j = j0; j < j1; ++j) {
      ahead.step(share);
      const T* v = w.vr[j] + at;
      vf x[NV];
      for (int c = 0; c < NV; ++c) x[c] = vload(v + c * W);
      for (int r = 0; r < RB; ++r) {
        const vf pj = vset(s[r * w.BK + j]);
        for (int c = 0; c < NV; ++c) acc[r][c] = vfma(pj, x[c], acc[r][c]);
      }
    }
    for (int r = 0; r < RB; ++r)
      for (int c = 0; c < NV; ++c) vstore(o + static_cast<int64_t>(r) * w.VP + c * W, acc[r][c]);
  }

  template <int RB>
  void weigh_all(int h, int r0, int j0, int j1, int share) {
    constexpr int NV = W == 16 ? 4 : 2;
    const int64_t row = static_cast<int64_t>(h) * w.rows + r0, head = h * w.v_step;
    float* o = w.st.o + row * w.VP;
    const float* s = w.s + row * w.BK;
    int d = 0;
    for (; d + NV * W <= w.Dv; d += NV * W, share = 0) weigh<RB, NV>(o + d, s, head + d, j0, j1, share);
    for (; d + W <= w.Dv; d += W, share = 0) weigh<RB, 1>(o + d, s, head + d, j0, j1, share);
    if (d < w.Dv) {
      vf acc[RB];
      for (int r = 0; r < RB; ++r) acc[r] = vload(o + static_cast<int64_t>(r) * w.VP + d);
      for (int j = j0; j < j1; ++j) {
        const vf x = vloadn(w.vr[j] + head + d, w.Dv - d);
        for (int r = 0; r < RB; ++r) acc[r] = vfma(vset(s[r * w.BK + j]), x, acc[r]);
      }
      for (int r = 0; r < RB; ++r) vstore(o + static_cast<int64_t>(r) * w.VP + d, acc[r]);
    }
  }

  void accumulate(int, int rows, int n) {
    const int share = lines(w.Dv);
    for (int j = 0; j < n; j += block) {
      const int end = j + block < n ? j + block : n;
      look_ahead(w.vr, end, n, w.kr + w.tile, next, w.v_step, w.Dv);
      for (int h = 0; h < w.heads; ++h) {
        int i = 0;
        for (; rows - i >= 4; i += 4) weigh_all<4>(h, i, j, end, i == 0 ? share : 0);
        if (rows - i >= 2) {
          weigh_all<2>(h, i, j, end, i == 0 ? share : 0);
          i += 2;
        }
        if (rows - i >= 1) weigh_all<1>(h, i, j, end, i == 0 ? share : 0);
      }
    }
  }
};

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
