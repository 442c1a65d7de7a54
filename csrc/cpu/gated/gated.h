// What the gated activations' C API (gated.cpp) and their kernels (gated.inl.h, once per instruction set) agree on.
#pragma once
#include <cstdint>

#include "cpu/rows.h"

namespace fastops::cpu {

// n dense elements of each; forward: gate, up, out. Backward: dout, dgate, dup in addition, no out.
struct GatedPiece {
  const char *gate, *up, *dout;
  char *out, *dgate, *dup;
  int64_t n;
  bool stream;
  const char *next_gate, *next_up;  // what is read after this piece, or null; forward asks for its beginning
};

struct GatedTable {
  void (*forward)(const GatedPiece& p, int32_t activation, int32_t dtype);
  void (*backward)(const GatedPiece& p, int32_t activation, int32_t dtype);
};

FASTOPS_DECLARE_TABLES(GatedTable, gated_table)

}  // namespace fastops::cpu
