// What this library is, and what the device is.
#include <cstring>

#include "cuda/launch.h"

#ifndef FASTOPS_CUDA_ARCHS
#define FASTOPS_CUDA_ARCHS ""
#endif

namespace fastops::cuda {

fastops_status device_of(fastops_cuda_env* env, Device* device) {
  if (env->struct_size != sizeof(fastops_cuda_env)) {
    set_message(env->message, "fastops_cuda_env: struct_size is %u, this library knows %zu", env->struct_size,
                sizeof(fastops_cuda_env));
    return FASTOPS_ERR_VALUE;
  }
  *device = {env->arch, env->sm_count, false};
#if defined(__CUDACC__)
  int id = 0, major = 0, minor = 0;
  cudaError_t error = cudaSuccess;
  if (device->arch == 0 || device->sm_count == 0) {
    error = cudaGetDevice(&id);
    if (error == cudaSuccess && device->arch == 0) {
      error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id);
      device->arch = 10 * major + minor;
    }
    if (error == cudaSuccess && device->sm_count == 0)
      error = cudaDeviceGetAttribute(&device->sm_count, cudaDevAttrMultiProcessorCount, id);
  }
  if (error != cudaSuccess) {
    set_message(env->message, "no CUDA device: %s", cudaGetErrorString(error));
    return FASTOPS_ERR_UNSUPPORTED;
  }
#else
  if (device->arch == 0) device->arch = 80;
  if (device->sm_count == 0) device->sm_count = 4;
#endif
  device->sm90a = device->arch == 90;
#if defined(__CUDACC__)
  device->sm90a = device->sm90a && std::strstr(FASTOPS_CUDA_ARCHS, "90a") != nullptr;
#endif
  if (device->arch < 80) {
    set_message(env->message, "the device has compute capability %d.%d, the kernels need 8.0", device->arch / 10,
                device->arch % 10);
    return FASTOPS_ERR_UNSUPPORTED;
  }
  return FASTOPS_OK;
}

}  // namespace fastops::cuda

extern "C" const char* fastops_cuda_version(void) { return "0.1.0"; }
extern "C" const char* fastops_cuda_archs(void) { return FASTOPS_CUDA_ARCHS; }
extern "C" int fastops_cuda_emulated(void) {
#if defined(__CUDACC__)
  return 0;
#else
  return 1;
#endif
}
