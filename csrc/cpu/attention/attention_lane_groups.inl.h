// Few rows against KIVI's caches (Liu et al., arXiv:2402.02750, section 3.2: keys have a scale and a minimum for each
// channel of a group of tokens, values for each token's groups of channels), a row in every lane and no decoded row
// anywhere, by the products of attention_lane_codes.inl.h:
//   q k^T = (q ks) code + q km
//   p v = (p vs) code + p vm
// q ks is rounded once for a group of keys; a key has as many weights p vs as its value has groups of channels.
#if defined(FASTOPS_HAS_VNNI)
namespace fastops::cpu::FASTOPS_ISA {
namespace {

template <int kKind>
struct LaneGroups : LaneCodes<kKind, true> {
  using Base = LaneCodes<kKind, true>;
  using Kind = LaneCode<kKind>;
  using Elem = Code<kKind>;
  using Base::base, Base::bytes, Base::columns, Base::doubles, Base::group, Base::groups, Base::head_in, Base::k_bytes,
      Base::kLanes, Base::kPiece, Base::kStep, Base::l, Base::lane_of, Base::lanes, Base::m, Base::next, Base::p,
      Base::part, Base::q_scale, Base::q_step, Base::rest, Base::w;
  static constexpr int kGroupKeys = 32, kGroupChannels = 32;
  static constexpr int kKeysTogether = kGroupKeys;
  static constexpr int kCodes = Kind::kParts;  // of a word
  // 32 bytes of a value fill half of a vector: two keys' are the halves of one, another two's of a second, and the
  // words of both by turns, the first or the second four of each 128-bit lane, are pairs of keys. A 128-bit lane of
  // them belongs to one group of channels.
  static constexpr int kPairs = kPiece / 64;    // of groups of channels in 32 bytes
  static constexpr int kQuarters = kCodes / 4;  // of the numbers of a word
  static constexpr int kWidth = 2 * W;          // columns of o side by side
  struct Side {                                 // the numbers of one side of a tile: where the first head's stand
    int64_t scale, shift;
  };
  int v_groups, pad, stride;       // groups of a value; heads and floats of a key in v_scale and v_min
  float *q_all, *k_scale, *k_min;  // q [heads * rows][dim], and a head's numbers, in the order of the parts
  float *v_scale, *v_min;          // [keys][groups][pad]
  float *p_scale, *p_inverse;      // [groups][lanes]
  float* weights;                  // [quads of keys][pairs of groups][vectors][4 rows of 4 lanes][4]
  Side k_now[kDirectKeys / kGroupKeys], k_then[kDirectKeys / kGroupKeys];
  int groups_behind = 0;
  __m512i take_numbers[8];  // the heads of two groups, or of one, from the numbers of a key

  // What `keys` of a tile take of w.raw, in floats.
  static int64_t room(const AttentionParams& p, int64_t heads, int64_t rows, int lanes, int keys) {
    const int64_t pairs = pieces(p.Dv) * kPairs, stride = numbers_of(p, heads);
    return heads * rows * padded(p.D) + 2 * padded(p.D) + 2 * keys * stride + 4 * pairs * lanes + lanes +
           keys / 4 * pairs * lanes * 4;
  }
  static int pieces(int dim) { return (dim + kPiece - 1) / kPiece; }
  static int64_t padded(int dim) { return static_cast<int64_t>(pieces(dim)) * kPiece; }
  static int pad_of(int64_t heads) { return heads <= W / 2 ? W / 2 : W; }
  static int numbers_of(const AttentionParams& p, int64_t heads) {
    return (p.Dv / kGroupChannels * pad_of(heads) + 2 * W - 1) / (2 * W) * (2 * W);
  }
  static constexpr int64_t kRoom =
      kDecodedFloats - 4 * kDirectKeys * static_cast<int64_t>(sizeof(HeadNumbers::Places)) / 4;

