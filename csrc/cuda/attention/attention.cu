// The attention C API on a GPU: checks, the choice of kernel and splits, the launches.
#include "core/attention_check.h"
#include "cuda/attention/attention_kv.cuh"
#include "cuda/attention/attention_sm80.cuh"
#include "cuda/attention/attention_sm90.cuh"
#include "cuda/launch.h"
#include "cuda/tensor_map.h"

#if !defined(__CUDACC_RTC__)  // the rest is the host's
namespace fastops::cuda {
namespace {

// What the kernels do not do, in words; NULL: nothing.
const char* refusal(const fastops_attention_desc& d, const AttentionParams& p) {
  if (d.q.dtype != FASTOPS_F16 && d.q.dtype != FASTOPS_BF16) return "q is float32 (the kernels take float16, bfloat16)";
  if (p.bias) return "there is an attn_mask";
  if (p.D % 8 != 0 || p.Dv % 8 != 0) return "head sizes are not multiples of 8";
  // Eight elements at a time: 16 bytes, or 8, 4 or 2 bytes of codes (whose strides count bytes).
  const auto side = [&](const KvSide& q, const char* data, int64_t sb, int64_t ss, int64_t sh) {
    if (q.kind == kKvPlain) return rows_aligned(data, {sb, ss, sh});
    const int unit = q.kind == kKvU4 ? 4 : q.kind == kKvU2 ? 2 : 8;
    return sb % unit == 0 && ss % unit == 0 && sh % unit == 0 && reinterpret_cast<uintptr_t>(data) % unit == 0;
  };
  if (!rows_aligned(p.q, {p.q_sb, p.q_ss, p.q_sh}) || !rows_aligned(p.out, {p.o_sb, p.o_ss, p.o_sh}) ||
      !side(p.kq, p.k, p.k_sb, p.k_ss, p.k_sh) || !side(p.vq, p.v, p.v_sb, p.v_ss, p.v_sh))
    return "rows of q, k, v and out do not all begin at multiples of 16 bytes (eight codes: of their own size)";
  if (p.packed && (!rows_aligned(p.kq.recent, {p.kq.recent_s[0], p.kq.recent_s[1], p.kq.recent_s[2]}) ||
                   !rows_aligned(p.vq.recent, {p.vq.recent_s[0], p.vq.recent_s[1], p.vq.recent_s[2]})))
    return "rows of the recent keys and values do not begin at multiples of 16 bytes";
  return too_many_rows(p);
}

struct Plan {
  AttentionArgs a{};
  Device device{};
  int dim = 0;
  AttentionTile tile{};
  size_t partial = 0, bytes = 0;
};

fastops_status plan_of(const fastops_attention_desc& d, fastops_cuda_env* env, Plan* plan) {
  fastops_status status = device_of(env, &plan->device);
  if (status != FASTOPS_OK) return status;
  AttentionParams& p = plan->a.p;
  status = check_attention(d, &p, env->message, true);
  if (status != FASTOPS_OK) return status;
  if (const char* why = refusal(d, p)) {
    set_message(env->message, "attention: %s", why);
    return FASTOPS_ERR_UNSUPPORTED;
  }
  plan->dim = attention_dim(p.D, p.Dv);
  const int64_t keys = p.paged ? p.max_pages << p.page_shift : p.ragged ? p.k_rows : p.Sk;
  plan->a.rows = attention_rows(p);
  plan->tile = attention_tile(plan->device.sm90a && !p.quant, plan->dim, plan->a.rows);
  plan->a.blocks = (plan->a.rows + plan->tile.rows - 1) / plan->tile.rows;
  const int64_t per_key = p.cu_q ? p.B * p.Hkv : plan->a.blocks * p.Hkv * p.B;
  const int tile = plan->tile.keys;
  const float unit = p.scale * kLog2e;
  plan->a.unit = unit > 0.0f && !(p.softcap > 0.0f) && p.alibi == nullptr ? unit : 1.0f;  // the largest stays so
  plan->a.splits = attention_splits(per_key, keys, plan->tile, plan->device.sm_count);
  const int64_t split = (keys + plan->a.splits - 1) / plan->a.splits;
  plan->a.split_keys = (split + tile - 1) / tile * tile;
  if (plan->a.splits > 1) {
    const auto slots = static_cast<size_t>(p.B * plan->a.splits * p.Hkv * plan->a.rows);
    plan->partial = slots * static_cast<size_t>(p.Dv) * sizeof(float);
    plan->bytes = plan->partial + slots * sizeof(float);
  }
  return FASTOPS_OK;
}

// Keys or values as the copy engine sees them: [B or 1][Hkv][keys][D].
bool keys_map(const AttentionParams& p, const char* data, int dim, int64_t sb, int64_t ss, int64_t sh,
              const fastops_cuda_env* env, TensorMap* map) {
  const auto step = [](int64_t size, int64_t stride) { return size > 1 ? stride : int64_t{8}; };
  const int64_t keys = p.ragged ? p.k_rows : p.Sk, batch = p.ragged ? 1 : p.B;
  return tensor_map({data, {dim, keys, p.Hkv, batch}, {step(keys, ss), step(p.Hkv, sh), step(batch, sb)}, kHopperKeys},
                    env, map);
}

template <class T, int kDim, class Keys>
fastops_status run_hopper(const Plan& plan, fastops_cuda_env* env) {
  if constexpr (kDim <= 128 && !Keys::kDecodes) {
    const AttentionParams& p = plan.a.p;
    HopperArgs args{plan.a, {}, {}, false};
    args.tma = !p.paged && keys_map(p, p.k, p.D, p.k_sb, p.k_ss, p.k_sh, env, &args.k) &&
               keys_map(p, p.v, p.Dv, p.v_sb, p.v_ss, p.v_sh, env, &args.v);
    return launch<attention_sm90<T, kDim, Keys>>(
        {plan.a.blocks, p.Hkv, p.B * plan.a.splits, kHopperThreads, hopper_shared(kDim)}, env, args);
  } else {
    return FASTOPS_ERR_INTERNAL;
  }
}

template <class T, int kDim, class Keys>
fastops_status run(const Plan& plan, fastops_cuda_env* env) {
  const AttentionArgs& a = plan.a;
  const Grid grid{a.blocks, a.p.Hkv, a.p.B * a.splits, kAttentionThreads, attention_shared(kDim)};
  fastops_status status =
      plan.tile.hopper ? run_hopper<T, kDim, Keys>(plan, env) : launch<attention_sm80<T, kDim, Keys>>(grid, env, a);
  constexpr int kWarps = kAttentionThreads / 32;
  if (status == FASTOPS_OK && a.splits > 1)
    status = launch<attention_merge<T>>({(a.rows + kWarps - 1) / kWarps, a.p.Hkv, a.p.B, kAttentionThreads, 0}, env, a);
  if (status == FASTOPS_OK && a.p.cu_q)
    status = launch<attention_tail<T>>({a.p.q_rows, a.p.Hq, 1, kAttentionThreads, 0}, env, a);
  return status;
}

template <class T, class Keys>
fastops_status run_dim(const Plan& plan, fastops_cuda_env* env) {
  if (plan.dim == 64) return run<T, 64, Keys>(plan, env);
  if (plan.dim == 128) return run<T, 128, Keys>(plan, env);
  return run<T, 256, Keys>(plan, env);
}

template <class T>
fastops_status run_keys(const Plan& plan, fastops_cuda_env* env) {
  if (plan.a.p.quant) return run_dim<T, QuantKeys<T>>(plan, env);
  return plan.a.p.paged ? run_dim<T, PagedKeys<T>>(plan, env) : run_dim<T, DenseKeys<T>>(plan, env);
}

}  // namespace
}  // namespace fastops::cuda

