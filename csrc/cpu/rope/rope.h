// What rope's C API (rope.cpp) and its kernels (rope.inl.h, once per instruction set) agree on.
#pragma once
#include <cstdint>

#include "cpu/rows.h"

namespace fastops::cpu {

constexpr int64_t kRopePairs = 512;  // of a head, at most

// One token's heads of one tensor. Steps are bytes from head to head.
struct RopePlace {
  const char* in;
  char* out;
  int64_t in_step, out_step;
  int64_t heads;
};

struct RopeHeads : RopePlace {
  const float* weight;  // [D] or null: RMS norm first
  RopePlace then[2];    // what is turned after these, to ask for meanwhile; no heads: nothing
};

struct RopeAngles {
  const char *cos, *sin;
  int32_t dtype;
  bool inverse;
};

struct RopeShape {
  int64_t d, half;
  float eps;
  bool interleaved, stream, by_l2;
  int32_t dtype;
};

struct RopeTable {
  // [n] of any dtype as floats, plus offset.
  void (*weight)(const char* from, int32_t dtype, int64_t n, float offset, float* to);
  // `half` angles as floats, the sines negated when inverse. Interleaved: each twice, the first sine of two negated.
  void (*angles)(const RopeAngles& from, const RopeShape& shape, float* cos, float* sin);
  void (*heads)(const RopeHeads& h, const RopeShape& shape, const float* cos, const float* sin);
};

FASTOPS_DECLARE_TABLES(RopeTable, rope_table)

}  // namespace fastops::cpu
