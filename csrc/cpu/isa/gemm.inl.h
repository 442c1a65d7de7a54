// The one small matrix multiply under every kernel: C[M][N] (+)= A[M][K] B[K][N].
//
// Operands are 32-bit units: fp32 numbers (DotF32) or pairs of bf16 whose products a lane adds up (DotBf16), so both
// share layouts and loops; so do groups of four bytes (DotU8S8). A is row-major and read one broadcast at a time; B
// holds W-wide columns; N is a multiple of W, M and K are free. A register block is kMR x (kNV * W): 6 x 4 vectors
// leave 32 registers room for four of B and one of A, 6 x 2 do the same for 16.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

struct DotF32 {
  static constexpr bool kBytes = false;
  static FASTOPS_INLINE vf dot(const float* a, vf b, vf acc) { return vfma(vset(*a), b, acc); }
};

#if defined(FASTOPS_HAS_BF16_DOT)
struct DotBf16 {
  static constexpr bool kBytes = false;
  static FASTOPS_INLINE vf dot(const float* a, vf b, vf acc) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof(pair));
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_castps_si512(b));
  }
};
#endif

// Units are four unsigned bytes of B (at most 15) and four signed ones of A; C holds the bits of 32-bit integers.
struct DotU8S8 {
  static constexpr bool kBytes = true;
  static FASTOPS_INLINE vf dot(const float* a, vf b, vf acc) {
    int32_t four;
    std::memcpy(&four, a, sizeof(four));
    return vi_as_bits(vdot4(vi_from_bits(acc), vi_from_bits(b), four));
  }
};

constexpr int kMR = 6;
constexpr int kNV = W == 16 ? 4 : 2;

template <class Dot, bool kTransA, int MR, int NV>
FASTOPS_INLINE void gemm_block(const float* __restrict a, int64_t lda, const float* __restrict b, int64_t ldb,
                               float* __restrict c, int64_t ldc, int K, bool add) {
  vf acc[MR][NV];
  FASTOPS_UNROLL
  for (int i = 0; i < MR; ++i) FASTOPS_UNROLL
  for (int j = 0; j < NV; ++j) acc[i][j] = vzero();
  for (int k = 0; k < K; ++k) {
    vf bv[NV];
    FASTOPS_UNROLL
    for (int j = 0; j < NV; ++j) bv[j] = vload(b + k * ldb + j * W);
    FASTOPS_UNROLL
    for (int i = 0; i < MR; ++i) FASTOPS_UNROLL
    for (int j = 0; j < NV; ++j) acc[i][j] = Dot::dot(kTransA ? a + k * lda + i : a + i * lda + k, bv[j], acc[i][j]);
  }
  FASTOPS_UNROLL
  for (int i = 0; i < MR; ++i) FASTOPS_UNROLL
  for (int j = 0; j < NV; ++j) {
    // At the end: sums of sums lose less than one long sum.
    if (add) acc[i][j] = vadd(vload(c + i * ldc + j * W), acc[i][j]);
    vstore(c + i * ldc + j * W, acc[i][j]);
  }
}

template <class Dot, bool kTransA, int NV>
void gemm_panel(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int M, int K,
                bool add) {
  const int64_t step = kTransA ? 1 : lda;  // between rows of A
  int i = 0;
  for (; i + kMR <= M; i += kMR) gemm_block<Dot, kTransA, kMR, NV>(a + i * step, lda, b, ldb, c + i * ldc, ldc, K, add);
  if (M - i >= 4) {
    gemm_block<Dot, kTransA, 4, NV>(a + i * step, lda, b, ldb, c + i * ldc, ldc, K, add);
    i += 4;
  }
  if (M - i >= 2) {
    gemm_block<Dot, kTransA, 2, NV>(a + i * step, lda, b, ldb, c + i * ldc, ldc, K, add);
    i += 2;
  }
  if (M - i >= 1) gemm_block<Dot, kTransA, 1, NV>(a + i * step, lda, b, ldb, c + i * ldc, ldc, K, add);
}

// Columns outermost: the B panel (K x kNV * W) stays in L1 while all rows pass over it.
template <class Dot, bool kTransA = false>
void gemm(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int M, int N, int K,
          bool add) {
  int j = 0;
  for (; j + kNV * W <= N; j += kNV * W) gemm_panel<Dot, kTransA, kNV>(a, lda, b + j, ldb, c + j, ldc, M, K, add);
  if constexpr (kNV == 4) {
    if (N - j >= 2 * W) {
      gemm_panel<Dot, kTransA, 2>(a, lda, b + j, ldb, c + j, ldc, M, K, add);
      j += 2 * W;
    }
  }
  if (N - j >= W) gemm_panel<Dot, kTransA, 1>(a, lda, b + j, ldb, c + j, ldc, M, K, add);
}

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
