// Codes of a panel in L1, as the products of int4_linear's panels read them.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

// Units [u0, u0 + n) of 64 features, as gemm reads them: [n][64]. A unit is one weight (f32, scaled), or two or four
// codes (scaled after the product).
template <Mode mode, bool k24>
void expand(const Int4Params& p, int64_t panel, int64_t word0, int64_t words, float* to) {
  const int64_t blocks = (p.N + kInt4Block - 1) / kInt4Block;
  for (int b = 0; b < kInt4Panel / kInt4Block; ++b) {
    const int64_t block = panel * (kInt4Panel / kInt4Block) + b;
    if (block >= blocks) break;  // whatever stands there meets no output
    const uint8_t* codes = p.codes + (block * (p.K / 8) + word0) * p.word_bytes;
    for (int v = 0; v < kNV16; ++v) {
      float* dst = to + b * kInt4Block + v * W;
      for (int64_t w = 0; w < words;) {
        const int64_t g = (word0 + w) * 8 / p.group, end = (g + 1) * p.group / 8 - word0;
        const int64_t stop = end < words ? end : words;
        if constexpr (mode == Mode::f32) {
          const int64_t at = (block * p.groups + g) * kInt4Block + v * W;
          const vf scale = load_scale(p.scales, p.scale_dtype, at);
          const vf zero = p.zeros ? vsub(load_scale(p.zeros, p.scale_dtype, at), vset(8.0f)) : vzero();
          const vf shift = p.mins ? vsub(load_scale(p.mins, p.scale_dtype, at), vmul(vset(8.0f), scale)) : vzero();
          for (; w < stop; ++w) {
            const vi word = load_word<k24>(codes + w * p.word_bytes, v);
            const float* column = p.column_zeros ? p.column_zeros + (word0 + w) * 8 : nullptr;
            const auto one = [&](auto i) FASTOPS_LAMBDA {
              const vf centre = column ? vset(column[kOrder[i]] - 8.0f) : zero;
              const vf x = vmul(vsub(vnibble<decltype(i)::value>(word), centre), scale);
              vstore(dst + (w * 8 + kOrder[i]) * kInt4Panel, vsub(x, shift));
            };
            each_of<8>(one);
          }
        }
#if defined(FASTOPS_HAS_BF16_DOT)
        if constexpr (mode == Mode::bf16) {
          for (; w < stop; ++w) {
            const vi word = load_word<k24>(codes + w * p.word_bytes, v);
            const auto pair = [&](auto i) FASTOPS_LAMBDA {
              vistore(dst + (w * 4 + i) * kInt4Panel, vpairs_bf16<decltype(i)::value>(word));
            };
            each_of<4>(pair);
          }
        }
#endif
        if constexpr (mode == Mode::int8) {
          for (; w < stop; ++w) {
            const vi word = load_word<k24>(codes + w * p.word_bytes, v);
            vistore(dst + w * 2 * kInt4Panel, vnibbles_low(word));
            vistore(dst + (w * 2 + 1) * kInt4Panel, vnibbles_high(word));
          }
        }
      }
    }
  }
}

// As expand, of both planes at once: weights of 8 bits are bytes that stand for 136 less, bf16 or (scaled) fp32.
template <Mode mode>
void expand_joined(const Int4Params& p, int64_t panel, int64_t word0, int64_t words, float* to) {
  constexpr int kPerWord = mode == Mode::f32 ? 8 : mode == Mode::bf16 ? 4 : 2;  // units
  const int64_t blocks = (p.N + kInt4Block - 1) / kInt4Block, plane = p.K / 16 * kInt4Word;
  for (int b = 0; b < kInt4Panel / kInt4Block; ++b) {
    const int64_t block = panel * (kInt4Panel / kInt4Block) + b;
    if (block >= blocks) break;
    const uint8_t* codes = p.codes + (block * (p.K / 8) + word0) * kInt4Word;
    for (int v = 0; v < kNV16; ++v) {
      for (int64_t w = 0; w < words;) {
        const int64_t g = (word0 + w) * 8 / p.group, end = (g + 1) * p.group / 8 - word0;
        const int64_t at = (block * p.groups + p.groups / 2 + g) * kInt4Block + v * W;  // the second plane's scale
        [[maybe_unused]] const vf scale = load_scale(p.scales, p.scale_dtype, at);
        for (const int64_t stop = end < words ? end : words; w < stop; ++w) {
          const uint8_t* word = codes + w * kInt4Word + v * W * 4;
          const vi high = viload(word), low = viload(word + plane);
          float* dst = to + b * kInt4Block + v * W + w * kPerWord * kInt4Panel;
          [[maybe_unused]] const auto weight = [&](auto i) FASTOPS_LAMBDA {
            return vfma(vset(16.0f), vnibble<decltype(i)::value>(high), vnibble<decltype(i)::value>(low));
          };
          if constexpr (mode == Mode::int8) {
            vistore(dst, vjoin_nibbles(vnibbles_low(high), vnibbles_low(low)));
            vistore(dst + kInt4Panel, vjoin_nibbles(vnibbles_high(high), vnibbles_high(low)));
          }
#if defined(FASTOPS_HAS_BF16_DOT)
          if constexpr (mode == Mode::bf16) {
            const auto pair = [&](auto i) FASTOPS_LAMBDA {
              vstore(dst + i * kInt4Panel, vupper_pairs(weight(i), weight(Index<decltype(i)::value + 4>())));
            };
            each_of<4>(pair);
          }
#endif
          if constexpr (mode == Mode::f32) {
            const auto one = [&](auto i)
                                 FASTOPS_LAMBDA { vstore(dst + kOrder[i] * kInt4Panel, vmul(weight(i), scale)); };
            each_of<8>(one);
          }
        }
      }
    }
  }
}

template <Mode mode>
void expand_any(const Int4Params& p, int64_t panel, int64_t word0, int64_t words, float* to) {
  if (joined(p)) return expand_joined<mode>(p, panel, word0, words, to);
  (p.word_bytes == kInt4Word24 ? expand<mode, true> : expand<mode, false>)(p, panel, word0, words, to);
}

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
