// For fastops._C: the C API on the calling thread's scratch and torch's threads, without torch's dispatcher.
#pragma once
#include "fastops/fastops.h"

extern "C" {
typedef fastops_status (*fastops_torch_function)(const void* desc, fastops_env*);
typedef fastops_status (*fastops_torch_workspace)(const void* desc, const fastops_env*, size_t*);
/* `workspace` may be null. `message` holds FASTOPS_MESSAGE_SIZE characters. */
FASTOPS_API fastops_status fastops_torch_run(fastops_torch_function run, fastops_torch_workspace workspace,
                                             const void* desc, char* message);
/* A new tensor on the CPU, as the address of torch's own object for it, and its end; or null. */
FASTOPS_API void* fastops_torch_empty(const int64_t* size, const int64_t* stride, int ndim, fastops_dtype dtype);
FASTOPS_API void fastops_torch_release(void* tensor);
/* Whether CPU tensors of this thread go to the CPU's kernels at all, and whether autograd records. */
FASTOPS_API int fastops_torch_on_cpu(void);
FASTOPS_API int fastops_torch_records(void);
}
