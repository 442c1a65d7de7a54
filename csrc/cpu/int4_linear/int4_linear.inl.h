// INT4 weights times activations, written once in the vocabulary of cpu/isa/vec_*.h.
//
// A packed word holds eight codes of one output feature: nibble 2 b is input feature b of eight, nibble 2 b + 1 feature
// 4 + b. Masking the low or the high nibbles of its bytes gives four neighbours for an integer dot product; shifting
// by 4 i gives one code for a table look-up, or the pair (i, i + 4) of nibbles for bf16 pairs.
//   stream (few rows)  : codes go from memory through registers into the products, once
//   panel  (more rows) : 128 units x 64 features are expanded into L1, then the gemm of cpu/isa runs all rows over them
namespace fastops::cpu::FASTOPS_ISA {
namespace {

constexpr int kNV16 = kInt4Block / W;  // vectors of a block
// The input feature of nibble i. The pairs (i, i + 4) hold features 0 2, 4 6, 1 3, 5 7: in that layout feature j stands
// at kOrder[j], too.
constexpr int kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};

enum class Mode { f32, bf16, int8 };

// Vector v of a word, eight codes a lane. With 2:4 sparsity sixteen bits hold the four codes kept (less 8, the first
// in the lowest ones), eight more their places in their four columns; what is not there has code 8, that is, weight 0.
template <bool k24>
FASTOPS_INLINE vi load_word(const uint8_t* word, int v) {
  if constexpr (!k24) {
    return viload(word + v * W * 4);
  } else {
    const vi codes = viload_u16(word + v * W * 2), places = viload_u8(word + kInt4Block * 2 + v * W);
    // Nibble 2 c is column c of the first four, nibble 2 c + 1 of the second: 8 bits a column.
    const vi a = vishlv(vimask<0xf>(codes), vimask<24>(vishl<3>(places)));
    const vi b = vishlv(vimask<0xf>(vishr<4>(codes)), vimask<24>(vishl<1>(places)));
    const vi c = vishlv(vimask<0xf0>(vishr<4>(codes)), vimask<24>(vishr<1>(places)));
    const vi d = vishlv(vimask<0xf0>(vishr<8>(codes)), vimask<24>(vishr<3>(places)));
    return viflip<0x88888888>(vior(vior(a, b), vior(c, d)));
  }
}

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA

#include "cpu/int4_linear/int4_linear_tiles.inl.h"

namespace fastops::cpu::FASTOPS_ISA {
namespace {

template <class T>
FASTOPS_INLINE vf load_as(const char* p, int64_t i) {
  return vload(reinterpret_cast<const T*>(p) + i);
}
FASTOPS_INLINE vf load_scale(const char* p, int32_t dtype, int64_t i) {
  return dtype == FASTOPS_F32 ? load_as<float>(p, i) : dtype == FASTOPS_F16 ? load_as<f16>(p, i) : load_as<bf16>(p, i);
}

// Whether panels multiply two planes as one of 8 bits: 16 high + low, from 0 to 255, is 136 more than the weight. For
// bytes where the integer product takes unsigned ones of any size.
FASTOPS_INLINE bool joined(const Int4Params& p) {
#if defined(FASTOPS_HAS_VNNI)
  return p.eight;
#else
  return p.eight && !p.int8;
#endif
}

Mode mode_of(const Int4Params& p) {
  if (p.int8 && !is_scaled(p)) return Mode::int8;
#if defined(FASTOPS_HAS_AMX)  // (whose processors multiply vectors of fp32 faster than those of bf16)
  if (is_tiled(p)) return Mode::bf16;
#elif defined(FASTOPS_HAS_BF16_DOT)
  if (p.rounded || (p.dtype == FASTOPS_BF16 && p.column_scales == nullptr)) return Mode::bf16;
#endif
  return Mode::f32;
}

// Of a row of x, or of each of its parts.
int64_t plane_bytes(const Int4Params& p) {
  const Mode mode = mode_of(p);
  const int64_t lines = (p.K * (mode == Mode::int8 ? 1 : mode == Mode::bf16 ? 2 : 4) + 63) / 64;
  return (lines | 1) * 64;
}
int64_t row_bytes(const Int4Params& p) {
  const Mode mode = mode_of(p);
  if (mode == Mode::f32 && p.M <= kInt4StreamRows && !p.rounded && p.dtype == FASTOPS_F32 && p.perm == nullptr &&
      p.column_scales == nullptr && p.K == p.features)
    return 0;
  return planes_of(p) * plane_bytes(p);
}

// Features [k, k + n) of a row in fp32, in the weight's order.
void gather_features(const Int4Params& p, int64_t row, int64_t k, int n, float* to) {
  if (p.perm) {
    const char* x = p.x + row * p.x_sm * (p.dtype == FASTOPS_F32 ? 4 : 2);
    for (int i = 0; i < n; ++i) {
      const int64_t at = p.perm[k + i];
      to[i] = p.dtype == FASTOPS_F32   ? reinterpret_cast<const float*>(x)[at]
              : p.dtype == FASTOPS_F16 ? to_f32(reinterpret_cast<const f16*>(x)[at])
                                       : to_f32(reinterpret_cast<const bf16*>(x)[at]);
    }
    return;
  }
  const auto convert = [&](const auto* x) FASTOPS_LAMBDA {
    x += row * p.x_sm + k % p.features;  // a group lies in one plane
    int i = 0;
    for (; i + W <= n; i += W) vstore(to + i, vload(x + i));
    if (i < n) vstoren(to + i, vloadn(x + i, n - i), n - i);
  };
  if (p.dtype == FASTOPS_F32) convert(reinterpret_cast<const float*>(p.x));
  if (p.dtype == FASTOPS_F16) convert(reinterpret_cast<const f16*>(p.x));
  if (p.dtype == FASTOPS_BF16) convert(reinterpret_cast<const bf16*>(p.x));
}
// The same times what the columns carry, rounded where that is asked for.
void read_features(const Int4Params& p, int64_t row, int64_t k, int n, float* to) {
  gather_features(p, row, k, n, to);
  if (p.column_scales)
    for (int i = 0; i < n; ++i) to[i] *= p.column_scales[k + i];
  if (!p.rounded) return;
  bf16 x[W];
  int i = 0;
  for (; i + W <= n; i += W) vstore(x, vload(to + i)), vstore(to + i, vload(x));
  if (i < n) vstoren(x, vloadn(to + i, n - i), n - i), vstoren(to + i, vloadn(x, n - i), n - i);
}

// Row `row` of x as the products read it, and its sums over groups where something is multiplied with them.
void prepare(const Int4Params& p, int64_t row) {
  constexpr int64_t kChunk = 256;  // columns at a time, of one plane
  const Mode mode = mode_of(p);
  char* a = p.a ? p.a + row * p.a_row : nullptr;
  float buffer[kChunk], inverse = 0.0f;
  const auto chunk = [](int64_t at, int64_t end) { return end - at < kChunk ? end - at : kChunk; };
  if (p.int8) {  // x = row_scale * code, |code| <= 127. A row with an inf or NaN becomes NaN.
    vf top = vzero(), poison = vzero();
    const int64_t columns = p.perm || p.column_scales ? p.K : p.features;  // planes read the same again
    for (int64_t k = 0, n = 0; k < columns; k += n) {
      n = chunk(k, (k / p.features + 1) * p.features);  // a plane at a time
      read_features(p, row, k, static_cast<int>(n), buffer);
      for (int64_t i = 0; i < n; i += W) {
        const vf v = n - i >= W ? vload(buffer + i) : vloadn(buffer + i, static_cast<int>(n - i));
        top = vmax(vabs(v), top);
        poison = vfma(v, vzero(), poison);
      }
    }
    const float most = vhmax(top), bad = vsum(poison);
    p.row_scale[row] = most / 127.0f + bad;
    inverse = most > 0.0f && bad == 0.0f ? 127.0f / most : 0.0f;
  }
  const bool summed = p.summed(), once = p.M > kInt4StreamRows && joined(p);  // both planes are read as one then
  const float centre = mode == Mode::int8 ? 0.0f : 8.0f;
  const auto weigh = [&](vf v, int64_t k, int left) FASTOPS_LAMBDA {  // what a column's zero makes of x
    if (p.column_zeros == nullptr) return v;
    const float* zero = p.column_zeros + k;
    return vmul(v, vsub(left >= W ? vload(zero) : vloadn(zero, left), vset(centre)));
  };
  const int64_t columns = once ? p.K / 2 : p.K;
  int64_t g = 0, group_end = p.group;
  vf sum = vzero();
  for (int64_t k = 0, n = 0; k < columns; k += n) {
    n = chunk(k, (k / p.features + 1) * p.features);
    read_features(p, row, k, static_cast<int>(n), buffer);
    const auto at = [&](int64_t i, int64_t end) FASTOPS_LAMBDA {
      return end - i >= W ? vload(buffer + i) : vloadn(buffer + i, static_cast<int>(end - i));
    };
    for (int64_t i = 0; p.int8 && i < n; i += W)
      vstore(buffer + i, inverse == 0.0f ? vzero() : vround(vmul(at(i, n), vset(inverse))));
    for (int64_t i = 0; summed && i < n;) {
      const int64_t end = group_end - k < n ? group_end - k : n;
      for (; i < end; i += W) sum = vadd(sum, weigh(at(i, end), k + i, static_cast<int>(end - i)));
      i = end;
      if (k + end < group_end) break;
      p.sums[row * p.groups + g++] = vsum(sum);
      group_end += p.group;
      sum = vzero();
    }
    if (mode == Mode::int8) {
      int8_t codes[kChunk];
      for (int64_t i = 0; i < n; i += W) vstore_i8(codes + i, at(i, n));
      std::memcpy(a + k, codes, static_cast<size_t>(n));
    }
    if (mode == Mode::f32 && a) std::memcpy(reinterpret_cast<float*>(a) + k, buffer, static_cast<size_t>(n) * 4);
#if defined(FASTOPS_HAS_AMX)
    if (mode == Mode::bf16) store_planes(buffer, static_cast<int>(n), a + k * 2, plane_bytes(p), planes_of(p));
#else
    if (mode == Mode::bf16)  // exact: these numbers were bf16 before
      for (int64_t i = 0; i < n; ++i) from_f32(buffer[i], reinterpret_cast<bf16*>(a) + k + i / 8 * 8 + kOrder[i % 8]);
#endif
  }
}

const char* row_of(const Int4Params& p, int64_t row) {
  return p.a ? p.a + row * p.a_row : p.x + row * p.x_sm * static_cast<int64_t>(sizeof(float));
}

// What a group's sum of x is multiplied with and taken away: codes meet x less 8 (int8: as they are).
FASTOPS_INLINE vf offset_of(const Int4Params& p, int64_t at, vf scale, bool centred) {
  const float shift = centred ? 8.0f : 0.0f;
  if (p.zeros) return vmul(vsub(load_scale(p.zeros, p.scale_dtype, at), vset(shift)), scale);
  if (p.mins) return vsub(load_scale(p.mins, p.scale_dtype, at), vmul(vset(shift), scale));
  if (p.column_zeros) return scale;  // the sums know the zeros
  return vmul(vset(8.0f - shift), scale);
}

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA

#include "cpu/int4_linear/int4_linear_stream.inl.h"

namespace fastops::cpu::FASTOPS_ISA {
namespace {

// ---- panel ---------------------------------------------------------------------------------------------------------

// Features of a panel, in whole blocks.
int panel_columns(const Int4Params& p, int64_t panel) {
  const int64_t blocks = (p.N + kInt4Block - 1) / kInt4Block - panel * (kInt4Panel / kInt4Block);
  return static_cast<int>(blocks < kInt4Panel / kInt4Block ? blocks * kInt4Block : kInt4Panel);
}

// The outputs of panels, whose totals stand `size` floats apart.
void finish_panels(const Int4Params& p, int64_t panel0, int64_t panel_end, const float* totals, int64_t size) {
  for (int64_t panel = panel0; panel < panel_end; ++panel, totals += size) {
    const int columns = panel_columns(p, panel);
    for (int r = 0; r < p.M; ++r) {
      for (int c = 0; c < columns; c += kInt4Block) {
        vf values[kNV16];
        for (int v = 0; v < kNV16; ++v) values[v] = vload(totals + r * kInt4Panel + c + v * W);
        finish(p, r, panel * kInt4Panel + c, values);
      }
    }
  }
}

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA

#include "cpu/int4_linear/int4_linear_expand.inl.h"
#include "cpu/int4_linear/int4_linear_tile_panels.inl.h"

namespace fastops::cpu::FASTOPS_ISA {
namespace {

// total += scale * products; where the group begins also its offset times the sum of x over the group.
template <Mode mode>
void add_group(const Int4Params& p, int64_t panel, int64_t g, bool begins, int row0, int rows, int columns,
               const float* products, float* total) {
  const bool shifted = begins && p.summed();
  for (int c = 0; c < columns; c += W) {
    const int64_t block = panel * (kInt4Panel / kInt4Block) + c / kInt4Block;
    const bool both = joined(p);  // the second plane's scale then
    const int64_t at = (block * p.groups + g + (both ? p.groups / 2 : 0)) * kInt4Block + c % kInt4Block;
    const vf scale = load_scale(p.scales, p.scale_dtype, at);
    const vf offset = !shifted ? vzero()
                      : both   ? vmul(vset(mode == Mode::int8 ? 136.0f : 0.0f), scale)
                               : offset_of(p, at, scale, mode != Mode::int8);
    for (int r = 0; r < rows; ++r) {
      vf x = vload(products + r * kInt4Panel + c);
      if constexpr (mode == Mode::int8) x = vi_to_float(vi_from_bits(x));
      vf sum = vfma(scale, x, vload(total + r * kInt4Panel + c));
      if (shifted) sum = vfma(offset, vset(-p.sums[(row0 + r) * p.groups + g]), sum);
      vstore(total + r * kInt4Panel + c, sum);
    }
  }
}

template <Mode mode, class Dot>
void expanded_panels(const Int4Params& p, int64_t panel0, int64_t panel_end, float* scratch) {
  constexpr int kPerWord = mode == Mode::f32 ? 8 : mode == Mode::bf16 ? 4 : 2;  // units
  constexpr int64_t kWords = kInt4Units / kPerWord;
  const int rows = static_cast<int>(p.M);
  const int64_t size = int4_total_rows(rows) * kInt4Panel, lda = p.a_row / 4;
  float *expanded = scratch, *products = expanded + kInt4Units * kInt4Panel;
  float* totals = products + int4_product_rows(rows) * kInt4Panel;
  std::memset(totals, 0, sizeof(float) * static_cast<size_t>(size * (panel_end - panel0)));
  const bool both = joined(p);
  const int64_t all = p.K / (both ? 16 : 8);
  for (int64_t word = 0; word < all;) {
    int64_t words = all - word < kWords ? all - word : kWords;
    const int64_t g = word * 8 / p.group, group_end = (g + 1) * p.group / 8;
    if (mode != Mode::f32 && group_end - word < words) words = group_end - word;  // a product ends with its group
    const float* a = reinterpret_cast<const float*>(row_of(p, 0)) + word * kPerWord;
    const int units = static_cast<int>(words * kPerWord);
    for (int64_t panel = panel0; panel < panel_end; ++panel) {
      float* total = totals + (panel - panel0) * size;
      const int columns = panel_columns(p, panel);
      expand_any<mode>(p, panel, word, words, expanded);
      if constexpr (mode == Mode::f32) {
        gemm<Dot>(a, lda, expanded, kInt4Panel, total, kInt4Panel, rows, columns, units, true);
      } else {
        const bool begins = word * 8 == g * p.group;
#if defined(FASTOPS_HAS_AMX)
        if (is_tiled(p)) {
          const int whole = (units + 15) / 16 * 16;
          std::memset(expanded + units * kInt4Panel, 0,
                      sizeof(float) * static_cast<size_t>((whole - units) * kInt4Panel));
          const int planes = planes_of(p);
          const auto multiply = [&](auto parts, const float* from, int n) {
            tile_gemm<Dot, decltype(parts)::value>(from, lda, expanded, kInt4Panel, products, kInt4Panel, n, columns,
                                                   whole, false, {plane_bytes(p) / 4, 0});
          };
          for (int r = 0; r < rows; r += 32) {  // their products stay in L1
            const int n = rows - r < 32 ? rows - r : 32;
            planes == 3   ? multiply(Index<3>(), a + r * lda, n)
            : planes == 2 ? multiply(Index<2>(), a + r * lda, n)
                          : multiply(Index<1>(), a + r * lda, n);
            add_group<mode>(p, panel, g, begins, r, n, columns, products, total + r * kInt4Panel);
          }
          continue;
        }
#endif
        gemm<Dot>(a, lda, expanded, kInt4Panel, products, kInt4Panel, rows, columns, units, false);
        add_group<mode>(p, panel, g, begins, 0, rows, columns, products, total);
      }
    }
    word += words;
  }
  finish_panels(p, panel0, panel_end, totals, size);
}

// ---- choice --------------------------------------------------------------------------------------------------------

template <Mode m, class D>
struct ModeIs {
  static constexpr Mode mode = m;
  using Dot = D;
};
template <class F>
void in_mode_of(const Int4Params& p, const F& f) {
  switch (mode_of(p)) {
    case Mode::int8:
      return f(ModeIs<Mode::int8, DotU8S8>{});
#if defined(FASTOPS_HAS_BF16_DOT)
    case Mode::bf16:
      return f(ModeIs<Mode::bf16, DotBf16>{});
#endif
    default:
      return f(ModeIs<Mode::f32, DotF32>{});
  }
}

void int4_stream(const Int4Params& p, int64_t first, int64_t end, int64_t part, int64_t parts) {
#if defined(FASTOPS_HAS_AMX)
  [[maybe_unused]] const TileScope tiles(static_cast<int>(p.M) * planes_of(p));
#endif
  in_mode_of(p, [&](auto is) {
    constexpr Mode mode = decltype(is)::mode;
    (p.word_bytes == kInt4Word24 ? stream_rows<mode, true> : stream_rows<mode, false>)(p, first, end, part, parts);
  });
}

void int4_panels(const Int4Params& p, int64_t first, int64_t end, float* scratch) {
#if defined(FASTOPS_HAS_AMX)
  [[maybe_unused]] const TileScope tiles;
  if (is_scaled(p)) return scaled_panels(p, first, end, scratch);
#endif
  in_mode_of(p, [&](auto is) {
    using Is = decltype(is);
    expanded_panels<Is::mode, typename Is::Dot>(p, first, end, scratch);
  });
}

}  // namespace

extern const Int4Table int4_table;
#if defined(FASTOPS_HAS_AMX)
constexpr int kRowsRead = 16;
#else
constexpr int kRowsRead = 1;
#endif
const Int4Table int4_table = {&row_bytes, &prepare, &int4_stream, &join_parts, &int4_panels, kRowsRead};

}  // namespace fastops::cpu::FASTOPS_ISA
