// kv_append.inl.h compiled for one instruction set. See docs/design/002-isa.md.
#if defined(__x86_64__)
#include "cpu/isa/intrinsics.h"
#include "cpu/kv_append/kv_append.h"
#include "fastops/fastops.h"

#include "cpu/isa/begin_avx512.h"

#include "cpu/kv_append/kv_append.inl.h"

#include "cpu/isa/end.h"
#endif
