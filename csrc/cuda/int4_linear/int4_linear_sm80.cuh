// x times a weight of 4-bit codes for sm_80 and later, after Marlin (Frantar et al. 2024, section 3): four stages of x
// and codes on their way by cp.async, codes expanded in registers by lop3, fp16 or bf16 products by mma.m16n8k16, fp32
// sums.
//
// A tile is 16 to 64 rows by 128 features, each warp 32 of these. A block takes a run of steps (int4_stripes), which
// may begin and end within tiles: fp32 parts of these go to memory, and a second kernel adds them in a fixed order. The
// stages do not run dry between tiles. The codes come as fastops_int4_pack leaves them for the CPU: word (octet of k,
// feature) holds k in the order 0 4 1 5 2 6 3 7. A product does not care which k stands in which slot of a fragment as
// long as both sides agree, so thread t of a group of four takes octet t of 32 k for itself:
//
//   slots of mma       2t 2t+1 | 2t+8 2t+9      first product: k 0 2 | 1 3 of octet t      second: k 4 6 | 5 7
//   its code word      bits 0, 16: k 0 2   bits 4, 20: k 4 6   bits 8, 24: k 1 3   bits 12, 28: k 5 7
//   its part of x      16 bytes of a row, whose halves two permutations bring into that order
//
// Group scales are not multiplied into the codes (which would round them) but into the sums of each group: code - 8 is
// exact in 16 bits. Zeros and minima go into sums of x, by one more product with a matrix of ones.
#pragma once
#include "cuda/arch/arch.h"
#include "cuda/int4_linear/int4_config.h"
#include "cuda/layout/numbers.h"

