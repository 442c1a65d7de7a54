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

}  // namespace fastops::cuda
