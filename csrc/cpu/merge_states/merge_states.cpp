// merge_states: joins attention results over disjoint key sets (attention/merge.h has the formula).
#include "cpu/attention/merge.h"

#include "core/op_checks.h"
#include "core/parallel.h"
#include "core/status.h"
#include "fastops/fastops.h"

using namespace fastops;
using namespace fastops::cpu;

extern "C" fastops_status fastops_merge_states_check(const fastops_merge_states_desc* desc, char* message) {
  return check_merge_states(*desc, message);
}

extern "C" fastops_status fastops_merge_states(const fastops_merge_states_desc* desc, fastops_env* env) {
  const fastops_merge_states_desc& d = *desc;
  const fastops_status status = check_merge_states(d, env->message);
  if (status != FASTOPS_OK) return status;
  const fastops_tensor& o = d.out;
  const int64_t B = o.ndim == 4 ? o.size[0] : 1, S = o.size[o.ndim - 3], H = o.size[o.ndim - 2];
  const auto Dv = static_cast<int32_t>(o.size[o.ndim - 1]);
  const int64_t esize = o.dtype == FASTOPS_F32 ? 4 : 2;
  const auto variant = FASTOPS_CHOOSE_ANY(AttentionTable, attention_table);
  const AttentionTable& table = variant.table;
  env->variant = variant.name;
  constexpr int64_t kRowsPerItem = 64;
  const int64_t rows = B * S * H, items = (rows + kRowsPerItem - 1) / kRowsPerItem;
  fastops_env inner = *env;
  if (rows * Dv * d.count < 65536) inner.num_threads = 1;  // waking a thread would cost more
  parallel_items(inner, items, [&](int64_t item, int) {
    const int64_t end = (item + 1) * kRowsPerItem < rows ? (item + 1) * kRowsPerItem : rows;
    for (int64_t r = item * kRowsPerItem; r < end; ++r) {
      const int64_t h = r % H, s = r / H % S, b = r / H / S;
      const auto state = [&](int64_t i) {
        const fastops_tensor &x = d.outs[i], &l = d.lses[i];
        return MergeInput{static_cast<const char*>(x.data) + merge_offset(x, b, s, h) * esize,
                          static_cast<const float*>(l.data)[merge_lse_offset(l, b, s, h)]};
      };
      const float lse = merge_row(table, d.count, state, o.dtype, Dv, nullptr,
                                  static_cast<char*>(o.data) + merge_offset(o, b, s, h) * esize, o.dtype);
      static_cast<float*>(d.lse.data)[merge_lse_offset(d.lse, b, s, h)] = lse;
    }
  });
  return FASTOPS_OK;
}
