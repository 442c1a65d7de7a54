// Portable vocabulary: four lanes of the compiler's generic vectors (SSE2 on x86-64, NEON on Arm, plain code elsewhere).
// The same names and meanings as vec_avx2.h and vec_avx512.h.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

constexpr int W = 4;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

inline vf vset(float x) { return vf{x, x, x, x}; }
inline vf vzero() { return vset(0.0f); }
inline vf vload(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
template <class T>
inline vf vloadn(const T* p, int n) {
  vf x = vzero();
  for (int i = 0; i < n; ++i) x[i] = to_f32(p[i]);
  return x;
}
inline vf vload(const f16* p) { return vloadn(p, W); }
inline vf vload(const bf16* p) { return vloadn(p, W); }
inline void vstore(float* p, vf x) { std::memcpy(p, &x, sizeof(x)); }
template <class T>
inline void vstoren(T* p, vf x, int n) {
  for (int i = 0; i < n; ++i) from_f32(x[i], p + i);
}
inline void vstore(f16* p, vf x) { vstoren(p, x, W); }
inline void vstore(bf16* p, vf x) { vstoren(p, x, W); }
inline vf vadd(vf a, vf b) { return a + b; }
inline vf vsub(vf a, vf b) { return a - b; }
inline vf vmul(vf a, vf b) { return a * b; }
inline vf vdiv(vf a, vf b) { return a / b; }
inline vf vfma(vf a, vf b, vf c) { return a * b + c; }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }
inline vf vmin(vf a, vf b) { return a < b ? a : b; }
inline vf vabs(vf a) { return a < 0.0f ? -a : a; }
// Ties to even by the fp32 adder; right for |x| < 2^22, which is all the callers need.
inline vf vround(vf x) {
  const vf magic = vset(12582912.0f);
  return (x + magic) - magic;
}
inline vf vldexp(vf p, vf n) {
  const vi e = (__builtin_convertvector(n, vi) + 127) << 23;
  vf scale;
  std::memcpy(&scale, &e, sizeof(e));
  return p * scale;
}
// y where x >= lo (a NaN x counts), else 0.
inline vf vkeep_ge(vf y, vf x, float lo) {
  for (int i = 0; i < W; ++i)
    if (x[i] < lo) y[i] = 0.0f;
  return y;
}
inline vf vselect_gt(vf a, vf b, vf yes, vf no) { return a > b ? yes : no; }
inline float vsum(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float vhmax(vf x) {
  const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}
inline vf vlanes() { return vf{0, 1, 2, 3}; }
inline vf vkeep(vf x, int lo, int hi, float other) {
  for (int i = 0; i < W; ++i)
    if (i < lo || i >= hi) x[i] = other;
  return x;
}
inline bool vall_finite(vf x) {
  const vf z = x - x;
  return z[0] == 0 && z[1] == 0 && z[2] == 0 && z[3] == 0;
}
inline void vtranspose(vf r[W]) {
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < i; ++j) {
      const float t = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = t;
    }
}
inline vf vreduce(const vf a[W]) { return vf{vsum(a[0]), vsum(a[1]), vsum(a[2]), vsum(a[3])}; }
inline void vprefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
