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
// (Behind the last row of an item comes the first one of the next, which the same thread takes as a rule.)
template <class T>
struct NormNext {
  const T *x, *r;  // or null
  FASTOPS_INLINE void ask(int64_t i) const {
    if (i * static_cast<int64_t>(sizeof(T)) % 64 != 0) return;
    if (x != nullptr) vprefetch(x + i);
    if (r != nullptr) vprefetch(r + i);
  }
};

// A row and what turns it into results, by value: results may be stored over anything the arguments point to.
template <class T, bool kAdd, bool kLayer>
struct NormRow {
  const T *x, *r;
  T* sum;
  const float *weight, *bias;
  vf mean, rstd;

  // y = (s - mean) rstd weight + bias for `m` elements, and s itself to `sum`.
  FASTOPS_INLINE vf one(int64_t i, int m) const {
    const vf s = m == W ? norm_take<T, kAdd>(x, r, i) : norm_take_n<T, kAdd>(x, r, i, m);
    vf y = vmul(kLayer ? vsub(s, mean) : s, rstd);
    if (weight) y = vmul(y, m == W ? vload(weight + i) : vloadn(weight + i, m));
    if (kLayer && bias) y = vadd(y, m == W ? vload(bias + i) : vloadn(bias + i, m));
    if constexpr (kAdd) {
      if (m == W)
        vstore(sum + i, s);
      else
        vstoren(sum + i, s, m);
    }
    return y;
  }
};

// A row of results, two vectors at a time; kStream: past the caches, where every pair is aligned.
template <bool kStream, class O, class T, bool kAdd, bool kLayer>
FASTOPS_INLINE void norm_finish(const NormRow<T, kAdd, kLayer> row, O* out, const NormNext<T> next, int64_t n) {
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    next.ask(i);
    next.ask(i + W);
    const vf first = row.one(i, W), second = row.one(i + W, W);
    if constexpr (kStream)
      vstream(out + i, first, second);
    else
      vstore2(out + i, first, second);
  }
  for (; i < n; i += W) {
    const int m = static_cast<int>(n - i < W ? n - i : W);
    vstoren(out + i, row.one(i, m), m);
  }
}

