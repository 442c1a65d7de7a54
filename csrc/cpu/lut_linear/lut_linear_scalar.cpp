// lut_linear.inl.h compiled for one instruction set. See docs/design/002-isa.md.
#include "cpu/isa/intrinsics.h"
#include "cpu/lut_linear/lut_linear.h"
#include "fastops/fastops.h"

#include "cpu/isa/begin_scalar.h"

#include "cpu/lut_linear/lut_linear.inl.h"

#include "cpu/isa/end.h"
