// RMS norm and layer norm, one row at a time, written once in the vocabulary of cpu/isa/vec_*.h. A row stays in the
// first cache between the passes over it: statistics first, then the results.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

// x (+ residual) from element i on, `m` of them (W but for the last).
template <class T, bool kAdd>
FASTOPS_INLINE vf norm_take(const T* x, const T* r, int64_t i) {
  return kAdd ? vadd(vload(x + i), vload(r + i)) : vload(x + i);
}
template <class T, bool kAdd>
FASTOPS_INLINE vf norm_take_n(const T* x, const T* r, int64_t i, int m) {
  return kAdd ? vadd(vloadn(x + i, m), vloadn(r + i, m)) : vloadn(x + i, m);
}

// The sum over the row of what f adds to a total for a vector and the number of its lanes that count; four totals.
template <class T, bool kAdd, class F>
FASTOPS_INLINE float norm_total(const T* x, const T* r, int64_t n, F&& f) {
  vf acc[4] = {vzero(), vzero(), vzero(), vzero()};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    FASTOPS_UNROLL
    for (int u = 0; u < 4; ++u) f(acc[u], norm_take<T, kAdd>(x, r, i + u * W), W);
  }
  for (; i + W <= n; i += W) f(acc[0], norm_take<T, kAdd>(x, r, i), W);
  if (i < n) f(acc[1], norm_take_n<T, kAdd>(x, r, i, static_cast<int>(n - i)), static_cast<int>(n - i));
  return vsum(vadd(vadd(acc[0], acc[1]), vadd(acc[2], acc[3])));
}

// Lines of the next row, asked for while this one's results are made: the first pass over it then finds them there.
template <class T>
struct NormNext {
  const T *x, *r;  // or null
  FASTOPS_INLINE void ask(int64_t i) const {
    if (i * static_cast<int64_t>(sizeof(T)) % 64 != 0) return;
    if (x != nullptr) vprefetch(x + i);
    if (r != nullptr) vprefetch(r + i);
  }
};

// y = (s - mean) rstd weight + bias for `m` elements of the row, and s itself to `sum`.
template <class T, bool kAdd>
FASTOPS_INLINE vf norm_one(const NormArgs& a, const T* x, const T* r, T* sum, vf mean, vf rstd, int64_t i, int m) {
  const vf s = m == W ? norm_take<T, kAdd>(x, r, i) : norm_take_n<T, kAdd>(x, r, i, m);
  vf y = a.layer ? vmul(vsub(s, mean), rstd) : vmul(s, rstd);
  if (a.weight) y = vmul(y, m == W ? vload(a.weight + i) : vloadn(a.weight + i, m));
  if (a.bias) y = vadd(y, m == W ? vload(a.bias + i) : vloadn(a.bias + i, m));
  if constexpr (kAdd) {
    if (m == W)
      vstore(sum + i, s);
    else
      vstoren(sum + i, s, m);
  }
  return y;
}

// A row of results: two vectors at a time past the caches, where every pair is aligned.
template <class T, class O, bool kAdd, bool kStream>
FASTOPS_INLINE void norm_finish(const NormArgs& a, const T* x, const T* r, T* sum, O* out, NormNext<T> next, float mean,
                                float rstd) {
  const vf middle = vset(mean), scale = vset(rstd);
  int64_t i = 0;
  if constexpr (kStream) {
    for (; i + 2 * W <= a.n; i += 2 * W) {
      next.ask(i);
      next.ask(i + W);
      const vf first = norm_one<T, kAdd>(a, x, r, sum, middle, scale, i, W);
      vstream(out + i, first, norm_one<T, kAdd>(a, x, r, sum, middle, scale, i + W, W));
    }
  }
  for (; i + W <= a.n; i += W) {
    next.ask(i);
    vstore(out + i, norm_one<T, kAdd>(a, x, r, sum, middle, scale, i, W));
  }
  const int rest = static_cast<int>(a.n - i);
  if (rest > 0) vstoren(out + i, norm_one<T, kAdd>(a, x, r, sum, middle, scale, i, rest), rest);
}

// The same into floats; returns the largest magnitude, or NaN where a result is not finite (a maximum may lose it).
template <class T, bool kAdd>
FASTOPS_INLINE float norm_finish_wide(const NormArgs& a, const T* x, const T* r, T* sum, float* out, float mean,
                                      float rstd) {
  const vf middle = vset(mean), scale = vset(rstd);
  vf top = vzero(), odd = vzero();
  for (int64_t i = 0; i < a.n; i += W) {
    const int m = static_cast<int>(a.n - i < W ? a.n - i : W);
    vf y = norm_one<T, kAdd>(a, x, r, sum, middle, scale, i, m);
    if (m < W) y = vkeep(y, 0, m, 0.0f);
    top = vmax(top, vabs(y));
    odd = vfma(y, vzero(), odd);
    vstoren(out + i, y, m);
  }
  return vhmax(top) + vsum(odd);
}

