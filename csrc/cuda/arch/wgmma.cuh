// Products of 64-row tiles by four warps, from shared memory, that go on by themselves (sm_90a). PTX ISA:
// wgmma.mma_async
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions
//
// The lists of operands are written out by hand-made macros: the instruction names every register.
#pragma once

namespace fastops::cuda {

// Registers written before are the products' to read; results are theirs until the wait that covers them.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}
// Keeps the compiler from moving reads and writes of d across this place.
template <int kTiles>
__device__ __forceinline__ void wgmma_hold(float (&d)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
  }
}
// Registers of a warp group of four warps: more, or fewer (a multiple of 8). PTX ISA: setmaxnreg
template <int kRegisters>
__device__ __forceinline__ void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
// A tile in shared memory as 128-byte rows, swizzled (layout/tile.h): where it begins, bytes between its blocks of 64
// elements (needed where the rows run along m or n) and of 8 rows. PTX ISA: matrix descriptor
__device__ __forceinline__ uint64_t wgmma_tile(const void* shared, int leading, int stride) {
  const uint64_t at = (shared_address(shared) & 0x3ffff) >> 4;
  return at | static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 | 1ull << 62;
}

// d (+)= a b, fp32 sums; d[n] of a lane: as mma_m16n8k16's, the four warps' rows one below the other.
//   wgmma_ss: a [64][16] and b [n][16] in shared memory, rows along k
//   wgmma_rs: a in registers as mma_m16n8k16's, b [16][n] in shared memory, rows along n
//   wgmma_rs_along_k: the same with b [n][16], rows along k
template <class T, int kN>
struct Wgmma;

#define FASTOPS_F4(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define FASTOPS_WG16(d, n) FASTOPS_F4(d, n), FASTOPS_F4(d, n + 1), FASTOPS_F4(d, n + 2), FASTOPS_F4(d, n + 3)
#define FASTOPS_WG32(d, n) FASTOPS_WG16(d, n), FASTOPS_WG16(d, n + 4)
#define FASTOPS_D64(d) FASTOPS_WG32(d, 0)
#define FASTOPS_D128(d) FASTOPS_WG32(d, 0), FASTOPS_WG32(d, 8)
#define FASTOPS_LIST64                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define FASTOPS_LIST128                                                              \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
#define FASTOPS_WGMMA(T, type, kN, a, b, c, e, f)                                                                   \
  template <>                                                                                                       \
  struct Wgmma<T, kN> {                                                                                             \
    static __device__ __forceinline__ void ss(float (&d)[kN / 8][4], uint64_t x, uint64_t y, int add) {             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" c                                                           \
                   ", 0;\n"                                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." type "." type " " FASTOPS_LIST##kN            \
                   "%" a ", %" b ", p, 1, 1, 0, 0;\n}\n"                                                            \
                   : FASTOPS_D##kN(d)                                                                               \
                   : "l"(x), "l"(y), "r"(add));                                                                     \
    }                                                                                                               \
    template <int kAlongN>                                                                                          \
    static __device__ __forceinline__ void rs(float (&d)[kN / 8][4], const uint32_t (&x)[4], uint64_t y, int add) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" f                                                           \
                   ", 0;\n"                                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." type "." type " " FASTOPS_LIST##kN            \
                   "{%" a ", %" b ", %" c ", %" e "}, %" FASTOPS_AFTER##kN ", p, 1, 1, %" FASTOPS_LAST##kN ";\n}\n" \
                   : FASTOPS_D##kN(d)                                                                               \
                   : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(y), "r"(add), "n"(kAlongN));                   \
    }                                                                                                               \
  };
#define FASTOPS_LAST64 "38"
#define FASTOPS_LAST128 "70"
#define FASTOPS_AFTER64 "36"
#define FASTOPS_AFTER128 "68"
FASTOPS_WGMMA(f16, "f16", 64, "32", "33", "34", "35", "37")
FASTOPS_WGMMA(bf16, "bf16", 64, "32", "33", "34", "35", "37")
FASTOPS_WGMMA(f16, "f16", 128, "64", "65", "66", "67", "69")
FASTOPS_WGMMA(bf16, "bf16", 128, "64", "65", "66", "67", "69")
#undef FASTOPS_WGMMA
#undef FASTOPS_LAST64
#undef FASTOPS_LAST128
#undef FASTOPS_AFTER64
#undef FASTOPS_AFTER128
#undef FASTOPS_LIST64
#undef FASTOPS_LIST128
#undef FASTOPS_D64
#undef FASTOPS_D128
#undef FASTOPS_F4
#undef FASTOPS_WG16
#undef FASTOPS_WG32

template <class T, int kTiles>
__device__ __forceinline__ void wgmma_ss(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool add) {
  Wgmma<T, kTiles * 8>::ss(d, a, b, add);
}
template <class T, int kTiles>
__device__ __forceinline__ void wgmma_rs(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  Wgmma<T, kTiles * 8>::template rs<1>(d, a, b, add);
}
template <class T, int kTiles>
__device__ __forceinline__ void wgmma_rs_along_k(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  Wgmma<T, kTiles * 8>::template rs<0>(d, a, b, add);
}

}  // namespace fastops::cuda
