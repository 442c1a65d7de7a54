// Blocks of a cluster (sm_90) run at the same time, meet, and reach one another's shared memory. launch() makes
// clusters of neighbours along x. PTX ISA: barrier.cluster, mapa
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-barrier-cluster
#pragma once

namespace fastops::cuda {

// Which block of its cluster this is.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return static_cast<int>(rank);
}

// By all threads of all blocks of the cluster: what was done to shared memory before `arrive` is seen behind `wait`.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Arrives at the barrier that stands at this place in the shared memory of block `rank` of the cluster (perhaps this
// one), which must not have ended.
__device__ __forceinline__ void mbarrier_arrive_at(Mbarrier* bar, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}\n" ::"r"(shared_address(bar)),
      "r"(rank)
      : "memory");
}

}  // namespace fastops::cuda
