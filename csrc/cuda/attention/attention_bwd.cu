// Attention's backward C API on a GPU: checks, workspace, the launches.
#include "core/attention_check.h"
#include "cuda/attention/attention_bwd_sm80.cuh"
#include "cuda/launch.h"

#if !defined(__CUDACC_RTC__)  // the rest is the host's
namespace fastops::cuda {
namespace {

const char* refusal(const fastops_attention_bwd_desc& d, const BackwardParams& g) {
  const AttentionParams& p = g.f;
  if (d.fwd.q.dtype != FASTOPS_F16 && d.fwd.q.dtype != FASTOPS_BF16)
    return "q is float32 (the kernels take float16, bfloat16)";
  if (p.bias) return "there is an attn_mask";
  if (!rows_aligned(p.q, {p.q_sb, p.q_ss, p.q_sh}) || !rows_aligned(p.k, {p.k_sb, p.k_ss, p.k_sh}) ||
      !rows_aligned(p.v, {p.v_sb, p.v_ss, p.v_sh}) || !rows_aligned(g.dout, {g.do_sb, g.do_ss, g.do_sh}) ||
      !rows_aligned(g.dq, {g.dq_sb, g.dq_ss, g.dq_sh}) || !rows_aligned(g.dk, {g.dk_sb, g.dk_ss, g.dk_sh}) ||
      !rows_aligned(g.dv, {g.dv_sb, g.dv_ss, g.dv_sh}))
    return "rows of q, k, v, dout and their gradients do not all begin at multiples of 16 bytes";
  return too_many_rows(p);
}

fastops_status plan_of(const fastops_attention_bwd_desc& d, fastops_cuda_env* env, BackwardArgs* args) {
  Device device{};
  fastops_status status = device_of(env, &device);
  if (status == FASTOPS_OK) status = check_attention_backward(d, &args->g, env->message, true);
  if (status != FASTOPS_OK) return status;
  if (const char* why = refusal(d, args->g)) {
    set_message(env->message, "attention_backward: %s", why);
    return FASTOPS_ERR_UNSUPPORTED;
  }
  const AttentionParams& p = args->g.f;
  args->a.p = p;
  args->a.splits = 1;
  args->total_rows = p.cu_q ? p.q_rows : p.B * p.Sq;
  return FASTOPS_OK;
}

template <class T, int kDim>
fastops_status run(const BackwardArgs& args, fastops_cuda_env* env) {
  const AttentionParams& p = args.a.p;
  const auto blocks = [](int64_t n) { return (n + 63) / 64; };
  const int64_t key_blocks = blocks(p.ragged ? p.k_rows : p.Sk), row_blocks = blocks(attention_rows(p));
  const Grid keys{key_blocks, p.Hkv, p.B, kAttentionThreads, backward_shared(kDim, true)};
  fastops_status status =
      launch<attention_bwd_delta<T>>({(args.total_rows + 3) / 4, p.Hq, 1, kAttentionThreads, 0}, env, args);
  if constexpr (kDim <= 128) {
    if (status == FASTOPS_OK) status = launch<attention_bwd_keys<T, kDim, true, true>>(keys, env, args);
  } else {  // the sums of both do not fit into registers
    if (status == FASTOPS_OK) status = launch<attention_bwd_keys<T, kDim, true, false>>(keys, env, args);
    if (status == FASTOPS_OK) status = launch<attention_bwd_keys<T, kDim, false, true>>(keys, env, args);
  }
  if (status == FASTOPS_OK)
    status = launch<attention_bwd_rows<T, kDim>>(
        {row_blocks, p.Hkv, p.B, kAttentionThreads, backward_shared(kDim, false)}, env, args);
  if (status == FASTOPS_OK && args.g.dsinks)
    status = launch<attention_bwd_sinks>({p.Hq, 1, 1, kAttentionThreads, 33 * sizeof(float)}, env, args);
  if (status == FASTOPS_OK && p.ragged)
    status = launch<attention_bwd_tail<T>>({p.q_rows > p.k_rows ? p.q_rows : p.k_rows, p.Hq, 1, kAttentionThreads, 0},
                                           env, args);
  return status;
}

template <class T>
fastops_status run_dim(const BackwardArgs& args, fastops_cuda_env* env) {
  const int dim = attention_dim(args.a.p.D, args.a.p.Dv);
  return dim == 64 ? run<T, 64>(args, env) : dim == 128 ? run<T, 128>(args, env) : run<T, 256>(args, env);
}

size_t workspace_of(const BackwardArgs& args) {
  return static_cast<size_t>(args.total_rows * args.a.p.Hq) * sizeof(float);
}

}  // namespace
}  // namespace fastops::cuda

using namespace fastops;
using namespace fastops::cuda;

extern "C" fastops_status fastops_cuda_attention_bwd_workspace(const fastops_attention_bwd_desc* desc,
                                                               fastops_cuda_env* env, size_t* bytes) {
  BackwardArgs args{};
  const fastops_status status = plan_of(*desc, env, &args);
  *bytes = workspace_of(args);
  return status;
}

extern "C" fastops_status fastops_cuda_attention_bwd(const fastops_attention_bwd_desc* desc, fastops_cuda_env* env) {
  BackwardArgs args{};
  const fastops_status status = plan_of(*desc, env, &args);
  if (status != FASTOPS_OK) return status;
  env->variant = "sm80";
  const size_t need = workspace_of(args);
  if (need > 0 && (env->workspace == nullptr || env->workspace_size < need)) {
    set_message(env->message, "attention_backward: workspace has %zu bytes, needs %zu", env->workspace_size, need);
    return FASTOPS_ERR_WORKSPACE;
  }
  args.delta = static_cast<float*>(env->workspace);
  return args.a.p.dtype == FASTOPS_F16 ? run_dim<f16>(args, env) : run_dim<bf16>(args, env);
}
#endif
