// Few rows against codes of 8 or 4 bits, a row in every lane (attention_lanes.inl.h). Codes become numbers of 16 bits
// in registers (attention_lane_kinds.inl.h), and the scales are multiplied into the scores and the probabilities, so
// that no decoded row exists anywhere (docs/design/006-quantised-kv.md):
//   q k^T = ks (q code) + kb sum(q)        p v = (p vs) code + p vb        b: a minimum, or -zero scale
// Whole codes meet q, and p vs of a tile, as whole numbers of 15 bits and a sign: what that leaves out is 2^-16 of a
// row's largest. e4m3 meets them in bf16.
//
// For scores the codes of four keys are turned, a quarter of each in a vector, so that four sums are left to add up
// where a whole row in a vector leaves sixteen.
#if defined(FASTOPS_HAS_VNNI)
namespace fastops::cpu::FASTOPS_ISA {
namespace {

// kGrouped: keys of a group share numbers, which q has met (attention_lane_groups.inl.h).
template <int kKind, bool kGrouped = false>
struct LaneCodes : LaneRows<CodeMode<kKind>, true> {
  using Rows = LaneRows<CodeMode<kKind>, true>;
  using Kind = LaneCode<kKind>;
  using Sum = typename Kind::Sum;
  static constexpr bool kIntegers = Kind::kIntegers;
  using Elem = Code<kKind>;
  using Rows::block_lanes, Rows::bytes, Rows::columns, Rows::group, Rows::groups, Rows::head_of, Rows::is_row,
      Rows::k_at, Rows::k_bytes, Rows::l, Rows::lane_of, Rows::lanes, Rows::m, Rows::next, Rows::p, Rows::part,
      Rows::rest, Rows::v_bytes, Rows::w;
  static constexpr int kPerByte = 8 / kCodeBits<kKind>;
  static constexpr int kChunk = 64 * kPerByte;  // channels of a vector of codes,
  static constexpr int kPiece = kChunk / 2;     // of what scores take at a time of a key,
  static constexpr int kStep = kChunk / 4;      // and of a quarter
  static constexpr int kLanes = W / 2;          // of a block
  static constexpr int kPart = 4 * W;           // columns of o in a group of vectors
  static constexpr int kLeastKeys = 32;         // of a tile
  int block, lead;
  int64_t q_step;            // from a block of q to the next
  float* q_sum;              // [lanes], as those below
  float *q_scale, *p_scale;  // what 1 of q and of the weights of a tile stands for, where these are whole numbers
  float* base;               // [lanes], of kGrouped: what is added to the scores
  HeadNumbers k_numbers, v_numbers;
  bool found = false;
  vi head_in[kDirectRows];  // the head of each lane, for each vector of rows

