// AMX: eight tiles of up to 16 rows x 64 bytes. In a product the rows of A and of C are the same, a row of A holds 16
// units of 32 bits (pairs of bf16, four bytes), a row of B one unit for each of 16 columns (the layout Intel calls
// VNNI), and C is 16 x 16 fp32 or int32. https://www.intel.com/sdm, volume 1, chapter 18.
//
// With FASTOPS_AMX_EMULATE the tiles are plain arrays: the same loops, layouts and addresses run, and are tested, on
// machines without AMX. Sums are those of the manual: products of bf16 with even and with odd K each add up from zero,
// then to each other, then to C, rounded each time.
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
  static FASTOPS_INLINE vf upper(vi x) { return vi_as_bits(vimask<0xffff0000u>(x)); }
  template <int C, int A, int B>
  void dot_bf16() {
    for (int m = 0; m < rows; ++m) {
      __m512 even = _mm512_setzero_ps(), odd = even;
      for (int k = 0; k < 16; ++k) {
        const __m512i a = _mm512_set1_epi32(t[A][m][k]), b = _mm512_loadu_si512(t[B][k]);
        even = _mm512_fmadd_ps(upper(_mm512_slli_epi32(a, 16)), upper(_mm512_slli_epi32(b, 16)), even);
        odd = _mm512_fmadd_ps(upper(a), upper(b), odd);
      }
      _mm512_storeu_ps(t[C][m], _mm512_add_ps(_mm512_loadu_ps(t[C][m]), _mm512_add_ps(even, odd)));
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

// Operands may be sums of matrices, `a` and `b` units one after the other.
struct Parts {
  int64_t a = 0, b = 0;
};

// One block of C: MT x NT tiles. Rows beyond M up to a multiple of 16 are computed too: scratch has room for them.
// Of sums, the products i of A with j of B are taken for which i + j is less than the larger number of parts: what the
// rest would add is smaller than the last part. kAll: of two and two all four.
template <class Dot, int MT, int NT, int kA, int kB, bool kAll>
FASTOPS_INLINE void tile_block(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int K,
                               bool add, Parts parts) {
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
    const auto load_a = [&](int i) FASTOPS_LAMBDA {
      const float* from = a + i * parts.a + k;
      t.load<4>(from, lda * 4);
      if constexpr (MT == 2) t.load<5>(from + 16 * lda, lda * 4);
    };
    const auto load_b = [&](int j) FASTOPS_LAMBDA {
      const float* from = b + j * parts.b + k * ldb;
      t.load<6>(from, ldb * 4);
      if constexpr (NT == 2) t.load<7>(from + 16, ldb * 4);
    };
    const auto multiply = [&]() FASTOPS_LAMBDA {
      tile_dot<Dot, 0, 4, 6>(t);
      if constexpr (NT == 2) tile_dot<Dot, 1, 4, 7>(t);
      if constexpr (MT == 2) tile_dot<Dot, 2, 5, 6>(t);
      if constexpr (MT == 2 && NT == 2) tile_dot<Dot, 3, 5, 7>(t);
    };
    load_b(0);
    if constexpr (kA > 2) load_a(2), multiply();
    if constexpr (kA > 1) load_a(1), multiply();
    if constexpr (kA > 2 && kB > 1) load_b(1), multiply();
    load_a(0), multiply();  // with part 1 of B where there are three
    if constexpr (kB > 2) load_b(0), multiply();
    if constexpr (kB > 1) load_b(kB - 1), multiply();
    if constexpr (kAll) load_a(1), multiply();
  }
  t.store<0>(c, ldc * 4);
  if constexpr (NT == 2) t.store<1>(c + 16, ldc * 4);
  if constexpr (MT == 2) t.store<2>(c + 16 * ldc, ldc * 4);
  if constexpr (MT == 2 && NT == 2) t.store<3>(c + 16 * ldc + 16, ldc * 4);
}

struct NoStep {
  void operator()() const {}
};

// As gemm. K is a multiple of 16 units, N of 16 columns. `step` is called before each block.
template <class Dot, int kA = 1, int kB = 1, bool kAll = false, class Step = NoStep>
void tile_gemm(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int M, int N, int K,
               bool add, Parts parts = Parts(), const Step& step = Step()) {
  static_assert((kB == 1 || kA == kB || (kA == 1 && kB == 2)) && (!kAll || kA == 2), "the order of products");
  for (int i = 0; i < M; i += 32) {
    const float* rows = a + i * lda;
    float* to = c + i * ldc;
    for (int j = 0; j < N; j += 32) {
      step();
      const auto block = [&](auto mt, auto nt) FASTOPS_LAMBDA {
        tile_block<Dot, decltype(mt)::value, decltype(nt)::value, kA, kB, kAll>(rows, lda, b + j, ldb, to + j, ldc, K,
                                                                                add, parts);
      };
      using One = Index<1>;
      using Two = Index<2>;
      if (M - i > 16)
        N - j > 16 ? block(Two(), Two()) : block(Two(), One());
      else
        N - j > 16 ? block(One(), Two()) : block(One(), One());
    }
  }
}

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
