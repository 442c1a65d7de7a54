// Numbers: conversions and the hardware's approximations. PTX ISA: cvt, ex2.approx.ftz, rsqrt, tanh
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-ex2
#pragma once

namespace fastops::cuda {

// 2^x with a relative error below 2^-22; -inf gives 0.
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log_natural(float x) { return logf(x); }
__device__ __forceinline__ float tanh_precise(float x) { return tanhf(x); }
__device__ __forceinline__ float erf_precise(float x) { return erff(x); }
__device__ __forceinline__ float sqrt_precise(float x) { return __fsqrt_rn(x); }
__device__ __forceinline__ float maximum(float a, float b) { return fmaxf(a, b); }  // a NaN loses
__device__ __forceinline__ float round_even(float x) { return rintf(x); }
__device__ __forceinline__ float absolute(float x) { return fabsf(x); }
__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float widen(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ void narrow(float x, float* y) { *y = x; }
__device__ __forceinline__ void narrow(float x, f16* y) { asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(y->bits) : "f"(x)); }
__device__ __forceinline__ void narrow(float x, bf16* y) { asm("cvt.rn.bf16.f32 %0, %1;\n" : "=h"(y->bits) : "f"(x)); }
// Two numbers in a register, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<f16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// (x & mask) | bits in one instruction. PTX ISA: lop3
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;\n" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}
// Bytes of the pair (a, b), a in the lower half, chosen by the digits of `select`. PTX ISA: prmt
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t select) {
  return __byte_perm(a, b, select);
}
// a b + c for both halves of a register. PTX ISA: fma.rn.f16x2, fma.rn.bf16x2
template <class T>
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);
template <>
__device__ __forceinline__ uint32_t fma2<f16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}
template <>
__device__ __forceinline__ uint32_t fma2<bf16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}

}  // namespace fastops::cuda
