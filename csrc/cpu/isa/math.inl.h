// exp2, tanh, sigmoid and the normal distribution over the vocabulary: polynomials, no table, the same in every
// variant.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

template <int v>
struct Index {
  static constexpr int value = v;
  constexpr operator int() const { return v; }
};
// f(Index<0>), ..., f(Index<N - 1>)
template <int N, int i = 0, class F>
FASTOPS_INLINE void each_of(const F& f) {
  if constexpr (i < N) {
    f(Index<i>{});
    each_of<N, i + 1>(f);
  }
}

// 2 W elements.
template <class T>
FASTOPS_INLINE void vstore2(T* p, vf a, vf b) {
  vstore(p, a);
  vstore(p + W, b);
}
// 2 W elements in whatever order is quickest for the type, which vstore_pair and vstream_pair turn back.
template <class T>
FASTOPS_INLINE void vload_pair(const T* p, vf* a, vf* b) {
  *a = vload(p);
  *b = vload(p + W);
}
template <class T>
FASTOPS_INLINE void vstore_pair(T* p, vf a, vf b) {
  vstore2(p, a, b);
}
template <class T>
FASTOPS_INLINE void vstream_pair(T* p, vf a, vf b) {
  vstream(p, a, b);
}
// 2 W floats, in memory order, as vload_pair orders T's.
template <class T>
FASTOPS_INLINE void vpair_as(const T*, vf*) {}
// sum, and the squares of 2 W elements.
template <class T>
FASTOPS_INLINE vf vadd_squares2(vf sum, const T* p) {
  const vf a = vload(p), b = vload(p + W);
  return vfma(b, b, vfma(a, a, sum));
}

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// 2^x for x <= 127; x below -126 (in some variants -126.5) gives exactly 0, as -inf does; NaN gives NaN.
// Range reduction x = n + f, |f| <= 1/2 and a minimax polynomial for 2^f (the software exp of FlashAttention-4, section
// 3.2 there, in the degree each caller's rounding hides). Relative error: degree 3 8.1e-5, 4 2.8e-6, 6 2.0e-9.
template <int kDegree>
FASTOPS_INLINE vf vexp2(vf x) {
  static_assert(kDegree == 3 || kDegree == 4 || kDegree == 6, "no coefficients for this degree");
  if (kLdexpLeast != 0.0f) x = vmax(vset(kLdexpLeast), x);  // second operand: a NaN passes through
  const vf n = vround(x);
  const vf f = vsub(x, n);
  vf p;
  if constexpr (kDegree == 3) {
    p = vfma(vset(0.0558382829462f), f, vset(0.242639478546f));
    p = vfma(p, f, vset(0.693136733884f));
    p = vfma(p, f, vset(0.999924556951f));
  } else if constexpr (kDegree == 4) {
    p = vfma(vset(0.00966636851539f), f, vset(0.0559219758423f));
    p = vfma(p, f, vset(0.24022349038f));
    p = vfma(p, f, vset(0.693121045203f));
    p = vfma(p, f, vset(1.0f));
  } else {
    p = vfma(vset(0.000154614446986f), f, vset(0.00134004281776f));
    p = vfma(p, f, vset(0.00961805667852f));
    p = vfma(p, f, vset(0.0555032722667f));
    p = vfma(p, f, vset(0.240226509223f));
    p = vfma(p, f, vset(0.693147206703f));
    p = vfma(p, f, vset(1.0f));
  }
  return vldexp(p, n, x);
}

// tanh(x) = 1 - 2 / (exp(2x) + 1), and x - x^3/3 + 2x^5/15 - 17x^7/315 near 0 where that would cancel.
// Absolute error below 3e-7.
FASTOPS_INLINE vf vtanh(vf x) {
  const vf t = vmax(vset(-20.0f), vmin(vset(20.0f), x));
  const vf e = vexp2<6>(vmul(t, vset(2.0f * kLog2e)));
  const vf big = vsub(vset(1.0f), vdiv(vset(2.0f), vadd(e, vset(1.0f))));
  const vf x2 = vmul(t, t);
  vf p = vfma(vset(-17.0f / 315.0f), x2, vset(2.0f / 15.0f));
  p = vfma(p, x2, vset(-1.0f / 3.0f));
  const vf small = vfma(vmul(vmul(p, x2), t), vset(1.0f), t);
  return vselect_gt(vset(0.15f), vabs(t), small, big);
}

// exp(-x), at most 2^127 or infinity: what 1 / (1 + exp(-x)) needs.
template <int kDegree>
FASTOPS_INLINE vf vexp_minus(vf x) {
  const vf y = vmul(x, vset(-kLog2e));
  return vexp2<kDegree>(kLdexpInfinite ? y : vmin(vset(127.0f), y));
}

// The standard normal distribution at x and its density, by erfc(z) = t Q(t) exp(-z^2), t = 1 / (1 + 0.4 z), z >= 0; Q
// is a minimax polynomial for z <= 10.5. Relative error of the smaller tail below 3e-7 + 6e-8 z^2.
template <int kDegree>
FASTOPS_INLINE vf vnormal(vf x, vf* density) {
  const vf z = vmul(vabs(x), vset(0.707106781186547524f));
  const vf e = vexp2<kDegree>(vmul(vmul(z, z), vset(-kLog2e)));
  const vf t = vdiv(vset(1.0f), vfma(vset(0.4f), z, vset(1.0f)));
  vf p = vfma(vset(0.0421193847f), t, vset(-0.144555653f));
  p = vfma(p, t, vset(0.0927915346f));
  p = vfma(p, t, vset(0.0778351859f));
  p = vfma(p, t, vset(0.0867921737f));
  p = vfma(p, t, vset(0.190380863f));
  p = vfma(p, t, vset(0.202661717f));
  p = vfma(p, t, vset(0.226334224f));
  p = vfma(p, t, vset(0.225640636f));
  const vf tail = vmul(vmul(vmul(p, t), e), vset(0.5f));
  *density = vmul(e, vset(0.398942280401432678f));
  return vselect_gt(x, vzero(), vsub(vset(1.0f), tail), tail);
}

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
