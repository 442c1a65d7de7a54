// Validity of attention calls, and their flattening. The one owner of the C API's refusals.
#pragma once
#include "cpu/attention/attention.h"
#include "fastops/fastops.h"

namespace fastops::cpu {

// Checks shapes, strides, dtypes and the contents of the index tensors; on success fills everything in `p` but the
// plan.
fastops_status check_attention(const fastops_attention_desc& d, AttentionParams* p, char* message);

}  // namespace fastops::cpu
