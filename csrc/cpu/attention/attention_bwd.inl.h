// Attention backward (FlashAttention-2, algorithm 2), in two passes instead of one: a key tile's item sums its own dK
// and dV over the rows that see it, and a row block's item sums its own dQ over its keys. Both recompute P from the
// LSE. Seven multiplications instead of five, but no item writes what another one writes: no atomics, no fp32 copy of
// dQ, and the same bits for any number of threads. Everything in fp32, one rounding at the end.
//
//   P = exp(S - LSE)   dP = dO V^T   dS = P (dP - delta + dLSE)   delta = rowsum(dO * O)
//   dV = P^T dO        dQ = scale dS K        dK = scale dS^T Q
namespace fastops::cpu::FASTOPS_ISA {
namespace {

template <class T>
struct Backward {
  const BackwardParams& g;
  const AttentionParams& p;
  const Sequence seq;
  const int64_t b, hkv;
  const int D, Dv, DP, VP;
  float *kt, *vt, *dk, *dv, *kn, *dq;  // tile: K^T [DP][keys], V^T [VP][keys]; sums; K [keys][DP]; dQ [rows][DP]
  float *q, *dout;                     // a group of rows, fp32
  float *s, *ds, *chain;               // [group][keys]: P, dS, the softcap's derivative
  float *lse, *delta;                  // [group]; delta has dLSE taken off
  int lo[kBackwardGroup], hi[kBackwardGroup];
  const T *kr[kBackwardKeys], *vr[kBackwardKeys];

  Backward(const BackwardParams& params, int64_t batch, int64_t head, float* scratch)
      : g(params),
        p(params.f),
        seq(sequence(params.f, batch)),
        b(batch),
        hkv(head),
        D(p.D),
        Dv(p.Dv),
        DP(pad_dim(p.D)),
        VP(pad_dim(p.Dv)) {
    float* at = scratch;
    auto take = [&at](int64_t n) {
      float* here = at;
      at += n;
      return here;
    };
    kt = take(static_cast<int64_t>(DP) * kBackwardKeys);
    vt = take(static_cast<int64_t>(VP) * kBackwardKeys);
    dk = take(static_cast<int64_t>(DP) * kBackwardKeys);
    dv = take(static_cast<int64_t>(VP) * kBackwardKeys);
    kn = take(static_cast<int64_t>(DP) * kBackwardKeys);
    dq = take(static_cast<int64_t>(DP) * kBackwardRows);
    q = take(static_cast<int64_t>(DP) * kBackwardGroup);
    dout = take(static_cast<int64_t>(VP) * kBackwardGroup);
    s = take(kBackwardGroup * kBackwardKeys);
    ds = take(kBackwardGroup * kBackwardKeys);
    chain = take(kBackwardGroup * kBackwardKeys);
    lse = take(kBackwardGroup);
    delta = take(kBackwardGroup);
  }

  static void widen(const T* src, int n, float* dst, int padded) {
    for (int d = 0; d < padded; d += W) {
      const int left = n - d;
      vstore(dst + d, left >= W ? vload(src + d) : left > 0 ? vloadn(src + d, left) : vzero());
    }
  }

  // rows [keys][dim] -> dst [dim][kBackwardKeys], keys behind n zero.
  static void transposed(const T* const* rows, int n, int dim, float* dst) {
    for (int j = 0; j < kBackwardKeys; j += W)
      for (int d = 0; d < dim; d += W) {
        vf r[W];
        for (int i = 0; i < W; ++i) {
          const int left = dim - d;
          r[i] = j + i >= n ? vzero() : left >= W ? vload(rows[j + i] + d) : vloadn(rows[j + i] + d, left);
        }
        vtranspose(r);
        const int rest = dim - d < W ? dim - d : W;
        for (int i = 0; i < rest; ++i) vstore(dst + static_cast<int64_t>(d + i) * kBackwardKeys + j, r[i]);
      }
  }

  void load_tile(int64_t key, int n) {
    const DenseSource<T> source(p, AttentionItem{b, hkv, 1, 0, 0, 0, 0, nullptr, nullptr, 0}, seq);
    source.rows(key, n, kr, vr);
    transposed(kr, n, D, kt);
    transposed(vr, n, Dv, vt);
  }

