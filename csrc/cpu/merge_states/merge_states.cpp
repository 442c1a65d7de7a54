// merge_states: joins attention results over disjoint key sets (attention/merge.h has the formula).
#include "cpu/attention/merge.h"

#include "core/isa.h"
#include "core/parallel.h"
#include "core/status.h"
#include "fastops/fastops.h"

namespace fastops::cpu {

const AttentionTable& attention_table_for(Isa isa);

namespace {

#define REFUSE(status, ...)            \
  do {                                 \
    set_message(message, __VA_ARGS__); \
    return status;                     \
  } while (0)

bool same_size(const fastops_tensor& a, const fastops_tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.size[i] != b.size[i]) return false;
  return true;
}

fastops_status check_out(const char* name, const fastops_tensor& t, const fastops_tensor& like, char* message) {
  if (!same_size(t, like)) REFUSE(FASTOPS_ERR_VALUE, "merge_states: %s differs in shape from outs[0]", name);
  if (t.dtype != like.dtype) REFUSE(FASTOPS_ERR_TYPE, "merge_states: %s differs in dtype from outs[0]", name);
  if (t.size[t.ndim - 1] > 1 && t.stride[t.ndim - 1] != 1)
    REFUSE(FASTOPS_ERR_VALUE, "merge_states: the last dimension of %s must be contiguous", name);
  return FASTOPS_OK;
}

// lse is out's shape without its last dimension, heads before positions.
fastops_status check_lse(const char* name, const fastops_tensor& lse, const fastops_tensor& out, char* message) {
  if (lse.dtype != FASTOPS_F32) REFUSE(FASTOPS_ERR_TYPE, "merge_states: %s must be float32", name);
  const int n = out.ndim;
  if (lse.ndim != n - 1 || lse.size[n - 2] != out.size[n - 3] || lse.size[n - 3] != out.size[n - 2] ||
      (n == 4 && lse.size[0] != out.size[0]))
    REFUSE(FASTOPS_ERR_VALUE, "merge_states: %s must be [B, H, S] for outs [B, S, H, D], or [H, T] for [T, H, D]",
           name);
  return FASTOPS_OK;
}

fastops_status check_merge(const fastops_merge_states_desc& d, char* message) {
  if (d.struct_size != sizeof(d))
    REFUSE(FASTOPS_ERR_VALUE, "merge_states: struct_size is %u, this library knows %zu", d.struct_size, sizeof(d));
  if (d.count < 1) REFUSE(FASTOPS_ERR_VALUE, "merge_states: needs at least one state, got %d", d.count);
  const fastops_tensor& first = d.outs[0];
  if (first.ndim != 3 && first.ndim != 4)
    REFUSE(FASTOPS_ERR_VALUE, "merge_states: outs[0] must have 3 or 4 dimensions, got %d", first.ndim);
  if (first.dtype != FASTOPS_F32 && first.dtype != FASTOPS_F16 && first.dtype != FASTOPS_BF16)
    REFUSE(FASTOPS_ERR_TYPE, "merge_states: outs must be float32, float16 or bfloat16");
  const int64_t Dv = first.size[first.ndim - 1];
  if (Dv < 1 || Dv > kMaxHeadDim)
    REFUSE(FASTOPS_ERR_VALUE, "merge_states: head size %lld, allowed: 1 to 256", static_cast<long long>(Dv));
  for (int i = 0; i < d.count; ++i) {
    fastops_status status = check_out("a tensor of outs", d.outs[i], first, message);
    if (status == FASTOPS_OK) status = check_lse("a tensor of lses", d.lses[i], first, message);
    if (status != FASTOPS_OK) return status;
  }
  const fastops_status status = check_out("out", d.out, first, message);
  return status != FASTOPS_OK ? status : check_lse("lse", d.lse, first, message);
}

int64_t offset(const fastops_tensor& t, int64_t b, int64_t s, int64_t h) {  // of an outs-like tensor
  const int64_t* st = t.stride + (t.ndim - 3);
  return (t.ndim == 4 ? b * t.stride[0] : 0) + s * st[0] + h * st[1];
}
int64_t lse_offset(const fastops_tensor& t, int64_t b, int64_t s, int64_t h) {
  const int64_t* st = t.stride + (t.ndim - 2);
  return (t.ndim == 3 ? b * t.stride[0] : 0) + h * st[0] + s * st[1];
}

}  // namespace
}  // namespace fastops::cpu

using namespace fastops;
using namespace fastops::cpu;

extern "C" fastops_status fastops_merge_states_check(const fastops_merge_states_desc* desc, char* message) {
  return check_merge(*desc, message);
}

extern "C" fastops_status fastops_merge_states(const fastops_merge_states_desc* desc, fastops_env* env) {
  const fastops_merge_states_desc& d = *desc;
  const fastops_status status = check_merge(d, env->message);
  if (status != FASTOPS_OK) return status;
  const fastops_tensor& o = d.out;
  const int64_t B = o.ndim == 4 ? o.size[0] : 1, S = o.size[o.ndim - 3], H = o.size[o.ndim - 2];
  const auto Dv = static_cast<int32_t>(o.size[o.ndim - 1]);
  const int64_t esize = o.dtype == FASTOPS_F32 ? 4 : 2;
  const Isa isa = active_isa();
  const AttentionTable& table = attention_table_for(isa);
  env->variant = isa_name(isa);
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
        return MergeInput{static_cast<const char*>(x.data) + offset(x, b, s, h) * esize,
                          static_cast<const float*>(l.data)[lse_offset(l, b, s, h)]};
      };
      const float lse = merge_row(table, d.count, state, o.dtype, Dv, nullptr,
                                  static_cast<char*>(o.data) + offset(o, b, s, h) * esize, o.dtype);
      static_cast<float*>(d.lse.data)[lse_offset(d.lse, b, s, h)] = lse;
    }
  });
  return FASTOPS_OK;
}
