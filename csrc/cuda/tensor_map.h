// What the copy engine must know of a tensor of 16-bit elements: made on the host, handed to a kernel by value.
#pragma once
#include "cuda/arch/arch.h"
#include "cuda/launch.h"

#if !defined(__CUDACC_RTC__)
namespace fastops::cuda {

// Four dimensions, the innermost (dense) first; `step`: elements between neighbours of the outer three (multiples of
// 8). A box is 64 elements by `rows` of the second dimension, in rows of 128 bytes, swizzled (layout/tile.h). `base` is
// 16-byte aligned. False: the driver will not make one.
struct TensorShape {
  const void* base;
  int64_t size[4], step[3];
  int rows;
};
bool tensor_map(const TensorShape& shape, const fastops_cuda_env* env, TensorMap* map);

}  // namespace fastops::cuda
#endif
