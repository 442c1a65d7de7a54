// AMX: gemm<DotBf16> on 16 x 16 tiles. The operands are those of the vector version: a tile row of A is 16 bf16 pairs,
// a tile of B is 16 rows of 16 pairs (the layout TDPBF16PS calls VNNI), C is fp32.
//
// With FASTOPS_AMX_EMULATE the eight tiles are plain arrays: the same loops, layouts and addresses run, and are tested,
// on machines without AMX. Products are exact in fp32 and added pair by pair, as the instruction does.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

#if defined(FASTOPS_AMX_EMULATE)
struct TileScope {};
struct Tiles {
  float t[8][16][16];
  template <int I>
  void zero() {
    std::memset(t[I], 0, sizeof t[I]);
  }
  template <int I>
  void load(const float* p, int64_t ld) {
    for (int r = 0; r < 16; ++r) std::memcpy(t[I][r], p + r * ld, 64);
  }
  template <int I>
  void store(float* p, int64_t ld) const {
    for (int r = 0; r < 16; ++r) std::memcpy(p + r * ld, t[I][r], 64);
  }
  template <int C, int A, int B>
  void dot() {
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 16; ++k) {
        bf16 a[2], b[2];
        std::memcpy(a, &t[A][m][k], 4);
        for (int n = 0; n < 16; ++n) {
          std::memcpy(b, &t[B][k][n], 4);
          t[C][m][n] += to_f32(a[0]) * to_f32(b[0]);
          t[C][m][n] += to_f32(a[1]) * to_f32(b[1]);
        }
      }
  }
};
#else
// Eight tiles of 16 rows x 64 bytes, configured while an item runs. https://www.intel.com/sdm, volume 1, chapter 18.
struct TileScope {
  TileScope() {
    alignas(64) uint8_t config[64] = {1};  // palette 1
    for (int i = 0; i < 8; ++i) {
      config[16 + 2 * i] = 64;  // bytes per row
      config[48 + i] = 16;      // rows
    }
    _tile_loadconfig(config);
  }
  ~TileScope() { _tile_release(); }
};
// GCC's tile intrinsics paste their tile number into assembly text, so each must be a literal.
struct Tiles {
  template <int I>
  FASTOPS_INLINE void zero() {
    if constexpr (I == 0) _tile_zero(0);
    if constexpr (I == 1) _tile_zero(1);
    if constexpr (I == 2) _tile_zero(2);
    if constexpr (I == 3) _tile_zero(3);
  }
  template <int I>
  FASTOPS_INLINE void load(const float* p, int64_t ld) {
    if constexpr (I == 0) _tile_loadd(0, p, ld * 4);
    if constexpr (I == 1) _tile_loadd(1, p, ld * 4);
    if constexpr (I == 2) _tile_loadd(2, p, ld * 4);
    if constexpr (I == 3) _tile_loadd(3, p, ld * 4);
    if constexpr (I == 4) _tile_loadd(4, p, ld * 4);
    if constexpr (I == 5) _tile_loadd(5, p, ld * 4);
    if constexpr (I == 6) _tile_loadd(6, p, ld * 4);
    if constexpr (I == 7) _tile_loadd(7, p, ld * 4);
  }
  template <int I>
  FASTOPS_INLINE void store(float* p, int64_t ld) const {
    if constexpr (I == 0) _tile_stored(0, p, ld * 4);
    if constexpr (I == 1) _tile_stored(1, p, ld * 4);
    if constexpr (I == 2) _tile_stored(2, p, ld * 4);
    if constexpr (I == 3) _tile_stored(3, p, ld * 4);
  }
  template <int I, int A, int B>
  FASTOPS_INLINE void dot() {
    if constexpr (I == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (I == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (I == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (I == 3) _tile_dpbf16ps(3, 5, 7);
    static_assert(A == 4 + I / 2 && B == 6 + I % 2, "the block's fixed use of tiles");
  }
};
#endif

// One block of C: MT x NT tiles. Rows beyond M up to a multiple of 16 are computed too: scratch has room for them.
template <int MT, int NT>
FASTOPS_INLINE void tile_block(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int K,
                               bool add) {
  Tiles t;
  if (add) {
    t.load<0>(c, ldc);
    if constexpr (NT == 2) t.load<1>(c + 16, ldc);
    if constexpr (MT == 2) t.load<2>(c + 16 * ldc, ldc);
    if constexpr (MT == 2 && NT == 2) t.load<3>(c + 16 * ldc + 16, ldc);
  } else {
    t.zero<0>();
    if constexpr (NT == 2) t.zero<1>();
    if constexpr (MT == 2) t.zero<2>();
    if constexpr (MT == 2 && NT == 2) t.zero<3>();
  }
  for (int k = 0; k < K; k += 16) {
    t.load<4>(a + k, lda);
    if constexpr (MT == 2) t.load<5>(a + 16 * lda + k, lda);
    t.load<6>(b + k * ldb, ldb);
    if constexpr (NT == 2) t.load<7>(b + k * ldb + 16, ldb);
    t.dot<0, 4, 6>();
    if constexpr (NT == 2) t.dot<1, 4, 7>();
    if constexpr (MT == 2) t.dot<2, 5, 6>();
    if constexpr (MT == 2 && NT == 2) t.dot<3, 5, 7>();
  }
  t.store<0>(c, ldc);
  if constexpr (NT == 2) t.store<1>(c + 16, ldc);
  if constexpr (MT == 2) t.store<2>(c + 16 * ldc, ldc);
  if constexpr (MT == 2 && NT == 2) t.store<3>(c + 16 * ldc + 16, ldc);
}

template <int MT>
FASTOPS_INLINE void tile_rows(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int N,
                              int K, bool add) {
  int j = 0;
  for (; j + 32 <= N; j += 32) tile_block<MT, 2>(a, lda, b + j, ldb, c + j, ldc, K, add);
  if (j < N) tile_block<MT, 1>(a, lda, b + j, ldb, c + j, ldc, K, add);
}

// K is a multiple of 16 units, N of 16 columns.
template <>
inline void gemm<DotBf16, false>(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int M,
                                 int N, int K, bool add) {
  int i = 0;
  for (; M - i > 16; i += 32) tile_rows<2>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, N, K, add);
  if (M - i > 0) tile_rows<1>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, N, K, add);
}

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