// Divides the row by its scale and stores it as `store` does, element by element of a vector.
template <class Q, class Store>
FASTOPS_INLINE void norm_quantise(const float* y, Q* out, int64_t n, float inverse, Store&& store) {
  const vf scale = vset(inverse);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, vmul(vload(y + i), scale));
  if (i < n) {
    Q tail[W];
    store(tail, vmul(vloadn(y + i, static_cast<int>(n - i)), scale));
    std::memcpy(out + i, tail, static_cast<size_t>(n - i));
  }
}

template <class T, class O, bool kAdd, bool kStream>
void norm_rows(const NormArgs& a, int64_t first, int64_t last, float* scratch) {
  const float count = 1.0f / static_cast<float>(a.n);
  for (int64_t row = first; row < last; ++row) {
    const T* x = reinterpret_cast<const T*>(a.x.at(row));
    const T* r = kAdd ? reinterpret_cast<const T*>(a.residual.at(row)) : nullptr;
    T* sum = kAdd ? reinterpret_cast<T*>(a.sum.at(row)) : nullptr;
    float mean = 0.0f;
    if (a.layer) mean = norm_total<T, kAdd>(x, r, a.n, [](vf& t, vf s, int) FASTOPS_LAMBDA { t = vadd(t, s); }) * count;
    const vf middle = vset(mean);
    const float squares = norm_total<T, kAdd>(x, r, a.n, [&](vf& t, vf s, int m) FASTOPS_LAMBDA {
      vf d = vsub(s, middle);
      if (m < W) d = vkeep(d, 0, m, 0.0f);
      t = vfma(d, d, t);
    });
    const float rstd = 1.0f / __builtin_sqrtf(squares * count + a.eps);
    if (a.mean) a.mean[row] = mean;
    if (a.rstd) a.rstd[row] = rstd;
    if constexpr (sizeof(O) > 1) {
      NormNext<T> next{};
      if (row + 1 < last) next.x = reinterpret_cast<const T*>(a.x.at(row + 1));
      if (kAdd && row + 1 < last) next.r = reinterpret_cast<const T*>(a.residual.at(row + 1));
      norm_finish<T, O, kAdd, kStream>(a, x, r, sum, reinterpret_cast<O*>(a.out.at(row)), next, mean, rstd);
    } else {
      const float most = norm_finish_wide<T, kAdd>(a, x, r, sum, scratch, mean, rstd);
      const float scale = most == 0.0f ? 1.0f : most / (a.out_dtype == FASTOPS_I8 ? 127.0f : 448.0f);
      a.scales[row] = scale;
      if (a.out_dtype == FASTOPS_I8)
        norm_quantise(scratch, reinterpret_cast<int8_t*>(a.out.at(row)), a.n, 1.0f / scale,
                      [](int8_t* p, vf y) FASTOPS_LAMBDA { vstore_i8(p, y); });
      else
        norm_quantise(scratch, reinterpret_cast<uint8_t*>(a.out.at(row)), a.n, 1.0f / scale,
                      [](uint8_t* p, vf y) FASTOPS_LAMBDA { vstore_f8(p, y); });
    }
  }
  if (kStream) vstream_done();
}

template <class T, class O>
void norm_as(const NormArgs& a, int64_t first, int64_t last, float* scratch) {
  if (a.residual) {
    norm_rows<T, O, true, false>(a, first, last, scratch);
    return;
  }
  if constexpr (sizeof(O) > 1)
    if (a.stream) {
      norm_rows<T, O, false, true>(a, first, last, scratch);
      return;
    }
  norm_rows<T, O, false, false>(a, first, last, scratch);
}

template <class T>
void norm_from(const NormArgs& a, int64_t first, int64_t last, float* scratch) {
  if (a.out_dtype == FASTOPS_I8 || a.out_dtype == FASTOPS_F8_E4M3)
    norm_as<T, int8_t>(a, first, last, scratch);
  else if (a.out_dtype == a.dtype)
    norm_as<T, T>(a, first, last, scratch);
  else
    norm_as<T, float>(a, first, last, scratch);
}