  LaneCodes(Work<Elem>& work, const AttentionParams& params)
      : Rows(work, params, kLeastKeys),
        q_step(static_cast<int64_t>(w.D + kPiece - 1) / kPiece * kPiece * kLanes / 2),
        k_numbers(params.kq, w.heads, reinterpret_cast<HeadNumbers::Places*>(w.raw)),
        v_numbers(params.vq, w.heads, k_numbers.end()) {
    w.VP = columns = chunks(w.Dv) * kChunk;
    part = kPart;
    rest = m + lanes;
    q_sum = rest + lanes;
    q_scale = q_sum + lanes;
    p_scale = q_scale + lanes;
    std::memset(w.q, 0, sizeof(float) * static_cast<size_t>(lanes / kLanes * q_step));
    std::memset(rest, 0, sizeof(float) * static_cast<size_t>(4 * lanes));
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
  int keys(int64_t room, int least, int most) const {
    const int64_t row = bytes(w.D > w.Dv ? w.D : w.Dv) * w.heads;
    const int n = static_cast<int>(room / row) / least * least;
    return n < least ? least : n < most ? n : most;
  }

  static int chunks(int dim) { return (dim + kChunk - 1) / kChunk; }
  // The words of a row in the 64 bytes of a chunk of which so many channels are left, or the double words of a piece.
  static __mmask32 words(int channels) { return channels >= kChunk ? ~0u : (1u << channels / (2 * kPerByte)) - 1u; }
  static __mmask8 doubles(int channels) {
    return static_cast<__mmask8>(channels >= kPiece ? 0xffu : (1u << channels / (4 * kPerByte)) - 1u);
  }

  // q as [blocks][quarters of a vector of codes][parts][lanes][8 channels].
  void load_q(const AttentionParams&, const AttentionItem& it, const Sequence& seq, int h) {
    if (kIntegers && p.dtype == 2) return load_q_as<f16>(it, seq, h);
    load_q_as<bf16>(it, seq, h);
  }
  template <class Q>
  void load_q_as(const AttentionItem& it, const Sequence& seq, int h) {
    const Q* base = reinterpret_cast<const Q*>(p.q) + it.b * p.q_sb + seq.q0 * p.q_ss + (it.hkv + h) * p.G * p.q_sh;
    for (int r = 0; r < w.rows; ++r) {
      const int64_t at = it.row0 + r, lane = lane_of(h, r);
      const Q* src = base + at / p.G * p.q_ss + at % p.G * p.q_sh;
      alignas(64) int16_t whole[kMaxHeadDim + 2 * W];
      if constexpr (kIntegers) q_scale[lane] = rounded(src, w.D, whole);
      const void* words = kIntegers ? static_cast<const void*>(whole) : src;
      auto* to = reinterpret_cast<__m128i*>(w.q + lane / kLanes * q_step) + lane % kLanes;
      vf sum = vzero();
      for (int d = 0; d < w.D; d += kStep) {
        const int n = w.D - d < kStep ? w.D - d : kStep;
        const vi x = _mm512_maskz_loadu_epi16(n == 32 ? ~0u : (1u << n) - 1u, static_cast<const int16_t*>(words) + d);
        if (Kind::kShifted)
          for (int i = 0; i < n; i += W) sum = vadd(sum, vloadn(src + d + i, n - i < W ? n - i : W));
        FASTOPS_UNROLL
        for (int i = 0; i < Kind::kParts; ++i, to += kLanes) _mm_storeu_si128(to, Kind::q_part(x, i));
      }
      if (Kind::kShifted) q_sum[lane] = vsum(sum);
    }
  }
  // A row of q as whole numbers; returns what 1 of them stands for, NaN where not all of the row is finite.
  template <class Q>
  static float rounded(const Q* src, int dim, int16_t* to) {
    vf top = vzero();
    for (int d = 0; d < dim; d += W) top = vmost(top, vloadn(src + d, dim - d < W ? dim - d : W));
    const WholeScale scale(vi_as_bits(_mm512_set1_epi32(static_cast<int>(_mm512_reduce_max_epu32(vi_from_bits(top))))));
    for (int d = 0; d < dim; d += W)
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + d),
                         _mm512_cvtepi32_epi16(scale.round(vloadn(src + d, dim - d < W ? dim - d : W))));
    return lane0(scale.one);
  }

  // The first keys of an item, whose rows nobody has asked for yet.
  void begin(int n) const {
    RowStream first(w.kr + w.tile, n < lead ? n : lead, k_bytes, nullptr, 0, 0);
    first.step(1 << 10);
  }

  static bool fits(const AttentionParams& p, const AttentionItem& it) {
    if (!Rows::fits(it) || !Kind::fits(p.kq) || !Kind::fits(p.vq)) return false;
    if (p.kq.scale == nullptr || p.vq.scale == nullptr) return p.kq.scale == p.vq.scale;
    return p.kq.scale_dtype == p.vq.scale_dtype;
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
    if (p.kq.scale == nullptr) return;
    k_numbers.find(p, it, page_table, key, n);
    v_numbers.find(p, it, page_table, key, n);
  }