namespace fastops::cuda {

struct Int4Args {
  const char* x;
  char* out;
  const uint8_t* codes;
  const void *scales, *zeros, *mins;
  const float* bias;
  float* partial;  // [stripes][2: of a tile begun before, of one not ended][rows of a tile][kInt4Columns]
  int64_t M, N, K, Kx, ldx, ldo, groups, group_size, chunks, steps, stripes;  // chunks: steps of a tile
  int32_t scale_dtype;
  bool out_f32, out_wide, sparse;  // wide: 16 bits, eight columns at a time can be stored; sparse: 2:4
};

// A number whose unit is 1: its lowest bits take a code. In both halves of a register.
template <class T>
struct Magic;
template <>
struct Magic<f16> {
  static constexpr uint32_t kBits = 0x64006400u, kOne = 0x3c003c00u, kMinus = 0xe408e408u;  // 1024, 1, -1032
};
template <>
struct Magic<bf16> {
  static constexpr uint32_t kBits = 0x43004300u, kOne = 0x3f803f80u, kMinus = 0xc308c308u;  // 128, 1, -136
};

// Where a quarter of the sixteen features' words of an octet lies: places are exchanged so that the lanes of a quarter
// warp meet no bank twice.
FASTOPS_DEVICE int int4_code_at(int block, int octet, int quarter) {
  return block * (kInt4Depth / 8 * 64) + octet * 64 + (quarter ^ ((octet >> 1 & 1) << 1)) * 16;
}
// A word of 2:4 sparse codes is 48 bytes for sixteen features, one behind the other (csrc/cpu/int4_linear): sixteen
// times four codes kept, less 8, then sixteen times four places.
FASTOPS_DEVICE uint32_t int4_word24(const char* word, int feature) {
  const uint32_t codes = *reinterpret_cast<const uint16_t*>(word + 2 * feature);
  const uint32_t places = *reinterpret_cast<const uint8_t*>(word + 32 + feature);
  // Nibble 2 c is column c of the first four, nibble 2 c + 1 of the second; what is not there has code 8.
  return ((codes & 15) << (places << 3 & 24) | (codes >> 4 & 15) << (places << 1 & 24) |
          (codes >> 4 & 0xf0) << (places >> 1 & 24) | (codes >> 8 & 0xf0) << (places >> 3 & 24)) ^
         0x88888888u;
}
// The eight codes of a feature of a block in an octet.
template <bool k24>
FASTOPS_DEVICE uint32_t int4_word(const char* codes, int block, int octet, int feature) {
  if constexpr (k24) return int4_word24(codes + (block * (kInt4Depth / 8) + octet) * 48, feature);
  return *reinterpret_cast<const uint32_t*>(codes + int4_code_at(block, octet, feature / 4) + feature % 4 * 4);
}
// The codes of a block's features in one step of columns.
template <bool k24>
FASTOPS_DEVICE void int4_load_codes(const Int4Args& a, char* to, int64_t column0, int64_t chunk, uint64_t policy) {
  constexpr int kOctets = kInt4Depth / 8, kPieces = k24 ? 3 : 4;
  FASTOPS_UNROLL_BY(1)
  for (int i = thread_index(); i < kInt4Columns / 16 * kOctets * kPieces; i += kInt4Threads) {
    const int piece = i % kPieces, octet = i / kPieces % kOctets, block = i / kPieces / kOctets;
    const int64_t b = column0 / 16 + block, k8 = chunk * kOctets + octet;
    const bool there = b * 16 < a.N && k8 * 8 < a.K;
    const uint8_t* from = there ? a.codes + (b * (a.K / 8) + k8) * (16 * kPieces) + piece * 16 : a.codes;
    cp_async16(to + (k24 ? i * 16 : int4_code_at(block, octet, piece)), from, there, policy);
  }
}
// A finished sum.
template <class T>
FASTOPS_DEVICE void int4_finish(const Int4Args& a, int64_t row, int64_t column, float y) {
  if (a.bias) y += a.bias[column];
  if (a.out_f32)
    reinterpret_cast<float*>(a.out)[row * a.ldo + column] = y;
  else
    narrow(y, reinterpret_cast<T*>(a.out) + row * a.ldo + column);
}

// Where a block is on its way through the steps: tiles of the same features follow one another.
template <int kRows>
struct Int4Walk {
  int row0, column0, chunk;  // 32 bits: the host refuses more rows, and the kernels have no register to spare
  FASTOPS_DEVICE Int4Walk(const Int4Args& a, int64_t step) {
    const int64_t down = (a.M + kRows - 1) / kRows, tile = step / a.chunks;
    row0 = static_cast<int>(tile % down * kRows);
    column0 = static_cast<int>(tile / down * kInt4Columns);
    chunk = static_cast<int>(step % a.chunks);
  }
  FASTOPS_DEVICE void next(const Int4Args& a) {
    if (++chunk < a.chunks) return;
    chunk = 0;
    row0 += kRows;
    if (row0 < a.M) return;
    row0 = 0;
    column0 += kInt4Columns;
  }
};
// Sums of steps [head, tail) of the tile at `at`, number(m, n, i) as mma has them: the result, or a part of it.
template <class T, int kTiles, class F>
FASTOPS_DEVICE void int4_store(const Int4Args& a, const Int4Walk<16 * kTiles>& at, int head, int tail, F&& number) {
  const int g = lane_index() / 4, t = lane_index() % 4, warp = warp_index();
  const bool whole = head == 0 && tail == a.chunks;
  float* const part =
      a.partial + (2 * block_x() + (head == 0 ? 1 : 0)) * (16 * kTiles * static_cast<int64_t>(kInt4Columns));
  FASTOPS_UNROLL
  for (int m = 0; m < kTiles; ++m) {
    FASTOPS_UNROLL
    for (int n = 0; n < 4; ++n) {
      FASTOPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int r = 16 * m + g + i / 2 * 8, c = warp * 32 + n * 8 + 2 * t + i % 2;
        if (at.row0 + r >= a.M || at.column0 + c >= a.N) continue;
        const float y = number(m, n, i, at.row0 + r);
        if (whole)
          int4_finish<T>(a, at.row0 + r, at.column0 + c, y);
        else
          part[r * kInt4Columns + c] = y;
      }
    }
  }
}

