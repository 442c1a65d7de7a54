// attention.inl.h compiled for one instruction set. See docs/design/002-isa.md.
#if defined(__x86_64__)
#include "cpu/attention/attention.h"
#include "cpu/isa/intrinsics.h"

#include "cpu/isa/begin_avx512_vnni.h"

#include "cpu/attention/attention.inl.h"

#include "cpu/isa/end.h"
#endif
