// Decode: K and V rows are read where they lie, and asked for a little ahead.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

// Asks for the rows of two runs, one after the other, a few cache lines at a time and in memory order. Lives in
// registers inside the loops that call it.
struct RowStream {
  const char* const* next;  // the rows behind the one at work
  const char* const* then;
  const char *at = nullptr, *end = nullptr;
  const char* const* oldest;  // row of the run at work
  int64_t again = 0;
  int64_t bytes, then_bytes;
  int left, then_left, lag, far;

  // `before`: rows that stand before `rows` and were asked for already. `known`: rows of the second run that are known,
  // n2 or more. With each row of the first run the one in its place in the second is touched: a run ahead, so that its
  // page is found before its lines are asked for.
  RowStream() : RowStream(nullptr, 0, 64, nullptr, 0, 64) {}  // asks for nothing
  RowStream(const void* rows, int n, int64_t row_bytes, const void* rows2, int n2, int64_t row_bytes2, int before = 0,
            int known = 0)
      : next(static_cast<const char* const*>(rows)),
        then(static_cast<const char* const*>(rows2)),
        oldest(next - before),
        bytes(row_bytes),
        then_bytes(row_bytes2),
        left(n),
        then_left(n2),
        lag(static_cast<int>((kAgain + row_bytes - 1) / row_bytes)),
        far(known) {}
  FASTOPS_INLINE bool advance() {
    if (left == 0) {
      if (then_left == 0) return false;  // all of them are on their way
      next = oldest = then;
      bytes = then_bytes;
      left = then_left;
      then_left = far = 0;
    }
    if (next - oldest < far) vprefetch(then[next - oldest]);
    at = *next;
    again = next - oldest >= lag ? at - next[-lag] : 0;
    ++next;
    end = at + bytes;
    --left;
    return true;
  }
  // A processor drops a prefetch that finds its queue of misses full. So each line is asked for once more, as many rows
  // later as kAgain bytes are, while there is still time. (Not Intel's.)
#if defined(FASTOPS_IS_INTEL)
  static constexpr int64_t kAgain = 0;
#else
  static constexpr int64_t kAgain = 2 << 10;
#endif
  FASTOPS_INLINE void step(int lines) {
    _Pragma("GCC unroll 1") for (; lines > 0; --lines, at += 64) {
      if (at >= end && !advance()) return;
      vprefetch_row(at);
      if (kAgain > 0) vprefetch_row(at - again);
      pace();
    }
  }
  // Room behind a request: with it Intel's reads up to 13 % faster (docs/design/003-cpu-attention.md, AMX).
  static FASTOPS_INLINE void pace() {
#if defined(FASTOPS_IS_INTEL)
    __asm__ volatile("nop\n\tnop");
#endif
  }
  // The next so many lines, for the caller to ask for one by one between its own steps: many at once would fill the
  // queue of misses. (Where a row ends among them they are asked for here, and what is returned is in the cache
  // already.)
  struct Lines {
    const char *first = nullptr, *late = nullptr;
    // Those of step `i` out of `steps`. kHere: at this very place.
    template <int kLines, bool kHere = false>
    FASTOPS_INLINE void ask(int i, int steps) const {
      for (int k = i * kLines / steps; k < (i + 1) * kLines / steps; ++k) {
        kHere ? vprefetch_here(first + 64 * k) : vprefetch_row(first + 64 * k);
        if (kAgain > 0) kHere ? vprefetch_here(late + 64 * k) : vprefetch_row(late + 64 * k);
        pace();
      }
    }
  };
  template <int kLines>
  FASTOPS_INLINE Lines take() {
    if (end - at < 64 * kLines && (at < end || !advance() || end - at < 64 * kLines)) {
      step(kLines);
      return Lines{reinterpret_cast<const char*>(then), reinterpret_cast<const char*>(then)};
    }
    const Lines taken{at, at - again};
    at += 64 * kLines;
    return taken;
  }
};

// Memory delivers its full speed to one linear stream. In the [B,S,H,D] layout the rows of one head lie a page apart
// (two thirds of that speed, whatever is prefetched), so an item holds neighbouring heads and takes a few keys of all
// of them at a time, while the keys `lead` rows further on are on their way to L1 (docs/design/003-cpu-attention.md).
template <class T>
struct Direct {
  static constexpr int kParts = kDot16<T> ? 1 : 0;  // bf16 that a probability becomes, 0: it stays fp32
  static constexpr bool kReadsCodes = false;
  static constexpr bool kStreams = true;
  static constexpr bool kInLanes = false;
  static constexpr int kKeysTogether = 1;
  static constexpr int64_t kDecodedBytes = 64 << 10;  // of K, and as many of V: what L2 gives back quickly
  static constexpr int kStep = W / 4;                 // keys of a dot-product block that takes four rows or heads
  Work<T>& w;
  int64_t k_bytes, v_bytes;  // of one key, all heads of the item
  int block, lead;           // keys whose values are weighed together; how far the prefetch runs ahead
  int next = 0;
  bool asks = true;  // whether the next scores and values ask for rows ahead: a tile's first group of rows does
  static int rows_at_once() { return kDirectRows; }

