// A third way to multiply a tile: few rows of bf16 against 4-bit codes with one scale a key and head (KV4). The codes
// are looked up in registers, in an order that costs a shift and a look-up for 32 of them, and the scales are
// multiplied into the scores and the probabilities:
//   q k^T = ks (q (code - 8)) + kb sum(q)        p v = (p vs) (code - 8) + p vb        b = 8 scale + min, or (8 - zero)
//   scale
// so that no decoded row exists anywhere (docs/design/006-quantised-kv.md).
#if defined(FASTOPS_HAS_BF16_DOT)
namespace fastops::cpu::FASTOPS_ISA {
namespace {

struct Nibbles : CodeMode<kKvU4> {
  static constexpr int kChunk = 128;  // channels of a vector of codes
  int block, lead;
  float* q_sum;  // [heads * rows]

  Nibbles(Work<Code<kKvU4>>& work, const AttentionParams& params) : CodeMode(work, params, tile_of(work)) {
    w.ldq = chunks(w.D) * kChunk / 2;
    w.VP = chunks(w.Dv) * kChunk + W;  // o in the order of the look-ups, then what is added to every channel
    w.st.ldo = w.VP;
    block = keys(w, 8 << 10, 4, w.tile);
    lead = keys(w, 12 << 10, 1, w.tile);
    q_sum = numbers.end();
  }

  // As many keys as so many bytes hold.
  static int keys(const Work<Code<kKvU4>>& w, int64_t bytes, int least, int most) {
    const int64_t row = (w.D > w.Dv ? w.D : w.Dv) / 2 * w.heads;
    const int n = static_cast<int>(bytes / row) / least * least;
    return n < least ? least : n < most ? n : most;
  }
  static int tile_of(const Work<Code<kKvU4>>& w) {
    const int scores = kDirectScores / 2 / (w.heads * w.rows) / 32 * 32;
    return keys(w, 128 << 10, 32, scores < 32 ? 32 : scores < kDirectKeys ? scores : kDirectKeys);
  }

  static int chunks(int dim) { return (dim + kChunk - 1) / kChunk; }
  static __m512i table() { return _mm512_broadcast_i64x4(vnarrow_bf16(vsub(vlanes(), vset(8.0f)))); }
  static __mmask32 words(int channels) { return channels >= kChunk ? 0xffffffffu : (1u << channels / 4) - 1u; }

  // Channel 4 i + n of a chunk is nibble n of word i: q in the order word by word for n = 0, then n = 1, ...
  void load_q(const AttentionItem& it, const Sequence& seq, int h) {
    const bf16* base =
        reinterpret_cast<const bf16*>(p.q) + it.b * p.q_sb + seq.q0 * p.q_ss + (it.hkv + h) * p.G * p.q_sh;
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (int r = 0; r < w.rows; ++r) {
      const int64_t at = it.row0 + r, row = static_cast<int64_t>(h) * w.rows + r;
      const bf16* src = base + at / p.G * p.q_ss + at % p.G * p.q_sh;
      bf16* dst = reinterpret_cast<bf16*>(w.q + row * w.ldq);
      vf sum = vzero();
      for (int d = 0; d < chunks(w.D) * kChunk; d += 32) {
        const int left = w.D - d;
        const __mmask32 m = left >= 32 ? 0xffffffffu : left > 0 ? (1u << left) - 1u : 0u;
        const __m512i x = _mm512_maskz_loadu_epi16(m, src + (left > 0 ? d : 0));
        sum = _mm512_dpbf16_ps(sum, (__m512bh)x, ones);
        bf16* to = dst + d / kChunk * kChunk + d % kChunk / 4;
        FASTOPS_UNROLL
        for (int n = 0; n < 4; ++n)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to + n * 32),
                           _mm512_cvtepi64_epi16(n ? _mm512_srli_epi64(x, 16 * n) : x));
      }
      q_sum[row] = vsum(sum);
    }
  }

  // The first keys of an item, whose rows nobody has asked for yet.
  void begin(int n) const {
    RowStream first(w.kr + w.tile, n < lead ? n : lead, k_bytes, nullptr, 0, 0);
    first.step(1 << 10);
  }

  void scales(const AttentionItem& it, const int32_t* page_table, int64_t key, int n) {
    numbers.load(p, it, page_table, key, n, 8.0f);
  }

  // What the inner loops use, out of reach of the stores that might change it.
  struct View {
    const Code<kKvU4>* const* rows;
    int64_t step;
    int dim;
    const float* a;  // q, or the probabilities
    int64_t lda;
    float* c;  // scores, or o
    int64_t ldc;
    __m512i codes;
  };

