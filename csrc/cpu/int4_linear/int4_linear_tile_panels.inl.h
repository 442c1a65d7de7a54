// int4_linear's panels by AMX for groups of 32, where a product that ends with its group and meets its scale in vectors
// takes longer there than on tiles. A code less 8 has 4 bits and a scale in 16 bits at most 11, so the weight
// scale * (code - 8) is the sum of two bf16, exactly: tiles take both and keep their totals over all groups. Zeros and
// mins meet the sums of x in a product of their own. For bf16 x and int8 activations (whose codes are exact in bf16,
// too): an x in parts of its own would need as many products again (docs/design/004-int4-linear.md).
#if defined(FASTOPS_HAS_AMX)
namespace fastops::cpu::FASTOPS_ISA {
namespace {

// Scaled weights, `plane` floats between their two parts. Where the second would be 0, 2^-40 of the weight stands
// there, so that an infinite x meets no 0 but that of a weight.
template <bool k24>
void expand_scaled(const Int4Params& p, int64_t panel, int64_t word0, int64_t words, float* to, int64_t plane) {
  const int64_t blocks = (p.N + kInt4Block - 1) / kInt4Block;
  const vf tiny = vset(0x1p-40f);
  for (int b = 0; b < kInt4Panel / kInt4Block; ++b) {
    const int64_t block = panel * (kInt4Panel / kInt4Block) + b;
    if (block >= blocks) break;
    const uint8_t* codes = p.codes + (block * (p.K / 8) + word0) * p.word_bytes;
    for (int64_t w = 0; w < words;) {
      const int64_t g = (word0 + w) * 8 / p.group, end = (g + 1) * p.group / 8 - word0;
      const vf scale = load_scale(p.scales, p.scale_dtype, (block * p.groups + g) * kInt4Block);
      for (const int64_t stop = end < words ? end : words; w < stop; ++w) {
        const vi word = load_word<k24>(codes + w * p.word_bytes, 0);
        const auto pair = [&](auto i) FASTOPS_LAMBDA {
          constexpr int k = decltype(i)::value;
          const vf first = vmul(scale, vnibble<k>(word)), second = vmul(scale, vnibble<k + 4>(word));
          const auto rest = [&](vf x) FASTOPS_LAMBDA {
            return vfma(x, tiny, vsub(x, vi_as_bits(vimask<0xffff0000u>(vi_from_bits(x)))));
          };
          float* dst = to + b * kInt4Block + (w * 4 + k) * kInt4Panel;
          vstore(dst, vupper_pairs(first, second));
          vstore(dst + plane, vupper_pairs(rest(first), rest(second)));
        };
        each_of<4>(pair);
      }
    }
  }
}

// totals -= what zeros and mins make of the sums of x.
void add_offsets(const Int4Params& p, int64_t panel, float* offsets, float* total) {
  const int columns = panel_columns(p, panel);
  for (int64_t g0 = 0; g0 < p.groups; g0 += kInt4Units) {
    const int n = static_cast<int>(p.groups - g0 < kInt4Units ? p.groups - g0 : kInt4Units);
    for (int i = 0; i < n; ++i) {
      for (int c = 0; c < columns; c += kInt4Block) {
        const int64_t block = panel * (kInt4Panel / kInt4Block) + c / kInt4Block;
        const int64_t at = (block * p.groups + g0 + i) * kInt4Block;
        const vf scale = load_scale(p.scales, p.scale_dtype, at);
        vstore(offsets + i * kInt4Panel + c, vsub(vzero(), offset_of(p, at, scale, true)));
      }
    }
    gemm<DotF32>(p.sums + g0, p.groups, offsets, kInt4Panel, total, kInt4Panel, static_cast<int>(p.M), columns, n,
                 true);
  }
}

void scaled_panels(const Int4Params& p, int64_t panel0, int64_t panel_end, float* scratch) {
  constexpr int kParts = 2, kPerWord = 4;  // units
  constexpr int64_t kWords = kInt4Units / kParts / kPerWord, kPlane = kInt4Units / kParts * kInt4Panel;
  const int rows = static_cast<int>(p.M);
  const int64_t size = int4_total_rows(rows) * kInt4Panel, lda = p.a_row / 4;
  float *expanded = scratch, *totals = expanded + kInt4Units * kInt4Panel;
  std::memset(totals, 0, sizeof(float) * static_cast<size_t>(size * (panel_end - panel0)));
  if (p.zeros || p.mins || p.column_zeros)
    for (int64_t panel = panel0; panel < panel_end; ++panel)
      add_offsets(p, panel, expanded, totals + (panel - panel0) * size);
  for (int64_t word = 0, words; word < p.K / 8; word += words) {
    words = p.K / 8 - word < kWords ? p.K / 8 - word : kWords;
    const float* a = reinterpret_cast<const float*>(row_of(p, 0)) + word * kPerWord;
    for (int64_t panel = panel0; panel < panel_end; ++panel) {
      (p.word_bytes == kInt4Word24 ? expand_scaled<true> : expand_scaled<false>)(p, panel, word, words, expanded,
                                                                                 kPlane);
      tile_gemm<DotBf16, 1, kParts>(a, lda, expanded, kInt4Panel, totals + (panel - panel0) * size, kInt4Panel, rows,
                                    panel_columns(p, panel), static_cast<int>(words * kPerWord), true, {0, kPlane});
    }
  }
  finish_panels(p, panel0, panel_end, totals, size);
}

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
#endif
