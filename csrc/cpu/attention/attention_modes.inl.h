// The two ways to multiply a tile: Direct reads K and V rows in place (few rows: decode, memory bound), Packed copies
// the tile once into a layout the register-blocked gemm streams (many rows: prefill, compute bound). Both offer the
// tile loop
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
    const int rows_max = it.rows > kDirectRows ? p.block_rows : kDirectRows * kDirectHeads;
    const AttentionScratch at = attention_scratch(D, Dv, rows_max, BK, p.quant);
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
template <class T, bool kBf16P>
__attribute__((noinline)) void accumulate_seen(Work<T>& w, int h, int r0, int rows, int n) {
  for (int i = 0; i < rows; ++i) {
    float* o = w.st.o + static_cast<int64_t>(h * w.rows + r0 + i) * w.VP;
    const float* pr = kBf16P ? w.p16 + (h * rows + i) * (w.BK / 2) : w.s + (h * rows + i) * w.BK;
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

  Packed(Work<T>& work, const AttentionParams&) : w(work) {}
  static void finish(float*) {}

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

// Asks for the rows of two runs, one after the other, a few cache lines at a time and in memory order. Lives in
// registers inside the loops that call it.
struct RowStream {
  const char* const* next;  // the rows behind the one at work
  const char* const* then;
  const char *at = nullptr, *end = nullptr;
  int64_t bytes, then_bytes;
  int left, then_left;

  RowStream(const void* rows, int n, int64_t row_bytes, const void* rows2, int n2, int64_t row_bytes2)
      : next(static_cast<const char* const*>(rows)),
        then(static_cast<const char* const*>(rows2)),
        bytes(row_bytes),
        then_bytes(row_bytes2),
        left(n),
        then_left(n2) {}
  FASTOPS_INLINE bool advance() {
    if (left == 0) {
      if (then_left == 0) return false;  // all of them are on their way
      next = then;
      bytes = then_bytes;
      left = then_left;
      then_left = 0;
    }
    at = *next++;
    end = at + bytes;
    --left;
    return true;
  }
  FASTOPS_INLINE void step(int lines) {
    for (; lines > 0; --lines, at += 64) {
      if (at >= end && !advance()) return;
      vprefetch(at);
    }
  }
};

// Memory delivers its full speed to one linear stream. In the [B,S,H,D] layout the rows of one head lie a page apart
// (two thirds of that speed, whatever is prefetched), so an item holds neighbouring heads and takes a few keys of all
// of them at a time, while the keys `lead` rows further on are on their way to L1 (docs/design/003-cpu-attention.md).
template <class T>
struct Direct {
  static constexpr bool kBf16P = kDot16<T>;
  static constexpr int kRows = kDirectRows;
  static constexpr int64_t kDecodedBytes = 64 << 10;  // of K, and as many of V: what L2 gives back quickly
  static constexpr int kStep = W / 4;                 // keys of a dot-product block that takes four rows or heads
  Work<T>& w;
  int64_t k_bytes, v_bytes;  // of one key, all heads of the item
  int block, lead;           // keys whose values are weighed together; how far the prefetch runs ahead
  int next = 0;

  static void finish(float*) {}
  Direct(Work<T>& work, const AttentionParams&) : w(work) {
    constexpr int64_t size = sizeof(T);
    k_bytes = ((w.heads - 1) * w.k_step + w.D) * size;
    v_bytes = ((w.heads - 1) * w.v_step + w.Dv) * size;
    const int64_t row = (w.D > w.Dv ? w.D : w.Dv) * size * w.heads;
    const auto keys = [&](int64_t bytes, int least, int most) {
      const int n = static_cast<int>(bytes / row) / least * least;
      return n < least ? least : n < most ? n : most;
    };
    block = keys(8 << 10, 4, kDirectKeys);
    lead = keys(12 << 10, 1, kDirectKeys);
    if (lead < block) lead = block;
    const int scores_fit = kDirectScores / 2 / (w.heads * w.rows) / 32 * 32;  // half of it stays in L1 beside the rest
    const int64_t tile_bytes = w.quant ? kDecodedBytes : 128 << 10;
    w.tile = keys(tile_bytes, w.quant ? kDecodedKeys : 32,
                  scores_fit < 32            ? 32
                  : scores_fit < kDirectKeys ? scores_fit
                                             : kDirectKeys);
    w.BK = w.tile;
  }

  static int lines(int64_t elems) { return static_cast<int>((elems * static_cast<int64_t>(sizeof(T)) + 63) / 64); }

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

  // Pointers and strides the inner loops use, out of reach of the stores that might change them.
  struct View {
    const T* const* rows;
    int64_t step;  // elements between heads
    const float* a;
    int64_t lda;
    float* c;
    int64_t ldc;
    int rows_per_head, dim;
  };

  // c[HB heads][RB rows][JB keys] = q k^T: up to W accumulators, whose horizontal sums are taken together.
  template <int HB, int RB, int JB>
  static FASTOPS_INLINE void dots(const View& t, RowStream& stream, bool ask, int h, int r0, int j) {
    static_assert(HB * RB * JB <= W, "one accumulator per lane of the sums");
    const float* q = t.a + (static_cast<int64_t>(h) * t.rows_per_head + r0) * t.lda;
    float* s = t.c + (static_cast<int64_t>(h) * t.rows_per_head + r0) * t.ldc + j;
    const int64_t head_q = t.rows_per_head * t.lda, head_s = t.rows_per_head * t.ldc;
    vf acc[W];
    FASTOPS_UNROLL
    for (int i = 0; i < W; ++i) acc[i] = vzero();
    const T* kr[HB * JB];
    FASTOPS_UNROLL
    for (int hh = 0; hh < HB; ++hh) {
      FASTOPS_UNROLL
      for (int jj = 0; jj < JB; ++jj) kr[hh * JB + jj] = t.rows[j + jj] + (h + hh) * t.step;
    }
    // With every line of a row that is used up, one more is asked for: bursts would fill the queue of misses, and wait.
    constexpr int kUnit = kDot16<T> ? 2 * W : W, kLine = 64 / static_cast<int>(sizeof(T));
    int d = 0;
    for (; d + kUnit <= t.dim; d += kUnit) {
      if (ask && d % kLine == 0) stream.step(HB * JB);
      dots_step<HB, RB, JB>(acc, kr, q, head_q, t.lda, d, kUnit);
    }
    if (d < t.dim) {
      if (ask && d % kLine == 0) stream.step(HB * JB);
      dots_step<HB, RB, JB>(acc, kr, q, head_q, t.lda, d, t.dim - d);
    }
    float sums[W];
    vstore(sums, vreduce(acc));
    FASTOPS_UNROLL
    for (int hh = 0; hh < HB; ++hh) {
      FASTOPS_UNROLL
      for (int r = 0; r < RB; ++r)
        std::memcpy(s + hh * head_s + r * t.ldc, sums + (hh * RB + r) * JB, JB * sizeof(float));
    }
  }

  template <int HB, int RB, int JB>
  static FASTOPS_INLINE void dots_step(vf (&acc)[W], const T* const (&kr)[HB * JB], const float* q, int64_t head_q,
                                       int64_t ldq, int d, int n) {
    FASTOPS_UNROLL
    for (int hh = 0; hh < HB; ++hh) {
#if defined(FASTOPS_HAS_BF16_DOT)
      if constexpr (kDot16<T>) {
        const __mmask32 m = n == 2 * W ? 0xffffffffu : (1u << n) - 1u;
        __m512i kv[JB];
        FASTOPS_UNROLL
        for (int jj = 0; jj < JB; ++jj) kv[jj] = _mm512_maskz_loadu_epi16(m, kr[hh * JB + jj] + d);
        FASTOPS_UNROLL
        for (int r = 0; r < RB; ++r) {
          const __m512i qv = _mm512_loadu_si512(q + hh * head_q + r * ldq + d / 2);
          FASTOPS_UNROLL
          for (int jj = 0; jj < JB; ++jj) {
            vf& a = acc[(hh * RB + r) * JB + jj];
            a = _mm512_dpbf16_ps(a, (__m512bh)qv, (__m512bh)kv[jj]);
          }
        }
        continue;
      }
#endif
      vf kv[JB];
      FASTOPS_UNROLL
      for (int jj = 0; jj < JB; ++jj) kv[jj] = n == W ? vload(kr[hh * JB + jj] + d) : vloadn(kr[hh * JB + jj] + d, n);
      FASTOPS_UNROLL
      for (int r = 0; r < RB; ++r) {
        const vf qv = vload(q + hh * head_q + r * ldq + d);
        FASTOPS_UNROLL
        for (int jj = 0; jj < JB; ++jj) acc[(hh * RB + r) * JB + jj] = vfma(qv, kv[jj], acc[(hh * RB + r) * JB + jj]);
      }
    }
  }

  void scores(int, int rows, int n) {
    const int now = lead < n ? lead : n;
    RowStream stream(w.kr + now, n - now, k_bytes, w.vr, now, v_bytes);
    const View t{w.kr, w.k_step, w.q, w.ldq, w.s, w.BK, w.rows, w.D};
    if (w.heads == 1) {  // a vector of keys at once
      for (int j = 0; j < n; j += W) {
        int i = 0;
        for (; rows - i >= 4; i += 4)
          for (int jj = 0; jj < W; jj += W / 4) dots<1, 4, W / 4>(t, stream, i == 0, 0, i, j + jj);
        for (; rows - i >= 2; i += 2)
          for (int jj = 0; jj < W; jj += W / 2) dots<1, 2, W / 2>(t, stream, i == 0, 0, i, j + jj);
        for (; rows - i >= 1; ++i) dots<1, 1, W>(t, stream, i == 0, 0, i, j);
      }
      return;
    }
    for (int j = 0; j < n; j += kStep) {
      int h = 0;
      if (rows == 1)
        for (; h + 4 <= w.heads; h += 4) dots<4, 1, kStep>(t, stream, true, h, 0, j);
      if (rows == 2)
        for (; h + 2 <= w.heads; h += 2) dots<2, 2, kStep>(t, stream, true, h, 0, j);
      for (; h < w.heads; ++h) {
        int i = 0;
        for (; rows - i >= 4; i += 4) dots<1, 4, kStep>(t, stream, i == 0, h, i, j);
        for (; rows - i >= 2; i += 2) dots<1, 2, kStep>(t, stream, i == 0, h, i, j);
        for (; rows - i >= 1; ++i) dots<1, 1, kStep>(t, stream, i == 0, h, i, j);
      }
    }
  }

  // c[RB rows][NV vectors] += probabilities times values of the keys [j0, j1), at column d of head h. n < W: the last,
  // partial vector (then NV is 1).
  template <int RB, int NV>
  static FASTOPS_INLINE void weigh(const View& t, RowStream& stream, int h, int r0, int d, int j0, int j1, int share,
                                   int n) {
    const int64_t row = static_cast<int64_t>(h) * t.rows_per_head + r0, at = h * t.step + d;
    float* o = t.c + row * t.ldc + d;
    const float* p = t.a + row * t.lda;
    vf acc[RB][NV];
    FASTOPS_UNROLL
    for (int r = 0; r < RB; ++r) {
      FASTOPS_UNROLL
      for (int c = 0; c < NV; ++c) acc[r][c] = vload(o + r * t.ldc + c * W);
    }
#if defined(FASTOPS_HAS_BF16_DOT)
    if constexpr (kDot16<T>) {  // two keys at once: a vector of values holds their pairs, columns in order
      const __m512i lanes =
          _mm512_cvtepu16_epi32(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
      const __m512i low = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(32)), 16));
      const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
      for (int j = j0; j < j1; j += 2) {
        if (share > 0) stream.step(2 * share);
        const T *a = t.rows[j] + at, *b = t.rows[j + 1] + at;
        const bool both = j + 1 < j1;  // an absent key's value is not read
        __m512i x[NV];
        if constexpr (NV == 1) {
          const __mmask32 m = n >= W ? 0xffffu : (1u << n) - 1u;
          x[0] =
              _mm512_permutex2var_epi16(_mm512_maskz_loadu_epi16(m, a), low, _mm512_maskz_loadu_epi16(both ? m : 0, b));
        } else {
          FASTOPS_UNROLL
          for (int c = 0; c < NV; c += 2) {
            const __m512i va = _mm512_loadu_si512(a + c * W);
            const __m512i vb = _mm512_maskz_loadu_epi16(both ? 0xffffffffu : 0u, b + c * W);
            x[c] = _mm512_permutex2var_epi16(va, low, vb);
            x[c + 1] = _mm512_permutex2var_epi16(va, high, vb);
          }
        }
        FASTOPS_UNROLL
        for (int r = 0; r < RB; ++r) {
          const __m512bh pj = (__m512bh)_mm512_castps_si512(vset(p[r * t.lda + j / 2]));
          FASTOPS_UNROLL
          for (int c = 0; c < NV; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], pj, (__m512bh)x[c]);
        }
      }
    } else
#endif
    {
      for (int j = j0; j < j1; ++j) {
        if (share > 0) stream.step(share);
        const T* v = t.rows[j] + at;
        vf x[NV];
        FASTOPS_UNROLL
        for (int c = 0; c < NV; ++c) x[c] = NV > 1 || n >= W ? vload(v + c * W) : vloadn(v, n);
        FASTOPS_UNROLL
        for (int r = 0; r < RB; ++r) {
          const vf pj = vset(p[r * t.lda + j]);
          FASTOPS_UNROLL
          for (int c = 0; c < NV; ++c) acc[r][c] = vfma(pj, x[c], acc[r][c]);
        }
      }
    }
    FASTOPS_UNROLL
    for (int r = 0; r < RB; ++r) {
      FASTOPS_UNROLL
      for (int c = 0; c < NV; ++c) vstore(o + r * t.ldc + c * W, acc[r][c]);
    }
  }

  template <int RB>
  static FASTOPS_INLINE void weigh_all(const View& t, RowStream& stream, int h, int r0, int j0, int j1, int share) {
    constexpr int NV = W == 16 ? 4 : 2;
    int d = 0;
    for (; d + NV * W <= t.dim; d += NV * W, share = 0) weigh<RB, NV>(t, stream, h, r0, d, j0, j1, share, W);
    for (; d < t.dim; d += W, share = 0) weigh<RB, 1>(t, stream, h, r0, d, j0, j1, share, t.dim - d);
  }

  void accumulate(int, int rows, int n) {
    const int now = lead < n ? lead : n, share = lines(w.Dv);
    RowStream stream(w.vr + now, n - now, v_bytes, w.kr + w.tile, lead < next ? lead : next, k_bytes);
    const View t{w.vr, w.v_step, kBf16P ? w.p16 : w.s, kBf16P ? w.BK / 2 : w.BK, w.st.o, w.VP, w.rows, w.Dv};
    for (int j = 0; j < n; j += block) {
      const int end = j + block < n ? j + block : n;
      for (int h = 0; h < w.heads; ++h) {
        int i = 0;
        for (; rows - i >= 4; i += 4) weigh_all<4>(t, stream, h, i, j, end, i == 0 ? share : 0);
        for (; rows - i >= 2; i += 2) weigh_all<2>(t, stream, h, i, j, end, i == 0 ? share : 0);
        for (; rows - i >= 1; ++i) weigh_all<1>(t, stream, h, i, j, end, i == 0 ? share : 0);
      }
    }
  }
};

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
