// Few rows of bf16 against 4-bit codes with one scale a key and head (KV4), a row in every lane
// (attention_lanes.inl.h). A code becomes the bf16 number 128 + code by standing in its last bits, in an order that
// costs a shift and one more instruction for 32 of them; 128 is taken out afterwards, and the scales are multiplied
// into the scores and the probabilities, so that no decoded row exists anywhere (docs/design/006-quantised-kv.md):
//   q k^T = ks (q (128 + code)) + (min - 128 ks, or -(128 + zero) ks) sum(q)
//   p v = w (128 + code) - 136 w + p (8 vs + min, or (8 - zero) vs)        w = p vs, rounded
#if defined(FASTOPS_HAS_BF16_DOT)
namespace fastops::cpu::FASTOPS_ISA {
namespace {

struct Nibbles : LaneRows<CodeMode<kKvU4>, true> {
  using Rows = LaneRows<CodeMode<kKvU4>, true>;
  static constexpr int kChunk = 128;     // channels of a vector of codes
  static constexpr int kPart = 4 * W;    // columns of o that belong to half of one
  static constexpr int kLeastKeys = 32;  // of a tile
  int block, lead, steps;                // vectors of a row of q
  float* q_sum;                          // [lanes]
  HeadNumbers k_numbers, v_numbers;
  bool found = false;
  vi head_in[kDirectRows];  // the head of each lane, for each vector of rows

  Nibbles(Work<Code<kKvU4>>& work, const AttentionParams& params)
      : Rows(work, params, kLeastKeys),
        steps(chunks(w.D) * 4),
        k_numbers(params.kq, w.heads, reinterpret_cast<HeadNumbers::Places*>(w.raw)),
        v_numbers(params.vq, w.heads, k_numbers.end()) {
    w.VP = columns = chunks(w.Dv) * kChunk;
    part = kPart;
    rest = m + lanes;
    q_sum = rest + lanes;
    std::memset(w.q, 0, sizeof(float) * static_cast<size_t>(lanes * steps * W));
    std::memset(rest, 0, sizeof(float) * static_cast<size_t>(2 * lanes));
    for (int g = 0; g < groups; ++g) {
      int32_t heads[W];
      for (int i = 0; i < W; ++i) heads[i] = is_row(g * W + i) ? head_of(g * W + i) : 0;
      head_in[g] = viload(heads);
    }
    block = keys(16 << 10, 4, kDirectKeys);
    lead = keys(16 << 10, 1, kDirectKeys);
    const int fit = kDirectScores / 2 / lanes / kLeastKeys * kLeastKeys;
    w.tile = w.BK = keys(128 << 10, kLeastKeys, fit < kLeastKeys ? kLeastKeys : fit < kDirectKeys ? fit : kDirectKeys);
  }

  // As many keys as so many bytes hold.
  int keys(int64_t bytes, int least, int most) const {
    const int64_t row = (w.D > w.Dv ? w.D : w.Dv) / 2 * w.heads;
    const int n = static_cast<int>(bytes / row) / least * least;
    return n < least ? least : n < most ? n : most;
  }

  static int chunks(int dim) { return (dim + kChunk - 1) / kChunk; }
  // Nibble n of 32 words, as 128 + code.
  template <int n>
  static FASTOPS_INLINE __m512bh codes(__m512i x) {
    const __m512i shifted = n > 0 ? _mm512_srli_epi16(x, 4 * n) : x;
    return (__m512bh)_mm512_ternarylogic_epi32(shifted, _mm512_set1_epi16(15), _mm512_set1_epi16(0x4300), 0xea);
  }
  static FASTOPS_INLINE __m512bh codes(__m512i x, int n) {
    return n == 0 ? codes<0>(x) : n == 1 ? codes<1>(x) : n == 2 ? codes<2>(x) : codes<3>(x);
  }
  static __mmask32 words(int channels) { return channels >= kChunk ? 0xffffffffu : (1u << channels / 4) - 1u; }

