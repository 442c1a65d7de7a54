// Portable vocabulary: four lanes of the compiler's generic vectors (SSE2 on x86-64, NEON on Arm, plain code
// elsewhere). The same names and meanings as vec_avx2.h and vec_avx512.h.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

constexpr int W = 4;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

FASTOPS_INLINE vf vset(float x) { return vf{x, x, x, x}; }
FASTOPS_INLINE vf vzero() { return vset(0.0f); }
FASTOPS_INLINE vf vload(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
template <class T>
FASTOPS_INLINE vf vloadn(const T* p, int n) {
  vf x = vzero();
  for (int i = 0; i < n; ++i) x[i] = to_f32(p[i]);
  return x;
}
FASTOPS_INLINE vf vload(const f16* p) { return vloadn(p, W); }
FASTOPS_INLINE vf vload(const bf16* p) { return vloadn(p, W); }
FASTOPS_INLINE void vstore(float* p, vf x) { std::memcpy(p, &x, sizeof(x)); }
template <class T>
FASTOPS_INLINE void vstoren(T* p, vf x, int n) {
  for (int i = 0; i < n; ++i) from_f32(x[i], p + i);
}
FASTOPS_INLINE void vstore(f16* p, vf x) { vstoren(p, x, W); }
FASTOPS_INLINE void vstore(bf16* p, vf x) { vstoren(p, x, W); }
// Neighbours change places.
FASTOPS_INLINE vf vswap(vf x) { return vf{x[1], x[0], x[3], x[2]}; }
// 2 W elements past the caches, where that can be said; vstream_done() before anybody else may look.
template <class T>
FASTOPS_INLINE void vstream(T* p, vf a, vf b) {
  vstore(p, a);
  vstore(p + W, b);
}
FASTOPS_INLINE void vstream_done() {}
// W numbers as e4m3 (finite only): round to nearest even; what is beyond 448 becomes 448, a NaN stays one.
FASTOPS_INLINE void vstore_f8(uint8_t* p, vf x) {
  for (int i = 0; i < W; ++i) p[i] = to_f8(x[i]);
}
FASTOPS_INLINE vf vadd(vf a, vf b) { return a + b; }
FASTOPS_INLINE vf vsub(vf a, vf b) { return a - b; }
FASTOPS_INLINE vf vmul(vf a, vf b) { return a * b; }
FASTOPS_INLINE vf vdiv(vf a, vf b) { return a / b; }
FASTOPS_INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }
FASTOPS_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
FASTOPS_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
FASTOPS_INLINE vf vabs(vf a) { return a < 0.0f ? -a : a; }
// Ties to even by the fp32 adder; right for |x| < 2^22, which is all the callers need.
FASTOPS_INLINE vf vround(vf x) {
  const vf magic = vset(12582912.0f);
  return (x + magic) - magic;
}
constexpr float kLdexpLeast = -127.0f;  // here vldexp gives 0; further down it is wrong
constexpr bool kLdexpInfinite = false;
FASTOPS_INLINE vf vldexp(vf p, vf n, vf) {
  const vi e = (__builtin_convertvector(n, vi) + 127) << 23;
  vf scale;
  std::memcpy(&scale, &e, sizeof(e));
  return p * scale;
}
// y where x >= lo (a NaN x counts), else 0.
FASTOPS_INLINE vf vkeep_ge(vf y, vf x, float lo) {
  for (int i = 0; i < W; ++i)
    if (x[i] < lo) y[i] = 0.0f;
  return y;
}
FASTOPS_INLINE vf vselect_gt(vf a, vf b, vf yes, vf no) { return a > b ? yes : no; }
FASTOPS_INLINE float vsum(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }
FASTOPS_INLINE float vhmax(vf x) {
  const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}
FASTOPS_INLINE vf vlanes() { return vf{0, 1, 2, 3}; }
FASTOPS_INLINE vf vkeep(vf x, int lo, int hi, float other) {
  for (int i = 0; i < W; ++i)
    if (i < lo || i >= hi) x[i] = other;
  return x;
}
FASTOPS_INLINE bool vall_finite(vf x) {
  const vf z = x - x;
  return z[0] == 0 && z[1] == 0 && z[2] == 0 && z[3] == 0;
}
FASTOPS_INLINE void vtranspose(vf r[W]) {
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < i; ++j) {
      const float t = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = t;
    }
}
// The lower, and the upper, halves of both.
FASTOPS_INLINE vf vjoin_low(vf a, vf b) { return vf{a[0], a[1], b[0], b[1]}; }
FASTOPS_INLINE vf vjoin_high(vf a, vf b) { return vf{a[2], a[3], b[2], b[3]}; }
FASTOPS_INLINE vf vreduce(const vf a[W]) { return vf{vsum(a[0]), vsum(a[1]), vsum(a[2]), vsum(a[3])}; }

