// Global and shared memory, sixteen bytes at a time. PTX ISA: ld, st
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-ld
#pragma once

namespace fastops::cuda {

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// Read once: kept out of L1.
__device__ __forceinline__ Bytes16 load16(const void* global) {
  Bytes16 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "l"(global)
               : "memory");
  return x;
}
__device__ __forceinline__ void store16(void* global, const Bytes16& x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"l"(global), "r"(x.word[0]), "r"(x.word[1]),
               "r"(x.word[2]), "r"(x.word[3])
               : "memory");
}

}  // namespace fastops::cuda