  // Rows [r0, r0 + rows): q, dO, LSE, delta, and which keys each sees.
  void load_rows(int64_t r0, int rows) {
    for (int i = 0; i < rows; ++i) {
      const int64_t at = r0 + i, qi = seq.q0 + at / p.G, head = hkv * p.G + at % p.G;
      const KeyRange v = visible_keys(p, seq, at / p.G);
      lo[i] = static_cast<int>(v.lo);
      hi[i] = static_cast<int>(v.hi);
      widen(reinterpret_cast<const T*>(p.q) + b * p.q_sb + qi * p.q_ss + head * p.q_sh, D, q + i * DP, DP);
      widen(reinterpret_cast<const T*>(g.dout) + b * g.do_sb + qi * g.do_ss + head * g.do_sh, Dv, dout + i * VP, VP);
      lse[i] = p.lse[b * p.lse_sb + head * p.lse_sh + qi * p.lse_ss];
      delta[i] = row_delta<T>(g, b, qi, head);
    }
  }

  template <class U>
  static float row_delta(const BackwardParams& g, int64_t b, int64_t qi, int64_t head) {
    const AttentionParams& p = g.f;
    const U* x = reinterpret_cast<const U*>(g.dout) + b * g.do_sb + qi * g.do_ss + head * g.do_sh;
    const U* y = reinterpret_cast<const U*>(p.out) + b * p.o_sb + qi * p.o_ss + head * p.o_sh;
    vf sum = vzero();
    int d = 0;
    for (; d + W <= p.Dv; d += W) sum = vfma(vload(x + d), vload(y + d), sum);
    if (d < p.Dv) sum = vfma(vloadn(x + d, p.Dv - d), vloadn(y + d, p.Dv - d), sum);
    const float dlse = g.dlse ? g.dlse[b * g.dlse_sb + head * g.dlse_sh + qi * g.dlse_ss] : 0.0f;
    return vsum(sum) - dlse;
  }

  // P and dS of the loaded rows against the loaded tile. False where no row sees a key of it.
  bool multiply(int64_t r0, int rows, int64_t key, int n) {
    if (hi[rows - 1] <= key || lo[0] >= key + n) return false;
    gemm<DotF32>(q, DP, kt, kBackwardKeys, s, kBackwardKeys, rows, kBackwardKeys, D, false);
    gemm<DotF32>(dout, VP, vt, kBackwardKeys, ds, kBackwardKeys, rows, kBackwardKeys, Dv, false);
    for (int i = 0; i < rows; ++i) {
      float *si = s + i * kBackwardKeys, *di = ds + i * kBackwardKeys, *ci = chain + i * kBackwardKeys;
      const bool capped = p.softcap > 0.0f;
      if (capped) {
        const vf inner = vset(p.scale / p.softcap);
        for (int j = 0; j < kBackwardKeys; j += W) {
          const vf t = vtanh(vmul(vload(si + j), inner));
          vstore(ci + j, vsub(vset(1.0f), vmul(t, t)));
        }
      }
      const int from = lo[i] > key ? static_cast<int>(lo[i] - key) : 0;
      const int to = hi[i] - key < n ? static_cast<int>(hi[i] - key) : n;
      modify_row(p, b, hkv, seq, r0 + i, si, key, n);
      const bool empty = lse[i] == kNegInf;
      const vf m = vset(lse[i]), dl = vset(delta[i]), scale = vset(p.scale);
      for (int j = 0; j < kBackwardKeys; j += W) {
        vf e = vexp2<6>(vmul(vsub(vload(si + j), m), vset(kLog2e)));
        e = empty ? vzero() : vkeep(e, from - j, to - j, 0.0f);
        vstore(si + j, e);
        vf d = vmul(vmul(e, vsub(vload(di + j), dl)), scale);
        if (capped) d = vmul(d, vload(ci + j));
        vstore(di + j, vkeep(d, from - j, to - j, 0.0f));  // what no row sees may be anything, 0 * NaN too
      }
    }
    return true;
  }

