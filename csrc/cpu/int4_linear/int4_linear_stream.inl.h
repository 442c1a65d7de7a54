// int4_linear for few rows: codes go from memory through registers into the products, once.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

// sums[r][v] of one block of 16 features over `n` words (8 n input features) from `codes`.
template <Mode mode, bool k24, int MR>
FASTOPS_INLINE void stream_words(const uint8_t* codes, int64_t n, const char* const (&a)[MR], vf (&sums)[MR][kNV16]) {
  constexpr int kChains = MR * kNV16 >= 8 ? 1 : 8 / (MR * kNV16);  // independent sums hide the latency of an addition
  vf acc[MR][kNV16][kChains];
  FASTOPS_UNROLL
  for (int r = 0; r < MR; ++r) {
    FASTOPS_UNROLL
    for (int v = 0; v < kNV16; ++v) {
      FASTOPS_UNROLL
      for (int c = 0; c < kChains; ++c) acc[r][v][c] = vzero();
    }
  }
  for (int64_t w = 0; w < n; ++w, codes += k24 ? kInt4Word24 : kInt4Word) {
    vprefetch_stream(codes);  // blocks follow one another: the next one's codes, at the end of this
    FASTOPS_UNROLL
    for (int v = 0; v < kNV16; ++v) {
      if constexpr (k24 && mode == Mode::f32) {  // half the products: each code meets the column it was kept for
        const vi four = viflip<0x8888>(viload_u16(codes + v * W * 2));
        const vi places = viload_u8(codes + kInt4Block * 2 + v * W);
        const auto one = [&](auto i) FASTOPS_LAMBDA {
          const vf weights = vnibble<decltype(i)::value>(four);
          const vi place = vishr<2 * decltype(i)::value>(places);
          FASTOPS_UNROLL
          for (int r = 0; r < MR; ++r) {
            vf& sum = acc[r][v][i % kChains];
            sum = vfma(vquad(reinterpret_cast<const float*>(a[r]) + w * 8 + i / 2 * 4, place), weights, sum);
          }
        };
        each_of<4>(one);
        continue;
      }
      const vi word = load_word<k24>(codes, v);
      if constexpr (mode == Mode::int8) {
        const vi low = vnibbles_low(word), high = vnibbles_high(word);
        FASTOPS_UNROLL
        for (int r = 0; r < MR; ++r) {
          int32_t four[2];
          std::memcpy(four, a[r] + w * 8, 8);
          acc[r][v][0] = vi_as_bits(vdot4(vi_from_bits(acc[r][v][0]), low, four[0]));
          acc[r][v][1 % kChains] = vi_as_bits(vdot4(vi_from_bits(acc[r][v][1 % kChains]), high, four[1]));
        }
      }
#if defined(FASTOPS_HAS_BF16_DOT)
      if constexpr (mode == Mode::bf16) {
        const auto pair = [&](auto i) FASTOPS_LAMBDA {
          const vi weights = vpairs_bf16<decltype(i)::value>(word);
          FASTOPS_UNROLL
          for (int r = 0; r < MR; ++r) {
            vf& sum = acc[r][v][i % kChains];
            sum = DotBf16::dot(reinterpret_cast<const float*>(a[r]) + w * 4 + i, vi_as_bits(weights), sum);
          }
        };
        each_of<4>(pair);
      }
#endif
      if constexpr (mode == Mode::f32) {
        const auto one = [&](auto i) FASTOPS_LAMBDA {
          const vf weights = vnibble<decltype(i)::value>(word);
          FASTOPS_UNROLL
          for (int r = 0; r < MR; ++r) {
            vf& sum = acc[r][v][i % kChains];
            sum = vfma(vset(reinterpret_cast<const float*>(a[r])[w * 8 + kOrder[i]]), weights, sum);
          }
        };
        each_of<8>(one);
      }
    }
  }
  FASTOPS_UNROLL
  for (int r = 0; r < MR; ++r) {
    FASTOPS_UNROLL
    for (int v = 0; v < kNV16; ++v) {
      if constexpr (mode == Mode::int8) {
        vi sum = vi_from_bits(acc[r][v][0]);
        if constexpr (kChains > 1) sum = viadd(sum, vi_from_bits(acc[r][v][1]));
        sums[r][v] = vi_to_float(sum);
      } else {
        vf sum = acc[r][v][0];
        FASTOPS_UNROLL
        for (int c = 1; c < kChains; ++c) sum = vadd(sum, acc[r][v][c]);
        sums[r][v] = sum;
      }
    }
  }
}

template <class T>
void store_features(const Int4Params& p, char* out, int64_t at, const vf (&values)[kNV16], int n) {
  for (int v = 0; v < kNV16 && n > 0; ++v, n -= W) {
    T* dst = reinterpret_cast<T*>(out) + at + v * W;
    if (n >= W) {
      vstore(dst, values[v]);
    } else {
      vstoren(dst, values[v], n);
    }
  }
  (void)p;
}

