// AVX-512 (F, BW, DQ, VL) vocabulary: sixteen lanes.
//
// vloadn / vstoren touch only the first n elements (0 <= n <= W; absent lanes read as zero); vkeep puts `other` in the
// lanes outside [lo, hi); vmax and vmin return their second argument where either is a NaN (so does x86).
namespace fastops::cpu::FASTOPS_ISA {
namespace {

constexpr int W = 16;
using vf = __m512;

FASTOPS_INLINE __mmask16 vfirst(int n) {
  return static_cast<__mmask16>(n >= W ? 0xffffu : (n <= 0 ? 0u : (1u << n) - 1u));
}
FASTOPS_INLINE vf vset(float x) { return _mm512_set1_ps(x); }
FASTOPS_INLINE vf vzero() { return _mm512_setzero_ps(); }
FASTOPS_INLINE vf vload(const float* p) { return _mm512_loadu_ps(p); }
FASTOPS_INLINE vf vload(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FASTOPS_INLINE vf vwiden_bf16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
FASTOPS_INLINE vf vload(const bf16* p) { return vwiden_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
FASTOPS_INLINE vf vloadn(const float* p, int n) { return _mm512_maskz_loadu_ps(vfirst(n), p); }
FASTOPS_INLINE vf vloadn(const f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(vfirst(n), p)); }
FASTOPS_INLINE vf vloadn(const bf16* p, int n) { return vwiden_bf16(_mm256_maskz_loadu_epi16(vfirst(n), p)); }
#if defined(FASTOPS_HAS_BF16_DOT)
// The instruction takes denormal numbers for 0.
FASTOPS_INLINE __m256i vnarrow_bf16(vf x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
#else
FASTOPS_INLINE __m256i vnarrow_bf16(vf x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 isnan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i y = _mm512_mask_or_epi32(rounded, isnan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(y);
}
#endif
FASTOPS_INLINE void vstore(float* p, vf x) { _mm512_storeu_ps(p, x); }
FASTOPS_INLINE void vstore(f16* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
FASTOPS_INLINE void vstore(bf16* p, vf x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), vnarrow_bf16(x)); }
FASTOPS_INLINE void vstoren(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, vfirst(n), x); }
FASTOPS_INLINE void vstoren(f16* p, vf x, int n) {
  _mm256_mask_storeu_epi16(p, vfirst(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
FASTOPS_INLINE void vstoren(bf16* p, vf x, int n) { _mm256_mask_storeu_epi16(p, vfirst(n), vnarrow_bf16(x)); }
// Neighbours change places.
FASTOPS_INLINE vf vswap(vf x) { return _mm512_permute_ps(x, 0xb1); }
// 2 W elements past the caches, to addresses they are aligned to; vstream_done() before anybody else may look.
FASTOPS_INLINE void vstream(float* p, vf x) { _mm512_stream_ps(p, x); }
FASTOPS_INLINE void vstream(float* p, vf a, vf b) {
  vstream(p, a);
  vstream(p + W, b);
}
FASTOPS_INLINE void vstream_halves(void* p, __m256i a, __m256i b) {
  _mm512_stream_si512(static_cast<__m512i*>(p), _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}
FASTOPS_INLINE void vstream(f16* p, vf a, vf b) {
  vstream_halves(p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT), _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
}
#if defined(FASTOPS_HAS_BF16_DOT)
FASTOPS_INLINE __m512i vnarrow_bf16(vf a, vf b) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)); }
FASTOPS_INLINE void vstream(bf16* p, vf a, vf b) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), vnarrow_bf16(a, b));
}
// sum + a b, of pairs of bf16. It stays where it stands among vprefetch_here()s. Assembly, since GCC 12 sends operands
// of the intrinsic through the stack, one by one, where sixteen sums are under way.
FASTOPS_INLINE vf vdot_bf16(vf sum, __m512i a, __m512i b) {
#if defined(__clang__)
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  __asm__ volatile("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
  return sum;
#endif
}
// Better forms of what math.inl.h has for every type.
FASTOPS_INLINE void vload_pair(const bf16* p, vf* even, vf* odd) {
  const __m512i x = _mm512_loadu_si512(p);
  *even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  *odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
FASTOPS_INLINE void vpair_as(const bf16*, vf* v) {
  const __m512i two = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 1);
  const vf even = _mm512_permutex2var_ps(v[0], two, v[1]);
  v[1] = _mm512_permutex2var_ps(v[0], _mm512_add_epi32(two, _mm512_set1_epi32(1)), v[1]);
  v[0] = even;
}
FASTOPS_INLINE __m512i vnarrow_pair(vf even, vf odd) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i order = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)), 16));
  return _mm512_permutexvar_epi16(order, vnarrow_bf16(even, odd));
}
FASTOPS_INLINE void vstore_pair(bf16* p, vf even, vf odd) { _mm512_storeu_si512(p, vnarrow_pair(even, odd)); }
FASTOPS_INLINE void vstream_pair(bf16* p, vf even, vf odd) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), vnarrow_pair(even, odd));
}
FASTOPS_INLINE void vstore2(bf16* p, vf a, vf b) { _mm512_storeu_si512(p, vnarrow_bf16(a, b)); }
FASTOPS_INLINE vf vadd_squares2(vf sum, const bf16* p) {
  const auto x = reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
  return _mm512_dpbf16_ps(sum, x, x);
}
#else
FASTOPS_INLINE __m512i vnarrow_bf16(vf a, vf b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(vnarrow_bf16(a)), vnarrow_bf16(b), 1);
}
FASTOPS_INLINE void vstream(bf16* p, vf a, vf b) { vstream_halves(p, vnarrow_bf16(a), vnarrow_bf16(b)); }
#endif
FASTOPS_INLINE void vstream_done() { _mm_sfence(); }
// W numbers as e4m3 (finite only): round to nearest even; what is beyond 448 becomes 448, a NaN stays one.
FASTOPS_INLINE void vstore_f8(uint8_t* p, vf x) {
  const __m512i u = _mm512_castps_si512(x), mag = _mm512_and_si512(u, _mm512_set1_epi32(0x7fffffff));
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(u, 24), _mm512_set1_epi32(0x80));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(mag, 20), _mm512_set1_epi32(1));
  __m512i y =
      _mm512_srli_epi32(_mm512_add_epi32(mag, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff - (120 << 23)))), 20);
  y = _mm512_min_epi32(y, _mm512_set1_epi32(0x7e));
  // Below 2^-6 the adder rounds, at the unit 2^-9.
  const __m512i small =
      _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(mag), _mm512_set1_ps(16384.0f))),
                       _mm512_set1_epi32(0x46800000));
  y = _mm512_mask_mov_epi32(y, _mm512_cmplt_epi32_mask(mag, _mm512_set1_epi32(0x3c800000)), small);
  y = _mm512_mask_mov_epi32(y, _mm512_cmpgt_epi32_mask(mag, _mm512_set1_epi32(0x7f800000)), _mm512_set1_epi32(0x7f));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_or_si512(y, sign)));
}
FASTOPS_INLINE vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
FASTOPS_INLINE vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
FASTOPS_INLINE vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
FASTOPS_INLINE vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
FASTOPS_INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
FASTOPS_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
FASTOPS_INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
FASTOPS_INLINE vf vabs(vf a) { return _mm512_abs_ps(a); }
FASTOPS_INLINE vf vround(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// p 2^n, and 0 where x, which n is near to, is below -126. (The mask is for Intel's processors: a lane whose result is
// too small for a normal number costs them hundreds of cycles.)
FASTOPS_INLINE vf vldexp(vf p, vf n, vf x) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), p, n);
}
constexpr float kLdexpLeast = 0.0f;    // and whatever x and n are there
constexpr bool kLdexpInfinite = true;  // infinity, not nonsense, beyond 2^127
// y where x >= lo (a NaN x counts), else 0.
FASTOPS_INLINE vf vkeep_ge(vf y, vf x, float lo) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(lo), _CMP_NLT_UQ), y);
}
FASTOPS_INLINE vf vselect_gt(vf a, vf b, vf yes, vf no) {
  return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), yes);
}
FASTOPS_INLINE float vsum(vf x) { return _mm512_reduce_add_ps(x); }
FASTOPS_INLINE float vhmax(vf x) { return _mm512_reduce_max_ps(x); }
FASTOPS_INLINE vf vlanes() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
FASTOPS_INLINE vf vkeep(vf x, int lo, int hi, float other) {
  return _mm512_mask_mov_ps(_mm512_set1_ps(other), static_cast<__mmask16>(vfirst(hi) & ~vfirst(lo)), x);
}
FASTOPS_INLINE bool vall_finite(vf x) {
  const vf z = _mm512_sub_ps(x, x);
  return _mm512_cmp_ps_mask(z, z, _CMP_UNORD_Q) == 0;
}
FASTOPS_INLINE void vtranspose(vf r[W]) {
  vf t[W];
  for (int i = 0; i < W; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < W; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  // Now 4x4 blocks are transposed; exchange 128-bit lanes between the four groups of rows.
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
// The lower, and the upper, halves of both.
FASTOPS_INLINE vf vjoin_low(vf a, vf b) { return _mm512_shuffle_f32x4(a, b, 0x44); }
FASTOPS_INLINE vf vjoin_high(vf a, vf b) { return _mm512_shuffle_f32x4(a, b, 0xee); }
// Four vectors of four 128-bit lanes: out[i] holds lane i of each, in their order.
FASTOPS_INLINE void vturn_lanes(const vf (&x)[4], vf (&out)[4]) {
  const vf a = _mm512_shuffle_f32x4(x[0], x[1], 0x44), b = _mm512_shuffle_f32x4(x[2], x[3], 0x44);
  const vf c = _mm512_shuffle_f32x4(x[0], x[1], 0xee), d = _mm512_shuffle_f32x4(x[2], x[3], 0xee);
  out[0] = _mm512_shuffle_f32x4(a, b, 0x88);
  out[1] = _mm512_shuffle_f32x4(a, b, 0xdd);
  out[2] = _mm512_shuffle_f32x4(c, d, 0x88);
  out[3] = _mm512_shuffle_f32x4(c, d, 0xdd);
}
// Lane i of the result is the sum of a[i]: a transposition that adds at every step, 30 shuffles instead of 64.
FASTOPS_INLINE vf vreduce(const vf a[W]) {
  vf b[8], c[4], d[2];
  for (int i = 0; i < 8; ++i) {  // halves within 128-bit lanes: rows 2i, 2i+1
    b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  }
  for (int i = 0; i < 4; ++i) {  // each lane now holds the four partial sums of rows 4i..4i+3
    c[i] =
        _mm512_add_ps(_mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0x44), _mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0xee));
  }
  for (int i = 0; i < 2; ++i) {
    d[i] = _mm512_add_ps(_mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(d[0], d[1], 0x88), _mm512_shuffle_f32x4(d[0], d[1], 0xdd));
}

// Integers: W lanes of 32 bits, or 4 W bytes.
using vi = __m512i;
FASTOPS_INLINE vi viload(const void* p) { return _mm512_loadu_si512(p); }
FASTOPS_INLINE void vistore(void* p, vi x) { _mm512_storeu_si512(p, x); }
FASTOPS_INLINE vi vizero() { return _mm512_setzero_si512(); }
FASTOPS_INLINE vi viadd(vi a, vi b) { return _mm512_add_epi32(a, b); }
FASTOPS_INLINE vf vi_to_float(vi x) { return _mm512_cvtepi32_ps(x); }
FASTOPS_INLINE vi vi_from_bits(vf x) { return _mm512_castps_si512(x); }
FASTOPS_INLINE vf vi_as_bits(vi x) { return _mm512_castsi512_ps(x); }
FASTOPS_INLINE vf vquad(const float* p, vi place) {
  return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(p)), place);
}
FASTOPS_INLINE vi viload_u16(const uint8_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FASTOPS_INLINE vi viload_u8(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <int n>
FASTOPS_INLINE vi vishl(vi x) {
  return _mm512_slli_epi32(x, n);
}
template <int n>
FASTOPS_INLINE vi vishr(vi x) {
  return _mm512_srli_epi32(x, n);
}
FASTOPS_INLINE vi vishlv(vi x, vi n) { return _mm512_sllv_epi32(x, n); }
FASTOPS_INLINE vi vior(vi a, vi b) { return _mm512_or_si512(a, b); }
template <uint32_t bits>
FASTOPS_INLINE vi vimask(vi x) {
  return _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int32_t>(bits)));
}
template <uint32_t bits>
FASTOPS_INLINE vi viflip(vi x) {
  return _mm512_xor_si512(x, _mm512_set1_epi32(static_cast<int32_t>(bits)));
}
using vtable = vf;
FASTOPS_INLINE vtable vtable_load(const float* p) { return vload(p); }
FASTOPS_INLINE vf vtable_at(const vtable& t, vi index) { return _mm512_permutexvar_ps(index, t); }
// W integers from -127 to 127, rounded to nearest, as bytes.
FASTOPS_INLINE void vstore_i8(int8_t* p, vf x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}
FASTOPS_INLINE vi vnibbles_low(vi x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
FASTOPS_INLINE vi vnibbles_high(vi x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
// 16 high + low in each byte.
FASTOPS_INLINE vi vjoin_nibbles(vi high, vi low) { return _mm512_or_si512(_mm512_slli_epi16(high, 4), low); }
// Nibble i of each lane, less 8.
template <int i>
FASTOPS_INLINE vf vnibble(vi x) {
  const vf table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(x, 4 * i), table);
}
#if defined(FASTOPS_HAS_BF16_DOT)
// Nibbles i and i + 4 of each lane, less 8, as a pair of bf16.
template <int i>
FASTOPS_INLINE vi vpairs_bf16(vi x) {
  const __m256i half =
      _mm256_setr_epi16(static_cast<int16_t>(0xc100), static_cast<int16_t>(0xc0e0), static_cast<int16_t>(0xc0c0),
                        static_cast<int16_t>(0xc0a0), static_cast<int16_t>(0xc080), static_cast<int16_t>(0xc040),
                        static_cast<int16_t>(0xc000), static_cast<int16_t>(0xbf80), 0, 0x3f80, 0x4000, 0x4040, 0x4080,
                        0x40a0, 0x40c0, 0x40e0);
  // The look-up takes five bits; the fifth belongs to a neighbour, so both halves of the table are the same.
  return _mm512_permutexvar_epi16(_mm512_srli_epi32(x, 4 * i), _mm512_broadcast_i64x4(half));
}
#endif
#if defined(FASTOPS_HAS_VNNI)
// acc + the products of four unsigned bytes of `u` and four signed ones of `s`, in each lane. GCC 12 copies the sums of
// its intrinsic to and fro in loops with many of them (a quarter of their time).
FASTOPS_INLINE vi vdot_bytes(vi acc, vi u, vi s) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(s));
  return acc;
}
#endif
// acc + the products of four unsigned bytes of `u` (at most 15) and the four signed ones of `s4`, in each lane.
FASTOPS_INLINE vi vdot4(vi acc, vi u, int32_t s4) {
#if defined(FASTOPS_HAS_VNNI)
  return _mm512_dpbusd_epi32(acc, u, _mm512_set1_epi32(s4));
#else
  const __m512i pairs = _mm512_maddubs_epi16(u, _mm512_set1_epi32(s4));
  return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}
