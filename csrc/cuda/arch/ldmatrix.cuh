// Fragments of 16-bit matrices from shared memory (sm_75) and to it (sm_90). PTX ISA: ldmatrix, stmatrix
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-ldmatrix
#pragma once

namespace fastops::cuda {

// Four 8x8 matrices of 16-bit elements. Lane 8 i + r gives the address of row r of matrix i (16 bytes, aligned). r[i]
// of lane l: elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i; transposed: of column l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// The reverse, transposed: of r[i] of lane l the elements go to row 2 (l % 4), and 2 (l % 4) + 1, of matrix i, at l
// / 4.
__device__ __forceinline__ void stmatrix_x4_trans(void* shared, const uint32_t (&r)[4]) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(to), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace fastops::cuda