  // The codes of four keys, turned: their first quarter of a vector side by side, and the second one.
  template <bool kWhole>
  static FASTOPS_INLINE void turned(const Elem* const* rows, int64_t at, __mmask8 m, vi (&x)[2]) {
    const auto load = [&](int j) FASTOPS_LAMBDA {
      const uint8_t* from = reinterpret_cast<const uint8_t*>(rows[j]) + at;
      return kWhole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)) : _mm256_maskz_loadu_epi32(m, from);
    };
    const vi a = _mm512_inserti64x4(_mm512_castsi256_si512(load(0)), load(1), 1);
    const vi b = _mm512_inserti64x4(_mm512_castsi256_si512(load(2)), load(3), 1);
    x[0] = _mm512_shuffle_i32x4(a, b, 0x88);
    x[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  }

  // Keys of a block of scores, in groups of four: as many sums as there are registers for.
  static constexpr int groups_of_keys(int rows) { return rows <= 4 ? 4 : 2; }

  // acc[groups of keys][RB rows from lane `first`] = q code of one head, four sums in each 128-bit lane.
  template <int RB, bool kWhole, int kGroups>
  static FASTOPS_INLINE void dots(RowStream& stream, const Elem* const* rows, int64_t at, int dim, const float* q,
                                  int first, Sum (&sums)[kGroups][kLanes]) {
    constexpr int kLines = 2 * kGroups;
    Sum acc[kGroups][RB];
    FASTOPS_UNROLL
    for (int i = 0; i < kGroups * RB; ++i) acc[i / RB][i % RB] = Kind::none();
    const auto* from = reinterpret_cast<const __m128i*>(q) + first;
    for (int c = 0; c < dim; c += kPiece, from += 2 * Kind::kParts * kLanes) {
      const __mmask8 m = kWhole ? 0xff : doubles(dim - c);
      const RowStream::Lines lines = stream.take<kLines>();
      vi x[kGroups][2];
      FASTOPS_UNROLL
      for (int g = 0; g < kGroups; ++g) turned<kWhole>(rows + 4 * g, at + bytes(c), m, x[g]);
      FASTOPS_UNROLL
      for (int half = 0; half < 2; ++half) {
        typename Kind::Open opened[kGroups];
        FASTOPS_UNROLL
        for (int g = 0; g < kGroups; ++g) opened[g] = Kind::open(x[g][half]);
        FASTOPS_UNROLL
        for (int n = 0; n < Kind::kParts; ++n) {
          const int step = half * Kind::kParts + n;
          vi v[kGroups];
          FASTOPS_UNROLL
          for (int g = 0; g < kGroups; ++g) v[g] = Kind::part(opened[g], n);
          lines.ask<kLines>(step, 2 * Kind::kParts);
          FASTOPS_UNROLL
          for (int r = 0; r < RB; ++r) {
            const vi y = _mm512_broadcast_i32x4(_mm_loadu_si128(from + step * kLanes + r));
            FASTOPS_UNROLL
            for (int g = 0; g < kGroups; ++g) acc[g][r] = Kind::add(acc[g][r], y, v[g]);
          }
        }
      }
    }
    FASTOPS_UNROLL
    for (int i = 0; i < kGroups * RB; ++i) sums[i / RB][first + i % RB] = acc[i / RB][i % RB];
  }
  // A block of lanes: [four keys][four lanes] for each group of keys and half of the lanes.
  template <int RB, bool kWhole, int kGroups>
  static FASTOPS_INLINE void block_dots(RowStream& stream, const Elem* const* rows, const int64_t* at, int dim,
                                        const float* q, vf (&out)[kGroups][2]) {
    constexpr int HB = kLanes / RB;
    Sum sums[kGroups][kLanes];
    FASTOPS_UNROLL
    for (int i = 0; i < kGroups * (kLanes - HB * RB); ++i) sums[i % kGroups][HB * RB + i / kGroups] = Kind::none();
    FASTOPS_UNROLL
    for (int h = 0; h < HB; ++h) {
      dots<RB, kWhole, kGroups>(stream, rows, at[h], dim, q, h * RB, sums);
      const int known = h + 1 == HB ? kLanes : (h + 1) * RB;
      FASTOPS_UNROLL
      for (int i = h * RB / 4; i < known / 4; ++i) {
        FASTOPS_UNROLL
        for (int g = 0; g < kGroups; ++g) out[g][i] = Kind::sums_of_four(sums[g] + 4 * i);
      }
    }
  }