  // Channel 4 i + n of a chunk is nibble n of word i: q in the order word by word for n = 0, then n = 1, ...
  void load_q(const AttentionParams&, const AttentionItem& it, const Sequence& seq, int h) {
    const bf16* base =
        reinterpret_cast<const bf16*>(p.q) + it.b * p.q_sb + seq.q0 * p.q_ss + (it.hkv + h) * p.G * p.q_sh;
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (int r = 0; r < w.rows; ++r) {
      const int64_t at = it.row0 + r, lane = lane_of(h, r);
      const bf16* src = base + at / p.G * p.q_ss + at % p.G * p.q_sh;
      float* dst = w.q + (lane / W * steps * W + lane % W) * W;  // then a step is W vectors further
      vf sum = vzero();
      for (int d = 0; d < chunks(w.D) * kChunk; d += 32) {
        const int left = w.D - d;
        const __mmask32 m = left >= 32 ? 0xffffffffu : left > 0 ? (1u << left) - 1u : 0u;
        const __m512i x = _mm512_maskz_loadu_epi16(m, src + (left > 0 ? d : 0));
        sum = _mm512_dpbf16_ps(sum, (__m512bh)x, ones);
        FASTOPS_UNROLL
        for (int n = 0; n < 4; ++n) {
          auto* to = reinterpret_cast<bf16*>(dst + (d / kChunk * 4 + n) * W * W) + d % kChunk / 4;
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi64_epi16(n ? _mm512_srli_epi64(x, 16 * n) : x));
        }
      }
      q_sum[lane] = vsum(sum);
    }
  }

  // The first keys of an item, whose rows nobody has asked for yet.
  void begin(int n) const {
    RowStream first(w.kr + w.tile, n < lead ? n : lead, k_bytes, nullptr, 0, 0);
    first.step(1 << 10);
  }

  static bool fits(const AttentionParams& p, const AttentionItem& it) {
    return Rows::fits(it) && p.kq.scale_dtype == p.vq.scale_dtype;
  }

  // The numbers of a tile were found a tile ahead, but for the first.
  void scales(const AttentionItem& it, const int32_t* page_table, int64_t key, int n, int behind) {
    if (!found) expect(it, page_table, key, n);
    k_numbers.advance();
    v_numbers.advance();
    expect(it, page_table, key + n, behind);
    found = true;
  }
  void expect(const AttentionItem& it, const int32_t* page_table, int64_t key, int n) {
    k_numbers.find(p, it, page_table, key, n);
    v_numbers.find(p, it, page_table, key, n);
  }

  // [JB keys][block of lanes] = q code, of JB keys and the heads of a block.
  template <int RB, bool kOneChunk>
  static FASTOPS_INLINE vf dots(RowStream& stream, const Code<kKvU4>* const* rows, const int64_t* at, int channels,
                                const float* q) {
    const int dim = kOneChunk ? kChunk : channels;
    constexpr int kBlock = block_lanes(RB), JB = W / kBlock, HB = kBlock / RB;
    constexpr int kTogether = HB < 4 ? HB : 4;  // heads: one by one, a product would wait for the one before
    static_assert(HB % kTogether == 0, "no head is left over");
    vf acc[W];
    FASTOPS_UNROLL
    for (int i = 0; i < W; ++i) acc[i] = vzero();
    for (int c = 0; c < dim; c += kChunk, q += 4 * W * W) {
      RowStream::Lines lines;
      if (kOneChunk) {
        lines = stream.take<JB * HB>();
      } else {
        stream.step(dim - c > kChunk / 2 ? JB * HB : (JB * HB + 1) / 2);
      }
      const __mmask32 mask = words(dim - c);
      FASTOPS_UNROLL
      for (int h0 = 0; h0 < HB; h0 += kTogether) {
        __m512i x[kTogether][JB];
        FASTOPS_UNROLL
        for (int h = 0; h < kTogether; ++h) {
          FASTOPS_UNROLL
          for (int j = 0; j < JB; ++j)
            x[h][j] = _mm512_maskz_loadu_epi16(mask, reinterpret_cast<const uint8_t*>(rows[j]) + at[h0 + h] + c / 2);
        }
        FASTOPS_UNROLL
        for (int k = 0; k < 4 * kTogether; ++k) {
          const int n = k / kTogether, h = k % kTogether;
          __m512bh v[JB];
          FASTOPS_UNROLL
          for (int j = 0; j < JB; ++j) v[j] = codes(x[h][j], n);
          if (kOneChunk) lines.ask<JB * HB>(h0 * 4 + k, 4 * HB);
          FASTOPS_UNROLL
          for (int i = (h0 + h) * RB; i < (h0 + h + 1) * RB; ++i) {
            const __m512bh y = (__m512bh)_mm512_loadu_si512(q + (n * W + i) * W);
            FASTOPS_UNROLL
            for (int j = 0; j < JB; ++j) acc[j * kBlock + i] = _mm512_dpbf16_ps(acc[j * kBlock + i], y, v[j]);
          }
        }
      }
    }
    return vreduce(acc);
  }