void norm_forward(const NormArgs& a, int64_t first, int64_t last, float* scratch) {
  if (a.dtype == FASTOPS_F32) norm_from<float>(a, first, last, scratch);
  if (a.dtype == FASTOPS_F16) norm_from<f16>(a, first, last, scratch);
  if (a.dtype == FASTOPS_BF16) norm_from<bf16>(a, first, last, scratch);
}

// With h = (s - mean) rstd and m = dout weight: ds = rstd (m - mean(m) [layer] - h mean(m h)) + dsum.
template <class T>
void norm_backward_as(const NormBwdArgs& a, int64_t first, int64_t last, float* dweight, float* dbias) {
  const float count = 1.0f / static_cast<float>(a.n);
  for (int64_t row = first; row < last; ++row) {
    const T* dout = reinterpret_cast<const T*>(a.dout.at(row));
    const T* s = reinterpret_cast<const T*>(a.s.at(row));
    const T* dsum = a.dsum ? reinterpret_cast<const T*>(a.dsum.at(row)) : nullptr;
    T* ds = reinterpret_cast<T*>(a.ds.at(row));
    const vf middle = vset(a.layer ? a.mean[row] : 0.0f), scale = vset(a.rstd[row]);
    vf mh = vzero(), ms = vzero();
    const auto gather = [&](int64_t i, int m) FASTOPS_LAMBDA {
      const bool all = m == W;
      const vf g = all ? vload(dout + i) : vloadn(dout + i, m);
      vf h = vmul(vsub(all ? vload(s + i) : vloadn(s + i, m), middle), scale);
      if (!all) h = vkeep(h, 0, m, 0.0f);
      vf w = g;
      if (a.weight) w = vmul(g, all ? vload(a.weight + i) : vloadn(a.weight + i, m));
      mh = vfma(w, h, mh);
      ms = vadd(ms, w);
      if (dweight) {
        if (all)
          vstore(dweight + i, vfma(g, h, vload(dweight + i)));
        else
          vstoren(dweight + i, vfma(g, h, vloadn(dweight + i, m)), m);
      }
      if (dbias) {
        if (all)
          vstore(dbias + i, vadd(g, vload(dbias + i)));
        else
          vstoren(dbias + i, vadd(g, vloadn(dbias + i, m)), m);
      }
    };
    int64_t i = 0;
    for (; i + W <= a.n; i += W) gather(i, W);
    if (i < a.n) gather(i, static_cast<int>(a.n - i));
    const vf along = vset(vsum(mh) * count), level = vset(a.layer ? vsum(ms) * count : 0.0f);
    const auto finish = [&](int64_t at, int m) FASTOPS_LAMBDA {
      const bool all = m == W;
      vf w = all ? vload(dout + at) : vloadn(dout + at, m);
      if (a.weight) w = vmul(w, all ? vload(a.weight + at) : vloadn(a.weight + at, m));
      const vf h = vmul(vsub(all ? vload(s + at) : vloadn(s + at, m), middle), scale);
      vf d = vmul(vsub(vsub(w, level), vmul(h, along)), scale);
      if (dsum) d = vadd(d, all ? vload(dsum + at) : vloadn(dsum + at, m));
      if (all)
        vstore(ds + at, d);
      else
        vstoren(ds + at, d, m);
    };
    i = 0;
    for (; i + W <= a.n; i += W) finish(i, W);
    if (i < a.n) finish(i, static_cast<int>(a.n - i));
  }
}

void norm_backward(const NormBwdArgs& a, int64_t first, int64_t last, float* dweight, float* dbias) {
  if (a.dtype == FASTOPS_F32) norm_backward_as<float>(a, first, last, dweight, dbias);
  if (a.dtype == FASTOPS_F16) norm_backward_as<f16>(a, first, last, dweight, dbias);
  if (a.dtype == FASTOPS_BF16) norm_backward_as<bf16>(a, first, last, dweight, dbias);
}

template <class T>
void norm_widen_as(const T* x, float offset, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) vstore(out + i, vadd(vload(x + i), vset(offset)));
  for (; i < n; ++i) out[i] = to_f32(x[i]) + offset;
}

void norm_widen(const void* x, int32_t dtype, float offset, float* out, int64_t n) {
  if (dtype == FASTOPS_F32) norm_widen_as(static_cast<const float*>(x), offset, out, n);
  if (dtype == FASTOPS_F16) norm_widen_as(static_cast<const f16*>(x), offset, out, n);
  if (dtype == FASTOPS_BF16) norm_widen_as(static_cast<const bf16*>(x), offset, out, n);
}

}  // namespace

extern const NormTable norm_table;
const NormTable norm_table = {&norm_forward, &norm_backward, &norm_widen};

}  // namespace fastops::cpu::FASTOPS_ISA