  // c[RB rows][JB keys] = q k^T of one head; q and c point at the first.
  template <int RB, int JB>
  static FASTOPS_INLINE void dots(const View& t, RowStream& stream, bool ask, int64_t head, const float* q, float* s,
                                  int j) {
    vf acc[W];
    FASTOPS_UNROLL
    for (int i = 0; i < W; ++i) acc[i] = vzero();
    const uint8_t* row[JB];
    FASTOPS_UNROLL
    for (int jj = 0; jj < JB; ++jj) row[jj] = reinterpret_cast<const uint8_t*>(t.rows[j + jj]) + head;
    for (int c = 0; c < t.dim; c += kChunk, q += kChunk / 2) {
      if (ask) stream.step(JB);
      const __mmask32 m = words(t.dim - c);
      __m512i x[JB];
      FASTOPS_UNROLL
      for (int jj = 0; jj < JB; ++jj) x[jj] = _mm512_maskz_loadu_epi16(m, row[jj] + c / 2);
      FASTOPS_UNROLL
      for (int n = 0; n < 4; ++n) {
        __m512bh qv[RB];
        FASTOPS_UNROLL
        for (int r = 0; r < RB; ++r) qv[r] = (__m512bh)_mm512_loadu_si512(q + r * t.lda + n * W);
        FASTOPS_UNROLL
        for (int jj = 0; jj < JB; ++jj) {
          const __m512i v = _mm512_permutexvar_epi16(n ? _mm512_srli_epi16(x[jj], 4 * n) : x[jj], t.codes);
          FASTOPS_UNROLL
          for (int r = 0; r < RB; ++r) acc[r * JB + jj] = _mm512_dpbf16_ps(acc[r * JB + jj], qv[r], (__m512bh)v);
        }
      }
    }
    float sums[W];
    vstore(sums, vreduce(acc));
    FASTOPS_UNROLL
    for (int r = 0; r < RB; ++r) std::memcpy(s + r * t.ldc + j, sums + r * JB, JB * sizeof(float));
  }

  void scores(int, int rows, int n) {
    const int now = lead < n ? lead : n, heads = w.heads;
    RowStream stream(w.kr + now, n - now, k_bytes, w.vr, now, v_bytes);
    const View t{w.kr, w.k_step, w.D, w.q, w.ldq, w.s, w.BK, table()};
    for (int j = 0; j < n; j += 8) {
      const float* q = t.a;
      float* s = t.c;
      for (int64_t h = 0, head = 0; h < heads; ++h, head += t.step) {
        int i = 0;
        for (; rows - i >= 4; i += 4, q += 4 * t.lda, s += 4 * t.ldc) {
          dots<4, 4>(t, stream, i == 0, head, q, s, j);
          dots<4, 4>(t, stream, i == 0, head, q, s, j + 4);
        }
        for (; rows - i >= 2; i += 2, q += 2 * t.lda, s += 2 * t.ldc) dots<2, 8>(t, stream, i == 0, head, q, s, j);
        for (; rows - i >= 1; ++i, q += t.lda, s += t.ldc) dots<1, 8>(t, stream, i == 0, head, q, s, j);
      }
    }
    for (int h = 0; h < w.heads; ++h)
      for (int i = 0; i < rows; ++i) {
        float* s = w.s + (h * rows + i) * w.BK;
        const vf sum = vset(q_sum[h * rows + i]);
        for (int j = 0; j < n; j += W)
          vstore(s + j,
                 vfma(vload(s + j), vload(numbers.ks + h * w.BK + j), vmul(sum, vload(numbers.kb + h * w.BK + j))));
      }
  }