// Sixteen finished features of one row: row scale, bias, rounding.
void finish(const Int4Params& p, int64_t row, int64_t feature0, vf (&values)[kNV16]) {
  const int n = static_cast<int>(p.N - feature0 < kInt4Block ? p.N - feature0 : kInt4Block);
  for (int v = 0; v < kNV16; ++v) {
    if (p.int8) values[v] = vmul(values[v], vset(p.row_scale[row]));
    const int left = n - v * W;
    if (p.bias && left > 0)
      values[v] =
          vadd(values[v], left >= W ? vload(p.bias + feature0 + v * W) : vloadn(p.bias + feature0 + v * W, left));
  }
  const int64_t at = row * p.out_sm + feature0;
  if (p.out_dtype == FASTOPS_F32) store_features<float>(p, p.out, at, values, n);
  if (p.out_dtype == FASTOPS_F16) store_features<f16>(p, p.out, at, values, n);
  if (p.out_dtype == FASTOPS_BF16) store_features<bf16>(p, p.out, at, values, n);
}

// Words [w, end) of a block's rows.
template <Mode mode, bool k24, int MR>
void stream(const Int4Params& p, int64_t block, int64_t w, int64_t end, vf (&total)[MR][kNV16]) {
  constexpr int64_t kBytes = mode == Mode::int8 ? 8 : mode == Mode::bf16 ? 16 : 32;  // of x for a word
  const char* a[MR];
  for (int r = 0; r < MR; ++r) a[r] = row_of(p, r) + w * kBytes;
  for (int r = 0; r < MR; ++r)
    for (int v = 0; v < kNV16; ++v) total[r][v] = vzero();
  const int64_t words = p.group / 8;
  const uint8_t* codes = p.codes + (block * (p.K / 8) + w) * p.word_bytes;
  bool shifted = p.summed() && w % words == 0;  // where the group begins
  for (int64_t g = w / words; w < end; ++g) {
    const int64_t stop = (g + 1) * words, n = (stop < end ? stop : end) - w;
    vf sums[MR][kNV16];
#if defined(FASTOPS_HAS_AMX)
    if (mode == Mode::bf16 && is_tiled(p))
      tile_words<k24, MR>(codes, n, a[0], plane_bytes(p), planes_of(p), sums);
    else
#endif
      stream_words<mode, k24, MR>(codes, n, a, sums);
    FASTOPS_UNROLL
    for (int v = 0; v < kNV16; ++v) {
      const int64_t at = (block * p.groups + g) * kInt4Block + v * W;
      const vf scale = load_scale(p.scales, p.scale_dtype, at);
      FASTOPS_UNROLL
      for (int r = 0; r < MR; ++r) total[r][v] = vfma(scale, sums[r][v], total[r][v]);
      if (shifted) {
        const vf offset = offset_of(p, at, scale, mode != Mode::int8);
        FASTOPS_UNROLL
        for (int r = 0; r < MR; ++r) total[r][v] = vfma(offset, vset(-p.sums[r * p.groups + g]), total[r][v]);
      }
    }
    w += n;
    codes += n * p.word_bytes;
    for (int r = 0; r < MR; ++r) a[r] += n * kBytes;
    shifted = p.summed();
  }
}

float* partial_at(const Int4Params& p, int64_t part, int64_t row, int64_t block) {
  const int64_t blocks = (p.N + kInt4Block - 1) / kInt4Block;
  return p.partial + ((part * p.M + row) * blocks + block) * kInt4Block;
}

template <Mode mode, bool k24, int MR>
void stream_blocks(const Int4Params& p, int64_t first, int64_t end, int64_t part, int64_t parts) {
  const int64_t words = p.K / 8;
  for (int64_t block = first; block < end; ++block) {
    vf total[MR][kNV16];
    const auto cut = [&](int64_t i) { return i < parts ? words * i / parts / 4 * 4 : words; };
    stream<mode, k24, MR>(p, block, cut(part), cut(part + 1), total);
    for (int r = 0; r < MR; ++r) {
      if (p.partial == nullptr) {
        finish(p, r, block * kInt4Block, total[r]);
        continue;
      }
      float* to = partial_at(p, part, r, block);
      for (int v = 0; v < kNV16; ++v) vstore(to + v * W, total[r][v]);
    }
  }
}

void join_parts(const Int4Params& p, int64_t parts) {
  for (int64_t row = 0; row < p.M; ++row)
    for (int64_t block = 0; block * kInt4Block < p.N; ++block) {
      vf sums[kNV16];
      for (int v = 0; v < kNV16; ++v) {
        sums[v] = vzero();
        for (int64_t part = 0; part < parts; ++part)
          sums[v] = vadd(sums[v], vload(partial_at(p, part, row, block) + v * W));
      }
      finish(p, row, block * kInt4Block, sums);
    }
}

template <Mode mode, bool k24>
void stream_rows(const Int4Params& p, int64_t first, int64_t end, int64_t part, int64_t parts) {
  static_assert(kInt4StreamRows == 4, "one case for each");
  switch (p.M) {
    case 1:
      return stream_blocks<mode, k24, 1>(p, first, end, part, parts);
    case 2:
      return stream_blocks<mode, k24, 2>(p, first, end, part, parts);
    case 3:
      return stream_blocks<mode, k24, 3>(p, first, end, part, parts);
    default:
      return stream_blocks<mode, k24, 4>(p, first, end, part, parts);
  }
}

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