template <class T, int kTiles, bool kShift, bool k24>
FASTOPS_KERNEL(kInt4Threads, int4_blocks_per_sm(kTiles))
int4_gemm(const Int4Args a) {
  constexpr int kRows = 16 * kTiles, kOctets = kInt4Depth / 8;
  constexpr int kRowBytes = kInt4Depth * 2;  // of x
  const int lane = lane_index(), warp = warp_index(), g = lane / 4, t = lane % 4;
  const int64_t begin = int4_stripe_begin(a.steps, a.stripes, block_x());
  const int64_t end = int4_stripe_begin(a.steps, a.stripes, block_x() + 1);
  Int4Walk<kRows> at(a, begin), ahead(a, begin);
  char* const shared = dynamic_shared();
  const auto x_of = [&](int64_t step) { return shared + step % kInt4Stages * int4_stage_bytes(kTiles); };
  // Places are exchanged as in int4_code_at.
  const auto x_at = [](int row, int octet) { return row * kRowBytes + (octet ^ ((row & 1) << 2)) * 16; };

  const uint64_t policy = cache_policy(a.M <= kRows);  // of the codes: no other block will read them then
  const auto load = [&](int64_t step) {
    char* xs = x_of(step);
    FASTOPS_UNROLL_BY(1)
    for (int i = thread_index(); i < kRows * kOctets; i += kInt4Threads) {
      const int r = i / kOctets, octet = i % kOctets;
      const int64_t row = ahead.row0 + r, k = int64_t{ahead.chunk} * kInt4Depth + octet * 8;
      const bool there = row < a.M && k < a.K;
      const char* from = there ? a.x + (row * a.ldx + k % a.Kx) * 2 : a.x;
      cp_async16(xs + x_at(r, octet), from, there);
    }
    int4_load_codes<k24>(a, xs + kRows * kRowBytes, ahead.column0, ahead.chunk, policy);
    ahead.next(a);
  };

  float total[kTiles][4][4], part[kTiles][4][4], sums[kTiles][4];
  const auto clear = [&] {
    FASTOPS_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      FASTOPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        sums[m][i] = 0.0f;
        FASTOPS_UNROLL
        for (int n = 0; n < 4; ++n) part[m][n][i] = 0.0f;
      }
    }
  };
  const auto clear_total = [&] {
    FASTOPS_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      FASTOPS_UNROLL
      for (int n = 0; n < 4; ++n) {
        FASTOPS_UNROLL
        for (int i = 0; i < 4; ++i) total[m][n][i] = 0.0f;
      }
    }
  };
  clear();
  clear_total();
  // The sums of a group, with its numbers, into the totals. Tile n of a warp holds features 8 n to 8 n + 7 of its 32.
  const auto flush = [&](int64_t group) {
    const int64_t base = ((at.column0 / 16 + 2 * warp) * a.groups + group) * 16 + 2 * t;
    const int step = static_cast<int>(a.groups) * 16, left = static_cast<int>(a.N - at.column0) - warp * 32 - 2 * t;
    FASTOPS_UNROLL
    for (int n = 0; n < 4; ++n) {
      FASTOPS_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (n * 8 + i >= left) continue;
        const int64_t place = base + n / 2 * step + n % 2 * 8 + i;
        const float scale = number_at(a.scales, a.scale_dtype, place);
        float shift = 0.0f;
        if (kShift)
          shift = a.zeros ? (8.0f - number_at(a.zeros, a.scale_dtype, place)) * scale
                          : 8.0f * scale - number_at(a.mins, a.scale_dtype, place);
        FASTOPS_UNROLL
        for (int m = 0; m < kTiles; ++m) {
          FASTOPS_UNROLL
          for (int r = 0; r < 2; ++r) {
            total[m][n][2 * r + i] += scale * part[m][n][2 * r + i];
            if (kShift) total[m][n][2 * r + i] += shift * sums[m][2 * r];
          }
        }
      }
    }
    clear();
  };

  for (int s = 0; s < kInt4Stages - 1; ++s) {
    if (begin + s < end) load(begin + s);
    cp_async_commit();
  }
  int head = at.chunk;  // where this block begins the tile
  for (int64_t step = begin; step < end; ++step, at.next(a)) {
    cp_async_wait<kInt4Stages - 2>();
    block_sync();  // this step is there, and nobody reads the one before it any more
    if (step + kInt4Stages - 1 < end) load(step + kInt4Stages - 1);
    cp_async_commit();
    const char* xs = x_of(step);
    const char* codes = xs + kRows * kRowBytes;
    FASTOPS_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int octet = 4 * j + t;
      uint32_t xa[kTiles][2][4];  // of the two products
      FASTOPS_UNROLL
      for (int m = 0; m < kTiles; ++m) {
        FASTOPS_UNROLL
        for (int r = 0; r < 2; ++r) {
          const auto* w = reinterpret_cast<const uint32_t*>(xs + x_at(16 * m + 8 * r + g, octet));
          const uint32_t k01 = w[0], k23 = w[1], k45 = w[2], k67 = w[3];
          xa[m][0][r] = permute_bytes(k01, k23, 0x5410);
          xa[m][0][2 + r] = permute_bytes(k01, k23, 0x7632);
          xa[m][1][r] = permute_bytes(k45, k67, 0x5410);
          xa[m][1][2 + r] = permute_bytes(k45, k67, 0x7632);
        }
        if (kShift) {
          mma_m16n8k16<T>(sums[m], xa[m][0], Magic<T>::kOne, Magic<T>::kOne);
          mma_m16n8k16<T>(sums[m], xa[m][1], Magic<T>::kOne, Magic<T>::kOne);
        }
      }
      FASTOPS_UNROLL
      for (int n = 0; n < 4; ++n) {
        const uint32_t word = int4_word<k24>(codes, 2 * warp + n / 2, octet, n % 2 * 8 + g);
        uint32_t w[4];
        FASTOPS_UNROLL
        for (int i = 0; i < 4; ++i)
          w[i] = fma2<T>(and_or(word >> (4 * i), 0x000f000fu, Magic<T>::kBits), Magic<T>::kOne, Magic<T>::kMinus);
        FASTOPS_UNROLL
        for (int m = 0; m < kTiles; ++m) {
          mma_m16n8k16<T>(part[m][n], xa[m][0], w[0], w[2]);
          mma_m16n8k16<T>(part[m][n], xa[m][1], w[1], w[3]);
        }
      }
      const int64_t k = int64_t{at.chunk} * kInt4Depth + 32 * (j + 1);
      if (k % a.group_size == 0 && k < a.K) flush(k / a.group_size - 1);
    }
    if (at.chunk + 1 < a.chunks && step + 1 < end) continue;
    const int64_t whole = int64_t{at.chunk + 1} * kInt4Depth, k = whole < a.K ? whole : a.K;
    flush((k - 1) / a.group_size);  // what a group has left
    int4_store<T, kTiles>(a, at, head, at.chunk + 1, [&](int m, int n, int i, int64_t) { return total[m][n][i]; });
    clear_total();
    head = 0;
  }
  cp_async_wait<0>();
}

