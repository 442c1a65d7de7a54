// int4_linear by AMX. Codes less 8 are exact in bf16, and so are the parts of x: a bf16 is one, an fp16 the sum of two,
// an fp32 of three (8 bits of its significand each). Products are exact then, and sums are fp32, as elsewhere.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

#if defined(FASTOPS_HAS_AMX)
// Whether tiles multiply: groups must be whole rows of one (of bytes: half a row; what is missing meets weight 0), and
// one or two rows of x in all are quicker multiplied by vectors.
bool is_tiled(const Int4Params& p) { return p.group % 32 == 0 && p.many; }

// Parts of a number of x.
int planes_of(const Int4Params& p) {
  if (p.int8 || p.rounded || !is_tiled(p)) return 1;
  return p.column_scales || p.dtype == FASTOPS_F32 ? 3 : p.dtype == FASTOPS_F16 ? 2 : 1;
}

// Whether panels take scaled weights in two parts (int4_linear_tile_panels.inl.h).
bool is_scaled(const Int4Params& p) {
  return is_tiled(p) && p.wide && p.group < 64 && p.scale_dtype != FASTOPS_F32 && !p.eight && planes_of(p) == 1;
}

// n numbers (a multiple of 8) as so many bf16 that add up to them, `step` bytes apart, in the order of kOrder.
// Infinities and NaNs stand in the first.
void store_planes(const float* x, int n, char* to, int64_t step, int planes) {
  const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  for (int i = 0; i < n; i += W) {
    const __mmask16 there = n - i >= W ? 0xffff : 0xff;
    __m512 rest = _mm512_permutexvar_ps(order, _mm512_maskz_loadu_ps(there, x + i));
    for (int plane = 0; plane < planes; ++plane) {
      __m512i bits = _mm512_and_si512(_mm512_castps_si512(rest), _mm512_set1_epi32(static_cast<int>(0xffff0000)));
      const __mmask16 nan = _mm512_cmp_ps_mask(rest, rest, _CMP_UNORD_Q);
      bits = _mm512_mask_or_epi32(bits, nan, bits, _mm512_set1_epi32(0x400000));
      _mm256_mask_storeu_epi16(to + plane * step + i * 2, there, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
      rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(bits));
      rest = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(rest, rest, _CMP_ORD_Q), rest);
    }
  }
}

// As stream_words, of a multiple of four words. Rows of x and their parts are rows of one tile, `step` bytes apart.
template <bool k24, int MR>
FASTOPS_INLINE void tile_words(const uint8_t* codes, int64_t n, const char* a, int64_t step, int planes,
                               vf (&sums)[MR][kNV16]) {
  constexpr int kWords = 4, kUnits = 16 * W;  // of a tile
  constexpr int64_t kBytes = k24 ? kInt4Word24 : kInt4Word;
  alignas(64) float b[4 * kUnits], c[kUnits];
  const int rows = MR * planes;
  Tiles t(rows);
  t.zero<0>(), t.zero<1>(), t.zero<2>(), t.zero<3>();
  for (int64_t w = 0; w < n; w += 4 * kWords) {
    const auto tile = [&](auto i) FASTOPS_LAMBDA {
      constexpr int kAt = decltype(i)::value;
      const int64_t first = w + kAt * kWords;
      if (first >= n) return;
      float* to = b + kAt * kUnits;
      FASTOPS_UNROLL
      for (int word = 0; word < kWords; ++word) {
        const uint8_t* from = codes + (first + word) * kBytes;
        vprefetch(from + kInt4Near);
        const vi eight = load_word<k24>(from, 0);
        const auto pair = [&](auto k) FASTOPS_LAMBDA {
          vistore(to + (word * 4 + k) * W, vpairs_bf16<decltype(k)::value>(eight));
        };
        each_of<4>(pair);
      }
      t.load<4 + kAt % 2>(a + first * 16, step);
      t.load<6 + kAt % 2>(to, 64);
      t.dot_bf16<kAt, 4 + kAt % 2, 6 + kAt % 2>();
    };
    each_of<4>(tile);
  }
  for (int r = 0; r < MR; ++r) sums[r][0] = vzero();
  const auto add = [&](auto i) FASTOPS_LAMBDA {
    constexpr int kAt = decltype(i)::value;
    if (kAt * kWords >= n) return;
    t.store<kAt>(c, 64);
    for (int r = 0; r < MR; ++r)
      for (int plane = 0; plane < planes; ++plane) sums[r][0] = vadd(sums[r][0], vload(c + (r * planes + plane) * W));
  };
  each_of<4>(add);
}
#else
bool is_scaled(const Int4Params&) { return false; }
int planes_of(const Int4Params&) { return 1; }
#endif

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
