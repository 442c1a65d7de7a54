// scale_add.inl.h compiled for one instruction set. See docs/design/002-isa.md.
#include "cpu/isa/intrinsics.h"
#include "cpu/scale_add/scale_add.h"
#include "fastops/fastops.h"

#include "cpu/isa/begin_scalar.h"

#include "cpu/scale_add/scale_add.inl.h"

#include "cpu/isa/end.h"
