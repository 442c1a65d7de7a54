// Boxes of a tensor copied to shared memory by the copy engine (sm_90). PTX ISA: cp.async.bulk.tensor
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-tensor
#pragma once

namespace fastops::cuda {

// The box of `map` (cuda/tensor_map.h) at these coordinates, the innermost first, to 1024-byte aligned shared memory;
// its bytes count for the phase of `bar` that expects them. Coordinates outside the tensor give zeros. By one thread.
__device__ __forceinline__ void tma_load(void* shared, const TensorMap* map, Mbarrier* bar, int c0, int c1, int c2,
                                         int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];\n" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// The same into every block of the cluster whose bit of `blocks` is set: the box goes to this place of its shared
// memory and counts for the barrier at `bar`'s place there. It is read from memory once.
__device__ __forceinline__ void tma_load_all(void* shared, const TensorMap* map, Mbarrier* bar, uint32_t blocks, int c0,
                                             int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4, %5, %6}], [%2], %7;\n" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

}  // namespace fastops::cuda
