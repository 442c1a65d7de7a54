// The INT4 product's C API on a GPU: checks, the choice of tile and stripes, the launches.
#include "core/checks.h"
#include "cuda/int4_linear/int4_linear_int8.cuh"
#include "cuda/int4_linear/int4_linear_sm80.cuh"
#include "cuda/int4_linear/int4_linear_sm90.cuh"
#include "cuda/launch.h"
#include "cuda/tensor_map.h"

#if !defined(__CUDACC_RTC__)  // the rest is the host's
namespace fastops::cuda {
namespace {

struct Plan {
  Int4Args a{};
  int tiles = 0;
  bool hopper = false, int8 = false;
  TensorMap x{};  // hopper
  size_t bytes = 0;
};

bool refuse(Checks& c, const char* what) { return c.fail(FASTOPS_ERR_UNSUPPORTED, "%s", what); }

bool check(const fastops_int4_linear_desc& d, Int4Args* a, Checks& c) {
  if (!c.struct_size(d.struct_size, sizeof d) || !c.floats("x", d.x) || !c.floats("out", d.out)) return false;
  if (d.x.ndim != 2 || d.out.ndim != 2 || d.out.size[0] != d.x.size[0])
    return c.fail(FASTOPS_ERR_VALUE, "x must be [M, K] and out [M, N]");
  if (d.out.dtype != d.x.dtype && d.out.dtype != FASTOPS_F32)
    return c.fail(FASTOPS_ERR_TYPE, "out must have x's dtype or be float32");
  if (d.codes.ndim != 4 || d.codes.dtype != FASTOPS_U8)
    return c.fail(FASTOPS_ERR_VALUE, "codes must be uint8 [ceil(N / 16), K / 8, 16, 4]");
  if (given(d.column_scales) || given(d.column_zeros)) return refuse(c, "column_scales");
  const int64_t N = d.out.size[1], blocks = (N + 15) / 16, eighths = d.codes.size[1], K = eighths * 8, Kx = d.x.size[1];
  const bool sparse = d.codes.size[3] == 3;  // 2:4
  const int64_t codes[4] = {blocks, eighths, 16, sparse ? 3 : 4};
  if (!c.shape("codes", d.codes, 4, codes)) return false;
  if (Kx < 8 || K % Kx != 0)
    return c.fail(FASTOPS_ERR_VALUE, "x has %lld columns, which must divide the codes' %lld",
                  static_cast<long long>(Kx), static_cast<long long>(K));
  if (!c.floats("scales", d.scales)) return false;
  const int64_t groups = d.scales.ndim == 3 ? d.scales.size[1] : 0;
  if (groups < 1 || K % groups != 0)
    return c.fail(FASTOPS_ERR_VALUE, "scales have %lld groups, which must divide K = %lld",
                  static_cast<long long>(groups), static_cast<long long>(K));
  const int64_t scales[3] = {blocks, groups, 16};
  if (!c.shape("scales", d.scales, 3, scales)) return false;
  if (given(d.zeros) && given(d.mins)) return c.fail(FASTOPS_ERR_VALUE, "give zeros or mins, not both");
  for (const fastops_tensor* t : {&d.zeros, &d.mins})
    if (given(*t) &&
        !(c.shape("zeros or mins", *t, 3, scales) && c.same_dtype("zeros or mins", *t, "scales", d.scales)))
      return false;
  if (sparse && (given(d.zeros) || given(d.mins)))
    return c.fail(FASTOPS_ERR_VALUE, "2:4 sparse codes are symmetric: no zeros or mins");
  if (given(d.bias) && !(c.vector("bias", d.bias, N) &&
                         (d.bias.dtype == FASTOPS_F32 || c.fail(FASTOPS_ERR_TYPE, "bias must be float32"))))
    return false;
  constexpr int64_t kMost = INT32_MAX - 1024;
  if (d.x.size[0] > kMost || N > kMost || K > kMost) return refuse(c, "more than 2^31 rows, features or columns");
  if (d.x.dtype == FASTOPS_F32) return refuse(c, "x is float32 (the kernel takes float16, bfloat16)");
  const bool int8 = d.activations == FASTOPS_ACTIVATIONS_INT8;
  if (d.activations != FASTOPS_ACTIVATIONS_FLOAT && !int8 && d.x.dtype != FASTOPS_BF16)
    return refuse(c, "activations rounded to bfloat16: give x in bfloat16");
  if (int8 && K != Kx && Kx % 16 != 0) return refuse(c, "int8 activations and planes of no multiple of 16 columns");
  if (given(d.perm)) return refuse(c, "a permutation: gather the columns of x first");
  if (groups > 1 && K / groups % 32 != 0) return refuse(c, "groups that are not a multiple of 32 columns");
  if (reinterpret_cast<uintptr_t>(d.x.data) % 16 != 0 || d.x.stride[0] % 8 != 0 || Kx % 8 != 0 ||
      reinterpret_cast<uintptr_t>(d.codes.data) % 16 != 0)
    return refuse(c, "rows of x that do not begin at multiples of 16 bytes");
  const fastops_tensor* dense[] = {&d.codes, &d.scales, &d.zeros, &d.mins};
  for (const fastops_tensor* t : dense) {
    int64_t step = 1;
    for (int i = t->ndim - 1; i >= 0; step *= t->size[i--])
      if (t->size[i] > 1 && t->stride[i] != step)
        return c.fail(FASTOPS_ERR_VALUE, "codes, scales, zeros and mins must be contiguous");
  }
  a->x = static_cast<const char*>(d.x.data);
  a->out = static_cast<char*>(d.out.data);
  a->codes = static_cast<const uint8_t*>(d.codes.data);
  a->scales = d.scales.data;
  a->zeros = d.zeros.data;
  a->mins = d.mins.data;
  a->bias = static_cast<const float*>(d.bias.data);
  a->M = d.x.size[0];
  a->N = N;
  a->K = K;
  a->Kx = Kx;
  a->ldx = d.x.stride[0];
  a->ldo = d.out.stride[0];
  a->groups = groups;
  a->group_size = K / groups;
  a->scale_dtype = d.scales.dtype;
  a->out_f32 = d.out.dtype == FASTOPS_F32;
  a->out_wide = !a->out_f32 && N % 8 == 0 && a->ldo % 8 == 0 && reinterpret_cast<uintptr_t>(d.out.data) % 16 == 0;
  a->sparse = sparse;
  return true;
}

bool cut(const Int4Args& a) { return a.stripes != a.steps / a.chunks; }
// Of a multiple of 16.
size_t part_bytes(const Int4Args& a, int tiles) {
  return cut(a) ? static_cast<size_t>(2 * a.stripes * 16 * tiles * kInt4Columns) * sizeof(float) : 0;
}
int64_t pitch_of(const Int4Args& a) { return (a.Kx + 15) / 16 * 16; }  // bytes of a row of x in int8

fastops_status plan_of(const fastops_int4_linear_desc& d, fastops_cuda_env* env, Plan* plan) {
  Device device;
  const fastops_status status = device_of(env, &device);
  if (status != FASTOPS_OK) return status;
  Checks c("int4_linear", env->message);
  Int4Args& a = plan->a;
  if (!check(d, &a, c)) return c.status();
  plan->int8 = d.activations == FASTOPS_ACTIVATIONS_INT8;
  plan->hopper =
      int4_use_hopper(device.sm90a && !plan->int8 && !a.sparse, a.M, a.K, a.Kx, a.group_size) &&
      tensor_map({a.x, {a.Kx, a.M, 1, 1}, {a.ldx, 8, 8}, kInt4HopperRows / int4_hopper_cluster(a.N)}, env, &plan->x);
  if (plan->hopper) {
    if (a.zeros || a.mins) plan->bytes = static_cast<size_t>(a.M * a.groups) * sizeof(float);
    return FASTOPS_OK;
  }
  plan->tiles = int4_tiles(a.M);
  const int64_t tiles = (a.N + kInt4Columns - 1) / kInt4Columns * ((a.M + 16 * plan->tiles - 1) / (16 * plan->tiles));
  a.chunks = (a.K + kInt4Depth - 1) / kInt4Depth;
  a.steps = tiles * a.chunks;
  a.stripes = int4_stripes(tiles, a.chunks, device.sm_count);
  plan->bytes = part_bytes(a, plan->tiles);
  if (plan->int8) {
    plan->bytes += static_cast<size_t>(a.M * (pitch_of(a) + (1 + a.groups) * static_cast<int64_t>(sizeof(float))));
  }
  return FASTOPS_OK;
}

template <class T, int kTiles>
fastops_status add_parts(const Int4Args& a, fastops_cuda_env* env) {
  if (!cut(a)) return FASTOPS_OK;
  return launch<int4_add<T, kTiles>>({a.stripes - 1, a.M < 16 * kTiles ? (a.M + 15) / 16 : kTiles, 1, kInt4Threads, 0},
                                     env, a);
}

template <class T, int kTiles>
fastops_status run_int8(const Int4Args& a, fastops_cuda_env* env) {
  Int4Int8Args args{a, reinterpret_cast<int8_t*>(static_cast<char*>(env->workspace) + part_bytes(a, kTiles)), nullptr,
                    nullptr, pitch_of(a)};
  args.row_scale = reinterpret_cast<float*>(args.x + a.M * args.pitch);
  args.sums = args.row_scale + a.M;
  fastops_status status = launch<int4_round_rows<T>>({a.M, 1, 1, kInt4Threads, 33 * sizeof(float)}, env, args);
  const Grid grid{a.stripes, 1, 1, kInt4Threads, int4_int8_stage_bytes(kTiles) * kInt4Stages};
  if (status == FASTOPS_OK)
    status = a.sparse ? launch<int4_gemm_int8<T, kTiles, true>>(grid, env, args)
                      : launch<int4_gemm_int8<T, kTiles, false>>(grid, env, args);
  return status == FASTOPS_OK ? add_parts<T, kTiles>(a, env) : status;
}

template <class T, int kTiles>
fastops_status run(const Int4Args& a, bool int8, fastops_cuda_env* env) {
  if (int8) return run_int8<T, kTiles>(a, env);
  const Grid grid{a.stripes, 1, 1, kInt4Threads, int4_stage_bytes(kTiles) * kInt4Stages};
  fastops_status status = a.sparse            ? launch<int4_gemm<T, kTiles, false, true>>(grid, env, a)
                          : a.zeros || a.mins ? launch<int4_gemm<T, kTiles, true, false>>(grid, env, a)
                                              : launch<int4_gemm<T, kTiles, false, false>>(grid, env, a);
  return status == FASTOPS_OK ? add_parts<T, kTiles>(a, env) : status;
}

template <class T, int kCluster>
fastops_status run_hopper(const Plan& plan, fastops_cuda_env* env) {
  const Int4Args& a = plan.a;
  const Int4HopperArgs args{a, plan.x, static_cast<float*>(env->workspace)};
  const Grid grid{int4_hopper_blocks(a.N),
                  (a.M + kInt4HopperRows - 1) / kInt4HopperRows,
                  1,
                  kInt4HopperThreads,
                  int4_hopper_shared(),
                  kCluster};
  if (!a.zeros && !a.mins) return launch<int4_gemm_sm90<T, false, kCluster>>(grid, env, args);
  constexpr int kWarps = kInt4Threads / 32;
  const fastops_status status =
      launch<int4_sums<T>>({(a.groups + kWarps - 1) / kWarps, a.M, 1, kInt4Threads, 0}, env, args);
  return status == FASTOPS_OK ? launch<int4_gemm_sm90<T, true, kCluster>>(grid, env, args) : status;
}

template <class T>
fastops_status run_tiles(const Plan& plan, fastops_cuda_env* env) {
  if (plan.hopper)
    return int4_hopper_cluster(plan.a.N) == 2 ? run_hopper<T, 2>(plan, env) : run_hopper<T, 1>(plan, env);
  if (plan.tiles == 1) return run<T, 1>(plan.a, plan.int8, env);
  return plan.tiles == 2 ? run<T, 2>(plan.a, plan.int8, env) : run<T, 4>(plan.a, plan.int8, env);
}

}  // namespace
}  // namespace fastops::cuda

