// The one way to start a kernel, on a GPU or in the emulator, and what is asked of the device.
#pragma once
#if !defined(__CUDACC_RTC__)
#include <cstdint>

#include "core/status.h"
#include "fastops/fastops_cuda.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda/emulator/block.h"
#endif

namespace fastops::cuda {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
  int threads = 128;
  size_t shared = 0;  // bytes of dynamic shared memory
  int cluster = 1;    // blocks along x that run together (sm_90), at most 8; x is a multiple of it
};

// What heuristics may know of a device.
struct Device {
  int arch, sm_count;
  bool sm90a;  // compute capability 9.0, and this library holds code for it
};
fastops_status device_of(fastops_cuda_env* env, Device* device);

// kKernel(args) over a grid. An empty grid starts nothing.
template <auto kKernel, class Args>
fastops_status launch(const Grid& grid, fastops_cuda_env* env, const Args& args) {
  static_assert(sizeof(Args) <= 4096, "kernel arguments live in 4 KiB of constant memory");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return FASTOPS_OK;
  if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) {
    set_message(env->message, "a grid of %lld x %lld x %lld blocks is more than a device takes",
                static_cast<long long>(grid.x), static_cast<long long>(grid.y), static_cast<long long>(grid.z));
    return FASTOPS_ERR_UNSUPPORTED;
  }
  if (grid.cluster < 1 || grid.cluster > 8 || grid.x % grid.cluster != 0) {
    set_message(env->message, "%lld blocks in clusters of %d", static_cast<long long>(grid.x), grid.cluster);
    return FASTOPS_ERR_INTERNAL;
  }
#if defined(__CUDACC__)
  if (grid.shared > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared));
    if (error != cudaSuccess) {
      set_message(env->message, "%zu bytes of shared memory: %s", grid.shared, cudaGetErrorString(error));
      return FASTOPS_ERR_UNSUPPORTED;
    }
  }
  void* pointer = const_cast<Args*>(&args);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(env->stream);
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kKernel), &pointer);
  if (error != cudaSuccess) {
    set_message(env->message, "the kernel did not start: %s", cudaGetErrorString(error));
    return FASTOPS_ERR_UNSUPPORTED;
  }
#else
  if (env->start != nullptr) {  // somebody else starts kernels: NVRTC's path
    const int64_t blocks[3] = {grid.x, grid.y, grid.z};
    if (env->start(__PRETTY_FUNCTION__, blocks, grid.cluster, grid.threads, grid.shared, &args, sizeof args,
                   env->stream) == 0)
      return FASTOPS_OK;
    set_message(env->message, "the kernel did not start");
    return FASTOPS_ERR_UNSUPPORTED;
  }
  emulator::Cluster& cluster = emulator::Cluster::mine();
  const emulator::Dim3 size{grid.x, grid.y, grid.z};
  for (int64_t z = 0; z < grid.z; ++z)
    for (int64_t y = 0; y < grid.y; ++y)
      for (int64_t x = 0; x < grid.x; x += grid.cluster) {
        const bool good = cluster.run(
            grid.cluster, grid.threads, grid.shared, {x, y, z}, size, env->seed,
            [](void* arg) { kKernel(*static_cast<const Args*>(arg)); }, const_cast<Args*>(&args));
        if (!good) {
          set_message(env->message, "emulator: %s", cluster.message().c_str());
          return FASTOPS_ERR_INTERNAL;
        }
      }
#endif
  return FASTOPS_OK;
}

}  // namespace fastops::cuda
#endif
