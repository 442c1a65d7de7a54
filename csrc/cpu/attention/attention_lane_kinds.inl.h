// What codes of a quantised cache become in registers where a row of q stands in every lane
// (attention_lane_codes.inl.h), and what multiplies them.
#if defined(FASTOPS_HAS_VNNI)
namespace fastops::cpu::FASTOPS_ISA {
namespace {

// Products of bf16, each pair's in fp32 where no instruction adds them.
struct HalfProducts {
  static constexpr bool kIntegers = false;
  using Sum = vf;
  static FASTOPS_INLINE Sum none() { return vzero(); }
  static FASTOPS_INLINE Sum add(Sum sum, vi a, vi b) {
#if defined(FASTOPS_HAS_BF16_DOT)
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    return vfma(second(a), second(b), vfma(first(a), first(b), sum));
#endif
  }
  static FASTOPS_INLINE vf first(vi pairs) { return vi_as_bits(_mm512_slli_epi32(pairs, 16)); }
  static FASTOPS_INLINE vf second(vi pairs) { return vi_as_bits(vimask<0xffff0000u>(pairs)); }
  // Within each 128-bit lane: the sums of four vectors.
  static FASTOPS_INLINE vf sums_of_four(const Sum* x) {
    const vf a = vadd(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const vf b = vadd(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    return vadd(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
};
// Products of whole numbers of 16 bits: q and the weights are rounded to 15 bits and a sign. A tile's sums fit in 32
// bits (256 keys, or channels, of at most 255 each).
struct WholeProducts {
  static constexpr bool kIntegers = true;
  using Sum = vi;
  static FASTOPS_INLINE Sum none() { return vizero(); }
  static FASTOPS_INLINE Sum add(Sum sum, vi a, vi b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
    return sum;
  }
  static FASTOPS_INLINE vf sums_of_four(const Sum* x) {
    const vi a = viadd(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
    const vi b = viadd(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
    return vi_to_float(viadd(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)));
  }
};

// The larger magnitude; a NaN or an infinity stays.
FASTOPS_INLINE vf vmost(vf top, vf x) { return vi_as_bits(_mm512_max_epu32(vi_from_bits(top), vi_from_bits(vabs(x)))); }
// Numbers up to `most` as such whole numbers: what 1 of them stands for (NaN where `most` is none), and how many of
// them 1 is.
struct WholeScale {
  vf one, inverse;
  explicit WholeScale(vf most) {
    const vf levels = vset(32767.0f), quotient = _mm512_div_ps(levels, most);
    one = vadd(_mm512_div_ps(most, levels), vsub(most, most));
    inverse = _mm512_maskz_min_ps(_mm512_cmp_ps_mask(most, vzero(), _CMP_GT_OQ), quotient, vset(3e38f));
  }
  FASTOPS_INLINE vi round(vf x) const { return _mm512_cvtps_epi32(vmul(x, inverse)); }
};

// How a vector of 64 bytes of codes becomes 16-bit numbers (whole ones, or bf16): opened once, it gives kParts vectors
// of them, each with as many channels of every 128-bit lane. Values stand beside those of another key, in kGroups
// groups of four vectors.
template <int kKind>
struct LaneCode;

// Bytes are whole numbers as they are: those at even places, then those at odd ones.
template <bool kSigned>
struct LaneBytes : WholeProducts {
  static constexpr int kParts = 2, kGroups = 1;
  static constexpr bool kShifted = !kSigned, kHasNaN = false;
  // Numbers of a key's heads that do not lie side by side are the other mode's.
  static bool fits(const KvSide& side) {
    return (!kSigned || side.shift == nullptr) && side.scale_s[2] == 1 &&
           (side.shift == nullptr || side.shift_s[2] == 1);
  }
  using Open = vi;
  static FASTOPS_INLINE Open open(vi x) { return x; }
  static FASTOPS_INLINE vi part(vi x, int n) {
    if constexpr (kSigned) return _mm512_srai_epi16(n ? x : _mm512_slli_epi16(x, 8), 8);
    return n ? _mm512_srli_epi16(x, 8) : _mm512_and_si512(x, _mm512_set1_epi16(255));
  }
  static FASTOPS_INLINE void pairs(vi a, vi b, int, vi (&v)[4]) {
    const vi low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
    FASTOPS_UNROLL
    for (int n = 0; n < 4; ++n) v[n] = part(n < 2 ? low : high, n % 2);
  }
  static FASTOPS_INLINE __m128i q_part(vi x, int n) {
    return _mm256_castsi256_si128(_mm512_cvtepi32_epi16(n ? _mm512_srli_epi32(x, 16) : x));
  }
  // Channel 16 b + 8 h + 2 t + n of a chunk stands in lane 4 b + t of vector 2 h + n.
  static FASTOPS_INLINE void in_order(const float* from, float* to, vf added) {
    const vf x[4] = {vload(from), vload(from + W), vload(from + 2 * W), vload(from + 3 * W)};
    const vf mixed[4] = {_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]), _mm512_unpacklo_ps(x[2], x[3]),
                         _mm512_unpackhi_ps(x[2], x[3])};
    vf y[4];
    vturn_lanes(mixed, y);
    for (int i = 0; i < 4; ++i) vstore(to + i * W, kShifted ? vadd(y[i], added) : y[i]);
  }
};
template <>
struct LaneCode<kKvI8> : LaneBytes<true> {};
template <>
struct LaneCode<kKvU8> : LaneBytes<false> {};

template <>
struct LaneCode<kKvU4> : WholeProducts {
  static constexpr int kParts = 4, kGroups = 2;
  static constexpr bool kShifted = true, kHasNaN = false;
  static bool fits(const KvSide&) { return true; }
  using Open = vi;
  static FASTOPS_INLINE Open open(vi x) { return x; }
  // Nibble n of 32 words.
  template <int n>
  static FASTOPS_INLINE vi nibble(vi x) {
    const vi shifted = n > 0 ? _mm512_srli_epi16(x, 4 * n) : x;
    return n < 3 ? _mm512_and_si512(shifted, _mm512_set1_epi16(15)) : shifted;
  }
  static FASTOPS_INLINE vi part(vi x, int n) {
    return n == 0 ? nibble<0>(x) : n == 1 ? nibble<1>(x) : n == 2 ? nibble<2>(x) : nibble<3>(x);
  }
  // Words of the first or the second half of each 128-bit lane, as many channels of two keys.
  static FASTOPS_INLINE void pairs(vi a, vi b, int group, vi (&v)[4]) {
    const vi x = group == 1 ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b);
    FASTOPS_UNROLL
    for (int n = 0; n < 4; ++n) v[n] = part(x, n);
  }
  // 32 channels of q as they meet the parts.
  static FASTOPS_INLINE __m128i q_part(vi x, int n) {
    return _mm512_cvtepi64_epi16(n ? _mm512_srli_epi64(x, 16 * n) : x);
  }
  // The columns of a chunk of o in order: word 8 b + 4 group + t of the chunk stands in lane 4 b + t.
  static FASTOPS_INLINE void in_order(const float* from, float* to, vf added) {
    vf x[2][4];
    for (int n = 0; n < 8; ++n) x[n / 4][n % 4] = vload(from + n * W);
    for (int half = 0; half < 2; ++half) {
      const vf ab = _mm512_unpacklo_ps(x[half][0], x[half][1]), cd = _mm512_unpacklo_ps(x[half][2], x[half][3]);
      const vf AB = _mm512_unpackhi_ps(x[half][0], x[half][1]), CD = _mm512_unpackhi_ps(x[half][2], x[half][3]);
      const vf t[4] = {_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee),
                       _mm512_shuffle_ps(AB, CD, 0x44), _mm512_shuffle_ps(AB, CD, 0xee)};  // [t][lane b][n]
      vf b[4];
      vturn_lanes(t, b);
      for (int i = 0; i < 4; ++i) vstore(to + 32 * i + 16 * half, vadd(b[i], added));
    }
  }
};

// For scores alone (values: attention_lane_groups.inl.h).
template <>
struct LaneCode<kKvU2> : WholeProducts {
  static constexpr int kParts = 8;
  static constexpr bool kShifted = false, kHasNaN = false;
  using Open = vi;
  static FASTOPS_INLINE Open open(vi x) { return x; }
  template <int n>
  static FASTOPS_INLINE vi two_bits(vi x) {
    const vi shifted = n > 0 ? _mm512_srli_epi16(x, 2 * n) : x;
    return n < 7 ? _mm512_and_si512(shifted, _mm512_set1_epi16(3)) : shifted;
  }
  static FASTOPS_INLINE vi part(vi x, int n) {
    if (n < 4) return n == 0 ? two_bits<0>(x) : n == 1 ? two_bits<1>(x) : n == 2 ? two_bits<2>(x) : two_bits<3>(x);
    return n == 4 ? two_bits<4>(x) : n == 5 ? two_bits<5>(x) : n == 6 ? two_bits<6>(x) : two_bits<7>(x);
  }
};

// The two bytes of the bf16 number that each magnitude of e4m3 stands for: 7 is its bias, the largest code a NaN.
struct F8Bytes {
  uint8_t low[128], high[128];
  constexpr F8Bytes() : low(), high() {
    for (int code = 0; code < 128; ++code) {
      int exponent = code >> 3, mantissa = (code & 7) << 4;
      if (exponent > 0) {
        exponent += 120;
      } else if (mantissa > 0) {  // no leading one: 1 to 7 times 2^-9
        for (exponent = 121; mantissa < 128; --exponent) mantissa *= 2;
        mantissa -= 128;
      }
      const int bits = code == 127 ? 0x7fc0 : exponent << 7 | mantissa;
      low[code] = static_cast<uint8_t>(bits);
      high[code] = static_cast<uint8_t>(bits >> 8);
    }
  }
};
alignas(64) constexpr F8Bytes kF8Bytes;

template <>
struct LaneCode<kKvF8> : HalfProducts {
  static constexpr int kParts = 2, kGroups = 1;
  static constexpr bool kShifted = false, kHasNaN = true;
  static bool fits(const KvSide& side) { return side.shift == nullptr && isa_permutes_bytes(); }
  struct Open {
    vi low, high;
  };
  // Bytes of a table of 128 by the lower seven bits of x. (In assembly, because only processors with VBMI have it,
  // which `fits` asks at run time.)
  static FASTOPS_INLINE vi look_up(vi x, const uint8_t* table) {
    asm("vpermi2b %2, %1, %0" : "+v"(x) : "v"(_mm512_load_si512(table)), "vm"(_mm512_load_si512(table + 64)));
    return x;
  }
  static FASTOPS_INLINE Open open(vi x) {
    const vi sign = _mm512_set1_epi8(static_cast<char>(0x80));
    return {look_up(x, kF8Bytes.low), _mm512_ternarylogic_epi32(look_up(x, kF8Bytes.high), x, sign, 0xf8)};
  }
  static FASTOPS_INLINE vi part(const Open& x, int n) {
    return (n ? _mm512_unpackhi_epi8(x.low, x.high) : _mm512_unpacklo_epi8(x.low, x.high));
  }
  static bool has_nan(vi x) {
    const vi nan = _mm512_set1_epi8(127);
    return _mm512_cmpeq_epi8_mask(_mm512_and_si512(x, nan), nan) != 0;
  }
  static FASTOPS_INLINE void pairs(vi a, vi b, int, vi (&v)[4]) {
    const Open first = open(a), second = open(b);
    FASTOPS_UNROLL
    for (int n = 0; n < 4; ++n) {
      const auto x = part(first, n / 2), y = part(second, n / 2);
      v[n] = (n % 2 ? _mm512_unpackhi_epi16(x, y) : _mm512_unpacklo_epi16(x, y));
    }
  }
  static FASTOPS_INLINE __m128i q_part(vi x, int n) {
    return n ? _mm512_extracti32x4_epi32(x, 1) : _mm512_castsi512_si128(x);
  }
  // Channel 16 b + 4 n + t of a chunk stands in lane 4 b + t of vector n.
  static FASTOPS_INLINE void in_order(const float* from, float* to, vf) {
    const vf x[4] = {vload(from), vload(from + W), vload(from + 2 * W), vload(from + 3 * W)};
    vf y[4];
    vturn_lanes(x, y);
    for (int i = 0; i < 4; ++i) vstore(to + i * W, y[i]);
  }
};

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
#endif
