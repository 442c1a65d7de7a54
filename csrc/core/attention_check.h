// Validity of attention calls, and their flattening. The one owner of the C API's refusals.
#pragma once
#include "core/attention_backward.h"
#include "core/checks.h"
#include "fastops/fastops.h"

namespace fastops {

// Checks shapes, strides, dtypes and the contents of the index tensors (these not where they lie in a device's memory);
// on success fills everything in `p` but the plan.
fastops_status check_attention(const fastops_attention_desc& d, AttentionParams* p, char* message,
                               bool on_device = false);

// The same for a backward call.
fastops_status check_attention_backward(const fastops_attention_bwd_desc& d, BackwardParams* g, char* message,
                                        bool on_device = false);

// A quantised paged cache, and the tensor whose dtype is the model's.
struct KvCache {
  const fastops_tensor &q, &k, &v;
  const fastops_kv_quant& kv;
};
// kinds: dtypes and widths, before the layout is known; scales: the rest, once p has B, Hkv, D and Dv.
bool check_kv_kinds(const KvCache& c, AttentionParams* p, Checks& ok);
bool check_kv_scales(const KvCache& c, AttentionParams* p, Checks& ok);
// Channels that a row of `columns` elements of a cache holds.
inline int64_t kv_channels(int32_t kind, int64_t columns) {
  return kind == kKvU4 ? columns * 2 : kind == kKvU2 ? columns * 4 : columns;
}

}  // namespace fastops
