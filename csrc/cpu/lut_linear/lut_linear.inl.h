// Weights looked up in a table per output feature, plus a sparse part, times activations. Written once in the
// vocabulary of cpu/isa/vec_*.h.
//
// A table of sixteen numbers is one or a few registers, so that W codes become W weights in one or two instructions.
// Lanes are input features: codes of one output feature lie one behind the other.
//   stream (few rows)  : weights meet x as they are looked up, and a row's sum is gathered at its end
//   panel  (more rows) : 128 inputs x 64 outputs are expanded into L1, then the gemm of cpu/isa runs all rows over them
namespace fastops::cpu::FASTOPS_ISA {
namespace {

template <class T>
void widen_row(const T* x, float* a, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) vstore(a + i, vload(x + i));
  if (i < n) vstoren(a + i, vloadn(x + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

void prepare(const LutParams& p, int64_t row) {
  float* a = p.a + row * p.lda;
  const char* x = p.x + row * p.x_sm * size_of(p.dtype);
  if (p.dtype == FASTOPS_F32) widen_row(reinterpret_cast<const float*>(x), a, p.K);
  if (p.dtype == FASTOPS_F16) widen_row(reinterpret_cast<const f16*>(x), a, p.K);
  if (p.dtype == FASTOPS_BF16) widen_row(reinterpret_cast<const bf16*>(x), a, p.K);
  for (int64_t k = p.K; k < p.runs * kLutRun; ++k) a[k] = 0.0f;
}

// sums[r] of one output feature, for MR rows.
template <int MR>
FASTOPS_INLINE void stream(const LutParams& p, int64_t n, float (&sums)[MR]) {
  const vtable table = vtable_load(p.table + n * 16);
  const uint8_t* codes = p.codes + n * p.runs * 16;
  constexpr int kParts = 16 / W;  // vectors of low nibbles in a run, and as many of high ones
  constexpr int kChains = MR >= 4 ? 1 : 2;
  vf acc[MR][kChains][2];
  FASTOPS_UNROLL
  for (int r = 0; r < MR; ++r) {
    FASTOPS_UNROLL
    for (int c = 0; c < kChains; ++c) acc[r][c][0] = acc[r][c][1] = vzero();
  }
  const auto run = [&](int64_t at, int chain) FASTOPS_LAMBDA {
    FASTOPS_UNROLL
    for (int v = 0; v < kParts; ++v) {
      const vi bytes = viload_u8(codes + at * 16 + v * W);
      const vf low = vtable_at(table, bytes), high = vtable_at(table, vishr<4>(bytes));
      FASTOPS_UNROLL
      for (int r = 0; r < MR; ++r) {
        const float* x = p.a + r * p.lda + at * kLutRun + v * W;
        acc[r][chain][0] = vfma(vload(x), low, acc[r][chain][0]);
        acc[r][chain][1] = vfma(vload(x + 16), high, acc[r][chain][1]);
      }
    }
  };
  int64_t at = 0;
  for (; at + kChains <= p.runs; at += kChains) {
    vprefetch(codes + at * 16 + 4096);
    FASTOPS_UNROLL
    for (int c = 0; c < kChains; ++c) run(at + c, c);
  }
  for (; at < p.runs; ++at) run(at, 0);
  FASTOPS_UNROLL
  for (int r = 0; r < MR; ++r) {
    vf sum = vadd(acc[r][0][0], acc[r][0][1]);
    if constexpr (kChains == 2) sum = vadd(sum, vadd(acc[r][1][0], acc[r][1][1]));
    sums[r] = vsum(sum);
  }
}

template <int MR>
void stream_panel(const LutParams& p, int64_t first, int columns, float* totals) {
  for (int c = 0; c < columns; ++c) {
    float sums[MR];
    stream<MR>(p, first + c, sums);
    for (int r = 0; r < MR; ++r) totals[r * kLutPanel + c] = sums[r];
  }
}

// Weights of input features [k, k + depth) (depth whole runs) and 64 output features: [depth][64].
void expand(const LutParams& p, int64_t first, int columns, int64_t k, int depth, float* to) {
  for (int c = 0; c < kLutPanel; c += W) {
    for (int run = 0; run < depth / kLutRun; ++run) {
      for (int v = 0; v < 16; v += W) {
        vf low[W], high[W];
        for (int i = 0; i < W; ++i) {
          const int64_t n = first + (c + i < columns ? c + i : columns - 1);  // behind the last: met by no output
          const vtable table = vtable_load(p.table + n * 16);
          const vi bytes = viload_u8(p.codes + (n * p.runs + k / kLutRun + run) * 16 + v);
          low[i] = vtable_at(table, bytes);
          high[i] = vtable_at(table, vishr<4>(bytes));
        }
        vtranspose(low);
        vtranspose(high);
        for (int i = 0; i < W; ++i) {
          vstore(to + (run * kLutRun + v + i) * kLutPanel + c, low[i]);
          vstore(to + (run * kLutRun + 16 + v + i) * kLutPanel + c, high[i]);
        }
      }
    }
  }
}

template <class T>
void store_row(const LutParams& p, int64_t row, int64_t first, int columns, const float* total) {
  T* to = reinterpret_cast<T*>(p.out) + row * p.out_sm + first;
  for (int c = 0; c < columns; c += W) {
    const int n = columns - c;
    vf x = vload(total + c);
    if (p.bias) x = vadd(x, n >= W ? vload(p.bias + first + c) : vloadn(p.bias + first + c, n));
    if (n >= W)
      vstore(to + c, x);
    else
      vstoren(to + c, x, n);
  }
}

void lut_panel(const LutParams& p, int64_t panel, float* totals) {
  const int64_t first = panel * kLutPanel;
  const int columns = static_cast<int>(p.N - first < kLutPanel ? p.N - first : kLutPanel);
  const int rows = static_cast<int>(p.M);
  static_assert(kLutStreamRows == 4, "one case for each");
  if (rows == 1) {
    stream_panel<1>(p, first, columns, totals);
  } else if (rows == 2) {
    stream_panel<2>(p, first, columns, totals);
  } else if (rows == 3) {
    stream_panel<3>(p, first, columns, totals);
  } else if (rows == 4) {
    stream_panel<4>(p, first, columns, totals);
  } else {
    float* expanded = totals + p.M * kLutPanel;
    const int64_t all = p.runs * kLutRun;
    for (int64_t k = 0; k < all; k += kLutDepth) {
      const int depth = static_cast<int>(all - k < kLutDepth ? all - k : kLutDepth);
      expand(p, first, columns, k, depth, expanded);
      gemm<DotF32>(p.a + k, p.lda, expanded, kLutPanel, totals, kLutPanel, rows, kLutPanel, depth, k > 0);
    }
  }
  if (p.values) {
    for (int c = 0; c < columns; ++c) {
      const int32_t begin = p.row_starts[first + c], end = p.row_starts[first + c + 1];
      for (int r = 0; r < rows; ++r) {
        const float* a = p.a + r * p.lda;
        float sum = 0.0f;
        for (int32_t i = begin; i < end; ++i) sum += a[p.columns[i]] * p.values[i];
        totals[r * kLutPanel + c] += sum;
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    const float* total = totals + r * kLutPanel;
    if (p.out_dtype == FASTOPS_F32) store_row<float>(p, r, first, columns, total);
    if (p.out_dtype == FASTOPS_F16) store_row<f16>(p, r, first, columns, total);
    if (p.out_dtype == FASTOPS_BF16) store_row<bf16>(p, r, first, columns, total);
  }
}

}  // namespace

extern const LutTable lut_table;
const LutTable lut_table = {&prepare, &lut_panel};

}  // namespace fastops::cpu::FASTOPS_ISA