// Integers: W lanes of 32 bits, or 4 W bytes.
FASTOPS_INLINE vi viload(const void* p) {
  vi x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
FASTOPS_INLINE void vistore(void* p, vi x) { std::memcpy(p, &x, sizeof(x)); }
FASTOPS_INLINE vi vizero() { return vi{0, 0, 0, 0}; }
FASTOPS_INLINE vi viadd(vi a, vi b) { return a + b; }
FASTOPS_INLINE vf vi_to_float(vi x) { return __builtin_convertvector(x, vf); }
FASTOPS_INLINE vi vi_from_bits(vf x) { return viload(&x); }
FASTOPS_INLINE vf vi_as_bits(vi x) {
  vf y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
// p[place % 4] for the place in each lane.
FASTOPS_INLINE vf vquad(const float* p, vi place) {
  return vf{p[place[0] & 3], p[place[1] & 3], p[place[2] & 3], p[place[3] & 3]};
}
// W unsigned numbers of 16 or 8 bits.
FASTOPS_INLINE vi viload_u16(const uint8_t* p) {
  vi x;
  for (int i = 0; i < W; ++i) x[i] = p[2 * i] | p[2 * i + 1] << 8;
  return x;
}
FASTOPS_INLINE vi viload_u8(const uint8_t* p) { return vi{p[0], p[1], p[2], p[3]}; }
// Bits of each lane: moved by n, or by as many as the other lane says; both; those of a mask; those of a mask flipped.
template <int n>
FASTOPS_INLINE vi vishl(vi x) {
  return x << n;
}
template <int n>
FASTOPS_INLINE vi vishr(vi x) {
  return x >> n & static_cast<int32_t>(0xffffffffu >> n);
}
FASTOPS_INLINE vi vishlv(vi x, vi n) { return x << n; }
FASTOPS_INLINE vi vior(vi a, vi b) { return a | b; }
template <uint32_t bits>
FASTOPS_INLINE vi vimask(vi x) {
  return x & static_cast<int32_t>(bits);
}
template <uint32_t bits>
FASTOPS_INLINE vi viflip(vi x) {
  return x ^ static_cast<int32_t>(bits);
}
// Sixteen numbers, and those that the lowest four bits of each lane name.
struct vtable {
  const float* number;
};
FASTOPS_INLINE vtable vtable_load(const float* p) { return {p}; }
FASTOPS_INLINE vf vtable_at(const vtable& t, vi index) {
  return vf{t.number[index[0] & 15], t.number[index[1] & 15], t.number[index[2] & 15], t.number[index[3] & 15]};
}
// W integers from -127 to 127, rounded to nearest, as bytes.
FASTOPS_INLINE void vstore_i8(int8_t* p, vf x) {
  const vf whole = vround(x);
  for (int i = 0; i < W; ++i) p[i] = static_cast<int8_t>(whole[i]);
}
FASTOPS_INLINE vi vnibbles_low(vi x) { return x & 0x0f0f0f0f; }
FASTOPS_INLINE vi vnibbles_high(vi x) { return (x >> 4) & 0x0f0f0f0f; }
// 16 high + low in each byte.
FASTOPS_INLINE vi vjoin_nibbles(vi high, vi low) { return high << 4 | low; }
// Nibble i of each lane, less 8.
template <int i>
FASTOPS_INLINE vf vnibble(vi x) {
  return vi_to_float(((x >> (4 * i)) & 15) - 8);
}
// acc + the products of four unsigned bytes of `u` (at most 15) and the four signed ones of `s4`, in each lane.
FASTOPS_INLINE vi vdot4(vi acc, vi u, int32_t s4) {
  for (int b = 0; b < 32; b += 8) acc += ((u >> b) & 255) * static_cast<int8_t>(s4 >> b);
  return acc;
}
// W codes as numbers: bytes with and without a sign, e4m3, and 4 and 2 bits each (the first in the lowest ones).
// Exactly the bytes that hold them are read.
FASTOPS_INLINE vf vload_i8(const uint8_t* p) {
  vf x;
  for (int i = 0; i < W; ++i) x[i] = static_cast<float>(static_cast<int8_t>(p[i]));
  return x;
}
FASTOPS_INLINE vf vload_u8(const uint8_t* p) {
  vf x;
  for (int i = 0; i < W; ++i) x[i] = static_cast<float>(p[i]);
  return x;
}
FASTOPS_INLINE vf vload_f8(const uint8_t* p) {
  vf x;
  for (int i = 0; i < W; ++i) x[i] = from_f8(p[i]);
  return x;
}
FASTOPS_INLINE vf vload_u4(const uint8_t* p) {
  vf x;
  for (int i = 0; i < W; ++i) x[i] = static_cast<float>(p[i / 2] >> (i % 2 * 4) & 15);
  return x;
}
FASTOPS_INLINE vf vload_u2(const uint8_t* p) {
  vf x;
  for (int i = 0; i < W; ++i) x[i] = static_cast<float>(p[i / 4] >> (i % 4 * 2) & 3);
  return x;
}
FASTOPS_INLINE void vprefetch(const void* p) { __builtin_prefetch(p); }
FASTOPS_INLINE void vprefetch_row(const void* p) { vprefetch(p); }
FASTOPS_INLINE void vprefetch_here(const void* p) { vprefetch(p); }
FASTOPS_INLINE void vprefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }
FASTOPS_INLINE void vprefetch_stream(const uint8_t* p) { vprefetch(p + 4096); }
FASTOPS_INLINE void vprefetch_to_write(const void* p) { __builtin_prefetch(p, 1); }

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
