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

void rope_angles(const RopeAngles& from, const RopeShape& shape, float* cos, float* sin) {
  const float sign = from.inverse ? -1.0f : 1.0f;
  const int64_t half = shape.half;
  if (from.dtype == FASTOPS_F32)
    rope_widen<float>(from.cos, half, 1.0f, cos), rope_widen<float>(from.sin, half, sign, sin);
  if (from.dtype == FASTOPS_F16) rope_widen<f16>(from.cos, half, 1.0f, cos), rope_widen<f16>(from.sin, half, sign, sin);
  if (from.dtype == FASTOPS_BF16)
    rope_widen<bf16>(from.cos, half, 1.0f, cos), rope_widen<bf16>(from.sin, half, sign, sin);
  if (!shape.interleaved) return;
  for (int64_t i = half; i-- > 0;) {
    cos[2 * i] = cos[2 * i + 1] = cos[i];
    const float s = sin[i];
    sin[2 * i] = -s;
    sin[2 * i + 1] = s;
  }
}

// The sum of squares of a head's elements, spread over a vector.
template <class T>
FASTOPS_INLINE vf rope_squares(const T* in, int64_t d) {
  vf even = vzero(), odd = vzero();
  int64_t i = 0;
  for (; i + 4 * W <= d; i += 4 * W) {
    even = vadd_squares2(even, in + i);
    odd = vadd_squares2(odd, in + i + 2 * W);
  }
  for (; i < d; i += W) {
    const vf a = vloadn(in + i, static_cast<int>(d - i < W ? d - i : W));
    even = vfma(a, a, even);
  }
  return vadd(even, odd);
}

// 1 / the root mean square of up to W heads: one head alone would wait for its sum, its root and its quotient.
template <class T>
FASTOPS_INLINE void rope_rstd(const RopeHeads& h, const RopeShape& shape, int64_t first, float* rstd) {
  vf squares[W];
  for (int64_t i = 0; i < W; ++i)
    squares[i] = first + i < h.heads ? rope_squares(reinterpret_cast<const T*>(h.in + (first + i) * h.in_step), shape.d)
                                     : vzero();
  vstore(rstd, vreduce(squares));
  for (int i = 0; i < W; ++i) rstd[i] = 1.0f / __builtin_sqrtf(rstd[i] / static_cast<float>(shape.d) + shape.eps);
}

// One head's elements, normalised where a weight is given: x rstd weight.
template <class T>
struct RopeInput {
  const T* in;
  const float* weight;
  vf rstd;

  template <bool kNorm, bool kFull>
  FASTOPS_INLINE vf take(int64_t i, int m) const {
    const vf x = kFull ? vload(in + i) : vloadn(in + i, m);
    if constexpr (!kNorm) return x;
    return vmul(vmul(x, rstd), kFull ? vload(weight + i) : vloadn(weight + i, m));
  }
};

template <bool kFull, class T>
FASTOPS_INLINE void rope_put(T* p, vf y, int m) {
  if constexpr (kFull)
    vstore(p, y);
  else
    vstoren(p, y, m);
}

// Elements [first, last) turned (neighbours), kFull: a whole number of vectors.
template <class T, bool kNorm, bool kFull>
FASTOPS_INLINE void rope_neighbours(const RopeInput<T>& x, T* out, int64_t turned, const float* cos, const float* sin) {
  for (int64_t i = 0; i < turned; i += W) {
    const int m = static_cast<int>(turned - i < W ? turned - i : W);
    const vf a = x.template take<kNorm, kFull>(i, m);
    const vf c = kFull ? vload(cos + i) : vloadn(cos + i, m), s = kFull ? vload(sin + i) : vloadn(sin + i, m);
    rope_put<kFull>(out + i, vfma(a, c, vmul(vswap(a), s)), m);
  }
}

template <class T, bool kNorm, bool kFull>
FASTOPS_INLINE void rope_halves(const RopeInput<T>& x, T* out, int64_t half, const float* cos, const float* sin) {
  for (int64_t i = 0; i < half; i += W) {
    const int m = static_cast<int>(half - i < W ? half - i : W);
    const vf a = x.template take<kNorm, kFull>(i, m), b = x.template take<kNorm, kFull>(half + i, m);
    const vf c = kFull ? vload(cos + i) : vloadn(cos + i, m), s = kFull ? vload(sin + i) : vloadn(sin + i, m);
    rope_put<kFull>(out + i, vsub(vmul(a, c), vmul(b, s)), m);
    rope_put<kFull>(out + half + i, vfma(b, c, vmul(a, s)), m);
  }
}

