// The vocabulary CUDA kernels are written in: one thin function per instruction. nvcc sees inline PTX (the files beside
// this one, the only ones with assembly); any other compiler sees the emulator's twins with the same names and
// meanings, so the same kernel source runs on a machine without a GPU (docs/design/007-cuda.md).
//
// Addresses: global memory is plain pointers. Shared memory is what dynamic_shared() returns, and plain pointers into
// it.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace fastops::cuda {
// A tensor as the copy engine knows it (cuda/tensor_map.h makes one); a kernel's argument.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};
}  // namespace fastops::cuda

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FASTOPS_DEVICE __device__ __forceinline__
#define FASTOPS_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTOPS_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define FASTOPS_UNROLL _Pragma("unroll")
#define FASTOPS_ARGUMENT __grid_constant__ const  // of a kernel, whose address is taken
#define FASTOPS_UNROLL_BY(n) FASTOPS_PRAGMA(unroll n)
#define FASTOPS_PRAGMA(x) _Pragma(#x)
#include "cuda/arch/cp_async.cuh"
#include "cuda/arch/ldmatrix.cuh"
#include "cuda/arch/math.cuh"
#include "cuda/arch/memory.cuh"
#include "cuda/arch/mma.cuh"
#include "cuda/arch/thread.cuh"
#include "cuda/arch/mbarrier.cuh"
#include "cuda/arch/cluster.cuh"
#include "cuda/arch/tma.cuh"
#include "cuda/arch/wgmma.cuh"
#else
#define FASTOPS_DEVICE inline
#define FASTOPS_HOST_DEVICE inline
#define FASTOPS_KERNEL(threads, blocks_per_sm) void
#define FASTOPS_UNROLL _Pragma("GCC unroll 64")
#define FASTOPS_ARGUMENT const
#define FASTOPS_UNROLL_BY(n)
#include "cuda/emulator/vocabulary.h"
#include "cuda/emulator/vocabulary_sm90.h"
#endif
