// Between the C API (attention.cpp) and the per-instruction-set kernels (attention.inl.h): one work item of a call
// (core/attention_params.h), and the table of entry points each variant fills in.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/attention_backward.h"
#include "core/attention_params.h"
#include "cpu/rows.h"

namespace fastops::cpu {

constexpr int kPad = 16;             // head sizes are padded to this many fp32 lanes in scratch, for every variant
constexpr int kDirectRows = 8;       // rows of a KV head that meet rows of K and V where these lie, at once
constexpr int kSharedRows = 16;      // up to so many may do so, in groups
constexpr int kSharedKeys = 512;     // where so many keys are to be seen; else, and for more rows, tiles are packed
constexpr int kDirectKeys = 256;     // and so many keys at a time,
constexpr int kDirectScores = 4096;  // with so many scores (at least 32 keys of all rows and heads)
constexpr int kDirectHeads = 16;     // KV heads one direct item may hold
constexpr int kMaxKeyTile = 128;     // keys of a packed tile
constexpr int kPackedRows = 64;      // rows that meet it at once, at most
constexpr int kRowGroup = 32;        // scratch rows are padded to a multiple of this

// Whether the rows of a sequence read K and V in place.
inline bool is_direct(const AttentionParams& p, const Sequence& s) {
  const int64_t rows = s.Sq * p.G;
  if (rows <= kDirectRows) return true;
  return rows <= kSharedRows && s.Sk >= kSharedKeys && p.D <= 128 && p.Dv <= 128 && !p.quant && !is_general(p);
}

inline int pad_dim(int d) { return (d + kPad - 1) / kPad * kPad; }

struct AttentionItem {
  int64_t b, hkv, heads;             // heads > 1 only for direct items: neighbours in memory are read as one stream
  int64_t row0, rows;                // rows of each (sequence, KV head) this item computes
  int64_t key0, key1;                // keys this item may look at (a split, or all)
  float *partial_out, *partial_lse;  // fp32 [rows][Dv] and [rows] of the first head when the item is a split; else NULL
  int64_t partial_step;              // rows between the partials of neighbouring heads
  const AttentionItem* then = nullptr;                   // what the same thread takes next, as a rule, or NULL
  float v_factor = 1.0f;                                 // of all values, where the cache's kernel leaves it to the end
  const float *before = nullptr, *before_lse = nullptr;  // [heads][rows][Dv] and [heads][rows]: of keys seen already
};

inline int attention_key_tile(int D, int Dv) { return D <= 64 && Dv <= 64 ? 128 : 64; }
// And where numbers are sums of so many bf16.
constexpr int packed_tile_keys(int parts) { return parts == 1 ? 128 : 64; }

// Scratch of one worker, in floats; each part starts on a 64-byte boundary.
struct AttentionScratch {
  int64_t q, o, k, v, s, p16, m, l, lo, hi, rows, raw, before, total;
};
constexpr int64_t kDecodedFloats = 32 << 10;  // room for the decoded rows of a quantised tile
constexpr int kDecodedKeys = 16;              // keys a direct tile of them holds at least
// `rows`: query rows held at once, over all heads of the item.
inline AttentionScratch attention_scratch(const AttentionParams& p, int rows) {
  const int D = p.D, Dv = p.Dv;
  const bool quant = p.quant;
  const int64_t R = (rows + kRowGroup - 1) / kRowGroup * kRowGroup, DP = (D + 31) / 32 * 32, VP = pad_dim(Dv);
  const int64_t direct = kDirectRows * kDirectHeads;  // rows whose q and o may stand in the order of 4-bit codes
  // Three parts of fp32 (quantised rows are decoded to it) take half as much room again as the number.
  const bool split = p.dtype == 1 || quant;
  const int64_t parts = split ? 3 : 2, least = packed_tile_keys(split ? 3 : 2) * parts / 2;
  const int64_t key_tile = attention_key_tile(D, Dv) > least ? attention_key_tile(D, Dv) : least;
  const auto or_more = [&](int64_t floats, int64_t per_row) {
    return quant && direct * per_row > floats ? direct * per_row : floats;
  };
  AttentionScratch s{};
  int64_t at = 0;
  auto take = [&at](int64_t floats) {
    const int64_t here = at;
    at += (floats + 15) / 16 * 16;
    return here;
  };
  s.q = take(or_more(R * DP * parts / 2, (D + 127) / 128 * 64));
  s.o = take(or_more(R * VP, (Dv + 127) / 128 * 128 + kPad));
  s.k = take(DP * key_tile);
  s.v = take(static_cast<int64_t>(key_tile) * VP);
  s.s = take(kPackedRows * kMaxKeyTile);
  s.p16 = take(kPackedRows * packed_tile_keys(3) * 3 / 2);  // the most: three parts, in pairs
  s.m = take(R);
  s.l = take(R * kPad);
  s.lo = take(R);
  s.hi = take(R);
  s.rows = take(kDirectKeys * 2 * static_cast<int64_t>(sizeof(void*) / 4) * 2 + kMaxHeadDim);
  s.raw = take(quant ? kDecodedFloats : 0);
  // What an item's keys in pages gave, while the recent ones are seen.
  s.before = take(quant && R <= direct ? direct * (Dv + 1) : 0);
  s.total = at;
  return s;
}

constexpr int kBackwardKeys = 64;   // keys of a tile
constexpr int kBackwardRows = 96;   // rows of a dq item
constexpr int kBackwardGroup = 24;  // rows multiplied at once

// Floats of scratch a backward worker needs.
inline int64_t backward_scratch(int D, int Dv) {
  const int64_t DP = pad_dim(D), VP = pad_dim(Dv), rows = kBackwardRows;
  return 64 + 2 * kBackwardKeys * (DP + VP) + kBackwardKeys * DP + rows * DP + kBackwardGroup * (DP + VP) +
         3 * kBackwardGroup * kBackwardKeys + 8 * kBackwardGroup;
}

struct AttentionTable {
  void (*item)(const AttentionParams&, const AttentionItem&, float* scratch);
  // acc[0, n) += weight * x[0, n), acc fp32 with room for whole vectors; and out[0, n) = factor * acc[0, n).
  void (*add_weighted)(float* acc, const char* x, int32_t dtype, int32_t n, float weight);
  void (*store)(char* out, int32_t dtype, const float* acc, int32_t n, float factor);
  // dk and dv of one key tile; dq of one block of rows; dsinks of one head.
  void (*backward_keys)(const BackwardParams&, int64_t b, int64_t hkv, int64_t key0, float* scratch);
  void (*backward_rows)(const BackwardParams&, int64_t b, int64_t hkv, int64_t row0, float* scratch);
  void (*backward_sinks)(const BackwardParams&, int64_t head);
};

FASTOPS_DECLARE_ANY_TABLES(AttentionTable, attention_table)

}  // namespace fastops::cpu