// W codes as numbers: bytes with and without a sign, e4m3, and 4 and 2 bits each.
template <class Bits>
FASTOPS_INLINE Bits vbits(const uint8_t* p) {
  Bits x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
FASTOPS_INLINE __m128i vbytes(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
FASTOPS_INLINE vf vload_i8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(vbytes(p))); }
FASTOPS_INLINE vf vload_u8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(vbytes(p))); }
// By way of fp16, whose exponent is biased by 8 more; its conversion knows denormal numbers whatever the flags say.
FASTOPS_INLINE vf vload_f8(const uint8_t* p) {
  const __m256i x = _mm256_cvtepu8_epi16(vbytes(p));
  const __m256i mag = _mm256_and_si256(x, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x80)), 8);
  __m256i half = _mm256_or_si256(_mm256_slli_epi16(mag, 7), sign);
  half = _mm256_mask_mov_epi16(half, _mm256_cmpeq_epi16_mask(mag, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x7fff));
  return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
}
FASTOPS_INLINE vf vload_u4(const uint8_t* p) {  // a byte in each 64 bits, then once more, shifted, in their upper half
  const __m512i x = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(vbits<int64_t>(p)));
  const __m512i both = _mm512_or_si512(x, _mm512_slli_epi64(x, 28));
  return _mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(15)));
}
FASTOPS_INLINE vf vload_u2(const uint8_t* p) {
  const __m512i counts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i x = _mm512_srlv_epi32(_mm512_set1_epi32(vbits<int32_t>(p)), counts);
  return _mm512_cvtepi32_ps(_mm512_and_si512(x, _mm512_set1_epi32(3)));
}
#if defined(FASTOPS_HAS_BF16_DOT)
// 2 W codes of 4 or 2 bits each, looked up in a table of bf16 that repeats: the look-up takes five bits, and those
// above a code belong to its neighbour.
template <int bits>
FASTOPS_INLINE __m512i vlookup_bf16(const uint8_t* p, __m512i table) {
  if constexpr (bits == 4) {
    const __m512i x = _mm512_cvtepu8_epi32(vbytes(p));
    return _mm512_permutexvar_epi16(_mm512_or_si512(x, _mm512_slli_epi32(x, 12)), table);
  } else {
    const __m512i x = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(vbits<int64_t>(p)));
    const __m512i two = _mm512_or_si512(x, _mm512_slli_epi64(x, 14));
    return _mm512_permutexvar_epi16(_mm512_or_si512(two, _mm512_slli_epi64(two, 28)), table);
  }
}
// 2 W codes of e4m3 as bf16, exactly: the exponent's bias grows by 120; numbers below 2^-6, which have no leading one,
// are looked up, and 0x7f is a NaN.
FASTOPS_INLINE __m512i vload_f8_bf16(const uint8_t* p) {
  const __m512i x = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i sign = _mm512_and_si512(x, _mm512_set1_epi16(static_cast<int16_t>(0x8000)));
  const __m512i bits = _mm512_and_si512(_mm512_slli_epi16(x, 4), _mm512_set1_epi16(static_cast<int16_t>(0x87f0)));
  const __m512i normal = _mm512_add_epi16(bits, _mm512_set1_epi16(120 << 7));
  const __m512i eighths =  // of 2^-6; the look-up takes five bits, of which the upper two are 0 here
      _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
  const __mmask32 small = _mm512_testn_epi16_mask(x, _mm512_set1_epi16(0x78));
  const __m512i y = _mm512_mask_mov_epi16(normal, small, _mm512_or_si512(_mm512_permutexvar_epi16(x, eighths), sign));
  const __m512i seven = _mm512_set1_epi16(0x7f);
  return _mm512_mask_mov_epi16(y, _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, seven), seven),
                               _mm512_set1_epi16(0x7fc0));
}
#endif
// The nearest bf16 (finite x, below 2^127), and the upper halves of two vectors' lanes, side by side and in pairs.
FASTOPS_INLINE vf vround_bf16(vf x) {
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
  return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
FASTOPS_INLINE vi vupper(vf a, vf b) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(_mm512_castps_si512(a), _mm512_load_si512(kUpper), _mm512_castps_si512(b));
}
FASTOPS_INLINE vf vupper_pairs(vf a, vf b) {
  return _mm512_castsi512_ps(
      _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(a), 16), _mm512_castps_si512(b)));
}
FASTOPS_INLINE void vprefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
FASTOPS_INLINE void vprefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
// Intel's processors (only they run these variants, unless forced) read memory faster through their L2.
#if defined(FASTOPS_IS_INTEL)
FASTOPS_INLINE void vprefetch_here(const void* p) {
  __asm__ volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(p)));
}
FASTOPS_INLINE void vprefetch_row(const void* p) { vprefetch_l2(p); }
FASTOPS_INLINE void vprefetch_stream(const uint8_t* p) {
  vprefetch_l2(p + 8192);
  vprefetch(p + 1024);
}
#else
// The same, not to be moved: GCC gathers prefetches in bursts, which the queue of misses has no room for.
FASTOPS_INLINE void vprefetch_here(const void* p) {
  __asm__ volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(p)));
}
// Rows that are read some KiB later.
FASTOPS_INLINE void vprefetch_row(const void* p) { vprefetch(p); }
// Codes that are read from here on.
FASTOPS_INLINE void vprefetch_stream(const uint8_t* p) { vprefetch(p + 4096); }
#endif
FASTOPS_INLINE void vprefetch_to_write(const void* p) { __builtin_prefetch(p, 1); }

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
