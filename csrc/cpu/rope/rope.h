// What rope's C API (rope.cpp) and its kernels (rope.inl.h, once per instruction set) agree on.
#pragma once
#include <cstdint>

#include "cpu/rows.h"

namespace fastops::cpu {

// One token's heads of one tensor.
struct RopeHeads {
  const char* in;
  char* out;
  int64_t in_step, out_step;  // bytes from head to head
  int64_t heads;
  const float* weight;          // [D] or null: RMS norm first
  const char *next, *next_out;  // the next token's, to ask for while these are turned, or null
};

struct RopeAngles {
  const char *cos, *sin;
  int32_t dtype;
  bool inverse;
};

struct RopeShape {
  int64_t d, half;
  float eps;
  bool interleaved, stream;
  int32_t dtype;
};

struct RopeTable {
  // `half` angles as floats, the sines negated when inverse. Interleaved: each twice, the first sine of two negated.
  void (*angles)(const RopeAngles& from, const RopeShape& shape, float* cos, float* sin);
  void (*heads)(const RopeHeads& h, const RopeShape& shape, const float* cos, const float* sin);
};

FASTOPS_DECLARE_TABLES(RopeTable, rope_table)

}  // namespace fastops::cpu
