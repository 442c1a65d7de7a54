// lut_linear.inl.h compiled for one instruction set. See docs/design/002-isa.md.
#if defined(__x86_64__)
#include "cpu/isa/intrinsics.h"
#include "cpu/lut_linear/lut_linear.h"
#include "fastops/fastops.h"

#include "cpu/isa/begin_avx512.h"

#include "cpu/lut_linear/lut_linear.inl.h"

#include "cpu/isa/end.h"
#endif
