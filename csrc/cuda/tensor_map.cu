// tensor_map: the driver encodes it for a GPU, the emulator keeps the shape.
#include "cuda/tensor_map.h"

#include <cstring>

#if defined(__CUDACC__)
#include <cuda.h>
#endif

namespace fastops::cuda {

bool tensor_map(const TensorShape& shape, TensorMap* map) {
  for (int i = 0; i < 4; ++i)
    if (shape.size[i] < 1 || shape.size[i] > (int64_t{1} << 31)) return false;
  for (int64_t step : shape.step)
    if (step < 1 || step % 8 != 0 || step >= int64_t{1} << 38) return false;
#if defined(__CUDACC__)
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap), "the driver's form");
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {  // the driver's function, without linking to the driver
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (encode == nullptr) return false;
  cuuint64_t size[4], step[3];
  for (int i = 0; i < 4; ++i) size[i] = static_cast<cuuint64_t>(shape.size[i]);
  for (int i = 0; i < 3; ++i) step[i] = static_cast<cuuint64_t>(shape.step[i]) * 2;
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(shape.rows), 1, 1}, each[4] = {1, 1, 1, 1};
  return encode(reinterpret_cast<CUtensorMap*>(map), CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(shape.base),
                size, step, box, each, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
#else
  static_assert(sizeof(TensorShape) <= sizeof(TensorMap), "kept as it is");
  std::memcpy(map, &shape, sizeof shape);
  return true;
#endif
}

}  // namespace fastops::cuda
