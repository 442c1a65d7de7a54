// Who a thread is, and meeting others. PTX ISA: special registers; bar.sync; shfl.sync; vote.sync
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions
#pragma once

namespace fastops::cuda {

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int block_threads() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int64_t block_x() { return blockIdx.x; }
__device__ __forceinline__ int64_t block_y() { return blockIdx.y; }
__device__ __forceinline__ int64_t block_z() { return blockIdx.z; }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) & 31; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) >> 5; }

__device__ __forceinline__ void block_sync() { __syncthreads(); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }
__device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
// A number all lanes of a warp have, known to be so by the compiler from here on.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
__device__ __forceinline__ float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

// Whether any lane of the warp says so.
__device__ __forceinline__ bool any_lane(bool x) { return __any_sync(0xffffffffu, x) != 0; }

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(1024) char fastops_dynamic_shared[];
  return fastops_dynamic_shared;
}

}  // namespace fastops::cuda
