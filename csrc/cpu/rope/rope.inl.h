// Rotary embedding of one token's heads, after an RMS norm of each where asked, written once in the vocabulary of
// cpu/isa/vec_*.h. (Su et al., RoFormer, arXiv:2104.09864, section 3.4.2, equation 34; pairs half a head apart as
// GPT-NeoX has them, or neighbours.)
namespace fastops::cpu::FASTOPS_ISA {
namespace {

// to[i] = from[i] scale + offset.
template <class T>
void rope_widen_as(const char* from, int64_t n, float scale, float offset, float* to) {
  const T* x = reinterpret_cast<const T*>(from);
  for (int64_t i = 0; i < n; i += W) {
    const int m = static_cast<int>(n - i < W ? n - i : W);
    vstoren(to + i, vfma(vloadn(x + i, m), vset(scale), vset(offset)), m);
  }
}

void rope_widen(const char* from, int32_t dtype, int64_t n, float scale, float offset, float* to) {
  if (dtype == FASTOPS_F32) rope_widen_as<float>(from, n, scale, offset, to);
  if (dtype == FASTOPS_F16) rope_widen_as<f16>(from, n, scale, offset, to);
  if (dtype == FASTOPS_BF16) rope_widen_as<bf16>(from, n, scale, offset, to);
}

void rope_weight(const char* from, int32_t dtype, int64_t n, float offset, float* to) {
  rope_widen(from, dtype, n, 1.0f, offset, to);
}

void rope_angles(const RopeAngles& from, const RopeShape& shape, float* cos, float* sin) {
  const int64_t half = shape.half;
  rope_widen(from.cos, from.dtype, half, 1.0f, 0.0f, cos);
  rope_widen(from.sin, from.dtype, half, from.inverse ? -1.0f : 1.0f, 0.0f, sin);
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
FASTOPS_INLINE void rope_rstd(const RopeHeads& h, int64_t d, float eps, int64_t first, float* rstd) {
  vf squares[W];
  for (int64_t i = 0; i < W; ++i)
    squares[i] =
        first + i < h.heads ? rope_squares(reinterpret_cast<const T*>(h.in + (first + i) * h.in_step), d) : vzero();
  vstore(rstd, vreduce(squares));
  for (int i = 0; i < W; ++i) rstd[i] = 1.0f / __builtin_sqrtf(rstd[i] / static_cast<float>(d) + eps);
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

// As rope_halves where half is a multiple of 2 W, with results past the caches: these want no haste between the stores
// (docs/design/005-fused.md).
template <class T, bool kNorm>
FASTOPS_INLINE void rope_streamed(const RopeInput<T>& x, T* out, int64_t half, const float* cos, const float* sin) {
  for (int64_t i = 0; i < half; i += 2 * W) {
    const vf a = x.template take<kNorm, true>(i, W), b = x.template take<kNorm, true>(half + i, W);
    const vf c = vload(cos + i), s = vload(sin + i);
    const vf a2 = x.template take<kNorm, true>(i + W, W), b2 = x.template take<kNorm, true>(half + i + W, W);
    const vf c2 = vload(cos + i + W), s2 = vload(sin + i + W);
    vstream(out + i, vsub(vmul(a, c), vmul(b, s)), vsub(vmul(a2, c2), vmul(b2, s2)));
    vstream(out + half + i, vfma(b, c, vmul(a, s)), vfma(b2, c2, vmul(a2, s2)));
  }
}

// Heads ahead that memory is asked for: as far as rope_rstd reads at once, and half as far again. Half way there it is
// asked for a second time, for a request that finds the queue of misses full is dropped.
constexpr int64_t kRopeLead = 24;

// Asks for the head `i` places behind the first of these.
enum class RopeAsk { read, write, to_l2 };
FASTOPS_INLINE void rope_ask(const RopeHeads& h, int64_t i, int64_t bytes, RopeAsk how) {
  const RopePlace* at = &h;
  for (int k = 0; i >= at->heads; ++k) {
    if (k == 2) return;
    i -= at->heads;
    at = &h.then[k];
  }
  const char* in = at->in + i * at->in_step;
  if (how == RopeAsk::to_l2) {
    for (int64_t b = 0; b < bytes; b += 64) vprefetch_l2(in + b);
    return;
  }
  for (int64_t b = 0; b < bytes; b += 64) vprefetch(in + b);
  if (how == RopeAsk::write)
    for (int64_t b = 0; b < bytes; b += 64) vprefetch_to_write(at->out + i * at->out_step + b);
}

// cos and sin for pairs half a head apart, the weights of an RMS norm in them: what the first and the second half of a
// head are multiplied by, in the order of vload_pair.
struct RopeTurns {
  float a_cos[kRopePairs], a_sin[kRopePairs], b_cos[kRopePairs], b_sin[kRopePairs];

  template <class T>
  FASTOPS_INLINE void set(const float* weight, const float* cos, const float* sin, int64_t half) {
    const auto put = [](float* to, const float* angle, const float* w) FASTOPS_LAMBDA {
      vf v[2] = {vload(angle), vload(angle + W)};
      if (w != nullptr) v[0] = vmul(vload(w), v[0]), v[1] = vmul(vload(w + W), v[1]);
      constexpr const T* kType = nullptr;
      vpair_as(kType, v);
      vstore(to, v[0]), vstore(to + W, v[1]);
    };
    const float* second = weight != nullptr ? weight + half : nullptr;
    for (int64_t i = 0; i < half; i += 2 * W) {
      put(a_cos + i, cos + i, weight ? weight + i : nullptr), put(a_sin + i, sin + i, weight ? weight + i : nullptr);
      put(b_cos + i, cos + i, second ? second + i : nullptr), put(b_sin + i, sin + i, second ? second + i : nullptr);
    }
  }
};

// A whole head, half a multiple of 2 W.
template <class T, bool kNorm>
FASTOPS_INLINE void rope_whole(const T* in, T* out, int64_t half, float rstd, const RopeTurns& by) {
  const vf r = vset(rstd);
  for (int64_t i = 0; i < half; i += 2 * W) {
    vf a[2], b[2], left[2], right[2];
    vload_pair(in + i, &a[0], &a[1]), vload_pair(in + half + i, &b[0], &b[1]);
    for (int j = 0; j < 2; ++j) {
      const int64_t at = i + j * W;
      if (kNorm) a[j] = vmul(a[j], r), b[j] = vmul(b[j], r);
      left[j] = vsub(vmul(a[j], vload(by.a_cos + at)), vmul(b[j], vload(by.b_sin + at)));
      right[j] = vfma(b[j], vload(by.b_cos + at), vmul(a[j], vload(by.a_sin + at)));
    }
    vstore_pair(out + i, left[0], left[1]), vstore_pair(out + half + i, right[0], right[1]);
  }
}

// Any other head, one by one.
template <class T, bool kNorm>
void rope_head(const T* in, T* out, const RopeHeads& h, const RopeShape& shape, const float* cos, const float* sin,
               float rstd) {
  const int64_t d = shape.d, half = shape.half, turned = 2 * half;
  const RopeInput<T> x{in, h.weight, vset(rstd)};
  if (shape.interleaved) {
    if (turned % W == 0)
      rope_neighbours<T, kNorm, true>(x, out, turned, cos, sin);
    else
      rope_neighbours<T, kNorm, false>(x, out, turned, cos, sin);
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

template <class T, bool kNorm>
void rope_heads_as(const RopeHeads& h, const RopeShape& shape, const float* cos, const float* sin) {
  const int64_t bytes = shape.d * static_cast<int64_t>(sizeof(T));
  const bool even = !shape.interleaved && shape.half % (2 * W) == 0 && 2 * shape.half == shape.d;
  const bool stream = even && shape.stream, whole = even && !stream;
  const int64_t lead = stream ? h.heads + h.then[0].heads : kRopeLead;
  RopeTurns by;
  if (whole) by.set<T>(kNorm ? h.weight : nullptr, cos, sin, shape.half);
  float rstd[W] = {};
  for (int64_t head = 0; head < h.heads; ++head) {
    if (kNorm && head % W == 0) rope_rstd<T>(h, shape.d, shape.eps, head, rstd);
    const T* in = reinterpret_cast<const T*>(h.in + head * h.in_step);
    T* out = reinterpret_cast<T*>(h.out + head * h.out_step);
    const float r = rstd[head % W];
    rope_ask(h, head + lead, bytes, !stream ? RopeAsk::write : shape.by_l2 ? RopeAsk::to_l2 : RopeAsk::read);
    if (!stream) rope_ask(h, head + lead / 2, bytes, RopeAsk::write);
    if (stream)
      rope_streamed<T, kNorm>(RopeInput<T>{in, h.weight, vset(r)}, out, shape.half, cos, sin);
    else if (whole)
      rope_whole<T, kNorm>(in, out, shape.half, r, by);
    else
      rope_head<T, kNorm>(in, out, h, shape, cos, sin, r);
  }
  if (stream) vstream_done();
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
const RopeTable rope_table = {&rope_weight, &rope_angles, &rope_heads};

}  // namespace fastops::cpu::FASTOPS_ISA
