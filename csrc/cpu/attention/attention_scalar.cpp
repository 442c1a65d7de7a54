// attention.inl.h compiled for one instruction set. See docs/design/002-isa.md.
#include "cpu/attention/attention.h"
#include "cpu/isa/intrinsics.h"

#include "cpu/isa/begin_scalar.h"

#include "cpu/attention/attention.inl.h"

#include "cpu/isa/end.h"