  static void finish(float*) {}
  static bool sound() { return true; }
  static constexpr bool kSeesV = false;
  void load_q(const AttentionParams& p, const AttentionItem& it, const Sequence& seq, int h) {
    load_q_rows(p, it, seq, w, h);
  }
  Direct(Work<T>& work, const AttentionParams&) : w(work) {
    constexpr int64_t size = sizeof(T);
    k_bytes = ((w.heads - 1) * w.k_step + w.D) * size;
    v_bytes = ((w.heads - 1) * w.v_step + w.Dv) * size;
    block = keys(8 << 10, 4, kDirectKeys);
    lead = keys(12 << 10, 1, kDirectKeys);
    if (lead < block) lead = block;
    plan_tile(w.heads * (w.rows < kDirectRows ? w.rows : kDirectRows));
  }

  // As many keys as so many bytes hold.
  int keys(int64_t bytes, int least, int most) const {
    const int64_t row = (w.D > w.Dv ? w.D : w.Dv) * static_cast<int64_t>(sizeof(T)) * w.heads;
    const int n = static_cast<int>(bytes / row) / least * least;
    return n < least ? least : n < most ? n : most;
  }

  // Keys of a tile, for so many scores a key.
  void plan_tile(int scores) {
    const int64_t tile_bytes = w.quant ? kDecodedBytes : 128 << 10;
    const int fit = kDirectScores / 2 / scores / 32 * 32;  // half of it stays in L1 beside the rest
    w.tile = keys(tile_bytes, w.quant ? kDecodedKeys : 32, fit < 32 ? 32 : fit < kDirectKeys ? fit : kDirectKeys);
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
    int64_t lda, head_a;
    float* c;
    int64_t ldc, head_c;
    int dim;
  };

  // c[HB heads][RB rows][JB keys] = q k^T: up to W accumulators, whose horizontal sums are taken together.
  template <int HB, int RB, int JB>
  static FASTOPS_INLINE void dots(const View& t, RowStream& stream, bool ask, int h, int r0, int j) {
    static_assert(HB * RB * JB <= W, "one accumulator per lane of the sums");
    const int64_t head_q = t.head_a, head_s = t.head_c;
    const float* q = t.a + h * head_q + r0 * t.lda;
    float* s = t.c + h * head_s + r0 * t.ldc + j;
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

  void scores(int r0, int rows, int n) {
    const int now = lead < n ? lead : n;
    const bool ask = asks;
    RowStream stream(w.kr + now, n - now, k_bytes, w.vr, now, v_bytes, now, n);
    const View t{w.kr, w.k_step, w.q + r0 * w.ldq, w.ldq, w.rows * w.ldq, w.s, w.BK, rows * w.BK, w.D};
    if (w.heads == 1) {  // a vector of keys at once
      for (int j = 0; j < n; j += W) {
        int i = 0;
        for (; rows - i >= 4; i += 4)
          for (int jj = 0; jj < W; jj += W / 4) dots<1, 4, W / 4>(t, stream, ask && i == 0, 0, i, j + jj);
        for (; rows - i >= 2; i += 2)
          for (int jj = 0; jj < W; jj += W / 2) dots<1, 2, W / 2>(t, stream, ask && i == 0, 0, i, j + jj);
        for (; rows - i >= 1; ++i) dots<1, 1, W>(t, stream, ask && i == 0, 0, i, j);
      }
      return;
    }
    for (int j = 0; j < n; j += kStep) {
      int h = 0;
      if (rows == 1)
        for (; h + 4 <= w.heads; h += 4) dots<4, 1, kStep>(t, stream, ask, h, 0, j);
      if (rows == 2)
        for (; h + 2 <= w.heads; h += 2) dots<2, 2, kStep>(t, stream, ask, h, 0, j);
      for (; h < w.heads; ++h) {
        int i = 0;
        for (; rows - i >= 4; i += 4) dots<1, 4, kStep>(t, stream, ask && i == 0, h, i, j);
        for (; rows - i >= 2; i += 2) dots<1, 2, kStep>(t, stream, ask && i == 0, h, i, j);
        for (; rows - i >= 1; ++i) dots<1, 1, kStep>(t, stream, ask && i == 0, h, i, j);
      }
    }
  }

  // c[RB rows][NV vectors] += probabilities times values of the keys [j0, j1), at column d of head h. n < W: the last,
  // partial vector (then NV is 1).
  template <int RB, int NV>
  static FASTOPS_INLINE void weigh(const View& t, RowStream& stream, int h, int r0, int d, int j0, int j1, int share,
                                   int n) {
    const int64_t at = h * t.step + d;
    float* o = t.c + h * t.head_c + r0 * t.ldc + d;
    const float* p = t.a + h * t.head_a + r0 * t.lda;
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

  void accumulate(int r0, int rows, int n) {
    const int now = lead < n ? lead : n, share = asks ? lines(w.Dv) : 0;
    RowStream stream(w.vr + now, n - now, v_bytes, w.kr + w.tile, lead < next ? lead : next, k_bytes, now, next);
    const int64_t ldp = kParts ? w.BK / 2 : w.BK, vp = w.VP;
    const View t{w.vr, w.v_step, kParts ? w.p16 : w.s, ldp, rows * ldp, w.st.o + r0 * vp, vp, w.rows * vp, w.Dv};
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
