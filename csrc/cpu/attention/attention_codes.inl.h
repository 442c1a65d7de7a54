// A fourth way to multiply a tile: few rows of 16-bit numbers against caches of 8- or 4-bit codes with one scale a key
// and head, by integer dot products, where LaneCodes does not fit (one KV head, scales of any layout, soft caps).
// Scales are multiplied into the scores and the probabilities,
//   q k^T = ks (q (code - c)) + kb sum(q)        p v = (p vs) (code - c) + p vb
//   b = c scale + min, or (c - zero) scale; c: 8, or 128; 0 in b where codes have a sign
// and rows of q, and of p vs over a tile, are rounded to 15 bits: x = 128 high + low, two signed bytes, each of which
// one instruction multiplies with 64 codes. What that leaves out is 2^-15 of a row's largest number, less than its own
// 16-bit rounding does (docs/design/006-quantised-kv.md).
//
// Scores: 16 keys are turned so that a vector holds four bytes of each, and four channels of q meet them all at once;
// no horizontal sums. Values: four keys' bytes are interleaved, and their four probabilities meet them.
#if defined(FASTOPS_HAS_VNNI)
namespace fastops::cpu::FASTOPS_ISA {
namespace {

template <int kKind>
struct Codes : CodeMode<kKind> {
  using CodeMode<kKind>::w;
  using CodeMode<kKind>::p;
  using CodeMode<kKind>::k_bytes;
  using CodeMode<kKind>::v_bytes;
  using CodeMode<kKind>::next;
  using CodeMode<kKind>::numbers;
  using CodeMode<kKind>::bytes;
  static constexpr int kBits = kCodeBits<kKind>, kHalves = 8 / kBits;
  static constexpr int kChunk = 64 * kHalves;                  // channels of a vector of codes
  static constexpr int kCentre = kKind == kKvU4 ? 8 : 128;     // where the codes' middle is, as unsigned bytes
  static constexpr int kShift = kKind == kKvI8 ? 0 : kCentre;  // and what it stands for
  static constexpr float kLevels = 127 * 128;                  // of x
  float *q_sum, *q_scale;                                      // [heads * rows]
  int32_t* q_all;                                              // the sum of x, kCentre times
  float* p_scale;
  int32_t* p_all;  // [heads * rows][kBlocks]

  Codes(Work<Code<kKind>>& work, const AttentionParams& params) : CodeMode<kKind>(work, params, tile_of(work)) {
    w.ldq = chunks(w.D) * kChunk / 2;  // two bytes a channel
    w.VP = chunks(w.Dv) * kChunk + W;  // o in the order of the products, then what is added to every channel
    w.st.ldo = w.VP;
    const int rows = w.heads * w.rows;
    q_sum = numbers.end();
    q_scale = q_sum + rows;
    p_scale = q_scale + rows;
    q_all = reinterpret_cast<int32_t*>(p_scale + rows);
    p_all = q_all + rows;
  }

