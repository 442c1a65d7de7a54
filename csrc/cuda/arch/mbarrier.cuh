// Barriers in shared memory that count arrivals and bytes (sm_90), barriers by number, and fences between proxies. PTX
// ISA: mbarrier
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier
#pragma once

namespace fastops::cuda {

struct alignas(8) Mbarrier {
  uint64_t word;
};
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// By one thread; then mbarrier_ready() by the same, and block_sync() before anybody uses it.
__device__ __forceinline__ void mbarrier_init(Mbarrier* bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(bar)) : "memory");
}
// Arrives, and lets the phase wait for so many more bytes.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity is over; the first phase has parity 0. By all lanes of a warp.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* bar, uint32_t parity) {
  uint32_t over = 0;
  while (!over)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(over)
                 : "r"(shared_address(bar)), "r"(parity)
                 : "memory");
}

// What this thread wrote to shared memory becomes visible to copies and products that are not its own instructions.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Barrier `id` (1 to 15) of `threads` threads, by whole warps: arrive and wait, or arrive only. PTX ISA: bar
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace fastops::cuda
