/* The CUDA half of the C API: the same descriptors (fastops.h), over device memory, on a stream.
 *
 * libfastops_cuda holds it for GPUs; libfastops_emulated holds the same functions, built from the same kernel sources,
 * over host memory: every thread of a block is run on the CPU, with the checks of csrc/cuda/emulator (slow, and for
 * debuggers).
 *
 * No function here allocates, synchronises or reads device memory on the host; lengths and page tables stay on the
 * device and are checked there: a sequence whose indices point outside its tensors gives NaN. */
#ifndef FASTOPS_FASTOPS_CUDA_H
#define FASTOPS_FASTOPS_CUDA_H

#include "fastops/fastops.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct fastops_cuda_env {
  uint32_t struct_size;
  int32_t arch;     /* compute capability times ten, e.g. 90; 0: ask the device */
  int32_t sm_count; /* 0: ask the device */
  int32_t reserved;
  void* stream;    /* cudaStream_t */
  void* workspace; /* device memory of at least *_workspace() bytes, 256-byte aligned; may be NULL when that is 0 */
  size_t workspace_size; /* in bytes */
  char* message;         /* NULL or FASTOPS_MESSAGE_SIZE bytes */
  const char* variant;   /* out: the kernel that ran, e.g. "sm80" (static storage) */
  uint64_t seed;         /* emulator: draws the order in which warps take turns */
  /* The emulated library only: where given, kernels are not emulated; each launch goes to this function (0: started)
   * with the C++ signature of the function that starts the kernel, which names it, the grid, how many neighbours along
   * x make a cluster, and a pointer to the kernel's one argument. For code compiled elsewhere from the same sources
   * (fastops/_nvrtc.py): give arch and sm_count as well. */
  int (*start)(const char* launch, const int64_t grid[3], int32_t cluster, int32_t threads, size_t shared,
               const void* args, size_t args_size, void* stream);
} fastops_cuda_env;

FASTOPS_API const char* fastops_cuda_version(void);
/* 1 for the emulator. */
FASTOPS_API int fastops_cuda_emulated(void);
/* Architectures this library holds code for, e.g. "80 86 90a"; "" for the emulator. */
FASTOPS_API const char* fastops_cuda_archs(void);

FASTOPS_API fastops_status fastops_cuda_attention_workspace(const fastops_attention_desc* desc, fastops_cuda_env* env,
                                                            size_t* bytes);
FASTOPS_API fastops_status fastops_cuda_attention_fwd(const fastops_attention_desc* desc, fastops_cuda_env* env);
/* Dense and ragged, fp16 and bf16, no attn_mask. Workspace: 4 bytes for each row of q and head. No atomics: the same
 * bits every time. */
FASTOPS_API fastops_status fastops_cuda_attention_bwd_workspace(const fastops_attention_bwd_desc* desc,
                                                                fastops_cuda_env* env, size_t* bytes);
FASTOPS_API fastops_status fastops_cuda_attention_bwd(const fastops_attention_bwd_desc* desc, fastops_cuda_env* env);
FASTOPS_API fastops_status fastops_cuda_merge_states(const fastops_merge_states_desc* desc, fastops_cuda_env* env);
/* The packed form is fastops_int4_pack's. x: fp16 or bf16, its rows 16-byte aligned; groups of a multiple of 32 columns
 * (or one group); no perm (gather the columns of x first) and no int8: FASTOPS_ERR_UNSUPPORTED otherwise. */
FASTOPS_API fastops_status fastops_cuda_int4_linear_workspace(const fastops_int4_linear_desc* desc,
                                                              fastops_cuda_env* env, size_t* bytes);
FASTOPS_API fastops_status fastops_cuda_int4_linear(const fastops_int4_linear_desc* desc, fastops_cuda_env* env);
FASTOPS_API fastops_status fastops_cuda_norm(const fastops_norm_desc* desc, fastops_cuda_env* env);
/* Workspace: dweight and dbias of up to 264 groups of rows in fp32. */
FASTOPS_API fastops_status fastops_cuda_norm_bwd_workspace(const fastops_norm_bwd_desc* desc, fastops_cuda_env* env,
                                                           size_t* bytes);
FASTOPS_API fastops_status fastops_cuda_norm_bwd(const fastops_norm_bwd_desc* desc, fastops_cuda_env* env);
/* A token whose position lies outside cos and sin becomes NaN; one whose slot lies behind the cache goes nowhere. */
FASTOPS_API fastops_status fastops_cuda_rope(const fastops_rope_desc* desc, fastops_cuda_env* env);
FASTOPS_API fastops_status fastops_cuda_gated(const fastops_gated_desc* desc, fastops_cuda_env* env);

#ifdef __cplusplus
}
#endif

#endif