// The same into floats; returns the largest magnitude, or NaN where a result is not finite (a maximum may lose it).
template <class T, bool kAdd, bool kLayer>
FASTOPS_INLINE float norm_finish_wide(const NormRow<T, kAdd, kLayer> row, float* out, int64_t n) {
  vf top = vzero(), odd = vzero();
  for (int64_t i = 0; i < n; i += W) {
    const int m = static_cast<int>(n - i < W ? n - i : W);
    vf y = row.one(i, m);
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

// The sum of squares of x (+ residual), less `mean` where there is one. The lines of `out` (or null) are asked for
// meanwhile: the memory would be idle, and stores would wait for them one by one.
template <class T, bool kAdd, bool kLayer, class O>
FASTOPS_INLINE float norm_squares(const T* x, const T* r, int64_t n, float mean, const O* out) {
  if constexpr (!kAdd && !kLayer) {
    vf acc[4] = {vzero(), vzero(), vzero(), vzero()};
    int64_t i = 0;
    for (; i + 8 * W <= n; i += 8 * W) {
      FASTOPS_UNROLL
      for (int u = 0; u < 4; ++u) acc[u] = vadd_squares2(acc[u], x + i + 2 * u * W);
      if (out != nullptr) {
        FASTOPS_UNROLL
        for (int u = 0; u < 8 * W; u += 64 / static_cast<int>(sizeof(O))) vprefetch_to_write(out + i + u);
      }
    }
    for (; i < n; i += W) {
      const vf s = vloadn(x + i, static_cast<int>(n - i < W ? n - i : W));
      acc[0] = vfma(s, s, acc[0]);
    }
    return vsum(vadd(vadd(acc[0], acc[1]), vadd(acc[2], acc[3])));
  }
  const vf middle = vset(mean);
  return norm_total<T, kAdd>(x, r, n, [&](vf& t, vf s, int m) FASTOPS_LAMBDA {
    vf d = kLayer ? vsub(s, middle) : s;
    if (kLayer && m < W) d = vkeep(d, 0, m, 0.0f);
    t = vfma(d, d, t);
  });
}

// A row of results and, meanwhile, the sum of squares of the next one, in norm_squares' order: memory sees one even
// stream of reads and one of writes, whose lines are asked for kNormLead bytes ahead, in the rows behind where these
// end.
constexpr int64_t kNormLead = 2 << 10;
template <bool kFinish, class O, class T>
FASTOPS_INLINE float norm_finish_and_sum(const NormRow<T, false, false> row, O* out, const T* next, const T* after,
                                         const O* next_out, int64_t n) {
  constexpr int64_t kAheadX = kNormLead / static_cast<int>(sizeof(T)),
                    kAheadO = kNormLead / static_cast<int>(sizeof(O));
  vf acc[4] = {vzero(), vzero(), vzero(), vzero()};
  int64_t i = 0;
  for (; i + 8 * W <= n; i += 8 * W) {
    const T* const ask = i + kAheadX < n ? next + i + kAheadX : after + (i + kAheadX - n);
    const O* const to = i + kAheadO < n ? out + i + kAheadO : next_out + (i + kAheadO - n);
    FASTOPS_UNROLL
    for (int u = 0; u < 8 * W; u += 2 * W) {
      FASTOPS_UNROLL
      for (int k = 0; k < 2 * W; k += 64 / static_cast<int>(sizeof(T))) vprefetch(ask + u + k);
      FASTOPS_UNROLL
      for (int k = 0; k < 2 * W; k += 64 / static_cast<int>(sizeof(O))) vprefetch_to_write(to + u + k);
      acc[u / (2 * W)] = vadd_squares2(acc[u / (2 * W)], next + i + u);
      if constexpr (kFinish) vstore2(out + i + u, row.one(i + u, W), row.one(i + u + W, W));
    }
  }
  for (; i < n; i += W) {
    const int m = static_cast<int>(n - i < W ? n - i : W);
    const vf s = vloadn(next + i, m);
    acc[0] = vfma(s, s, acc[0]);
    if constexpr (kFinish) vstoren(out + i, row.one(i, m), m);
  }
  return vsum(vadd(vadd(acc[0], acc[1]), vadd(acc[2], acc[3])));
}

template <class T, class O>
void norm_rows_in_turn(const NormArgs& a, int64_t first, int64_t last) {
  const float count = 1.0f / static_cast<float>(a.n);
  const auto input = [&](int64_t row) FASTOPS_LAMBDA { return reinterpret_cast<const T*>(a.x.at(row)); };
  const auto result = [&](int64_t row) FASTOPS_LAMBDA { return reinterpret_cast<O*>(a.out.at(row)); };
  const auto behind = [&](int64_t row) FASTOPS_LAMBDA { return input(row + 1 < a.rows ? row + 1 : row); };
  const NormRow<T, false, false> none{nullptr, nullptr, nullptr, nullptr, nullptr, vzero(), vzero()};
  float squares = norm_finish_and_sum<false>(none, result(first), input(first), behind(first), result(first), a.n);
  for (int64_t row = first; row < last; ++row) {
    const float rstd = 1.0f / __builtin_sqrtf(squares * count + a.eps);
    if (a.rstd) a.rstd[row] = rstd;
    const T* const x = input(row);
    const NormRow<T, false, false> now{x, nullptr, nullptr, a.weight, a.bias, vzero(), vset(rstd)};
    if (row + 1 < last)
      squares = norm_finish_and_sum<true>(now, result(row), input(row + 1), behind(row + 1), result(row + 1), a.n);
    else
      norm_finish<false>(now, result(row), NormNext<T>{row + 1 < a.rows ? input(row + 1) : nullptr, nullptr}, a.n);
  }
}

template <class T, class O, bool kAdd, bool kLayer, bool kStream>
void norm_rows(const NormArgs& a, int64_t first, int64_t last, float* scratch) {
  const float count = 1.0f / static_cast<float>(a.n);
  for (int64_t row = first; row < last; ++row) {
    const T* x = reinterpret_cast<const T*>(a.x.at(row));
    const T* r = kAdd ? reinterpret_cast<const T*>(a.residual.at(row)) : nullptr;
    T* sum = kAdd ? reinterpret_cast<T*>(a.sum.at(row)) : nullptr;
    float mean = 0.0f;
    if (kLayer) mean = norm_total<T, kAdd>(x, r, a.n, [](vf& t, vf s, int) FASTOPS_LAMBDA { t = vadd(t, s); }) * count;
    O* const out = reinterpret_cast<O*>(a.out.at(row));
    const float squares = norm_squares<T, kAdd, kLayer>(x, r, a.n, mean, kStream ? nullptr : out);
    const float rstd = 1.0f / __builtin_sqrtf(squares * count + a.eps);
    if (a.mean) a.mean[row] = mean;
    if (a.rstd) a.rstd[row] = rstd;
    const NormRow<T, kAdd, kLayer> now{x, r, sum, a.weight, a.bias, vset(mean), vset(rstd)};
    if constexpr (sizeof(O) > 1) {
      NormNext<T> next{};
      if (row + 1 < a.rows) next.x = reinterpret_cast<const T*>(a.x.at(row + 1));
      if (kAdd && row + 1 < a.rows) next.r = reinterpret_cast<const T*>(a.residual.at(row + 1));
      norm_finish<kStream>(now, out, next, a.n);
    } else {
      const float most = norm_finish_wide(now, scratch, a.n);
      const float scale = most == 0.0f ? 1.0f : most / (a.out_dtype == FASTOPS_I8 ? 127.0f : 448.0f);
      a.scales[row] = scale;
      if (a.out_dtype == FASTOPS_I8)
        norm_quantise(scratch, reinterpret_cast<int8_t*>(out), a.n, 1.0f / scale,
                      [](int8_t* p, vf y) FASTOPS_LAMBDA { vstore_i8(p, y); });
      else
        norm_quantise(scratch, reinterpret_cast<uint8_t*>(out), a.n, 1.0f / scale,
                      [](uint8_t* p, vf y) FASTOPS_LAMBDA { vstore_f8(p, y); });
    }
  }
  if (kStream) vstream_done();
}

template <class T, class O, bool kLayer>
void norm_as(const NormArgs& a, int64_t first, int64_t last, float* scratch) {
  if (a.residual) {
    norm_rows<T, O, true, kLayer, false>(a, first, last, scratch);
    return;
  }
  if constexpr (sizeof(O) > 1)
    if (a.stream) {
      norm_rows<T, O, false, kLayer, true>(a, first, last, scratch);
      return;
    }
  if constexpr (sizeof(O) > 1 && !kLayer)
    if (a.n * static_cast<int64_t>(sizeof(T) < sizeof(O) ? sizeof(T) : sizeof(O)) >= 2 * kNormLead) {
      norm_rows_in_turn<T, O>(a, first, last);
      return;
    }
  norm_rows<T, O, false, kLayer, false>(a, first, last, scratch);
}

template <class T, class O>
void norm_into(const NormArgs& a, int64_t first, int64_t last, float* scratch) {
  if (a.layer)
    norm_as<T, O, true>(a, first, last, scratch);
  else
    norm_as<T, O, false>(a, first, last, scratch);
}

template <class T>
void norm_from(const NormArgs& a, int64_t first, int64_t last, float* scratch) {
  if (a.out_dtype == FASTOPS_I8 || a.out_dtype == FASTOPS_F8_E4M3)
    norm_into<T, int8_t>(a, first, last, scratch);
  else if (a.out_dtype == a.dtype)
    norm_into<T, T>(a, first, last, scratch);
  else
    norm_into<T, float>(a, first, last, scratch);
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
