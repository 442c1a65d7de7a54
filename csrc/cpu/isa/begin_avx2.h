// Opens the region compiled for AVX2, FMA and F16C; end.h closes it. No #pragma once: one per translation unit, on
// purpose.
#define FASTOPS_ISA avx2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,prfchw")
#include "cpu/isa/vec_avx2.h"

#include "cpu/isa/math.inl.h"
#include "cpu/isa/gemm.inl.h"