using namespace fastops;
using namespace fastops::cuda;

extern "C" fastops_status fastops_cuda_int4_linear_workspace(const fastops_int4_linear_desc* desc,
                                                             fastops_cuda_env* env, size_t* bytes) {
  Plan plan;
  const fastops_status status = plan_of(*desc, env, &plan);
  *bytes = plan.bytes;
  return status;
}

extern "C" fastops_status fastops_cuda_int4_linear(const fastops_int4_linear_desc* desc, fastops_cuda_env* env) {
  Plan plan;
  const fastops_status status = plan_of(*desc, env, &plan);
  if (status != FASTOPS_OK) return status;
  if (plan.bytes > 0 && (env->workspace == nullptr || env->workspace_size < plan.bytes)) {
    set_message(env->message, "int4_linear: workspace has %zu bytes, needs %zu", env->workspace_size, plan.bytes);
    return FASTOPS_ERR_WORKSPACE;
  }
  plan.a.partial = static_cast<float*>(env->workspace);
  env->variant = plan.hopper ? "sm90a" : "sm80";
  if (plan.a.M == 0 || plan.a.N == 0) return FASTOPS_OK;
  return desc->x.dtype == FASTOPS_F16 ? run_tiles<f16>(plan, env) : run_tiles<bf16>(plan, env);
}
#endif
