// Opens the region compiled for the compiler's baseline; end.h closes it. No #pragma once: one per translation unit, on
// purpose.
#define FASTOPS_ISA scalar
#pragma GCC push_options
#include "cpu/isa/vec_scalar.h"

#include "cpu/isa/math.inl.h"
#include "cpu/isa/gemm.inl.h"
