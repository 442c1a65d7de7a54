// int4_linear.inl.h compiled for one instruction set. See docs/design/002-isa.md.
#if defined(__x86_64__)
#include "cpu/int4_linear/int4_linear.h"
#include "cpu/isa/intrinsics.h"
#include "fastops/fastops.h"

#include "cpu/isa/begin_avx512_vnni.h"

#include "cpu/int4_linear/int4_linear.inl.h"

#include "cpu/isa/end.h"
#endif
