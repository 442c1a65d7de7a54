// activation(gate) * up and its gradients, written once in the vocabulary of cpu/isa/vec_*.h.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

// Degree of the exponential's polynomial: the rounding of 16-bit results hides the errors of lower ones.
template <class T>
constexpr int gated_degree = 4;
template <>
constexpr int gated_degree<float> = 6;
template <>
constexpr int gated_degree<bf16> = 3;

// activation(x), and its derivative where `slope` is asked for.
//   SiLU: x s(x)                                       s + x s (1 - s),  s the logistic function
//   GELU, tanh form: x s(2 u), u = sqrt(2/pi) (x + 0.044715 x^3)   s + x s (1 - s) 2 u'
//   GELU: x F(x)                                       F + x f,  F and f of the standard normal distribution
template <int kActivation, int kDegree, bool kSlope>
FASTOPS_INLINE vf gated_activation(vf x, vf* slope) {
  if constexpr (kActivation == FASTOPS_GELU) {
    vf density;
    const vf below = vnormal<kDegree>(x, &density);
    if constexpr (kSlope) *slope = vfma(x, density, below);
    return vmul(x, below);
  } else {
    vf argument = x, inner = vset(1.0f);
    if constexpr (kActivation == FASTOPS_GELU_TANH) {
      constexpr float kTwice = 1.59576912160573f, kCube = 0.044715f;  // 2 sqrt(2 / pi)
      const vf x2 = vmul(x, x);
      argument = vmul(vmul(x, vset(kTwice)), vfma(x2, vset(kCube), vset(1.0f)));
      if constexpr (kSlope) inner = vmul(vset(kTwice), vfma(x2, vset(3.0f * kCube), vset(1.0f)));
    }
    const vf more = vadd(vset(1.0f), vexp_minus<kDegree>(argument));
    if constexpr (kSlope) {
      const vf s = vdiv(vset(1.0f), more);
      *slope = vmul(s, vfma(vmul(x, inner), vsub(vset(1.0f), s), vset(1.0f)));
      return vmul(x, s);
    }
    return vdiv(x, more);
  }
}

template <class T, int kActivation>
FASTOPS_INLINE vf gated_one(vf gate, vf up) {
  vf unused;
  return vmul(gated_activation<kActivation, gated_degree<T>, false>(gate, &unused), up);
}

template <class T, int kActivation, bool kStream>
void gated_forward_as(const GatedPiece& p) {
  const T* gate = reinterpret_cast<const T*>(p.gate);
  const T* up = reinterpret_cast<const T*>(p.up);
  T* out = reinterpret_cast<T*>(p.out);
  const T* next_gate = p.next_gate ? reinterpret_cast<const T*>(p.next_gate) : gate;
  const T* next_up = p.next_up ? reinterpret_cast<const T*>(p.next_up) : up;
  const int64_t size = p.n;
  // The lines of both inputs are asked for well before their use: two streams are more than some prefetchers follow.
  constexpr int64_t kAhead = 2048 / static_cast<int64_t>(sizeof(T)), kLine = 64 / static_cast<int64_t>(sizeof(T));
  int64_t i = 0;
  const auto ask = [&](int64_t at) FASTOPS_LAMBDA {
    const int64_t over = at + kAhead - size;  // beyond the end of this piece
    vprefetch(over < 0 ? gate + at + kAhead : next_gate + over);
    vprefetch(over < 0 ? up + at + kAhead : next_up + over);
    if constexpr (!kStream) vprefetch_to_write(out + at + kAhead);
  };
  for (; i + 2 * W <= size; i += 2 * W) {
    for (int64_t at = i; at < i + 2 * W; at += kLine)
      if (kLine <= 2 * W || at % kLine == 0) ask(at);
    vf g[2], u[2];
    vload_pair(gate + i, g, g + 1);
    vload_pair(up + i, u, u + 1);
    for (int k = 0; k < 2; ++k) g[k] = gated_one<T, kActivation>(g[k], u[k]);
    if constexpr (kStream)
      vstream_pair(out + i, g[0], g[1]);
    else
      vstore_pair(out + i, g[0], g[1]);
  }
  for (; i < size; i += W) {
    const int m = static_cast<int>(size - i < W ? size - i : W);
    vstoren(out + i, gated_one<T, kActivation>(vloadn(gate + i, m), vloadn(up + i, m)), m);
  }
  if (kStream) vstream_done();
}

template <class T, int kActivation>
void gated_backward_as(const GatedPiece& p) {
  const T* gate = reinterpret_cast<const T*>(p.gate);
  const T* up = reinterpret_cast<const T*>(p.up);
  const T* dout = reinterpret_cast<const T*>(p.dout);
  T* dgate = reinterpret_cast<T*>(p.dgate);
  T* dup = reinterpret_cast<T*>(p.dup);
  for (int64_t i = 0; i < p.n; i += W) {
    const int m = static_cast<int>(p.n - i < W ? p.n - i : W);
    vf slope;
    const vf act = gated_activation<kActivation, gated_degree<T>, true>(vloadn(gate + i, m), &slope);
    const vf d = vloadn(dout + i, m), u = vloadn(up + i, m);
    vstoren(dgate + i, vmul(vmul(d, u), slope), m);
    vstoren(dup + i, vmul(d, act), m);
  }
}

template <class T, int kActivation>
void gated_run(const GatedPiece& p, bool backward) {
  if (backward)
    gated_backward_as<T, kActivation>(p);
  else if (p.stream)
    gated_forward_as<T, kActivation, true>(p);
  else
    gated_forward_as<T, kActivation, false>(p);
}

template <class T>
void gated_typed(const GatedPiece& p, int32_t activation, bool backward) {
  if (activation == FASTOPS_SILU) gated_run<T, FASTOPS_SILU>(p, backward);
  if (activation == FASTOPS_GELU_TANH) gated_run<T, FASTOPS_GELU_TANH>(p, backward);
  if (activation == FASTOPS_GELU) gated_run<T, FASTOPS_GELU>(p, backward);
}

template <bool kBackward>
void gated_any(const GatedPiece& p, int32_t activation, int32_t dtype) {
  if (dtype == FASTOPS_F32) gated_typed<float>(p, activation, kBackward);
  if (dtype == FASTOPS_F16) gated_typed<f16>(p, activation, kBackward);
  if (dtype == FASTOPS_BF16) gated_typed<bf16>(p, activation, kBackward);
}

}  // namespace

extern const GatedTable gated_table;
const GatedTable gated_table = {&gated_any<false>, &gated_any<true>};

}  // namespace fastops::cpu::FASTOPS_ISA