  // o[RB rows][4 vectors] += probabilities times codes of the pairs of keys [j0, j1): the words of one half of each
  // 128-bit lane of a chunk. `weights` and o point at the first row.
  template <int RB, bool kHigh>
  static FASTOPS_INLINE void weigh(const View& t, RowStream& stream, int64_t at, const float* weights, float* o,
                                   __mmask32 m, int64_t j0, int64_t j1, int share) {
    vf acc[RB][4];
    FASTOPS_UNROLL
    for (int r = 0; r < RB; ++r) {
      FASTOPS_UNROLL
      for (int n = 0; n < 4; ++n) acc[r][n] = vload(o + r * t.ldc + n * W);
    }
    const Code<kKvU4>* const* rows = t.rows;
    const float* weight[RB];
    FASTOPS_UNROLL
    for (int r = 0; r < RB; ++r) weight[r] = weights + r * t.lda;
    for (int64_t j = j0; j < j1; ++j) {
      if (share > 0) stream.step(share);
      const __m512i a = _mm512_maskz_loadu_epi16(m, reinterpret_cast<const uint8_t*>(rows[2 * j]) + at);
      const __m512i b = _mm512_maskz_loadu_epi16(m, reinterpret_cast<const uint8_t*>(rows[2 * j + 1]) + at);
      const __m512i x = kHigh ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b);
      __m512bh v[4];
      FASTOPS_UNROLL
      for (int n = 0; n < 4; ++n)
        v[n] = (__m512bh)_mm512_permutexvar_epi16(n ? _mm512_srli_epi16(x, 4 * n) : x, t.codes);
      FASTOPS_UNROLL
      for (int r = 0; r < RB; ++r) {
        const __m512bh pj = (__m512bh)_mm512_castps_si512(vset(weight[r][j]));
        FASTOPS_UNROLL
        for (int n = 0; n < 4; ++n) acc[r][n] = _mm512_dpbf16_ps(acc[r][n], pj, v[n]);
      }
    }
    FASTOPS_UNROLL
    for (int r = 0; r < RB; ++r) {
      FASTOPS_UNROLL
      for (int n = 0; n < 4; ++n) vstore(o + r * t.ldc + n * W, acc[r][n]);
    }
  }
  template <int RB>
  static FASTOPS_INLINE void weigh_all(const View& t, RowStream& stream, int64_t head, const float* weights, float* o,
                                       int64_t j0, int64_t j1, int share) {
    for (int c = 0; c < t.dim; c += kChunk, o += kChunk, share = 0) {
      const __mmask32 m = words(t.dim - c);
      weigh<RB, false>(t, stream, head + c / 2, weights, o, m, j0, j1, share);
      if (t.dim - c > 16) weigh<RB, true>(t, stream, head + c / 2, weights, o + 64, m, j0, j1, 0);
    }
  }

  // Unseen keys get a weight of exactly 0, whatever their numbers.
  void accumulate(int, int rows, int n) {
    for (int h = 0; h < w.heads; ++h)
      for (int i = 0; i < rows; ++i) {
        const int64_t row = static_cast<int64_t>(h) * rows + i;
        const float* s = w.s + row * w.BK;
        bf16* to = reinterpret_cast<bf16*>(w.p16 + row * (w.BK / 2));
        float* rest = w.st.o + row * w.VP + w.VP - W;
        vf sum = vload(rest);
        for (int j = 0; j < n; j += W) {
          const vf x = vload(s + j);
          const __mmask16 seen = _mm512_cmp_ps_mask(x, vzero(), _CMP_NEQ_UQ);
          vstore(to + j, _mm512_maskz_mul_ps(seen, x, vload(numbers.vs + h * w.BK + j)));
          sum = _mm512_mask3_fmadd_ps(x, vload(numbers.vb + h * w.BK + j), sum, seen);
        }
        vstore(rest, sum);
      }
    const int now = lead < n ? lead : n, share = 2 * ((w.Dv / 2 + 63) / 64), heads = w.heads;
    RowStream stream(w.vr + now, n - now, v_bytes, w.kr + w.tile, lead < next ? lead : next, k_bytes);
    const View t{w.vr, w.v_step, w.Dv, w.p16, w.BK / 2, w.st.o, w.VP, table()};
    for (int j = 0; j < n; j += block) {
      const int64_t j0 = j / 2, j1 = ((j + block < n ? j + block : n) + 1) / 2;
      const float* x = t.a;
      float* o = t.c;
      for (int64_t h = 0, head = 0; h < heads; ++h, head += t.step) {
        int i = 0;
        for (; rows - i >= 4; i += 4, x += 4 * t.lda, o += 4 * t.ldc)
          weigh_all<4>(t, stream, head, x, o, j0, j1, i == 0 ? share : 0);
        for (; rows - i >= 2; i += 2, x += 2 * t.lda, o += 2 * t.ldc)
          weigh_all<2>(t, stream, head, x, o, j0, j1, i == 0 ? share : 0);
        for (; rows - i >= 1; ++i, x += t.lda, o += t.ldc)
          weigh_all<1>(t, stream, head, x, o, j0, j1, i == 0 ? share : 0);
      }
    }
  }

  // A row of o, channels in order: word 8 b + 4 high + t of a chunk stands in lane 4 b + t of half `high`.
  void finish(float* o) const {
    const vf rest = vset(vsum(vload(o + w.VP - W)));
    for (int c = 0; c < w.Dv; c += kChunk, o += kChunk) {
      vf x[2][4];
      for (int n = 0; n < 8; ++n) x[n / 4][n % 4] = vload(o + n * W);
      for (int half = 0; half < 2; ++half) {
        const vf ab = _mm512_unpacklo_ps(x[half][0], x[half][1]), cd = _mm512_unpacklo_ps(x[half][2], x[half][3]);
        const vf AB = _mm512_unpackhi_ps(x[half][0], x[half][1]), CD = _mm512_unpackhi_ps(x[half][2], x[half][3]);
        const vf t[4] = {_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee),
                         _mm512_shuffle_ps(AB, CD, 0x44), _mm512_shuffle_ps(AB, CD, 0xee)};  // [t][lane b][n]
        const vf p0 = _mm512_shuffle_f32x4(t[0], t[1], 0x88), p1 = _mm512_shuffle_f32x4(t[0], t[1], 0xdd);
        const vf p2 = _mm512_shuffle_f32x4(t[2], t[3], 0x88), p3 = _mm512_shuffle_f32x4(t[2], t[3], 0xdd);
        const vf b[4] = {_mm512_shuffle_f32x4(p0, p2, 0x88), _mm512_shuffle_f32x4(p1, p3, 0x88),
                         _mm512_shuffle_f32x4(p0, p2, 0xdd), _mm512_shuffle_f32x4(p1, p3, 0xdd)};
        for (int i = 0; i < 4; ++i) vstore(o + 32 * i + 16 * half, vadd(b[i], rest));
      }
    }
  }
};

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
#endif