  // Products of q and codes as [keys][lanes].
  void scores(int, int, int n) {
    using Of = void (LaneCodes::*)(int);
    static constexpr Of kOf[] = {&LaneCodes::scores_of<1>, &LaneCodes::scores_of<2>, &LaneCodes::scores_of<3>,
                                 &LaneCodes::scores_of<4>, &LaneCodes::scores_of<5>, &LaneCodes::scores_of<6>,
                                 &LaneCodes::scores_of<7>, &LaneCodes::scores_of<8>};
    (this->*kOf[w.rows - 1])(n);
  }
  template <int RB>
  void scores_of(int n) {
    RowStream stream = keys_then_values(n);
    scores_between<RB>(stream, 0, n);
  }
  RowStream keys_then_values(int n) const {
    const int now = lead < n ? lead : n;
    return RowStream(w.kr + now, n - now, k_bytes, w.vr, now, v_bytes, now, n);
  }
  template <int RB>
  void scores_between(RowStream& stream, int j0, int j1) {
    if (w.D % kPiece == 0) return scores_in<RB, true>(stream, j0, j1);
    scores_in<RB, false>(stream, j0, j1);
  }
  template <int RB, bool kWhole>
  void scores_in(RowStream& given, int j0, int j1) {
    constexpr int HB = kLanes / RB, kGroups = groups_of_keys(RB), kKeys = 4 * kGroups;
    const int dim = w.D, vectors = groups, heads = w.heads;
    RowStream stream = given;
    const Elem* const* rows = w.kr;
    const int64_t pitch = lanes, step = q_step;
    const float *ones = q_scale, *added = base;
    float* s = w.s + j0 * pitch;
    for (int j = j0; j < j1; j += kKeys, s += kKeys * pitch) {  // the keys behind the last one are that one again
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
          for (int k = 0; k < 4; ++k) {
            if constexpr (kGrouped)
              y[k] = vfma(y[k], vload(ones + g * W), vload(added + g * W));
            else if constexpr (kIntegers)
              y[k] = vmul(y[k], vload(ones + g * W));
            vstore(s + (4 * i + k) * pitch + g * W, y[k]);
          }
        }
      }
    }
    given = stream;
  }

  // Products into scores, and these into probabilities times the scales of the values. Unseen keys get a weight of
  // exactly 0, whatever their numbers.
  void softmax(const AttentionParams&, int64_t key, int n, bool masked) {
    const int layout = k_numbers.layout() == v_numbers.layout() ? v_numbers.layout() : 0;
    if (p.kq.scale == nullptr) return masked ? softmax_of<kNone, 0>(key, n, true) : softmax_in<kNone>(key, n);
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
  // kLayout: of the scales; kNone: there are none. kVectors: how many of rows there are, or 0 for any number.
  static constexpr int kNone = -1;
  template <int kLayout, int kVectors>
  void softmax_of(int64_t key, int n, bool masked) {
    constexpr int kMost = kVectors ? kVectors : kDirectRows;
    constexpr bool kScaled = kLayout != kNone, kShifted = kScaled && Kind::kShifted, kAny = kLayout == 0;
    const float c = p.scale * kLog2e;
    const int64_t pitch = lanes;
    const int vectors = kVectors ? kVectors : groups;
    vf mc[kMost], sum[kMost], more[kMost], top[kMost];
    vi head[kMost];
    for (int g = 0; g < vectors; ++g) {
      top[g] = vset(kNegInf);
      head[g] = head_in[g];
    }
    if constexpr (kScaled) {
      const HeadNumbers numbers = k_numbers;
      const int layout = kLayout ? kLayout : numbers.layout();
      const float* sums = q_sum;
      float* s = w.s;
      for (int j = 0; j < n; ++j, s += pitch) {
        const HeadNumbers::Pair x = numbers.at(layout, j);
        for (int g = 0; g < vectors; ++g) {
          const vf scale = vtable_at(x.scale, head[g]), product = vload(s + g * W);
          vf score;
          if constexpr (kShifted) {
            score = vfma(product, scale, vmul(vtable_at(x.shift, head[g]), vload(sums + g * W)));
          } else {
            score = vmul(product, scale);
          }
          vstore(s + g * W, score);
          top[g] = vmax(top[g], score);
        }
      }
    }
    for (int g = 0; g < vectors; ++g) {
      if (masked) this->mask(w.s + g * W, key, n);
      if (masked || !kScaled) top[g] = this->largest(w.s + g * W, n);
      mc[g] = this->offset(g, top[g], c);
      sum[g] = more[g] = vzero();
    }
    const HeadNumbers numbers = v_numbers;
    const int layout = kLayout ? kLayout : numbers.layout();
    const vf cv = vset(c);
    [[maybe_unused]] vf most[kMost];
    for (int g = 0; g < vectors; ++g) most[g] = vzero();
    float* to = w.p16;
    float* s = w.s;
    for (int j = 0; j < n; j += 2, to += pitch, s += 2 * pitch) {
      const bool both = j + 1 < n;
      HeadNumbers::Pair a{}, b{};
      if constexpr (kScaled) {
        a = numbers.at(layout, j);
        b = numbers.at(layout, j + both);
      }
      float* then = s + (both ? pitch : 0);
      for (int g = 0; g < vectors; ++g) {
        vf x = vexp2<4>(vfma(vload(s + g * W), cv, mc[g]));
        vf y = both ? vexp2<4>(vfma(vload(then + g * W), cv, mc[g])) : vzero();
        sum[g] = vadd(sum[g], vadd(x, y));
        if constexpr (kShifted)
          more[g] = vadd(more[g], vadd(weighted<kAny>(x, vtable_at(a.shift, head[g])),
                                       weighted<kAny>(y, vtable_at(b.shift, head[g]))));
        if constexpr (kScaled) {
          x = weighted<kAny>(x, vtable_at(a.scale, head[g]));
          y = weighted<kAny>(y, vtable_at(b.scale, head[g]));
        }
        if constexpr (kIntegers) {
          most[g] = vmost(vmost(most[g], x), y);
          if (both) vstore(then + g * W, y);
          vstore(s + g * W, x);
        } else {
          vistore(to + g * W, Rows::paired(x, y));
        }
      }
    }
    if constexpr (kIntegers) round_weights<kVectors>(n, most);
    for (int g = 0; g < vectors; ++g) {
      vstore(l + g * W, vadd(vload(l + g * W), sum[g]));
      if (kShifted) vstore(rest + g * W, vadd(vload(rest + g * W), more[g]));
    }
  }
  // Weights of a tile, where the scores stood, as pairs of whole numbers.
  template <int kVectors, int kMost>
  FASTOPS_INLINE void round_weights(int n, const vf (&most)[kMost]) {
    const int vectors = kVectors ? kVectors : groups;
    vf inverse[kMost];
    for (int g = 0; g < vectors; ++g) {
      const WholeScale scale(most[g]);
      vstore(p_scale + g * W, scale.one);
      inverse[g] = scale.inverse;
    }
    const int64_t pitch = lanes;
    const float* s = w.s;
    float* to = w.p16;
    for (int j = 0; j < n; j += 2, to += pitch, s += 2 * pitch) {
      const bool both = j + 1 < n;
      for (int g = 0; g < vectors; ++g) {
        const vi x = _mm512_cvtps_epi32(vmul(vload(s + g * W), inverse[g]));
        const vi y = both ? _mm512_cvtps_epi32(vmul(vload(s + pitch + g * W), inverse[g])) : vizero();
        vistore(to + g * W, _mm512_mask_mov_epi16(x, 0xaaaaaaaau, _mm512_slli_epi32(y, 16)));
      }
    }
  }
  // x y, and 0 where x is, if y may be anything.
  template <bool kAny>
  static FASTOPS_INLINE vf weighted(vf x, vf y) {
    return kAny ? _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(x, vzero(), _CMP_NEQ_UQ), x, y) : vmul(x, y);
  }

  // o[RB rows][4 vectors] += probabilities times codes of the keys [j0, j1), two by two, at byte `at` of their rows:
  // kGroups groups of vectors of a chunk from `kFirst` on, `step` apart in o. kFull: all 64 bytes.
  template <int RB, int kFirst, int kGroups, int kLines, bool kFull>
  static FASTOPS_INLINE void weigh(RowStream& stream, const Elem* const* rows, int64_t at, const float* weights,
                                   int64_t pitch, float* o, int64_t step, __mmask32 mask, int j0, int j1,
                                   const float* ones) {
    const auto part_of = [&](int group, int r) FASTOPS_LAMBDA { return o + (kFirst + group) * step + r * kPart; };
    const auto load = [&](const Elem* row) FASTOPS_LAMBDA {
      const uint8_t* p = reinterpret_cast<const uint8_t*>(row) + at;
      return kFull ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(mask, p);
    };
    Sum acc[kGroups][RB][4];
    FASTOPS_UNROLL
    for (int i = 0; i < kGroups * RB * 4; ++i) {
      if constexpr (kIntegers)
        acc[i / (4 * RB)][i / 4 % RB][i % 4] = Kind::none();
      else
        acc[i / (4 * RB)][i / 4 % RB][i % 4] = vload(part_of(i / (4 * RB), i / 4 % RB) + i % 4 * W);
    }
    for (int j = j0; j < j1; j += 2, weights += pitch) {
      const RowStream::Lines lines = kLines > 0 ? stream.take<kLines>() : RowStream::Lines();
      const vi a = load(rows[j]), b = load(rows[j + 1]);
      FASTOPS_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        vi v[4];
        Kind::pairs(a, b, kFirst + group, v);
        FASTOPS_UNROLL
        for (int r = 0; r < RB; ++r) {
          const vi pj = _mm512_castps_si512(vset(weights[r]));
          FASTOPS_UNROLL
          for (int n = 0; n < 4; ++n) acc[group][r][n] = Kind::add(acc[group][r][n], v[n], pj);
          lines.ask<kLines>(group * RB + r, kGroups * RB);
        }
      }
    }
    FASTOPS_UNROLL
    for (int i = 0; i < kGroups * RB * 4; ++i) {
      const int r = i / 4 % RB;
      float* to = part_of(i / (4 * RB), r) + i % 4 * W;
      const Sum sum = acc[i / (4 * RB)][r][i % 4];
      if constexpr (kIntegers)
        vstore(to, vfma(vi_to_float(sum), vset(ones[r]), vload(to)));
      else
        vstore(to, sum);
    }
  }

  void accumulate(int, int, int n) {
    using Of = void (LaneCodes::*)(int);
    static constexpr Of kOf[] = {&LaneCodes::accumulate_of<1>, &LaneCodes::accumulate_of<2>,
                                 &LaneCodes::accumulate_of<3>, &LaneCodes::accumulate_of<4>,
                                 &LaneCodes::accumulate_of<5>, &LaneCodes::accumulate_of<6>,
                                 &LaneCodes::accumulate_of<7>, &LaneCodes::accumulate_of<8>};
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
    constexpr int kGroups = Kind::kGroups, kLast = kGroups - 1;
    constexpr int64_t step = kPart * RB;
    const int now = lead < n ? lead : n, dim = w.Dv;
    RowStream stream(w.vr + now, n - now, v_bytes, w.kr + w.tile, lead < next ? lead : next, k_bytes, now, next);
    const int64_t v_step = w.v_step, pitch = lanes;
    const Elem* const* v = w.vr;
    for (int j = 0; j < n; j += block) {
      const int end = j + block < n ? j + block : n;
      const float* x = w.p16 + j / 2 * pitch;
      float* o = w.st.o;
      for (int h = 0; h < w.heads; ++h) {
        const int64_t lane = h / HB * kBlock + h % HB * RB;
        const float *mine = x + lane, *one = p_scale + lane;
        for (int c = 0; c < dim; c += kChunk, o += kGroups * step) {
          const __mmask32 mask = words(dim - c);
          const int64_t at = h * v_step + bytes(c);
          const bool more = kGroups > 1 && (kFull || dim - c > 16);  // columns in the second group
          if (RB <= 2 && more) {  // few rows: one group alone has too few sums under way
            weigh<kFirst, 0, kGroups, 2, kFull>(stream, v, at, mine, pitch, o, step, mask, j, end, one);
            continue;
          }
          if (kFull || dim - c > kChunk / 2 || h % 2 == 0) {
            weigh<kFirst, 0, 1, 2, kFull>(stream, v, at, mine, pitch, o, step, mask, j, end, one);
          } else {
            weigh<kFirst, 0, 1, 0, kFull>(stream, v, at, mine, pitch, o, step, mask, j, end, one);
          }
          if (more) weigh<kFirst, kLast, 1, 0, kFull>(stream, v, at, mine, pitch, o, step, mask, j, end, one);
          if constexpr (kRest > 0) {
            float* then = o + 4 * kPart;
            weigh<kRest, 0, 1, 0, kFull>(stream, v, at, mine + 4, pitch, then, step, mask, j, end, one + 4);
            if (more)
              weigh<kRest, kLast, 1, 0, kFull>(stream, v, at, mine + 4, pitch, then, step, mask, j, end, one + 4);
          }
        }
      }
    }
  }

  // Whether no value of the keys is a NaN: where a row does not see a key, not even that may reach it.
  bool v_finite([[maybe_unused]] int n) const {
    if constexpr (Kind::kHasNaN) {
      for (int j = 0; j < n; ++j) {
        for (int h = 0; h < w.heads; ++h) {
          const auto* row = reinterpret_cast<const uint8_t*>(w.vr[j]) + h * w.v_step;
          for (int c = 0; c < w.Dv; c += kChunk)
            if (Kind::has_nan(_mm512_maskz_loadu_epi16(words(w.Dv - c), row + bytes(c)))) return false;
        }
      }
    }
    return true;
  }
  // accumulate() key by key, without those of probability 0 (attention_modes.inl.h, accumulate_seen).
  __attribute__((noinline)) void accumulate_seen(int n) {
    RowStream none;
    const int64_t step = static_cast<int64_t>(kPart) * w.rows;
    for (int h = 0; h < w.heads; ++h)
      for (int r = 0; r < w.rows; ++r)
        for (int j = 0; j < n; ++j) {
          const float* pair = w.p16 + static_cast<int64_t>(j / 2) * lanes + lane_of(h, r);
          const bf16 x[2] = {reinterpret_cast<const bf16*>(pair)[j % 2], bf16{}};  // this key, and nothing beside it
          if (to_f32(x[0]) == 0.0f) continue;
          float weight;
          std::memcpy(&weight, x, sizeof weight);
          const Elem* rows[2] = {w.vr[j], w.vr[j]};
          float* o = w.st.o + static_cast<int64_t>(h) * w.rows * w.VP + r * kPart;
          for (int c = 0; c < w.Dv; c += kChunk, o += Kind::kGroups * step)
            weigh<1, 0, Kind::kGroups, 0, false>(none, rows, h * w.v_step + bytes(c), &weight, lanes, o, step,
                                                 words(w.Dv - c), 0, 2, nullptr);
        }
  }

  // A row of o, channels in order.
  Row row(int h, int r) const {
    const int lane = lane_of(h, r);
    float* first = this->gathered(h, r);
    for (int c = 0; c < w.Dv; c += kChunk) Kind::in_order(first + c, first + c, vset(rest[lane]));
    return {first, m[lane], l[lane]};
  }
};

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
#endif
