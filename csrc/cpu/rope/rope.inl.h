// Rotary embedding of one token's heads, after an RMS norm of each where asked, written once in the vocabulary of
// cpu/isa/vec_*.h. (Su et al., RoFormer, arXiv:2104.09864, section 3.4.2, equation 34; pairs half a head apart as
// GPT-NeoX has them, or neighbours.)
namespace fastops::cpu::FASTOPS_ISA {
namespace {

template <class T>
void rope_widen(const char* from, int64_t n, float sign, float* to) {
  const T* x = reinterpret_cast<const T*>(from);
  for (int64_t i = 0; i < n; i += W) {
    const int m = static_cast<int>(n - i < W ? n - i : W);
    vstoren(to + i, vmul(vloadn(x + i, m), vset(sign)), m);
  }
}

void rope_angles(const RopeAngles& from, int64_t half, float* cos, float* sin) {
  const float sign = from.inverse ? -1.0f : 1.0f;
  if (from.dtype == FASTOPS_F32)
    rope_widen<float>(from.cos, half, 1.0f, cos), rope_widen<float>(from.sin, half, sign, sin);
  if (from.dtype == FASTOPS_F16) rope_widen<f16>(from.cos, half, 1.0f, cos), rope_widen<f16>(from.sin, half, sign, sin);
  if (from.dtype == FASTOPS_BF16)
    rope_widen<bf16>(from.cos, half, 1.0f, cos), rope_widen<bf16>(from.sin, half, sign, sin);
}

// A head as floats in `x`, normalised where a weight is given: x rstd weight.
template <class T>
FASTOPS_INLINE void rope_take(const T* in, int64_t d, const float* weight, float eps, float* x) {
  vf squares = vzero();
  for (int64_t i = 0; i < d; i += W) {
    const int m = static_cast<int>(d - i < W ? d - i : W);
    const vf v = m == W ? vload(in + i) : vloadn(in + i, m);
    squares = vfma(v, v, squares);
    vstore(x + i, v);  // the scratch is padded
  }
  if (weight == nullptr) return;
  const vf rstd = vset(1.0f / __builtin_sqrtf(vsum(squares) / static_cast<float>(d) + eps));
  for (int64_t i = 0; i < d; i += W) {
    const int m = static_cast<int>(d - i < W ? d - i : W);
    vstore(x + i, vmul(vmul(vload(x + i), rstd), m == W ? vload(weight + i) : vloadn(weight + i, m)));
  }
}

template <class T>
void rope_heads_as(const RopeHeads& h, int64_t d, int64_t half, const float* cos, const float* sin, float eps,
                   bool interleaved, float* x) {
  for (int64_t head = 0; head < h.heads; ++head) {
    const T* in = reinterpret_cast<const T*>(h.in + head * h.in_step);
    T* out = reinterpret_cast<T*>(h.out + head * h.out_step);
    rope_take(in, d, h.weight, eps, x);
    if (interleaved) {
      for (int64_t i = 0; i < half; ++i) {
        const float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * cos[i] - b * sin[i];
        x[2 * i + 1] = b * cos[i] + a * sin[i];
      }
      for (int64_t i = 0; i < d; i += W) vstoren(out + i, vload(x + i), static_cast<int>(d - i < W ? d - i : W));
      continue;
    }
    for (int64_t i = 0; i < half; i += W) {
      const int m = static_cast<int>(half - i < W ? half - i : W);
      const vf a = vloadn(x + i, m), b = vloadn(x + half + i, m), c = vloadn(cos + i, m), s = vloadn(sin + i, m);
      vstoren(out + i, vsub(vmul(a, c), vmul(b, s)), m);
      vstoren(out + half + i, vfma(b, c, vmul(a, s)), m);
    }
    for (int64_t i = 2 * half; i < d; i += W) {
      const int m = static_cast<int>(d - i < W ? d - i : W);
      vstoren(out + i, vloadn(x + i, m), m);
    }
  }
}

void rope_heads(const RopeHeads& h, int64_t d, int64_t half, const float* cos, const float* sin, float eps,
                bool interleaved, int32_t dtype, float* x) {
  if (dtype == FASTOPS_F32) rope_heads_as<float>(h, d, half, cos, sin, eps, interleaved, x);
  if (dtype == FASTOPS_F16) rope_heads_as<f16>(h, d, half, cos, sin, eps, interleaved, x);
  if (dtype == FASTOPS_BF16) rope_heads_as<bf16>(h, d, half, cos, sin, eps, interleaved, x);
}

}  // namespace

extern const RopeTable rope_table;
const RopeTable rope_table = {&rope_angles, &rope_heads};

}  // namespace fastops::cpu::FASTOPS_ISA