using namespace fastops;
using namespace fastops::cuda;

extern "C" fastops_status fastops_cuda_attention_workspace(const fastops_attention_desc* desc, fastops_cuda_env* env,
                                                           size_t* bytes) {
  Plan plan;
  const fastops_status status = plan_of(*desc, env, &plan);
  *bytes = plan.bytes;
  return status;
}

extern "C" fastops_status fastops_cuda_attention_fwd(const fastops_attention_desc* desc, fastops_cuda_env* env) {
  Plan plan;
  fastops_status status = plan_of(*desc, env, &plan);
  if (status != FASTOPS_OK) return status;
  if (plan.bytes > 0) {
    if (env->workspace == nullptr || env->workspace_size < plan.bytes) {
      set_message(env->message, "attention: workspace has %zu bytes, needs %zu", env->workspace_size, plan.bytes);
      return FASTOPS_ERR_WORKSPACE;
    }
    plan.a.partial_out = static_cast<float*>(env->workspace);
    plan.a.partial_lse = reinterpret_cast<float*>(static_cast<char*>(env->workspace) + plan.partial);
  }
  env->variant = plan.tile.hopper ? "sm90a" : "sm80";
  if (plan.a.p.B == 0 || plan.a.p.Hq == 0 || plan.a.rows == 0) return FASTOPS_OK;
  return plan.a.p.dtype == FASTOPS_F16 ? run_keys<f16>(plan, env) : run_keys<bf16>(plan, env);
}
#endif