// The tile that the cut before run block_x() + 1 goes through, if it is the first to do so: its parts, added in order.
// Sixteen of its rows.
template <class T, int kTiles>
FASTOPS_KERNEL(kInt4Threads, 8)
int4_add(const Int4Args a) {
  static_assert(kInt4Threads == kInt4Columns);
  constexpr int64_t kPart = 16 * kTiles * static_cast<int64_t>(kInt4Columns);
  const int64_t before = block_x(), cut = int4_stripe_begin(a.steps, a.stripes, before + 1);
  const int64_t from = cut / a.chunks * a.chunks;
  if (cut == from || int4_stripe_of(a.steps, a.stripes, from) != before) return;
  const int64_t last = int4_stripe_of(a.steps, a.stripes, from + a.chunks - 1);
  const Int4Walk<16 * kTiles> at(a, from);
  const int64_t row0 = block_y() * 16, column = at.column0 + thread_index();
  if (column >= a.N) return;
  const float* part = a.partial + (2 * before + 1) * kPart + row0 * kInt4Columns + thread_index();
  for (int64_t r = 0; r < 16 && at.row0 + row0 + r < a.M; ++r, part += kInt4Columns) {
    float y = part[0];
    for (int64_t s = before + 1; s <= last; ++s) y += part[(2 * (s - before) - 1) * kPart];
    int4_finish<T>(a, at.row0 + row0 + r, column, y);
  }
}

}  // namespace fastops::cuda
