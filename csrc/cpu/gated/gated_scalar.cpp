// gated.inl.h compiled for one instruction set. See docs/design/002-isa.md.
#include "cpu/isa/intrinsics.h"
#include "cpu/gated/gated.h"
#include "fastops/fastops.h"

#include "cpu/isa/begin_scalar.h"

#include "cpu/gated/gated.inl.h"

#include "cpu/isa/end.h"
