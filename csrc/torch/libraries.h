// The CUDA half of the C API (fastops_cuda.h), found at run time: libfastops_cuda for tensors on GPUs, and the
// emulator, which runs the same kernels on CPU tensors. Neither is linked, so that one wheel serves machines with and
// without GPUs.
#pragma once
#include <cstdint>

#include "fastops/fastops_cuda.h"

namespace fastops::binding {

enum CudaFunction {
  kNotOnCuda = -1,
  kCudaAttention,
  kCudaAttentionBwd,
  kCudaMergeStates,
  kCudaInt4Linear,
  kCudaNorm,
  kCudaNormBwd,
  kCudaRope,
  kCudaGated,
  kCudaFunctions
};

struct Library {
  const char* (*archs)(void);
  fastops_status (*run[kCudaFunctions])(const void* desc, fastops_cuda_env*);
  fastops_status (*workspace[kCudaFunctions])(const void* desc, fastops_cuda_env*, size_t*);  // null: needs none
};

// The library for a GPU's tensors, or for CPU tensors under kEmulate; null where none was loaded.
const Library* library_for(bool gpu);

// What a call's environment says beside its workspace: the device's current stream, or the emulator's seed.
void prepare(fastops_cuda_env* env, bool gpu, int32_t device);

// How calls of this thread are taken; fastops/_cuda.py sets it.
enum Mode : int {
  kEmulate = 1,   // CPU tensors by the emulated CUDA kernels
  kOrRefuse = 2,  // what the kernels for GPUs do not take is an error; otherwise plain torch runs
};
int mode();
void remember_refusal(const char* text);

}  // namespace fastops::binding

// For fastops._C. Loading: null, or what is wrong. The emulated library becomes one for GPUs by a `start`
// (fastops_cuda_env) and `facts`, which gives a device's arch and sm_count.
extern "C" {
typedef void (*fastops_torch_facts)(int32_t device, int32_t* arch, int32_t* sm_count);
FASTOPS_API const char* fastops_torch_load(const char* path, int for_gpus, void* start, fastops_torch_facts facts);
FASTOPS_API const char* fastops_torch_archs(int for_gpus);
FASTOPS_API int fastops_torch_set_mode(int mode); /* the one before */
FASTOPS_API const char* fastops_torch_last_refusal(void);
}
