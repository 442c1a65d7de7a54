// What kv_append's C API (kv_append.cpp) and its kernels (kv_append.inl.h, once per instruction set) agree on.
#pragma once
#include <cstdint>

#include "core/attention_params.h"
#include "cpu/rows.h"

namespace fastops::cpu {

constexpr int kAppendTokens = 32;  // of a group that shares scales, at most

// Keys, or values, of neighbouring tokens of one head that share scales: numbers in, codes out.
struct AppendGroup {
  const char* rows[kAppendTokens];  // `dim` numbers of `dtype`
  char* codes[kAppendTokens];
  char *scale, *shift;  // where those of the first channels go, or NULL: `given` is used
  int tokens, dim;
  int32_t dtype;
  float given_scale, given_offset;  // code = number / scale + offset
};

struct KvAppendTable {
  void (*group)(const KvSide& side, const AppendGroup& g);
};

FASTOPS_DECLARE_TABLES(KvAppendTable, kv_append_table)

}  // namespace fastops::cpu