  // Scores as [keys][lanes].
  void scores(int, int, int n) {
    using Of = void (Nibbles::*)(int);
    static constexpr Of kOf[] = {&Nibbles::scores_of<1>, &Nibbles::scores_of<2>, &Nibbles::scores_of<3>,
                                 &Nibbles::scores_of<4>, &Nibbles::scores_of<5>, &Nibbles::scores_of<6>,
                                 &Nibbles::scores_of<7>, &Nibbles::scores_of<8>};
    (this->*kOf[w.rows - 1])(n);
  }
  template <int RB>
  void scores_of(int n) {
    if (w.D == kChunk) return scores_in<RB, true>(n);
    scores_in<RB, false>(n);
  }
  template <int RB, bool kOneChunk>
  void scores_in(int n) {
    constexpr int kBlock = block_lanes(RB), JB = W / kBlock, HB = kBlock / RB;
    const int now = lead < n ? lead : n, dim = w.D, vectors = groups, heads = w.heads;
    RowStream stream(w.kr + now, n - now, k_bytes, w.vr, now, v_bytes, now, n);
    const Code<kKvU4>* const* rows = w.kr;
    const int64_t q_step = static_cast<int64_t>(steps) * W * W, pitch = lanes;
    const int layout = k_numbers.layout();
    const vf middle = vset(-128.0f);
    float* s = w.s;
    for (int j = 0; j < n; j += JB, s += JB * pitch) {  // the key behind an odd last one is that one again
      const HeadNumbers::Pair k = k_numbers.at(layout, j, middle);
      const HeadNumbers::Pair then = JB == 1 ? k : k_numbers.at(layout, j + 1 < n ? j + 1 : j, middle);
      const float* q = w.q;
      const int64_t* at = k_at;
      for (int g = 0; g < vectors; ++g, at += JB * HB, q += q_step) {
        const vf a = dots<RB, kOneChunk>(stream, rows + j, at, dim, q);
        if constexpr (JB == 1) {
          put(s, g, a, k);
        } else {
          const bool more = g * group + HB < heads;
          const vf b = more ? dots<RB, kOneChunk>(stream, rows + j, at + HB, dim, q + kBlock * W) : a;
          put(s, g, vjoin_low(a, b), k);
          put(s + pitch, g, vjoin_high(a, b), then);
        }
      }
    }
  }

  // The products of a key with vector g of the rows, scaled.
  FASTOPS_INLINE void put(float* s, int g, vf products, const HeadNumbers::Pair& k) const {
    const vf shift = vmul(vtable_at(k.shift, head_in[g]), vload(q_sum + g * W));
    vstore(s + g * W, vfma(products, vtable_at(k.scale, head_in[g]), shift));
  }