  static bool fits(const AttentionParams& p, const AttentionItem& it) {
    const KvSide &k = p.kq, &v = p.vq;
    if (k.kind != kKind || v.kind != kKind || it.rows > kDirectRows || !Base::Rows::fits(it)) return false;
    if (!k.each || k.group_shift != 5 || p.page_mask < kGroupKeys - 1 || p.D % kGroupChannels != 0) return false;
    if (v.each || v.group_shift != 0 || v.channels != kGroupChannels || p.dtype == 1) return false;
    const auto fine = [](const KvSide& s) {
      return s.scale && s.shift && !s.shift_is_zero && s.scale_dtype == 2 && s.scale_s[3] == 1 && s.shift_s[3] == 1;
    };
    if (!fine(k) || !fine(v)) return false;
    const int64_t v_groups = p.Dv / kGroupChannels;
    if (v_groups > 1 || it.heads > 1)
      if (v.scale_s[2] != v_groups || v.shift_s[2] != v_groups) return false;
    const int in_block = Base::block_lanes(static_cast<int>(it.rows)) / static_cast<int>(it.rows);
    const int heads = W / Base::block_lanes(static_cast<int>(it.rows)) * in_block;
    const int lanes = static_cast<int>(it.heads + heads - 1) / heads * W;
    return it.heads * v_groups <= 4 * W && room(p, it.heads, it.rows, lanes, kGroupKeys) <= kRoom;
  }

  LaneGroups(Work<Elem>& work, const AttentionParams& params) : Base(work, params) {
    w.VP = columns = static_cast<int>(padded(w.Dv));
    part = kWidth;
    v_groups = w.Dv / kGroupChannels;
    pad = pad_of(w.heads);
    stride = numbers_of(params, w.heads);
    const int keys = 2 * kGroupKeys;
    w.tile = w.BK =
        room(params, w.heads, w.rows, lanes, keys) <= kRoom && keys * lanes <= kDirectScores ? keys : kGroupKeys;
    const int pairs = pieces(w.Dv) * kPairs;
    rest = m + lanes;
    this->rests = v_groups;
    q_scale = rest + 2 * pairs * lanes;
    std::memset(rest, 0, sizeof(float) * static_cast<size_t>((2 * pairs + 1) * lanes));
    q_all = reinterpret_cast<float*>(this->v_numbers.end());
    k_scale = q_all + w.heads * w.rows * padded(w.D);
    k_min = k_scale + padded(w.D);
    v_scale = k_min + padded(w.D);
    v_min = v_scale + w.tile * stride;
    p_scale = v_min + w.tile * stride;
    p_inverse = p_scale + 2 * pairs * lanes;
    base = p_inverse + 2 * pairs * lanes;
    weights = base + lanes;
    std::memset(p_scale, 0, sizeof(float) * static_cast<size_t>(4 * pairs * lanes));
    std::memset(base, 0, sizeof(float) * static_cast<size_t>(lanes));
    for (int i = 0; i < stride / (2 * W); ++i) {
      uint16_t at[2 * W];
      for (int k = 0; k < 2 * W; ++k) {
        const int to = i * 2 * W + k, g = to / pad, h = to % pad;
        at[k] = static_cast<uint16_t>(g < v_groups && h < w.heads ? h * v_groups + g : 0);
      }
      take_numbers[i] = viload(at);
    }
  }

  // Numbers of 16 bits in the order of the parts: word i of part n of 16 bytes of codes is channel i kCodes + n. Words
  // 0 to 3 of four parts, then words 4 to 7 of them: two vectors that _mm512_packs_epi32 joins.
  template <class N>
  static FASTOPS_INLINE void in_parts(const N* from, int dim, float* to) {
    for (int c = 0; c < padded(dim); c += kStep) {
      vi x[2];
      for (int i = 0; i < 2; ++i) {
        const int left = dim - c - 2 * W * i;
        x[i] = _mm512_maskz_loadu_epi16(left >= 2 * W ? ~0u : left > 0 ? (1u << left) - 1u : 0u, from + c + 2 * W * i);
      }
      FASTOPS_UNROLL
      for (int i = 0; i < kCodes / 4; ++i) {
        alignas(64) N mixed[2 * W];
        vistore(mixed, _mm512_permutex2var_epi16(x[0], viload(kOrder.word[i]), x[1]));
        vstore(to, vload(mixed));
        vstore(to + W, vload(mixed + W));
        to += 2 * W;
      }
    }
  }
  struct Order {
    alignas(64) uint16_t word[2][2 * W];
    constexpr Order() : word() {
      for (int i = 0; i < 2; ++i)
        for (int n = 0; n < 4; ++n)
          for (int k = 0; k < 8; ++k)
            word[i][k / 4 * W + 4 * n + k % 4] = static_cast<uint16_t>(k * kCodes + (4 * i + n) % kCodes);
    }
  };
  static constexpr Order kOrder{};

