// A mask that broadcasts, as torch's do, in the C API's four dimensions.
#pragma once
#include "fastops/fastops.h"

namespace fastops::binding {

// attn_mask [B or 1, Hq or 1, Sq or 1, Sk or 1], the first two optional, for a dense d.q and d.k: dimensions that
// broadcast get strides of 0. False where it has more or fewer dimensions.
inline bool broadcast_mask(const fastops_attention_desc& d, fastops_tensor* mask) {
  const fastops_tensor m = *mask;
  if (m.ndim < 2 || m.ndim > 4) return false;
  const int64_t want[4] = {d.q.size[0], d.q.size[2], d.q.size[1], d.k.size[1]};
  mask->ndim = 4;
  for (int i = 0; i < 4; ++i) {
    const int j = i - (4 - m.ndim);
    const bool repeats = j < 0 || (m.size[j] == 1 && want[i] != 1);
    mask->size[i] = repeats ? want[i] : m.size[j];
    mask->stride[i] = repeats ? 0 : m.stride[j];
  }
  return true;
}

}  // namespace fastops::binding