// As rope_halves where half is a multiple of 2 W; kStream: results past the caches.
template <class T, bool kNorm, bool kStream>
FASTOPS_INLINE void rope_halves2(const RopeInput<T>& x, T* out, int64_t half, const float* cos, const float* sin) {
  const auto put = [](T* p, vf a, vf b) FASTOPS_LAMBDA {
    if constexpr (kStream)
      vstream(p, a, b);
    else
      vstore2(p, a, b);
  };
  for (int64_t i = 0; i < half; i += 2 * W) {
    const vf a = x.template take<kNorm, true>(i, W), b = x.template take<kNorm, true>(half + i, W);
    const vf c = vload(cos + i), s = vload(sin + i);
    const vf a2 = x.template take<kNorm, true>(i + W, W), b2 = x.template take<kNorm, true>(half + i + W, W);
    const vf c2 = vload(cos + i + W), s2 = vload(sin + i + W);
    put(out + i, vsub(vmul(a, c), vmul(b, s)), vsub(vmul(a2, c2), vmul(b2, s2)));
    put(out + half + i, vfma(b, c, vmul(a, s)), vfma(b2, c2, vmul(a2, s2)));
  }
}

template <class T, bool kNorm>
void rope_heads_as(const RopeHeads& h, const RopeShape& shape, const float* cos, const float* sin) {
  const int64_t d = shape.d, half = shape.half, turned = 2 * half;
  float rstd[W] = {};
  for (int64_t head = 0; head < h.heads; ++head) {
    if (kNorm && head % W == 0) rope_rstd<T>(h, shape, head, rstd);
    const RopeInput<T> x{reinterpret_cast<const T*>(h.in + head * h.in_step), h.weight, vset(rstd[head % W])};
    T* out = reinterpret_cast<T*>(h.out + head * h.out_step);
    const int64_t bytes = d * static_cast<int64_t>(sizeof(T));
    if (h.next != nullptr)
      for (int64_t i = 0; i < bytes; i += 64) vprefetch(h.next + head * h.in_step + i);
    if (h.next_out != nullptr)
      for (int64_t i = 0; i < bytes; i += 64) vprefetch_to_write(h.next_out + head * h.out_step + i);
    if (shape.interleaved) {
      if (turned % W == 0)
        rope_neighbours<T, kNorm, true>(x, out, turned, cos, sin);
      else
        rope_neighbours<T, kNorm, false>(x, out, turned, cos, sin);
    } else if (shape.stream && half % (2 * W) == 0 && turned == d) {
      rope_halves2<T, kNorm, true>(x, out, half, cos, sin);
    } else if (half % (2 * W) == 0) {
      rope_halves2<T, kNorm, false>(x, out, half, cos, sin);
    } else if (half % W == 0) {
      rope_halves<T, kNorm, true>(x, out, half, cos, sin);
    } else {
      rope_halves<T, kNorm, false>(x, out, half, cos, sin);
    }
    for (int64_t i = turned; i < d; i += W) {
      const int m = static_cast<int>(d - i < W ? d - i : W);
      vstoren(out + i, x.template take<kNorm, false>(i, m), m);
    }
  }
  if (shape.stream) vstream_done();
}

template <class T>
void rope_heads_of(const RopeHeads& h, const RopeShape& shape, const float* cos, const float* sin) {
  if (h.weight != nullptr)
    rope_heads_as<T, true>(h, shape, cos, sin);
  else
    rope_heads_as<T, false>(h, shape, cos, sin);
}

void rope_heads(const RopeHeads& h, const RopeShape& shape, const float* cos, const float* sin) {
  if (shape.dtype == FASTOPS_F32) rope_heads_of<float>(h, shape, cos, sin);
  if (shape.dtype == FASTOPS_F16) rope_heads_of<f16>(h, shape, cos, sin);
  if (shape.dtype == FASTOPS_BF16) rope_heads_of<bf16>(h, shape, cos, sin);
}

}  // namespace

extern const RopeTable rope_table;
const RopeTable rope_table = {&rope_angles, &rope_heads};

}  // namespace fastops::cpu::FASTOPS_ISA
