// A backward attention call flattened to plain numbers.
#pragma once
#include "core/attention_params.h"

namespace fastops {

// The backward pass: the forward's call plus gradients. Rows and heads as in the forward.
struct BackwardParams {
  AttentionParams f;  // f.out and f.lse hold the forward's results
  const char* dout;
  const float* dlse;
  char *dq, *dk, *dv;
  float* dsinks;
  int64_t do_sb, do_ss, do_sh, dlse_sb, dlse_sh, dlse_ss;
  int64_t dq_sb, dq_ss, dq_sh, dk_sb, dk_ss, dk_sh, dv_sb, dv_ss, dv_sh, dsinks_stride;
};

}  // namespace fastops