  void load_q(const AttentionParams&, const AttentionItem& it, const Sequence& seq, int h) {
    if (p.dtype == 2) return load_q_as<f16>(it, seq, h);
    load_q_as<bf16>(it, seq, h);
  }
  template <class Q>
  void load_q_as(const AttentionItem& it, const Sequence& seq, int h) {
    const Q* first = reinterpret_cast<const Q*>(p.q) + it.b * p.q_sb + seq.q0 * p.q_ss + (it.hkv + h) * p.G * p.q_sh;
    for (int r = 0; r < w.rows; ++r) {
      const int64_t at = it.row0 + r;
      in_parts(first + at / p.G * p.q_ss + at % p.G * p.q_sh, w.D, q_all + (h * w.rows + r) * padded(w.D));
    }
  }

  // Finds the numbers of keys [key, key + n), and asks for those of the keys behind.
  void scales(const AttentionItem& it, const int32_t* page_table, int64_t key, int n, int behind) {
    const auto page_of = [&](int64_t t) FASTOPS_LAMBDA {
      return static_cast<int64_t>(page_table[(t >> p.page_shift) * p.table_sp]);
    };
    const auto side = [&](const KvSide& s, int64_t page, int64_t row) FASTOPS_LAMBDA {
      return Side{page * s.scale_s[0] + row * s.scale_s[1] + it.hkv * s.scale_s[2],
                  page * s.shift_s[0] + row * s.shift_s[1] + it.hkv * s.shift_s[2]};
    };
    const auto find = [&](int64_t from, int keys, Side* to) {
      for (int j = 0; j < keys; j += kGroupKeys)
        to[j / kGroupKeys] = side(p.kq, page_of(from + j), ((from + j) & p.page_mask) / kGroupKeys);
    };
    find(key, n, k_now);
    find(key + n, behind, k_then);
    groups_behind = (behind + kGroupKeys - 1) / kGroupKeys;
    const int count = w.heads * v_groups;
    const auto *scale = reinterpret_cast<const f16*>(p.vq.scale), *low = reinterpret_cast<const f16*>(p.vq.shift);
    const auto first = static_cast<__mmask32>(count >= 2 * W ? ~0u : (1u << count) - 1u);
    const auto second = static_cast<__mmask32>(count <= 2 * W   ? 0u
                                               : count >= 4 * W ? ~0u
                                                                : (1u << (count - 2 * W)) - 1u);
    const auto spread = [&](const f16* from, float* to) FASTOPS_LAMBDA {
      const vi a = _mm512_maskz_loadu_epi16(first, from), b = _mm512_maskz_loadu_epi16(second, from + 2 * W);
      for (int i = 0; i < stride / (2 * W); ++i, to += 2 * W) {
        const vi x = _mm512_permutex2var_epi16(a, take_numbers[i], b);
        vstore(to, _mm512_cvtph_ps(_mm512_castsi512_si256(x)));
        vstore(to + W, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1)));
      }
    };
    int64_t page = 0, ahead = 0;
    for (int j = 0; j < n; ++j) {
      const int64_t t = key + j, slot = t & p.page_mask, late = t + n;
      if (j == 0 || slot == 0) page = page_of(t);
      const Side at = side(p.vq, page, slot);
      spread(scale + at.scale, v_scale + j * stride);
      spread(low + at.shift, v_min + j * stride);
      if (j >= behind) continue;
      if (j == 0 || (late & p.page_mask) == 0) ahead = page_of(late);
      const Side then = side(p.vq, ahead, late & p.page_mask);
      vprefetch(scale + then.scale), vprefetch(scale + then.scale + count - 1);
      vprefetch(low + then.shift), vprefetch(low + then.shift + count - 1);
    }
  }
  void expect(const AttentionItem&, const int32_t*, int64_t, int) const {}

