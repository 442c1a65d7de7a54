// Few rows of bf16 against 4-bit codes with one scale a key and head (KV4), a row in every lane
// (attention_lanes.inl.h). A code becomes the bf16 number 128 + code by standing in its last bits, in an order that
// costs a shift and one more instruction for 32 of them; 128 is taken out afterwards, and the scales are multiplied
// into the scores and the probabilities, so that no decoded row exists anywhere (docs/design/006-quantised-kv.md):
//   q k^T = ks (q (128 + code)) + (min - 128 ks, or -(128 + zero) ks) sum(q)
//   p v = w (128 + code) - 136 w + p (8 vs + min, or (8 - zero) vs)        w = p vs, rounded
// For scores the codes of four keys are turned, a quarter of each in a vector, so that four sums are left to add up
// where a whole row in a vector leaves sixteen.
#if defined(FASTOPS_HAS_BF16_DOT)
namespace fastops::cpu::FASTOPS_ISA {
namespace {

struct Nibbles : LaneRows<CodeMode<kKvU4>, true> {
  using Rows = LaneRows<CodeMode<kKvU4>, true>;
  static constexpr int kChunk = 128;     // channels of a vector of codes
  static constexpr int kPiece = 64;      // channels of a key that scores take at a time
  static constexpr int kStep = 8 * 4;    // channels of a quarter of a vector: eight words
  static constexpr int kLanes = W / 2;   // of a block
  static constexpr int kPart = 4 * W;    // columns of o that belong to half of one
  static constexpr int kLeastKeys = 32;  // of a tile
  int block, lead;
  int64_t q_step;  // from a block of q to the next
  float* q_sum;    // [lanes]
  HeadNumbers k_numbers, v_numbers;
  bool found = false;
  vi head_in[kDirectRows];  // the head of each lane, for each vector of rows