  void keys(int64_t key) {
    const int n = static_cast<int>(seq.Sk - key < kBackwardKeys ? seq.Sk - key : kBackwardKeys);
    load_tile(key, n);
    std::memset(dk, 0, sizeof(float) * static_cast<size_t>(DP) * kBackwardKeys);
    std::memset(dv, 0, sizeof(float) * static_cast<size_t>(VP) * kBackwardKeys);
    const int64_t all = seq.Sq * p.G;
    for (int64_t r0 = 0; r0 < all; r0 += kBackwardGroup) {
      const int rows = static_cast<int>(all - r0 < kBackwardGroup ? all - r0 : kBackwardGroup);
      const KeyRange first = visible_keys(p, seq, r0 / p.G), end = visible_keys(p, seq, (r0 + rows - 1) / p.G);
      if (end.hi <= key || first.lo >= key + n) continue;
      load_rows(r0, rows);
      if (!multiply(r0, rows, key, n)) continue;
      gemm<DotF32, true>(s, kBackwardKeys, dout, VP, dv, VP, n, VP, rows, true);
      gemm<DotF32, true>(ds, kBackwardKeys, q, DP, dk, DP, n, DP, rows, true);
    }
    for (int j = 0; j < n; ++j) {
      const int64_t at = seq.k0 + key + j;
      store_scaled(reinterpret_cast<T*>(g.dk) + b * g.dk_sb + at * g.dk_ss + hkv * g.dk_sh, dk + j * DP, D, 1.0f);
      store_scaled(reinterpret_cast<T*>(g.dv) + b * g.dv_sb + at * g.dv_ss + hkv * g.dv_sh, dv + j * VP, Dv, 1.0f);
    }
  }

  void rows(int64_t row0) {
    const int64_t all = seq.Sq * p.G;
    const int count = static_cast<int>(all - row0 < kBackwardRows ? all - row0 : kBackwardRows);
    std::memset(dq, 0, sizeof(float) * static_cast<size_t>(DP) * static_cast<size_t>(count));
    const KeyRange first = visible_keys(p, seq, row0 / p.G), end = visible_keys(p, seq, (row0 + count - 1) / p.G);
    for (int64_t key = first.lo; key < end.hi; key += kBackwardKeys) {
      const int n = static_cast<int>(end.hi - key < kBackwardKeys ? end.hi - key : kBackwardKeys);
      load_tile(key, n);
      for (int j = 0; j < n; ++j) widen(kr[j], D, kn + static_cast<int64_t>(j) * DP, DP);
      for (int i = 0; i < count; i += kBackwardGroup) {
        const int group = count - i < kBackwardGroup ? count - i : kBackwardGroup;
        load_rows(row0 + i, group);
        if (multiply(row0 + i, group, key, n))
          gemm<DotF32>(ds, kBackwardKeys, kn, DP, dq + static_cast<int64_t>(i) * DP, DP, group, DP, n, true);
      }
    }
    for (int i = 0; i < count; ++i) {
      const int64_t at = row0 + i, qi = seq.q0 + at / p.G, head = hkv * p.G + at % p.G;
      store_scaled(reinterpret_cast<T*>(g.dq) + b * g.dq_sb + qi * g.dq_ss + head * g.dq_sh,
                   dq + static_cast<int64_t>(i) * DP, D, 1.0f);
    }
  }

  // d sink = sum over rows of exp(sink - LSE) (dLSE - delta): the sink's probability, whose value is 0.
  static void sinks(const BackwardParams& g, int64_t head) {
    const AttentionParams& p = g.f;
    const float sink = p.sinks[head * p.sinks_stride];
    double total = 0.0;
    for (int64_t b = 0; b < p.B; ++b) {
      const Sequence s = sequence(p, b);
      for (int64_t i = 0; i < s.Sq; ++i) {
        const int64_t qi = s.q0 + i;
        const float row_lse = p.lse[b * p.lse_sb + head * p.lse_sh + qi * p.lse_ss];
        if (row_lse != kNegInf) total -= __builtin_expf(sink - row_lse) * row_delta<T>(g, b, qi, head);
      }
    }
    g.dsinks[head * g.dsinks_stride] = static_cast<float>(total);
  }
};

void backward_keys(const BackwardParams& g, int64_t b, int64_t hkv, int64_t key0, float* scratch) {
  if (g.f.dtype == 1) Backward<float>(g, b, hkv, scratch).keys(key0);
  if (g.f.dtype == 2) Backward<f16>(g, b, hkv, scratch).keys(key0);
  if (g.f.dtype == 3) Backward<bf16>(g, b, hkv, scratch).keys(key0);
}
void backward_rows(const BackwardParams& g, int64_t b, int64_t hkv, int64_t row0, float* scratch) {
  if (g.f.dtype == 1) Backward<float>(g, b, hkv, scratch).rows(row0);
  if (g.f.dtype == 2) Backward<f16>(g, b, hkv, scratch).rows(row0);
  if (g.f.dtype == 3) Backward<bf16>(g, b, hkv, scratch).rows(row0);
}
void backward_sinks(const BackwardParams& g, int64_t head) {
  if (g.f.dtype == 1) Backward<float>::sinks(g, head);
  if (g.f.dtype == 2) Backward<f16>::sinks(g, head);
  if (g.f.dtype == 3) Backward<bf16>::sinks(g, head);
}

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