  // q ks of a group of keys, as whole numbers, and q km.
  template <int RB>
  void meet(int index) {
    constexpr int kFours = (RB + 3) / 4;
    const int64_t dim = padded(w.D), size = w.D * static_cast<int64_t>(sizeof(f16));
    const auto *scale = reinterpret_cast<const f16*>(p.kq.scale), *low = reinterpret_cast<const f16*>(p.kq.shift);
    const float* q = q_all;
    alignas(64) float four[3][2 * W];  // of each row
    for (int h = 0; h < w.heads; ++h) {
      in_parts(scale + k_now[index].scale + h * p.kq.scale_s[2], w.D, k_scale);
      in_parts(low + k_now[index].shift + h * p.kq.shift_s[2], w.D, k_min);
      if (index < groups_behind) {
        const auto* s = reinterpret_cast<const char*>(scale + k_then[index].scale + h * p.kq.scale_s[2]);
        const auto* z = reinterpret_cast<const char*>(low + k_then[index].shift + h * p.kq.shift_s[2]);
        for (int64_t b = 0; b < size; b += 64) vprefetch(s + b), vprefetch(z + b);
      }
      vf top[4 * kFours], sum[4 * kFours];
      FASTOPS_UNROLL
      for (int r = 0; r < 4 * kFours; ++r) top[r] = sum[r] = vzero();
      for (int64_t d = 0; d < dim; d += W) {
        const vf by = vload(k_scale + d), low = vload(k_min + d);
        FASTOPS_UNROLL
        for (int r = 0; r < RB; ++r) {
          const vf x = vload(q + r * dim + d);
          top[r] = vmost(top[r], vmul(x, by));
          sum[r] = vfma(x, low, sum[r]);
        }
      }
      FASTOPS_UNROLL
      for (int i = 0; i < kFours; ++i) {
        const WholeScale whole(largest_of_four(top + 4 * i));
        vstore(four[0] + 4 * i, whole.one);
        vstore(four[1] + 4 * i, whole.inverse);
        vstore(four[2] + 4 * i, sums_of_four(sum + 4 * i));
      }
      for (int r = 0; r < RB; q += dim, ++r) {
        const int lane = lane_of(h, r);
        q_scale[lane] = four[0][r];
        base[lane] = four[2][r];
        const vf inverse = vset(four[1][r]);
        const auto whole = [&](int64_t d) FASTOPS_LAMBDA {
          return _mm512_cvtps_epi32(vmul(vmul(vload(q + d), vload(k_scale + d)), inverse));
        };
        auto* to = reinterpret_cast<__m128i*>(w.q + lane / kLanes * q_step) + lane % kLanes;
        for (int64_t d = 0; d < dim; d += 2 * W, to += 4 * kLanes) {
          const vi x = _mm512_packs_epi32(whole(d), whole(d + W));
          _mm_storeu_si128(to, _mm512_castsi512_si128(x));
          _mm_storeu_si128(to + kLanes, _mm512_extracti32x4_epi32(x, 1));
          _mm_storeu_si128(to + 2 * kLanes, _mm512_extracti32x4_epi32(x, 2));
          _mm_storeu_si128(to + 3 * kLanes, _mm512_extracti32x4_epi32(x, 3));
        }
      }
    }
  }
  // What vectors give each, again and again.
  static FASTOPS_INLINE vf sums_of_four(const vf* x) {
    const vf y = HalfProducts::sums_of_four(x), z = vadd(y, _mm512_shuffle_f32x4(y, y, 0x4e));
    return vadd(z, _mm512_shuffle_f32x4(z, z, 0xb1));
  }
  static FASTOPS_INLINE vf largest_of_four(const vf* x) {
    const vf a = vmost(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const vf b = vmost(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const vf y = vmost(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    const vf z = vmost(y, _mm512_shuffle_f32x4(y, y, 0x4e));
    return vmost(z, _mm512_shuffle_f32x4(z, z, 0xb1));
  }

  void scores(int, int, int n) {
    using Of = void (LaneGroups::*)(int);
    static constexpr Of kOf[] = {&LaneGroups::scores_of<1>, &LaneGroups::scores_of<2>, &LaneGroups::scores_of<3>,
                                 &LaneGroups::scores_of<4>, &LaneGroups::scores_of<5>, &LaneGroups::scores_of<6>,
                                 &LaneGroups::scores_of<7>, &LaneGroups::scores_of<8>};
    (this->*kOf[w.rows - 1])(n);
  }
  template <int RB>
  void scores_of(int n) {
    RowStream stream = this->keys_then_values(n);
    for (int j = 0; j < n; j += kGroupKeys) {
      meet<RB>(j / kGroupKeys);
      this->template scores_between<RB>(stream, j, j + kGroupKeys < n ? j + kGroupKeys : n);
    }
  }

  // Scores into probabilities, where they stand, and these into whole weights.
  void softmax(const AttentionParams&, int64_t key, int n, bool masked) {
    const float c = p.scale * kLog2e;
    const vf cv = vset(c);
    const int64_t pitch = lanes;
    const int all = (n + 3) / 4 * 4;
    for (int g = 0; g < groups; ++g) {
      float* s = w.s + g * W;
      if (masked) this->mask(s, key, n);
      const vf mc = this->offset(g, this->largest(s, n), c);
      vf sum = vzero();
      for (int j = 0; j < n; ++j, s += pitch) {
        const vf x = vexp2<4>(vfma(vload(s), cv, mc));
        sum = vadd(sum, x);
        vstore(s, x);
      }
      for (int j = n; j < all; ++j, s += pitch) vstore(s, vzero());
      vstore(l + g * W, vadd(vload(l + g * W), sum));
    }
    if (masked) return weigh_keys<true>(n, all);
    weigh_keys<false>(n, all);
  }
  // The lanes' numbers of a group of channels in a key's.
  vi numbers_at(int group_of_channels, int g) const {
    return _mm512_add_epi32(head_in[g], _mm512_set1_epi32(group_of_channels * pad % W));
  }
  template <bool kAny>
  FASTOPS_INLINE void weigh_keys(int n, int all) {
    const int64_t pitch = lanes, step = stride;
    for (int c = 0; c < v_groups; ++c) {
      const float *scale = v_scale + c * pad / W * W, *low = v_min + c * pad / W * W;
      for (int g = 0; g < groups; ++g) {
        const vi at = numbers_at(c, g);
        const float* s = w.s + g * W;
        const int64_t lane = c * pitch + g * W;
        vf top[2] = {vzero(), vzero()}, more[2] = {vload(rest + lane), vzero()};
        const auto meet_key = [&](int j, int chain) FASTOPS_LAMBDA {
          const vf x = vload(s + j * pitch),
                   y = Base::template weighted<kAny>(x, vtable_at(vload(scale + j * step), at));
          const vf z = Base::template weighted<kAny>(x, vtable_at(vload(low + j * step), at));
          more[chain] = vadd(more[chain], z);
          top[chain] = vmost(top[chain], y);
        };
        int j = 0;
        for (; j + 1 < n; j += 2) meet_key(j, 0), meet_key(j + 1, 1);
        if (j < n) meet_key(j, 0);
        vstore(rest + lane, vadd(more[0], more[1]));
        const WholeScale whole(vmost(top[0], top[1]));
        vstore(p_scale + lane, whole.one);
        vstore(p_inverse + lane, whole.inverse);
      }
    }
    // Four numbers side by side: of two pairs of keys, those of the two groups of channels in a vector of codes.
    auto* to = weights;
    const int pairs = pieces(w.Dv) * kPairs;
    for (int j = 0; j < all; j += 4)
      for (int pair = 0; pair < pairs; ++pair)
        for (int g = 0; g < groups; ++g, to += 4 * W) {
          vf x[4];
          for (int i = 0; i < 2; ++i) {
            const int c = group_at(pair, i);
            if (c >= v_groups) {
              x[i] = x[2 + i] = vzero();
              continue;
            }
            const vi at = numbers_at(c, g);
            const vf inverse = vload(p_inverse + c * pitch + g * W);
            vi y[4];
            for (int k = 0; k < 4; ++k) {
              const float* numbers = v_scale + (j + k < n ? j + k : n - 1) * step + c * pad / W * W;
              const vf scale = vmul(vtable_at(vload(numbers), at), inverse);
              y[k] = _mm512_cvtps_epi32(Base::template weighted<kAny>(vload(w.s + (j + k) * pitch + g * W), scale));
            }
            for (int k = 0; k < 2; ++k)
              x[2 * k + i] =
                  vi_as_bits(_mm512_mask_mov_epi16(y[2 * k], 0xaaaaaaaau, _mm512_slli_epi32(y[2 * k + 1], 16)));
          }
          const vf ab = _mm512_unpacklo_ps(x[0], x[1]), cd = _mm512_unpacklo_ps(x[2], x[3]);
          const vf AB = _mm512_unpackhi_ps(x[0], x[1]), CD = _mm512_unpackhi_ps(x[2], x[3]);
          vstore(to, _mm512_shuffle_ps(ab, cd, 0x44));
          vstore(to + W, _mm512_shuffle_ps(ab, cd, 0xee));
          vstore(to + 2 * W, _mm512_shuffle_ps(AB, CD, 0x44));
          vstore(to + 3 * W, _mm512_shuffle_ps(AB, CD, 0xee));
        }
  }
  // The group of channels of 128-bit lanes 0 and 2 (i = 0) or 1 and 3 of the vectors of a pair.
  static int group_at(int pair, int i) { return kPairs == 2 ? pair / 2 * 4 + pair % 2 + 2 * i : 2 * pair + i; }

  void accumulate(int, int, int n) {
    using Of = void (LaneGroups::*)(int);
    static constexpr Of kOf[] = {&LaneGroups::accumulate_of<1>, &LaneGroups::accumulate_of<2>,
                                 &LaneGroups::accumulate_of<3>, &LaneGroups::accumulate_of<4>,
                                 &LaneGroups::accumulate_of<5>, &LaneGroups::accumulate_of<6>,
                                 &LaneGroups::accumulate_of<7>, &LaneGroups::accumulate_of<8>};
    (this->*kOf[w.rows - 1])(n);
  }
  template <int RB>
  void accumulate_of(int n) {
    constexpr int kFirst = RB < 4 ? RB : 4, kRest = RB - kFirst;
    RowStream stream(w.kr + w.tile, next, k_bytes, nullptr, 0, 0);
    const int passes = w.heads * pieces(w.Dv) * kPairs * kQuarters;
    const int share = static_cast<int>((next * ((k_bytes + 63) / 64 + 1) + passes - 1) / passes);
    float* o = w.st.o;
    for (int h = 0; h < w.heads; ++h)
      for (int c = 0; c < w.Dv; c += kPiece)
        for (int half = 0; half < 2; ++half)
          for (int quarter = 0; quarter < kQuarters; ++quarter, o += RB * kWidth) {
            stream.step(share);
            const Place at{h * w.v_step + bytes(c), doubles(w.Dv - c), c / kPiece * kPairs + (kPairs == 2 ? half : 0),
                           n};
            weigh<kFirst>(at, half, quarter, lane_of(h, 0), o);
            if constexpr (kRest > 0) weigh<kRest>(at, half, quarter, lane_of(h, 4), o + 4 * kWidth);
          }
  }
  struct Place {  // of 32 bytes of the values of n keys
    int64_t at;
    __mmask8 mask;
    int pair, n;
  };
  template <int RB>
  void weigh(const Place& x, int half, int quarter, int lane, float* o) const {
    constexpr int kLast = kQuarters - 1;
    if (half == 0) return quarter == 0 ? weigh_part<RB, 0, 0>(x, lane, o) : weigh_part<RB, 0, kLast>(x, lane, o);
    return quarter == 0 ? weigh_part<RB, 1, 0>(x, lane, o) : weigh_part<RB, 1, kLast>(x, lane, o);
  }
  // o[RB rows][2 vectors] += weights times the numbers 4 kQuarter to 4 kQuarter + 3 of words.
  template <int RB, int kHalf, int kQuarter>
  __attribute__((noinline)) void weigh_part(const Place& x, int lane, float* o) const {
    const float* from[RB];
    for (int r = 0; r < RB; ++r) {
      const int of = lane + r;
      from[r] = weights + (x.pair * groups + of / W) * 4 * W + of % 4 * W + of % W / 4 * 4;
    }
    const int64_t step = static_cast<int64_t>(pieces(w.Dv)) * kPairs * groups * 4 * W;
    const auto load = [&](const Elem* row) FASTOPS_LAMBDA {
      const auto* at = reinterpret_cast<const __m256i*>(reinterpret_cast<const uint8_t*>(row) + x.at);
      return x.mask == 0xff ? _mm256_loadu_si256(at) : _mm256_maskz_loadu_epi32(x.mask, at);
    };
    const vi spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    vi acc[RB][4];
    FASTOPS_UNROLL
    for (int i = 0; i < 4 * RB; ++i) acc[i / 4][i % 4] = vizero();
    const Elem* const* rows = w.vr;
    for (int j = 0; j < x.n; j += 4, rows += 4) {
      const vi a = _mm512_inserti64x4(_mm512_castsi256_si512(load(rows[0])), load(rows[2]), 1);
      const vi b = _mm512_inserti64x4(_mm512_castsi256_si512(load(rows[1])), load(rows[3]), 1);
      const vi words = kHalf ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b);
      vi v[4];
      FASTOPS_UNROLL
      for (int i = 0; i < 4; ++i) v[i] = Kind::part(words, 4 * kQuarter + i);
      FASTOPS_UNROLL
      for (int r = 0; r < RB; ++r) {
        const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[r]));
        const vi weight = _mm512_permutexvar_epi32(spread, _mm512_castsi128_si512(four));
        from[r] += step;
        FASTOPS_UNROLL
        for (int i = 0; i < 4; ++i) acc[r][i] = Kind::add(acc[r][i], v[i], weight);
      }
    }
    const int64_t first = static_cast<int64_t>(group_at(x.pair, 0)) * lanes + lane;
    const int64_t second = static_cast<int64_t>(group_at(x.pair, 1)) * lanes + lane;
    FASTOPS_UNROLL
    for (int r = 0; r < RB; ++r) {
      const vf ones = _mm512_mask_mov_ps(vset(p_scale[first + r]), 0xf0f0, vset(p_scale[second + r]));
      FASTOPS_UNROLL
      for (int i = 0; i < 2; ++i) {
        const vi y = acc[r][2 * i], z = acc[r][2 * i + 1];
        const vi sum = viadd(_mm512_shuffle_i32x4(y, z, 0x44), _mm512_shuffle_i32x4(y, z, 0xee));
        float* to = o + r * kWidth + i * W;
        vstore(to, vfma(vi_to_float(sum), ones, vload(to)));
      }
    }
  }
  void accumulate_seen(int) const {}  // codes are finite

  // Where a channel of 32 bytes stands among their columns of o.
  struct Columns {
    alignas(64) int32_t of[kPiece];
    constexpr Columns() : of() {
      for (int i = 0; i < kPiece; ++i) {
        const int half = i / (2 * W) / kQuarters, quarter = i / (2 * W) % kQuarters, lane = i % W / 4;
        const int word = lane % 2 * 8 + half * 4 + i % 4;
        of[word * kCodes + 4 * quarter + i / W % 2 * 2 + lane / 2] = i;
      }
    }
  };
  static constexpr Columns kColumns{};
  Row row(int h, int r) const {
    const int lane = lane_of(h, r);
    float *from = this->gathered(h, r), *to = from + kMaxHeadDim;
    for (int c = 0; c < w.Dv; c += W) {
      const vf x = _mm512_i32gather_ps(viload(kColumns.of + c % kPiece), from + c / kPiece * kPiece, 4);
      vstore(to + c, vadd(x, vset(rest[c / kGroupChannels * lanes + lane])));
    }
    return {to, m[lane], l[lane]};
  }
};

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
#endif