  // Scores into probabilities times the scales of the values. Unseen keys get a weight of exactly 0, whatever their
  // numbers.
  void softmax(const AttentionParams&, int64_t key, int n, bool masked) {
    const int layout = v_numbers.layout();
    if (masked || layout == 0) return softmax_of<0>(key, n, masked);
    if (layout == 1) return softmax_of<1>(key, n, false);
    if (layout == 2) return softmax_of<2>(key, n, false);
    softmax_of<3>(key, n, false);
  }
  template <int kLayout>
  void softmax_of(int64_t key, int n, bool masked) {
    const float c = p.scale * kLog2e;
    const vf cv = vset(c), middle = vset(8.0f), out = vset(-136.0f);
    const int64_t pitch = lanes;
    const int vectors = groups;
    vf mc[kDirectRows], sum[kDirectRows], more[kDirectRows];
    for (int g = 0; g < vectors; ++g) {
      if (kLayout == 0 && masked) mask(w.s + g * W, key, n);
      mc[g] = offset(g, largest(w.s + g * W, n), c);
      sum[g] = more[g] = vzero();
    }
    float* to = w.p16;
    for (int j = 0; j < n; j += 2, to += pitch) {
      const bool both = j + 1 < n;
      const HeadNumbers::Pair a = v_numbers.at<kLayout>(j, middle), b = v_numbers.at<kLayout>(j + both, middle);
      const float *s = w.s + j * pitch, *then = s + (both ? pitch : 0);
      for (int g = 0; g < vectors; ++g) {
        const vf x = vexp2<4>(vfma(vload(s + g * W), cv, mc[g]));
        const vf y = both ? vexp2<4>(vfma(vload(then + g * W), cv, mc[g])) : vzero();
        sum[g] = vadd(sum[g], vadd(x, y));
        const vf xs = weighted<kLayout == 0>(x, vtable_at(a.scale, head_in[g]));
        const vf ys = weighted<kLayout == 0>(y, vtable_at(b.scale, head_in[g]));
        const vf shifts = vadd(weighted<kLayout == 0>(x, vtable_at(a.shift, head_in[g])),
                               weighted<kLayout == 0>(y, vtable_at(b.shift, head_in[g])));
        const vi pair = paired(xs, ys);
        vistore(to + g * W, pair);
        const vf rounded = vadd(vi_as_bits(vishl<16>(pair)), vi_as_bits(vimask<0xffff0000u>(pair)));
        more[g] = vfma(out, rounded, vadd(more[g], shifts));
      }
    }
    for (int g = 0; g < vectors; ++g) {
      vstore(l + g * W, vadd(vload(l + g * W), sum[g]));
      vstore(rest + g * W, vadd(vload(rest + g * W), more[g]));
    }
  }
  // x y, and 0 where x is, if y may be anything.
  template <bool kAny>
  static FASTOPS_INLINE vf weighted(vf x, vf y) {
    return kAny ? _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(x, vzero(), _CMP_NEQ_UQ), x, y) : vmul(x, y);
  }