  static int tile_of(const Work<Code<kKind>>& w) {
    const int keys = static_cast<int>(kTileBytes / (bytes(w.D > w.Dv ? w.D : w.Dv) * w.heads)) / 32 * 32;
    const int scores = kDirectScores / (w.heads * w.rows) / 32 * 32, most = keys < scores ? keys : scores;
    return most < 32 ? 32 : most < kDirectKeys ? most : kDirectKeys;
  }
  static constexpr int64_t kTileBytes = 128 << 10;      // of K, and as many of V
  static constexpr int kBlock = kBits == 4 ? 64 : 16;   // keys whose values are weighed together,
  static constexpr int kBlocks = kDirectKeys / kBlock;  // and how far the prefetch runs ahead
  static int chunks(int dim) { return (dim + kChunk - 1) / kChunk; }
  // The bytes of a row in the 64 from channel c on.
  static __mmask64 row_mask(int dim, int c) {
    const int64_t left = bytes(dim - c);
    return left >= 64 ? ~0ull : (1ull << left) - 1ull;
  }
  // A row as whole numbers up to kLevels, which stand for `scale` each; zeros that stand for NaN where the row has a
  // NaN or an infinity. most: its largest magnitude; poison: finite where all of it is.
  struct Rounding {
    float scale;
    __mmask16 finite;
    vf inverse;
    Rounding(float most, vf poison) {
      finite = vall_finite(poison) ? 0xffff : 0;
      scale = finite ? most / kLevels : __builtin_nanf("");
      const float x = most > 0.0f ? kLevels / most : 0.0f;
      inverse = vset(x <= 3e38f ? x : 3e38f);  // the least numbers of all become 0
    }
    vi operator()(vf x) const { return _mm512_maskz_cvtps_epi32(finite, vmul(x, inverse)); }
  };
  // Two signed bytes of each number of 15 bits.
  static FASTOPS_INLINE void split(vi x, __m128i* high, __m128i* low) {
    const vi h = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(64)), 7);
    *high = _mm512_cvtepi32_epi8(h);
    *low = _mm512_cvtepi32_epi8(_mm512_sub_epi32(x, _mm512_slli_epi32(h, 7)));
  }

  static FASTOPS_INLINE vi evens(vi bytes) { return _mm512_castsi256_si512(_mm512_cvtepi16_epi8(bytes)); }

