// AVX2 + FMA + F16C vocabulary: eight lanes. The same names and meanings as vec_avx512.h.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

constexpr int W = 8;
using vf = __m256;

FASTOPS_INLINE vf vset(float x) { return _mm256_set1_ps(x); }
FASTOPS_INLINE vf vzero() { return _mm256_setzero_ps(); }
FASTOPS_INLINE vf vload(const float* p) { return _mm256_loadu_ps(p); }
FASTOPS_INLINE vf vload(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
FASTOPS_INLINE vf vload(const bf16* p) {
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}
FASTOPS_INLINE __m256i vlane_ids() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
FASTOPS_INLINE __m256i vfirst(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), vlane_ids()); }
FASTOPS_INLINE vf vloadn(const float* p, int n) { return _mm256_maskload_ps(p, vfirst(n)); }
// AVX2 has no masked 16-bit load: a tail goes through the stack.
template <class T>
FASTOPS_INLINE vf vloadn(const T* p, int n) {
  T tmp[W] = {};
  std::memcpy(tmp, p, static_cast<size_t>(n) * sizeof(T));
  return vload(tmp);
}
FASTOPS_INLINE void vstore(float* p, vf x) { _mm256_storeu_ps(p, x); }
FASTOPS_INLINE void vstore(f16* p, vf x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
FASTOPS_INLINE void vstore(bf16* p, vf x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  const __m256i isnan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i y = _mm256_blendv_epi8(rounded, nan, isnan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(y, y), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
FASTOPS_INLINE void vstoren(float* p, vf x, int n) { _mm256_maskstore_ps(p, vfirst(n), x); }
template <class T>
FASTOPS_INLINE void vstoren(T* p, vf x, int n) {
  T tmp[W];
  vstore(tmp, x);
  std::memcpy(p, tmp, static_cast<size_t>(n) * sizeof(T));
}
// Neighbours change places.
FASTOPS_INLINE vf vswap(vf x) { return _mm256_permute_ps(x, 0xb1); }
// 2 W elements past the caches, to addresses they are aligned to; vstream_done() before anybody else may look.
FASTOPS_INLINE void vstream(float* p, vf a, vf b) {
  _mm256_stream_ps(p, a);
  _mm256_stream_ps(p + W, b);
}
template <class T>
FASTOPS_INLINE void vstream(T* p, vf a, vf b) {
  T tmp[2 * W];
  vstore(tmp, a);
  vstore(tmp + W, b);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tmp)));
}
FASTOPS_INLINE void vstream_done() { _mm_sfence(); }
// W numbers as e4m3 (finite only): round to nearest even; what is beyond 448 becomes 448, a NaN stays one.
FASTOPS_INLINE void vstore_f8(uint8_t* p, vf x) {
  const __m256i u = _mm256_castps_si256(x), mag = _mm256_and_si256(u, _mm256_set1_epi32(0x7fffffff));
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(u, 24), _mm256_set1_epi32(0x80));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(mag, 20), _mm256_set1_epi32(1));
  __m256i y =
      _mm256_srli_epi32(_mm256_add_epi32(mag, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7ffff - (120 << 23)))), 20);
  y = _mm256_min_epi32(y, _mm256_set1_epi32(0x7e));
  // Below 2^-6 the adder rounds, at the unit 2^-9.
  const __m256i small =
      _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(mag), _mm256_set1_ps(16384.0f))),
                       _mm256_set1_epi32(0x46800000));
  y = _mm256_blendv_epi8(y, small, _mm256_cmpgt_epi32(_mm256_set1_epi32(0x3c800000), mag));
  y = _mm256_blendv_epi8(y, _mm256_set1_epi32(0x7f), _mm256_cmpgt_epi32(mag, _mm256_set1_epi32(0x7f800000)));
  y = _mm256_or_si256(y, sign);
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(half, half));
}
FASTOPS_INLINE vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
FASTOPS_INLINE vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
FASTOPS_INLINE vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
FASTOPS_INLINE vf vdiv(vf a, vf b) { return _mm256_div_ps(a, b); }
FASTOPS_INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
FASTOPS_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
FASTOPS_INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
FASTOPS_INLINE vf vabs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
FASTOPS_INLINE vf vround(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
constexpr float kLdexpLeast = -127.0f;  // here vldexp gives 0; further down it is wrong
constexpr bool kLdexpInfinite = false;
FASTOPS_INLINE vf vldexp(vf p, vf n, vf) {
  const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(e));
}
FASTOPS_INLINE vf vkeep_ge(vf y, vf x, float lo) {
  return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(lo), _CMP_LT_OQ), y);
}
FASTOPS_INLINE vf vselect_gt(vf a, vf b, vf yes, vf no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
FASTOPS_INLINE float vsum(vf x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
FASTOPS_INLINE float vhmax(vf x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
FASTOPS_INLINE vf vlanes() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
FASTOPS_INLINE vf vkeep(vf x, int lo, int hi, float other) {
  const __m256i keep = _mm256_andnot_si256(vfirst(lo), vfirst(hi));
  return _mm256_blendv_ps(_mm256_set1_ps(other), x, _mm256_castsi256_ps(keep));
}
FASTOPS_INLINE bool vall_finite(vf x) {
  const vf z = _mm256_sub_ps(x, x);
  return _mm256_movemask_ps(_mm256_cmp_ps(z, z, _CMP_UNORD_Q)) == 0;
}
FASTOPS_INLINE void vtranspose(vf r[W]) {
  vf t[W];
  for (int i = 0; i < W; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  vf u[W];
  for (int i = 0; i < W; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
// The lower, and the upper, halves of both.
FASTOPS_INLINE vf vjoin_low(vf a, vf b) { return _mm256_permute2f128_ps(a, b, 0x20); }
FASTOPS_INLINE vf vjoin_high(vf a, vf b) { return _mm256_permute2f128_ps(a, b, 0x31); }
// Lane i of the result is the sum of a[i].
FASTOPS_INLINE vf vreduce(const vf a[W]) {
  const vf s0 = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  const vf s1 = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(s0, s1, 0x20), _mm256_permute2f128_ps(s0, s1, 0x31));
}

// Integers: W lanes of 32 bits, or 4 W bytes.
using vi = __m256i;
FASTOPS_INLINE vi viload(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
FASTOPS_INLINE void vistore(void* p, vi x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
FASTOPS_INLINE vi vizero() { return _mm256_setzero_si256(); }
FASTOPS_INLINE vi viadd(vi a, vi b) { return _mm256_add_epi32(a, b); }
FASTOPS_INLINE vf vi_to_float(vi x) { return _mm256_cvtepi32_ps(x); }
FASTOPS_INLINE vi vi_from_bits(vf x) { return _mm256_castps_si256(x); }
FASTOPS_INLINE vf vi_as_bits(vi x) { return _mm256_castsi256_ps(x); }
FASTOPS_INLINE vf vquad(const float* p, vi place) {
  return _mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)), place);
}
FASTOPS_INLINE vi viload_u16(const uint8_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FASTOPS_INLINE vi viload_u8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
template <int n>
FASTOPS_INLINE vi vishl(vi x) {
  return _mm256_slli_epi32(x, n);
}
template <int n>
FASTOPS_INLINE vi vishr(vi x) {
  return _mm256_srli_epi32(x, n);
}
FASTOPS_INLINE vi vishlv(vi x, vi n) { return _mm256_sllv_epi32(x, n); }
FASTOPS_INLINE vi vior(vi a, vi b) { return _mm256_or_si256(a, b); }
template <uint32_t bits>
FASTOPS_INLINE vi vimask(vi x) {
  return _mm256_and_si256(x, _mm256_set1_epi32(static_cast<int32_t>(bits)));
}
template <uint32_t bits>
FASTOPS_INLINE vi viflip(vi x) {
  return _mm256_xor_si256(x, _mm256_set1_epi32(static_cast<int32_t>(bits)));
}
struct vtable {
  vf low, high;
};
FASTOPS_INLINE vtable vtable_load(const float* p) { return {vload(p), vload(p + W)}; }
FASTOPS_INLINE vf vtable_at(const vtable& t, vi index) {
  const vf low = _mm256_permutevar8x32_ps(t.low, index), high = _mm256_permutevar8x32_ps(t.high, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
// W integers from -127 to 127, rounded to nearest, as bytes.
FASTOPS_INLINE void vstore_i8(int8_t* p, vf x) {
  const __m256i wide = _mm256_cvtps_epi32(x);
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
}
FASTOPS_INLINE vi vnibbles_low(vi x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
FASTOPS_INLINE vi vnibbles_high(vi x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
// 16 high + low in each byte.
FASTOPS_INLINE vi vjoin_nibbles(vi high, vi low) { return _mm256_or_si256(_mm256_slli_epi16(high, 4), low); }
// Nibble i of each lane, less 8.
template <int i>
FASTOPS_INLINE vf vnibble(vi x) {
  const vi q = _mm256_and_si256(_mm256_srli_epi32(x, 4 * i), _mm256_set1_epi32(15));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(q, _mm256_set1_epi32(8)));
}
// acc + the products of four unsigned bytes of `u` (at most 15) and the four signed ones of `s4`, in each lane.
FASTOPS_INLINE vi vdot4(vi acc, vi u, int32_t s4) {
  const __m256i pairs = _mm256_maddubs_epi16(u, _mm256_set1_epi32(s4));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
// W codes as numbers: bytes with and without a sign, e4m3, and 4 and 2 bits each.
template <class Bits>
FASTOPS_INLINE Bits vbits(const uint8_t* p) {
  Bits x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
FASTOPS_INLINE vf vload_i8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
FASTOPS_INLINE vf vload_u8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// By way of fp16, whose exponent is biased by 8 more; its conversion knows denormal numbers whatever the flags say.
FASTOPS_INLINE vf vload_f8(const uint8_t* p) {
  const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i mag = _mm_and_si128(x, _mm_set1_epi16(0x7f));
  const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(mag, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7c00));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(x, _mm_set1_epi16(0x80)), 8);
  const __m128i half = _mm_or_si128(_mm_or_si128(_mm_slli_epi16(mag, 7), sign), nan);
  return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
}
FASTOPS_INLINE vf vload_u4(const uint8_t* p) {
  const __m256i x =
      _mm256_srlv_epi32(_mm256_set1_epi32(vbits<int32_t>(p)), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
  return _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(15)));
}
FASTOPS_INLINE vf vload_u2(const uint8_t* p) {
  const __m256i x =
      _mm256_srlv_epi32(_mm256_set1_epi32(vbits<uint16_t>(p)), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
  return _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(3)));
}
FASTOPS_INLINE void vprefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
FASTOPS_INLINE void vprefetch_row(const void* p) { vprefetch(p); }
FASTOPS_INLINE void vprefetch_here(const void* p) { vprefetch(p); }
FASTOPS_INLINE void vprefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
FASTOPS_INLINE void vprefetch_stream(const uint8_t* p) { vprefetch(p + 4096); }
FASTOPS_INLINE void vprefetch_to_write(const void* p) { __builtin_prefetch(p, 1); }

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
