// Everything a kernel may include, taken in before a target region begins, so that no library code is compiled for an
// instruction set the machine may lack (docs/design/002-isa.md).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "core/dtype.h"

// The vocabulary must vanish into its callers: a call would pass vectors through memory.
#define FASTOPS_INLINE inline __attribute__((always_inline))
// Before a loop of a fixed, small count over an array of vectors: unrolled early, the array lives in registers.
#define FASTOPS_UNROLL _Pragma("GCC unroll 16")
// The same for a lambda, behind its parameters.
#define FASTOPS_LAMBDA __attribute__((always_inline))
