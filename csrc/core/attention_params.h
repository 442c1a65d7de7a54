// An attention call flattened to plain numbers, and what it means for one sequence and one query: the same for every
// kernel, on the host and in CUDA.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace fastops {

constexpr int kMaxHeadDim = 256;

// How the keys, or the values, of a quantised cache are stored (fastops_kv_quant, flattened).
enum KvKind : int32_t { kKvPlain, kKvI8, kKvF8, kKvU8, kKvU4, kKvU2 };
struct KvSide {
  int32_t kind;
  int32_t scale_dtype;             // of scale and shift
  const char *scale, *shift;       // NULL: 1 and 0
  int64_t scale_s[4], shift_s[4];  // strides over page, group of keys, head, group of channels; 0 where they share one
  int32_t group_shift;             // keys of a group, as a power of two
  int32_t channels;                // of a group
  bool each;                       // a scale for each channel of a group of keys
  bool shift_is_zero;              // value = (code - shift) scale, otherwise code scale + shift
  const char* recent;              // [B, R, Hkv, D] in q's dtype
  int64_t recent_s[3];
};

// Strides count elements. "Row" below is a (query position, head of the group) pair of one sequence and one KV head:
// row = position * G + head, so that one K/V tile serves every query head that shares it.
struct AttentionParams {
  const char *q, *k, *v;
  char* out;
  float* lse;
  int64_t q_sb, q_ss, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, o_sb, o_ss, o_sh, lse_sb, lse_sh, lse_ss;
  int32_t dtype, out_dtype;
  int32_t D, Dv;
  int64_t B, Hq, Hkv, G;
  int64_t Sq, Sk;                   // dense lengths
  const int32_t *cu_q, *cu_k;       // ragged (cu_q also for paged)
  const int32_t *seq_lens, *table;  // paged
  int64_t seq_stride, table_sb, table_sp, cu_q_stride, cu_k_stride;
  int64_t queries_per_seq;  // paged without cu_q
  int32_t page_shift, page_mask;
  int64_t pages, max_pages;  // of the cache, and of a row of the table
  int64_t q_rows, k_rows;    // of ragged q (also with pages), and of ragged k
  bool paged, ragged, top_left;
  float scale, softcap;
  int64_t window_left, window_right;  // -1: unbounded
  const float *sinks, *alibi;
  int64_t sinks_stride, alibi_sb, alibi_sh;
  const char* bias;
  int32_t bias_dtype;
  int64_t bias_s[4];
  bool quant;  // paged, with these two
  KvSide kq, vq;
  const int32_t* packed;  // keys in pages; those behind stand in a window of `recent`
  int64_t packed_stride, recent;
  // The plan (a function of the shapes and the machine's cores, never of the number of threads).
  int32_t block_rows;    // CPU: rows of a packed work item
  int32_t direct_heads;  // CPU: KV heads of a direct work item
  int64_t partial_room;  // CPU: bytes for partial results
  double split_cost;     // CPU: of a split of a sequence's keys, in the plan's measure; 0: no splitting
};

// Whether scores take more than a positive factor.
inline bool is_general(const AttentionParams& p) { return p.softcap > 0.0f || p.bias || p.alibi || !(p.scale > 0.0f); }

// One sequence of the batch.
struct Sequence {
  int64_t q0, k0;  // first row of q/out/lse and of k/v (ragged layouts; 0 otherwise)
  int64_t Sq, Sk;
  int64_t offset;  // key position of query 0
};

FASTOPS_SHARED Sequence sequence(const AttentionParams& p, int64_t b) {
  Sequence s{0, 0, p.Sq, p.Sk, 0};
  if (p.ragged || p.paged) {
    if (p.cu_q) {
      s.q0 = p.cu_q[b * p.cu_q_stride];
      s.Sq = p.cu_q[(b + 1) * p.cu_q_stride] - s.q0;
    } else {
      s.q0 = b * p.queries_per_seq;
      s.Sq = p.queries_per_seq;
    }
    if (p.paged) {
      s.Sk = p.seq_lens[b * p.seq_stride];
    } else {
      s.k0 = p.cu_k[b * p.cu_k_stride];
      s.Sk = p.cu_k[(b + 1) * p.cu_k_stride] - s.k0;
    }
  }
  s.offset = p.top_left ? 0 : s.Sk - s.Sq;
  return s;
}

// Keys [lo, hi) that a query at index i of the sequence sees.
struct KeyRange {
  int64_t lo, hi;
};
FASTOPS_SHARED KeyRange visible_keys(const AttentionParams& p, const Sequence& s, int64_t i) {
  const int64_t pos = i + s.offset;
  int64_t lo = p.window_left < 0 || pos - p.window_left < 0 ? 0 : pos - p.window_left;
  int64_t hi = p.window_right < 0 || pos >= s.Sk - p.window_right ? s.Sk : pos + p.window_right + 1;
  if (hi < 0) hi = 0;
  if (lo > hi) lo = hi;
  return {lo, hi};
}

}  // namespace fastops
