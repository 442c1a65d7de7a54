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
  const float* weight;  // [D] or null: RMS norm first
};

struct RopeAngles {
  const char *cos, *sin;
  int32_t dtype;
  bool inverse;
};

struct RopeTable {
  // `half` angles as floats, the sines first negated when inverse.
  void (*angles)(const RopeAngles& from, int64_t half, float* cos, float* sin);
  void (*heads)(const RopeHeads& h, int64_t d, int64_t half, const float* cos, const float* sin, float eps,
                bool interleaved, int32_t dtype, float* scratch);
};

FASTOPS_DECLARE_TABLES(RopeTable, rope_table)

}  // namespace fastops::cpu
