// tensor_map: the driver encodes it for a GPU, the emulator keeps the shape.
#include "cuda/tensor_map.h"

#include <cstring>

#if defined(__CUDACC_RTC__)
#elif defined(__CUDACC__)
#include <cuda.h>
#else
#include <dlfcn.h>
#endif

#if !defined(__CUDACC_RTC__)
namespace fastops::cuda {
namespace {

// The driver's function and the numbers it takes, by their meaning in cuda.h (which only nvcc brings along).
using Encode = int (*)(void* map, int type, uint32_t rank, void* base, const uint64_t* size, const uint64_t* step,
                       const uint32_t* box, const uint32_t* each, int interleave, int swizzle, int promotion, int fill);
constexpr int kUint16 = 1, kNoInterleave = 0, kSwizzle128 = 3, kPromote128 = 2, kZeros = 0;

Encode find_encode() {
#if defined(__CUDACC__)
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && kUint16 == CU_TENSOR_MAP_DATA_TYPE_UINT16 &&
                    kNoInterleave == CU_TENSOR_MAP_INTERLEAVE_NONE && kSwizzle128 == CU_TENSOR_MAP_SWIZZLE_128B &&
                    kPromote128 == CU_TENSOR_MAP_L2_PROMOTION_L2_128B && kZeros == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
                "the driver's form");
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
#else
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  return driver ? reinterpret_cast<Encode>(dlsym(driver, "cuTensorMapEncodeTiled")) : nullptr;
#endif
}

}  // namespace

bool tensor_map(const TensorShape& shape, const fastops_cuda_env* env, TensorMap* map) {
  for (int64_t size : shape.size)
    if (size < 1 || size > (int64_t{1} << 31)) return false;
  for (int64_t step : shape.step)
    if (step < 1 || step % 8 != 0 || step >= int64_t{1} << 38) return false;
#if !defined(__CUDACC__)
  if (env->start == nullptr) {
    static_assert(sizeof(TensorShape) <= sizeof(TensorMap), "the emulator keeps it as it is");
    std::memcpy(map, &shape, sizeof shape);
    return true;
  }
#endif
  static_cast<void>(env);
  static const Encode encode = find_encode();
  if (encode == nullptr) return false;
  uint64_t size[4], step[3];
  for (int i = 0; i < 4; ++i) size[i] = static_cast<uint64_t>(shape.size[i]);
  for (int i = 0; i < 3; ++i) step[i] = static_cast<uint64_t>(shape.step[i]) * 2;
  const uint32_t box[4] = {64, static_cast<uint32_t>(shape.rows), 1, 1}, each[4] = {1, 1, 1, 1};
  return encode(map, kUint16, 4, const_cast<void*>(shape.base), size, step, box, each, kNoInterleave, kSwizzle128,
                kPromote128, kZeros) == 0;
}

}  // namespace fastops::cuda
#endif
