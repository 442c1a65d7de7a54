// Copies from global to shared memory that a thread does not wait for (sm_80). PTX ISA: cp.async
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async
#pragma once

namespace fastops::cuda {

// 16 bytes, both addresses multiples of 16, past L1; where `valid` is false nothing is read and zeros are written.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
// The same with a policy for its lines in L2: those read once are the first to leave. PTX ISA: createpolicy; made once.
__device__ __forceinline__ uint64_t cache_policy(bool read_once) {
  uint64_t first, normal;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(first));
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;\n" : "=l"(normal));
  return read_once ? first : normal;
}
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid, uint64_t policy) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;\n" ::"r"(to), "l"(global),
               "r"(bytes), "l"(policy)
               : "memory");
}
// Ends a group of copies; wait<N>: all but the newest N groups of this thread are there.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

}  // namespace fastops::cuda
