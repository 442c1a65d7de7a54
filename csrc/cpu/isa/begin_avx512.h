// Opens the region compiled for AVX-512 F, BW, DQ and VL; end.h closes it. No #pragma once: one per translation unit,
// on purpose.
#define FASTOPS_ISA avx512
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl")
#include "cpu/isa/vec_avx512.h"

#include "cpu/isa/math.inl.h"
#include "cpu/isa/gemm.inl.h"