  void load_q(const AttentionParams&, const AttentionItem& it, const Sequence& seq, int h) {
    if (p.dtype == 2) return load_q_as<f16>(it, seq, h);
    load_q_as<bf16>(it, seq, h);
  }
  // Four channels of a row of x side by side, as `dots` meets them: for word t of a chunk (its even channels, then its
  // odd ones, where a byte holds two) the high bytes and the low ones.
  template <class Q>
  void load_q_as(const AttentionItem& it, const Sequence& seq, int h) {
    const Q* base = reinterpret_cast<const Q*>(p.q) + it.b * p.q_sb + seq.q0 * p.q_ss + (it.hkv + h) * p.G * p.q_sh;
    for (int r = 0; r < w.rows; ++r) {
      const int64_t at = it.row0 + r, row = static_cast<int64_t>(h) * w.rows + r;
      const Q* src = base + at / p.G * p.q_ss + at % p.G * p.q_sh;
      vf sum = vzero(), top = vzero(), poison = vzero();
      for (int d = 0; d < w.D; d += W) {
        const vf x = w.D - d >= W ? vload(src + d) : vloadn(src + d, w.D - d);
        sum = vadd(sum, x);
        top = vmax(top, vabs(x));
        poison = vfma(x, vzero(), poison);
      }
      const Rounding to_whole(vhmax(top), poison);
      q_sum[row] = vsum(sum);
      q_scale[row] = to_whole.scale;
      alignas(64) int8_t plane[2][kMaxHeadDim + kChunk] = {};
      vi all = vizero();
      for (int d = 0; d < w.D; d += W) {
        const vf x = w.D - d >= W ? vload(src + d) : vloadn(src + d, w.D - d);
        const vi n = to_whole(x);
        all = viadd(all, n);
        split(n, reinterpret_cast<__m128i*>(plane[0] + d), reinterpret_cast<__m128i*>(plane[1] + d));
      }
      q_all[row] = kCentre * _mm512_reduce_add_epi32(all);
      auto* to = reinterpret_cast<__m512i*>(w.q + row * w.ldq);
      for (int d = 0; d < chunks(w.D) * kChunk; d += kChunk) {
        if constexpr (kHalves == 1) {  // the planes' words by turns
          const vi high = viload(plane[0] + d), low = viload(plane[1] + d);
          const vi a = _mm512_unpacklo_epi32(high, low), b = _mm512_unpackhi_epi32(high, low);
          vistore(to++, _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), b));
          vistore(to++, _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), b));
        } else {
          for (int i = 0; i < kChunk; i += 64) {
            const vi h = viload(plane[0] + d + i), l = viload(plane[1] + d + i);
            // 8 words each: even channels' high and low bytes, odd channels'
            const vi low_half = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            const vi e = _mm512_permutex2var_epi32(evens(h), low_half, evens(l));
            const vi o =
                _mm512_permutex2var_epi32(evens(_mm512_srli_epi16(h, 8)), low_half, evens(_mm512_srli_epi16(l, 8)));
            vistore(to++, _mm512_permutex2var_epi64(e, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), o));
            vistore(to++, _mm512_permutex2var_epi64(e, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), o));
          }
        }
      }
    }
  }

  // The first keys of an item, whose rows nobody has asked for yet.
  void begin(int n) const {
    RowStream first(w.kr + w.tile, n < kBlock ? n : kBlock, k_bytes, nullptr, 0, 0);
    first.step(1 << 14);
  }

  void scales(const AttentionItem& it, const int32_t* page_table, int64_t key, int n, int) {
    numbers.load(p, it, page_table, key, n, kShift);
  }
  void expect(const AttentionItem&, const int32_t*, int64_t, int) const {}

  // The codes of each byte as unsigned bytes.
  static FASTOPS_INLINE void unpack(vi x, vi (&to)[kHalves]) {
    if constexpr (kBits == 4) {
      to[0] = vnibbles_low(x);
      to[1] = vnibbles_high(x);
    } else if constexpr (kKind == kKvI8) {
      to[0] = _mm512_xor_si512(x, _mm512_set1_epi8(static_cast<char>(0x80)));
    } else {
      to[0] = x;
    }
  }

  // What the inner loops use, out of reach of the stores that might change it.
  struct View {
    const Code<kKind>* const* rows;
    int64_t step;
    int dim;
    const int32_t* a;  // q, or the probabilities
    int64_t lda, ldc;  // and of the scores, or o
  };

  struct Weights {
    const int32_t* number;
    const float* scale;
    const int32_t* all;  // kCentre times their sum over the block
  };

  // The rows' beginnings, as the compiler must take them: it would keep the address of every number in them otherwise,
  // on the stack.
  template <int RB>
  static FASTOPS_INLINE void rows_of(const int32_t* first, int64_t step, const int32_t* (&row)[RB]) {
    FASTOPS_UNROLL
    for (int r = 0; r < RB; ++r) {
      row[r] = first + r * step;
      asm("" : "+r"(row[r]));
    }
  }

  // s[RB rows][16 keys] += x code over one chunk of a head, as whole numbers. (Without a loop over chunks, which would
  // keep the sums and the 16 vectors of keys alive at once.)
  template <int RB, int kWords>
  static FASTOPS_INLINE void dots(const View& t, RowStream& stream, int ask, int64_t at, __mmask64 m, const int32_t* q,
                                  int32_t* s, int j) {
    vi acc[RB][2][2];  // [high, low][even, odd]: two chains of sums each
    FASTOPS_UNROLL
    for (int r = 0; r < RB; ++r) {
      FASTOPS_UNROLL
      for (int i = 0; i < 4; ++i) acc[r][i / 2][i % 2] = vizero();
    }
    const int32_t* from[RB];
    rows_of<RB>(q, t.lda, from);
    const Code<kKind>* const* rows = t.rows + j;
    vf x[W];
    FASTOPS_UNROLL
    for (int i = 0; i < W; ++i)
      x[i] = vi_as_bits(_mm512_maskz_loadu_epi8(m, reinterpret_cast<const uint8_t*>(rows[i]) + at));
    vtranspose(x);
    FASTOPS_UNROLL
    for (int word = 0; word < kWords; ++word) {
      if (word % 4 == 0) stream.step(ask);
      vi codes[kHalves];
      unpack(vi_from_bits(x[word]), codes);
      FASTOPS_UNROLL
      for (int r = 0; r < RB; ++r) {
        FASTOPS_UNROLL
        for (int i = 0; i < 2 * kHalves; ++i) {
          vi& sum = acc[r][i % 2][kHalves == 2 ? i / 2 : word % 2];
          sum = vdot_bytes(sum, codes[i / 2], _mm512_set1_epi32(from[r][2 * kHalves * word + i]));
        }
      }
    }
    FASTOPS_UNROLL
    for (int r = 0; r < RB; ++r) {
      const vi high = viadd(acc[r][0][0], acc[r][0][1]), low = viadd(acc[r][1][0], acc[r][1][1]);
      int32_t* to = s + r * t.ldc + j;
      vistore(to, viadd(viload(to), viadd(vishl<7>(high), low)));
    }
  }
  template <int RB>
  static FASTOPS_INLINE void dots_of(const View& t, RowStream& stream, int ask, int64_t head, const int32_t* q,
                                     const int32_t* all, int32_t* s, int j) {
    FASTOPS_UNROLL
    for (int r = 0; r < RB; ++r) vistore(s + r * t.ldc + j, _mm512_set1_epi32(-all[r]));
    for (int c = 0; c < t.dim; c += kChunk, q += 32 * kHalves) {
      const __mmask64 m = row_mask(t.dim, c);
      if (bytes(t.dim - c) <= 32)
        dots<RB, 8>(t, stream, ask, head + c * kBits / 8, m, q, s, j);
      else
        dots<RB, 16>(t, stream, ask, head + c * kBits / 8, m, q, s, j);
    }
  }

  void scores(int, int rows, int n) {
    const int heads = w.heads;
    const int now = kBlock < n ? kBlock : n;
    RowStream stream(w.kr + now, n - now, k_bytes, w.vr, now, v_bytes, now);
    const View t{w.kr, w.k_step, w.D, reinterpret_cast<const int32_t*>(w.q), w.ldq, w.BK};
    const int ask =
        static_cast<int>((v_bytes / heads + 63) / 64 * 4 / chunks(w.D));  // lines of V, four times for 16 keys
    for (int j = 0; j < n; j += W) {
      const int32_t *q = t.a, *all = q_all;
      auto* s = reinterpret_cast<int32_t*>(w.s);
      for (int64_t h = 0, head = 0; h < heads; ++h, head += t.step) {
        int i = 0;
        const auto next_rows = [&](int done) {
          i += done;
          q += done * t.lda;
          all += done;
          s += done * t.ldc;
        };
        for (; rows - i >= 4; next_rows(4)) dots_of<4>(t, stream, i == 0 ? ask : 0, head, q, all, s, j);
        for (; rows - i >= 2; next_rows(2)) dots_of<2>(t, stream, i == 0 ? ask : 0, head, q, all, s, j);
        for (; rows - i >= 1; next_rows(1)) dots_of<1>(t, stream, i == 0 ? ask : 0, head, q, all, s, j);
      }
    }
    float* s = w.s;
    for (int h = 0; h < heads; ++h) {
      const float *scale = numbers.ks + h * t.ldc, *shift = numbers.kb + h * t.ldc;
      for (int i = 0; i < rows; ++i, s += t.ldc) {
        const vf sum = vset(q_sum[h * rows + i]), level = vset(q_scale[h * rows + i]);
        for (int j = 0; j < n; j += W)
          vstore(s + j, vfma(vmul(vi_to_float(viload(s + j)), level), vload(scale + j), vmul(sum, vload(shift + j))));
      }
    }
  }

  // o[RB rows][2 vectors] += x (code - kCentre) over the quads of keys [j0, j1): part `kPart` of a chunk's bytes, four
  // of each 128-bit lane (of two parts of 8-bit codes at once).
  template <int RB, int kPart>
  static FASTOPS_INLINE void weigh(const View& t, RowStream& stream, int64_t at, const Weights& x, float* o,
                                   __mmask64 m, int j0, int j1, int share) {
    vi acc[RB][2][2];
    FASTOPS_UNROLL
    for (int r = 0; r < RB; ++r) {
      FASTOPS_UNROLL
      for (int i = 0; i < 4; ++i) acc[r][i / 2][i % 2] = vizero();
    }
    const int32_t* from[RB];
    rows_of<RB>(x.number, t.lda, from);
    const Code<kKind>* const* rows = t.rows;
    for (int j = j0; j < j1; ++j) {
      if (share > 0) stream.step(share);
      vi key[4];
      FASTOPS_UNROLL
      for (int i = 0; i < 4; ++i)
        key[i] = _mm512_maskz_loadu_epi8(m, reinterpret_cast<const uint8_t*>(rows[4 * j + i]) + at);
      vi codes[2];
      if constexpr (kBits == 4) {
        constexpr bool kUpper = kPart / 2 == 1;
        const vi a = kUpper ? _mm512_unpackhi_epi8(key[0], key[1]) : _mm512_unpacklo_epi8(key[0], key[1]);
        const vi b = kUpper ? _mm512_unpackhi_epi8(key[2], key[3]) : _mm512_unpacklo_epi8(key[2], key[3]);
        unpack(kPart % 2 ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b), codes);
      } else {
        const vi a = kPart ? _mm512_unpackhi_epi8(key[0], key[1]) : _mm512_unpacklo_epi8(key[0], key[1]);
        const vi b = kPart ? _mm512_unpackhi_epi8(key[2], key[3]) : _mm512_unpacklo_epi8(key[2], key[3]);
        vi one[1];
        unpack(_mm512_unpacklo_epi16(a, b), one);
        codes[0] = one[0];
        unpack(_mm512_unpackhi_epi16(a, b), one);
        codes[1] = one[0];
      }
      FASTOPS_UNROLL
      for (int r = 0; r < RB; ++r) {
        FASTOPS_UNROLL
        for (int i = 0; i < 2; ++i) {
          const vi four = _mm512_set1_epi32(from[r][2 * j + i]);
          FASTOPS_UNROLL
          for (int n = 0; n < 2; ++n) acc[r][i][n] = vdot_bytes(acc[r][i][n], codes[n], four);
        }
      }
    }
    FASTOPS_UNROLL
    for (int r = 0; r < RB; ++r) {
      FASTOPS_UNROLL
      for (int n = 0; n < 2; ++n) {
        float* to = o + r * t.ldc + n * W;
        const vi sum = viadd(vishl<7>(acc[r][0][n]), acc[r][1][n]);
        const vf middle = vi_to_float(_mm512_sub_epi32(sum, _mm512_set1_epi32(x.all[r * kBlocks])));
        vstore(to, vfma(middle, vset(x.scale[r]), vload(to)));
      }
    }
  }
  template <int RB>
  static FASTOPS_INLINE void weigh_all(const View& t, RowStream& stream, int64_t head, const Weights& x, float* o,
                                       int j0, int j1, int share) {
    for (int c = 0; c < t.dim; c += kChunk, o += kChunk) {
      const __mmask64 m = row_mask(t.dim, c);
      const int64_t at = head + c * kBits / 8;
      weigh<RB, 0>(t, stream, at, x, o, m, j0, j1, share);
      weigh<RB, 1>(t, stream, at, x, o + 2 * W, m, j0, j1, 0);
      if constexpr (kBits == 4) {
        weigh<RB, 2>(t, stream, at, x, o + 4 * W, m, j0, j1, 0);
        weigh<RB, 3>(t, stream, at, x, o + 6 * W, m, j0, j1, 0);
      }
    }
  }

  // p vs of a row over a tile as 15-bit numbers, high and low bytes of four keys by turns. Unseen keys get a weight of
  // exactly 0, whatever their numbers.
  void round_weights(int64_t row, int h, int n) {
    float *s = w.s + row * w.BK, *rest = w.st.o + row * w.VP + w.VP - W;
    vf sum = vload(rest), top = vzero(), poison = vzero();
    for (int j = 0; j < n; j += W) {
      const vf x = vload(s + j);
      const __mmask16 seen = _mm512_cmp_ps_mask(x, vzero(), _CMP_NEQ_UQ);
      const vf y = _mm512_maskz_mul_ps(seen, x, vload(numbers.vs + h * w.BK + j));
      sum = _mm512_mask3_fmadd_ps(x, vload(numbers.vb + h * w.BK + j), sum, seen);
      top = vmax(top, vabs(y));
      poison = vfma(y, vzero(), poison);
      vstore(s + j, y);
    }
    vstore(rest, sum);
    const Rounding to_whole(vhmax(top), poison);
    p_scale[row] = to_whole.scale;
    auto* to = reinterpret_cast<__m128i*>(w.p16 + row * (w.BK / 2));
    for (int j = 0; j < n; j += kBlock) {
      vi all = vizero();
      for (int i = j; i < j + kBlock && i < n; i += W) {
        const vi x = to_whole(vload(s + i));
        all = viadd(all, x);
        __m128i high, low;
        split(x, &high, &low);
        _mm_storeu_si128(to++, _mm_unpacklo_epi32(high, low));
        _mm_storeu_si128(to++, _mm_unpackhi_epi32(high, low));
      }
      p_all[row * kBlocks + j / kBlock] = kCentre * _mm512_reduce_add_epi32(all);
    }
  }

  void accumulate(int, int rows, int n) {
    const int heads = w.heads;
    for (int h = 0; h < heads; ++h)
      for (int i = 0; i < rows; ++i) round_weights(static_cast<int64_t>(h) * rows + i, h, n);
    const int now = kBlock < n ? kBlock : n;
    RowStream stream(w.vr + now, n - now, v_bytes, w.kr + w.tile, kBlock < next ? kBlock : next, k_bytes, now);
    const View t{w.vr, w.v_step, w.Dv, reinterpret_cast<const int32_t*>(w.p16), w.BK / 2, w.VP};
    const int share = static_cast<int>((k_bytes / heads + 63) / 64 * 4 / chunks(w.Dv)) + 1;
    for (int j = 0; j < n; j += kBlock) {
      const int j0 = j / 4, j1 = ((j + kBlock < n ? j + kBlock : n) + 3) / 4;
      Weights x{t.a, p_scale, p_all + j / kBlock};
      float* o = w.st.o;
      for (int64_t h = 0, head = 0; h < heads; ++h, head += t.step) {
        int i = 0;
        const auto next_rows = [&](int done) {
          i += done;
          x = {x.number + done * t.lda, x.scale + done, x.all + done * kBlocks};
          o += done * t.ldc;
        };
        for (; rows - i >= 4; next_rows(4)) weigh_all<4>(t, stream, head, x, o, j0, j1, i == 0 ? share : 0);
        for (; rows - i >= 2; next_rows(2)) weigh_all<2>(t, stream, head, x, o, j0, j1, i == 0 ? share : 0);
        for (; rows - i >= 1; next_rows(1)) weigh_all<1>(t, stream, head, x, o, j0, j1, i == 0 ? share : 0);
      }
    }
  }

  // A row of o, channels in order. A vector holds four bytes of each 128-bit lane, or the even or odd channels of them.
  void finish(float* o) const {
    const vf rest = vset(vsum(vload(o + w.VP - W)));
    for (int c = 0; c < w.Dv; c += kChunk, o += kChunk) {
      vf x[4], y[4 * kHalves];
      for (int part = 0; part < kHalves; ++part) {
        for (int i = 0; i < 4; ++i) {
          if constexpr (kHalves == 1) {
            x[i] = vload(o + i * W);
          } else {
            const vf even = vload(o + (part * 4 + i / 2 * 2) * W), odd = vload(o + (part * 4 + i / 2 * 2 + 1) * W);
            x[i] = i % 2 ? _mm512_unpackhi_ps(even, odd) : _mm512_unpacklo_ps(even, odd);
          }
        }
        vf lane[4];
        vturn_lanes(x, lane);
        for (int i = 0; i < 4; ++i) y[kHalves * i + part] = vadd(lane[i], rest);
      }
      for (int i = 0; i < 4 * kHalves; ++i) vstore(o + i * W, y[i]);
    }
  }
};

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
#endif