  Nibbles(Work<Code<kKvU4>>& work, const AttentionParams& params)
      : Rows(work, params, kLeastKeys),
        q_step(static_cast<int64_t>(w.D + kPiece - 1) / kPiece * kPiece * kLanes / 2),
        k_numbers(params.kq, w.heads, reinterpret_cast<HeadNumbers::Places*>(w.raw)),
        v_numbers(params.vq, w.heads, k_numbers.end()) {
    w.VP = columns = chunks(w.Dv) * kChunk;
    part = kPart;
    rest = m + lanes;
    q_sum = rest + lanes;
    std::memset(w.q, 0, sizeof(float) * static_cast<size_t>(lanes / kLanes * q_step));
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

  // q as [blocks][quarters of a vector of codes][nibbles][lanes][words]: channel 4 i + n is nibble n of word i.
  void load_q(const AttentionParams&, const AttentionItem& it, const Sequence& seq, int h) {
    const bf16* base =
        reinterpret_cast<const bf16*>(p.q) + it.b * p.q_sb + seq.q0 * p.q_ss + (it.hkv + h) * p.G * p.q_sh;
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (int r = 0; r < w.rows; ++r) {
      const int64_t at = it.row0 + r, lane = lane_of(h, r);
      const bf16* src = base + at / p.G * p.q_ss + at % p.G * p.q_sh;
      auto* to = reinterpret_cast<__m128i*>(w.q + lane / kLanes * q_step) + lane % kLanes;
      vf sum = vzero();
      for (int d = 0; d < w.D; d += kStep) {
        const int left = w.D - d;
        const __m512i x = _mm512_maskz_loadu_epi16(left >= kStep ? 0xffffffffu : (1u << left) - 1u, src + d);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)x, ones);
        FASTOPS_UNROLL
        for (int n = 0; n < 4; ++n, to += kLanes)
          _mm_storeu_si128(to, _mm512_cvtepi64_epi16(n ? _mm512_srli_epi64(x, 16 * n) : x));
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

  // The codes of four keys, turned: their first quarter of a vector side by side, and the second one.
  template <bool kWhole>
  static FASTOPS_INLINE void turned(const Code<kKvU4>* const* rows, int64_t at, __mmask8 m, __m512i (&x)[2]) {
    const auto load = [&](int j) FASTOPS_LAMBDA {
      const uint8_t* from = reinterpret_cast<const uint8_t*>(rows[j]) + at;
      return kWhole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)) : _mm256_maskz_loadu_epi32(m, from);
    };
    const __m512i a = _mm512_inserti64x4(_mm512_castsi256_si512(load(0)), load(1), 1);
    const __m512i b = _mm512_inserti64x4(_mm512_castsi256_si512(load(2)), load(3), 1);
    x[0] = _mm512_shuffle_i32x4(a, b, 0x88);
    x[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  }

  // Keys of a block of scores, in groups of four: as many sums as there are registers for.
  static constexpr int groups_of_keys(int rows) { return rows <= 4 ? 4 : 2; }

  // acc[groups of keys][RB rows from lane `first`] = q code of one head, four sums in each 128-bit lane.
  template <int RB, bool kWhole, int kGroups>
  static FASTOPS_INLINE void dots(RowStream& stream, const Code<kKvU4>* const* rows, int64_t at, int dim,
                                  const float* q, int first, vf (&sums)[kGroups][kLanes]) {
    constexpr int kLines = 2 * kGroups;
    vf acc[kGroups][RB];
    FASTOPS_UNROLL
    for (int i = 0; i < kGroups * RB; ++i) acc[i / RB][i % RB] = vzero();
    const auto* from = reinterpret_cast<const __m128i*>(q) + first;
    for (int c = 0; c < dim; c += kPiece, from += 8 * kLanes) {
      const auto m = static_cast<__mmask8>(kWhole || dim - c >= kPiece ? 0xff : (1u << (dim - c) / 8) - 1u);
      const RowStream::Lines lines = stream.take<kLines>();
      __m512i x[kGroups][2];
      FASTOPS_UNROLL
      for (int g = 0; g < kGroups; ++g) turned<kWhole>(rows + 4 * g, at + c / 2, m, x[g]);
      FASTOPS_UNROLL
      for (int step = 0; step < 8; ++step) {
        __m512bh v[kGroups];
        FASTOPS_UNROLL
        for (int g = 0; g < kGroups; ++g) v[g] = codes(x[g][step / 4], step % 4);
        lines.ask<kLines>(step, 8);
        FASTOPS_UNROLL
        for (int r = 0; r < RB; ++r) {
          const __m512bh y = (__m512bh)_mm512_broadcast_i32x4(_mm_loadu_si128(from + step * kLanes + r));
          FASTOPS_UNROLL
          for (int g = 0; g < kGroups; ++g) acc[g][r] = _mm512_dpbf16_ps(acc[g][r], y, v[g]);
        }
      }
    }
    FASTOPS_UNROLL
    for (int i = 0; i < kGroups * RB; ++i) sums[i / RB][first + i % RB] = acc[i / RB][i % RB];
  }
  // A block of lanes: [four keys][four lanes] for each group of keys and half of the lanes.
  template <int RB, bool kWhole, int kGroups>
  static FASTOPS_INLINE void block_dots(RowStream& stream, const Code<kKvU4>* const* rows, const int64_t* at, int dim,
                                        const float* q, vf (&out)[kGroups][2]) {
    constexpr int HB = kLanes / RB;
    vf sums[kGroups][kLanes];
    FASTOPS_UNROLL
    for (int i = 0; i < kGroups * (kLanes - HB * RB); ++i) sums[i % kGroups][HB * RB + i / kGroups] = vzero();
    FASTOPS_UNROLL
    for (int h = 0; h < HB; ++h) {
      dots<RB, kWhole, kGroups>(stream, rows, at[h], dim, q, h * RB, sums);
      const int known = h + 1 == HB ? kLanes : (h + 1) * RB;
      FASTOPS_UNROLL
      for (int i = h * RB / 4; i < known / 4; ++i) {
        FASTOPS_UNROLL
        for (int g = 0; g < kGroups; ++g) out[g][i] = sums_of_four(sums[g] + 4 * i);
      }
    }
  }
  // Within each 128-bit lane: the sums of four vectors.
  static FASTOPS_INLINE vf sums_of_four(const vf* x) {
    const vf a = vadd(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const vf b = vadd(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    return vadd(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }

  // Products of q and codes as [keys][lanes].
  void scores(int, int, int n) {
    using Of = void (Nibbles::*)(int);
    static constexpr Of kOf[] = {&Nibbles::scores_of<1>, &Nibbles::scores_of<2>, &Nibbles::scores_of<3>,
                                 &Nibbles::scores_of<4>, &Nibbles::scores_of<5>, &Nibbles::scores_of<6>,
                                 &Nibbles::scores_of<7>, &Nibbles::scores_of<8>};
    (this->*kOf[w.rows - 1])(n);
  }
  template <int RB>
  void scores_of(int n) {
    if (w.D % kPiece == 0) return scores_in<RB, true>(n);
    scores_in<RB, false>(n);
  }
  template <int RB, bool kWhole>
  void scores_in(int n) {
    constexpr int HB = kLanes / RB, kGroups = groups_of_keys(RB), kKeys = 4 * kGroups;
    const int now = lead < n ? lead : n, dim = w.D, vectors = groups, heads = w.heads;
    RowStream stream(w.kr + now, n - now, k_bytes, w.vr, now, v_bytes, now, n);
    const Code<kKvU4>* const* rows = w.kr;
    const int64_t pitch = lanes, step = q_step;
    float* s = w.s;
    for (int j = 0; j < n; j += kKeys, s += kKeys * pitch) {  // the keys behind the last one are that one again
      const float* q = w.q;
      const int64_t* at = k_at;
      for (int g = 0; g < vectors; ++g, at += 2 * HB, q += 2 * step) {
        vf half[2][kGroups][2];
        block_dots<RB, kWhole, kGroups>(stream, rows + j, at, dim, q, half[0]);
        const bool more = g * group + HB < heads;
        if (more) block_dots<RB, kWhole, kGroups>(stream, rows + j, at + HB, dim, q + step, half[1]);
        FASTOPS_UNROLL
        for (int i = 0; i < kGroups; ++i) {
          const auto& b = half[more];
          const vf x[4] = {half[0][i][0], half[0][i][1], b[i][0], b[i][1]};
          vf y[4];
          vturn_lanes(x, y);
          FASTOPS_UNROLL
          for (int k = 0; k < 4; ++k) vstore(s + (4 * i + k) * pitch + g * W, y[k]);
        }
      }
    }
  }

  // Products into scores, and these into probabilities times the scales of the values. Unseen keys get a weight of
  // exactly 0, whatever their numbers.
  void softmax(const AttentionParams&, int64_t key, int n, bool masked) {
    const int layout = k_numbers.layout() == v_numbers.layout() ? v_numbers.layout() : 0;
    if (masked || layout == 0) return softmax_of<0, 0>(key, n, masked);
    if (layout == 1) return softmax_in<1>(key, n);
    if (layout == 2) return softmax_in<2>(key, n);
    softmax_in<3>(key, n);
  }
  template <int kLayout>
  void softmax_in(int64_t key, int n) {
    if (groups == 1) return softmax_of<kLayout, 1>(key, n, false);
    if (groups == 2) return softmax_of<kLayout, 2>(key, n, false);
    if (groups == 4) return softmax_of<kLayout, 4>(key, n, false);
    softmax_of<kLayout, 0>(key, n, false);
  }
  // kVectors: how many there are, or 0 for any number.
  template <int kLayout, int kVectors>
  void softmax_of(int64_t key, int n, bool masked) {
    constexpr int kMost = kVectors ? kVectors : kDirectRows;
    const float c = p.scale * kLog2e;
    const int64_t pitch = lanes;
    const int vectors = kVectors ? kVectors : groups;
    vf mc[kMost], sum[kMost], more[kMost], top[kMost];
    vi head[kMost];
    for (int g = 0; g < vectors; ++g) {
      top[g] = vset(kNegInf);
      head[g] = head_in[g];
    }
    {
      const HeadNumbers numbers = k_numbers;
      const int layout = kLayout ? kLayout : numbers.layout();
      const vf middle = vset(-128.0f);
      const float* sums = q_sum;
      float* s = w.s;
      for (int j = 0; j < n; ++j, s += pitch) {
        const HeadNumbers::Pair x = numbers.at(layout, j, middle);
        for (int g = 0; g < vectors; ++g) {
          const vf shift = vmul(vtable_at(x.shift, head[g]), vload(sums + g * W));
          const vf score = vfma(vload(s + g * W), vtable_at(x.scale, head[g]), shift);
          vstore(s + g * W, score);
          top[g] = vmax(top[g], score);
        }
      }
    }
    for (int g = 0; g < vectors; ++g) {
      if (kLayout == 0 && masked) {
        mask(w.s + g * W, key, n);
        top[g] = this->largest(w.s + g * W, n);
      }
      mc[g] = offset(g, top[g], c);
      sum[g] = more[g] = vzero();
    }
    const HeadNumbers numbers = v_numbers;
    const int layout = kLayout ? kLayout : numbers.layout();
    const vf cv = vset(c), middle = vset(8.0f);
    const __m512bh out = (__m512bh)_mm512_set1_epi16(static_cast<int16_t>(0xc308));  // -136
    float* to = w.p16;
    const float* s = w.s;
    for (int j = 0; j < n; j += 2, to += pitch, s += 2 * pitch) {
      const bool both = j + 1 < n;
      const HeadNumbers::Pair a = numbers.at(layout, j, middle), b = numbers.at(layout, j + both, middle);
      const float* then = s + (both ? pitch : 0);
      for (int g = 0; g < vectors; ++g) {
        const vf x = vexp2<4>(vfma(vload(s + g * W), cv, mc[g]));
        const vf y = both ? vexp2<4>(vfma(vload(then + g * W), cv, mc[g])) : vzero();
        sum[g] = vadd(sum[g], vadd(x, y));
        const vf xs = weighted<kLayout == 0>(x, vtable_at(a.scale, head[g]));
        const vf ys = weighted<kLayout == 0>(y, vtable_at(b.scale, head[g]));
        const vf shifts = vadd(weighted<kLayout == 0>(x, vtable_at(a.shift, head[g])),
                               weighted<kLayout == 0>(y, vtable_at(b.shift, head[g])));
        const vi pair = paired(xs, ys);
        vistore(to + g * W, pair);
        more[g] = _mm512_dpbf16_ps(vadd(more[g], shifts), (__m512bh)pair, out);
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