  // o[RB rows][4 vectors] += probabilities times codes of the keys [j0, j1), two by two, at byte `at` of their rows:
  // the words of the first half of each 128-bit lane of a chunk, of the second (o + high), or of both. kFull: all 32
  // words.
  enum Half { kLow, kHigh, kBoth };
  template <int RB, Half kHalf, int kLines, bool kFull>
  static FASTOPS_INLINE void weigh(RowStream& stream, const Code<kKvU4>* const* rows, int64_t at, const float* weights,
                                   int64_t pitch, float* o, int64_t high, __mmask32 mask, int j0, int j1) {
    constexpr int kHalves = kHalf == kBoth ? 2 : 1;
    const auto part_of = [&](int half, int r)
                             FASTOPS_LAMBDA { return o + (kHalf == kHigh || half == 1 ? high : 0) + r * kPart; };
    const auto load = [&](const Code<kKvU4>* row) FASTOPS_LAMBDA {
      const uint8_t* p = reinterpret_cast<const uint8_t*>(row) + at;
      return kFull ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(mask, p);
    };
    vf acc[kHalves][RB][4];
    FASTOPS_UNROLL
    for (int half = 0; half < kHalves; ++half) {
      FASTOPS_UNROLL
      for (int r = 0; r < RB; ++r) {
        FASTOPS_UNROLL
        for (int n = 0; n < 4; ++n) acc[half][r][n] = vload(part_of(half, r) + n * W);
      }
    }
    for (int j = j0; j < j1; j += 2, weights += pitch) {
      const RowStream::Lines lines = kLines > 0 ? stream.take<kLines>() : RowStream::Lines();
      const __m512i a = load(rows[j]), b = load(rows[j + 1]);
      FASTOPS_UNROLL
      for (int half = 0; half < kHalves; ++half) {
        const __m512i x = kHalf == kHigh || half == 1 ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b);
        __m512bh v[4];
        FASTOPS_UNROLL
        for (int n = 0; n < 4; ++n) v[n] = codes(x, n);
        FASTOPS_UNROLL
        for (int r = 0; r < RB; ++r) {
          const __m512bh pj = (__m512bh)_mm512_castps_si512(vset(weights[r]));
          FASTOPS_UNROLL
          for (int n = 0; n < 4; ++n) acc[half][r][n] = _mm512_dpbf16_ps(acc[half][r][n], pj, v[n]);
          lines.ask<kLines>(half * RB + r, kHalves * RB);
        }
      }
    }
    FASTOPS_UNROLL
    for (int half = 0; half < kHalves; ++half) {
      FASTOPS_UNROLL
      for (int r = 0; r < RB; ++r) {
        FASTOPS_UNROLL
        for (int n = 0; n < 4; ++n) vstore(part_of(half, r) + n * W, acc[half][r][n]);
      }
    }
  }

  void accumulate(int, int, int n) {
    using Of = void (Nibbles::*)(int);
    static constexpr Of kOf[] = {&Nibbles::accumulate_of<1>, &Nibbles::accumulate_of<2>, &Nibbles::accumulate_of<3>,
                                 &Nibbles::accumulate_of<4>, &Nibbles::accumulate_of<5>, &Nibbles::accumulate_of<6>,
                                 &Nibbles::accumulate_of<7>, &Nibbles::accumulate_of<8>};
    (this->*kOf[w.rows - 1])(n);
  }
  template <int RB>
  void accumulate_of(int n) {
    if (w.Dv % kChunk == 0) return accumulate_in<RB, true>(n);
    accumulate_in<RB, false>(n);
  }
  template <int RB, bool kFull>
  void accumulate_in(int n) {
    constexpr int kBlock = block_lanes(RB), HB = kBlock / RB, kFirst = RB < 4 ? RB : 4, kRest = RB - kFirst;
    constexpr int64_t kHighAt = kPart * RB;
    const int now = lead < n ? lead : n, dim = w.Dv;
    RowStream stream(w.vr + now, n - now, v_bytes, w.kr + w.tile, lead < next ? lead : next, k_bytes, now, next);
    const int64_t v_step = w.v_step, pitch = lanes;
    const Code<kKvU4>* const* v = w.vr;
    for (int j = 0; j < n; j += block) {
      const int end = j + block < n ? j + block : n;
      const float* x = w.p16 + j / 2 * pitch;
      float* o = w.st.o;
      for (int h = 0; h < w.heads; ++h) {
        const float* mine = x + h / HB * kBlock + h % HB * RB;
        for (int c = 0; c < dim; c += kChunk, o += 2 * kHighAt) {
          const __mmask32 mask = words(dim - c);
          const int64_t at = h * v_step + c / 2;
          const bool high = kFull || dim - c > 16;
          if (RB <= 2 && high) {  // few rows: one half alone has too few sums under way
            weigh<kFirst, kBoth, 2, kFull>(stream, v, at, mine, pitch, o, kHighAt, mask, j, end);
            continue;
          }
          if (kFull || dim - c > kChunk / 2 || h % 2 == 0) {
            weigh<kFirst, kLow, 2, kFull>(stream, v, at, mine, pitch, o, kHighAt, mask, j, end);
          } else {
            weigh<kFirst, kLow, 0, kFull>(stream, v, at, mine, pitch, o, kHighAt, mask, j, end);
          }
          if (high) weigh<kFirst, kHigh, 0, kFull>(stream, v, at, mine, pitch, o, kHighAt, mask, j, end);
          if constexpr (kRest > 0) {
            float* then = o + 4 * kPart;
            weigh<kRest, kLow, 0, kFull>(stream, v, at, mine + 4, pitch, then, kHighAt, mask, j, end);
            if (high) weigh<kRest, kHigh, 0, kFull>(stream, v, at, mine + 4, pitch, then, kHighAt, mask, j, end);
          }
        }
      }
    }
  }

  // A row of o, channels in order: word 8 b + 4 high + t of a chunk stands in lane 4 b + t of half `high`.
  Row row(int h, int r) const {
    const int lane = lane_of(h, r);
    float *first = gathered(h, r), *o = first;
    const vf added = vset(rest[lane]);
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
        for (int i = 0; i < 4; ++i) vstore(o + 32 * i + 16 * half, vadd(b[i], added));
      }
    }
    return {first, m[lane], l[lane]};
  }
};

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
#endif
