// AMX: eight tiles of up to 16 rows x 64 bytes. In a product the rows of A and of C are the same, a row of A holds 16
// units of 32 bits (pairs of bf16, four bytes), a row of B one unit for each of 16 columns (the layout Intel calls
// VNNI), and C is 16 x 16 fp32 or int32. https://www.intel.com/sdm, volume 1, chapter 18.
//
// With FASTOPS_AMX_EMULATE the tiles are plain arrays: the same loops, layouts and addresses run, and are tested, on
// machines without AMX. Products are exact and added unit by unit, as the instructions do.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

#if defined(FASTOPS_AMX_EMULATE)
struct TileScope {
  explicit TileScope(int = 16) {}
};
struct Tiles {
  int rows;
  int32_t t[8][16][16];
  explicit Tiles(int rows_of_a = 16) : rows(rows_of_a) {}
  template <int I>
  int rows_of() const {
    return I < 6 ? rows : 16;
  }
  template <int I>
  void zero() {
    std::memset(t[I], 0, sizeof t[I]);
  }
  template <int I>
  void load(const void* p, int64_t step) {
    for (int r = 0; r < rows_of<I>(); ++r) std::memcpy(t[I][r], static_cast<const char*>(p) + r * step, 64);
  }
  template <int I>
  void store(void* p, int64_t step) const {
    for (int r = 0; r < rows_of<I>(); ++r) std::memcpy(static_cast<char*>(p) + r * step, t[I][r], 64);
  }
  template <int C, int A, int B>
  void dot_bf16() {
    for (int m = 0; m < rows; ++m)
      for (int k = 0; k < 16; ++k) {
        bf16 a[2], b[2];
        std::memcpy(a, &t[A][m][k], 4);
        for (int n = 0; n < 16; ++n) {
          std::memcpy(b, &t[B][k][n], 4);
          float c;
          std::memcpy(&c, &t[C][m][n], 4);
          c += to_f32(a[0]) * to_f32(b[0]);
          c += to_f32(a[1]) * to_f32(b[1]);
          std::memcpy(&t[C][m][n], &c, 4);
        }
      }
  }
  // Signed bytes of A, unsigned ones of B.
  template <int C, int A, int B>
  void dot_s8u8() {
    for (int m = 0; m < rows; ++m)
      for (int k = 0; k < 16; ++k) {
        int8_t a[4];
        uint8_t b[4];
        std::memcpy(a, &t[A][m][k], 4);
        for (int n = 0; n < 16; ++n) {
          std::memcpy(b, &t[B][k][n], 4);
          for (int i = 0; i < 4; ++i) t[C][m][n] += a[i] * b[i];
        }
      }
  }
};
#else
struct TileConfigs {
  uint8_t bytes[17][64];
  constexpr TileConfigs() : bytes() {
    for (int rows = 1; rows <= 16; ++rows) {
      bytes[rows][0] = 1;  // palette
      for (int i = 0; i < 8; ++i) {
        bytes[rows][16 + 2 * i] = 64;  // bytes per row
        bytes[rows][48 + i] = static_cast<uint8_t>(i < 6 ? rows : 16);
      }
    }
  }
};
alignas(64) constexpr TileConfigs kTileConfigs;

// Tiles are there while one of these lives, 0 to 5 (for A and C) of so many rows. (Assembly throughout: GCC 12's
// intrinsics do not tell the compiler which memory they read and write, so that it may move or drop the stores that
// fill it.)
struct TileScope {
  explicit TileScope(int rows = 16) {
    __asm__ volatile("ldtilecfg %0" : : "m"(*reinterpret_cast<const uint8_t (*)[64]>(kTileConfigs.bytes[rows])));
  }
  ~TileScope() { __asm__ volatile("tilerelease" : : : "memory"); }
};
struct Tiles {
  explicit Tiles(int = 16) {}
  template <int I>
  FASTOPS_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(I));
  }
  template <int I>
  FASTOPS_INLINE void load(const void* p, int64_t step) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(step), "i"(I) : "memory");
  }
  template <int I>
  FASTOPS_INLINE void store(void* p, int64_t step) const {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(step), "i"(I) : "memory");
  }
  template <int C, int A, int B>
  FASTOPS_INLINE void dot_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
  // Signed bytes of A, unsigned ones of B.
  template <int C, int A, int B>
  FASTOPS_INLINE void dot_s8u8() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};
#endif

template <class Dot, int C, int A, int B>
FASTOPS_INLINE void tile_dot(Tiles& t) {
  if constexpr (Dot::kBytes)
    t.dot_s8u8<C, A, B>();
  else
    t.dot_bf16<C, A, B>();
}

// A is the sum of `count` matrices, `step` units one after the other.
struct Planes {
  int count = 1;
  int64_t step = 0;
};

// One block of C: MT x NT tiles. Rows beyond M up to a multiple of 16 are computed too: scratch has room for them.
template <class Dot, int MT, int NT>
FASTOPS_INLINE void tile_block(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int K,
                               bool add, Planes planes) {
  Tiles t;
  if (add) {
    t.load<0>(c, ldc * 4);
    if constexpr (NT == 2) t.load<1>(c + 16, ldc * 4);
    if constexpr (MT == 2) t.load<2>(c + 16 * ldc, ldc * 4);
    if constexpr (MT == 2 && NT == 2) t.load<3>(c + 16 * ldc + 16, ldc * 4);
  } else {
    t.zero<0>();
    if constexpr (NT == 2) t.zero<1>();
    if constexpr (MT == 2) t.zero<2>();
    if constexpr (MT == 2 && NT == 2) t.zero<3>();
  }
  for (int k = 0; k < K; k += 16) {
    t.load<6>(b + k * ldb, ldb * 4);
    if constexpr (NT == 2) t.load<7>(b + k * ldb + 16, ldb * 4);
    const float* from = a + k;
    for (int i = 0; i < planes.count; ++i, from += planes.step) {
      t.load<4>(from, lda * 4);
      tile_dot<Dot, 0, 4, 6>(t);
      if constexpr (NT == 2) tile_dot<Dot, 1, 4, 7>(t);
      if constexpr (MT == 2) t.load<5>(from + 16 * lda, lda * 4);
      if constexpr (MT == 2) tile_dot<Dot, 2, 5, 6>(t);
      if constexpr (MT == 2 && NT == 2) tile_dot<Dot, 3, 5, 7>(t);
    }
  }
  t.store<0>(c, ldc * 4);
  if constexpr (NT == 2) t.store<1>(c + 16, ldc * 4);
  if constexpr (MT == 2) t.store<2>(c + 16 * ldc, ldc * 4);
  if constexpr (MT == 2 && NT == 2) t.store<3>(c + 16 * ldc + 16, ldc * 4);
}

template <class Dot, int MT>
FASTOPS_INLINE void tile_rows(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int N,
                              int K, bool add, Planes planes) {
  int j = 0;
  for (; j + 32 <= N; j += 32) tile_block<Dot, MT, 2>(a, lda, b + j, ldb, c + j, ldc, K, add, planes);
  if (j < N) tile_block<Dot, MT, 1>(a, lda, b + j, ldb, c + j, ldc, K, add, planes);
}

// As gemm. K is a multiple of 16 units, N of 16 columns.
template <class Dot>
void tile_gemm(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int M, int N, int K,
               bool add, Planes planes = Planes()) {
  int i = 0;
  for (; M - i > 16; i += 32) tile_rows<Dot, 2>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, N, K, add, planes);
  if (M - i > 0) tile_rows<Dot, 1>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, N, K, add, planes);
}

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
