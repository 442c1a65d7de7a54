/* fastops C API (C11): attention, GEMM and fused operators on caller-owned memory.
 *
 * Rules that hold for every function here
 *   - No allocation, no exception, no global state is touched by an operator call: scratch memory, threads and the
 *     place for an error message come in through fastops_env.
 *   - Every descriptor starts with struct_size = sizeof(descriptor): a field added later reads as zero for callers
 *     compiled against an older header.
 *   - Strides count elements, may be any value (0 broadcasts, negative is allowed) and only the last dimension of
 *     q, k, v and out must be dense. Index tensors (cu_seqlens, block_table, seq_lens) are read and checked before
 *     anything they point at is touched.
 *   - A log-sum-exp (LSE) is fp32 and natural log. A row that sees no key gives out = 0 and LSE = -inf.
 *   - Results do not depend on the number of threads: the same inputs give the same bits.
 */
#ifndef FASTOPS_FASTOPS_H
#define FASTOPS_FASTOPS_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define FASTOPS_API __declspec(dllexport)
#else
#define FASTOPS_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define FASTOPS_VERSION_MAJOR 0
#define FASTOPS_VERSION_MINOR 1
#define FASTOPS_VERSION_PATCH 0

typedef enum fastops_status {
  FASTOPS_OK = 0,
  FASTOPS_ERR_VALUE = 1,       /* a shape, stride or value is wrong: Python raises ValueError */
  FASTOPS_ERR_TYPE = 2,        /* a dtype is wrong: Python raises TypeError */
  FASTOPS_ERR_UNSUPPORTED = 3, /* a right call that this build or machine cannot run: NotSupportedError */
  FASTOPS_ERR_INTERNAL = 4,    /* a bug in fastops */
  FASTOPS_ERR_WORKSPACE = 5    /* env->workspace is too small: ask fastops_*_workspace() and call again */
} fastops_status;

typedef enum fastops_dtype {
  FASTOPS_DTYPE_NONE = 0,
  FASTOPS_F32 = 1,
  FASTOPS_F16 = 2,
  FASTOPS_BF16 = 3,
  FASTOPS_I32 = 4,
  FASTOPS_I64 = 5,
  FASTOPS_BOOL = 6, /* one byte, 0 or 1 */
  FASTOPS_F64 = 7,  /* named so that a check can refuse it with a clear message */
  FASTOPS_U8 = 8,
  FASTOPS_I8 = 9,
  FASTOPS_F8_E4M3 = 10 /* finite only (e4m3fn): at most 448 */
} fastops_dtype;

#define FASTOPS_MAX_DIMS 5

/* A view of somebody else's memory. An absent optional tensor is all zero (data == NULL and ndim == 0); an empty
 * tensor has ndim > 0, a zero size, and may have data == NULL. */
typedef struct fastops_tensor {
  void* data;
  int64_t size[FASTOPS_MAX_DIMS];
  int64_t stride[FASTOPS_MAX_DIMS]; /* in elements */
  int32_t ndim;
  int32_t dtype; /* fastops_dtype */
} fastops_tensor;

/* Calls f(arg, begin, end) over a partition of [0, n) into ranges of at least `grain`, on any threads, and returns
 * when all have returned. */
typedef void (*fastops_range_fn)(void* arg, int64_t begin, int64_t end);
typedef void (*fastops_parallel_for_fn)(void* ctx, int64_t n, int64_t grain, fastops_range_fn f, void* arg);

#define FASTOPS_MESSAGE_SIZE 512

typedef struct fastops_env {
  uint32_t struct_size;
  int32_t num_threads;                  /* workers that parallel_for may run at once; <= 1 or no parallel_for: serial */
  fastops_parallel_for_fn parallel_for; /* may be NULL */
  void* parallel_ctx;
  void* workspace;       /* at least fastops_*_workspace() bytes, 64-byte aligned; may be NULL when that is 0 */
  size_t workspace_size; /* in bytes */
  char* message;         /* NULL or FASTOPS_MESSAGE_SIZE bytes: a failing call leaves a sentence here */
  const char* variant;   /* out: the instruction set that ran, e.g. "avx512" (static storage) */
} fastops_env;

/* ---- control plane ------------------------------------------------------------------------------------------- */

FASTOPS_API const char* fastops_version(void);
/* The instruction-set variants, best first, ended by NULL. compiled() and supported() take such a name: whether this
 * build holds it, and whether this machine can run it (the operating system's register saving included). */
FASTOPS_API const char* const* fastops_isa_names(void);
FASTOPS_API int fastops_isa_compiled(const char* name);
FASTOPS_API int fastops_isa_supported(const char* name);
/* The variant that calls will use, chosen once: the best compiled and supported one, or FASTOPS_ISA's. */
FASTOPS_API const char* fastops_isa_active(void);
/* Why FASTOPS_ISA's variant cannot be had (operators refuse to run then), or NULL. */
FASTOPS_API const char* fastops_isa_refusal(void);
/* Forces a variant for the whole process (NULL or "auto": back to automatic). FASTOPS_ERR_VALUE for an unknown name,
 * FASTOPS_ERR_UNSUPPORTED for one this build or machine lacks; the choice is unchanged then. */
FASTOPS_API fastops_status fastops_isa_set(const char* name, char* message);
/* The cores that plans are made for: those of the machine, or FASTOPS_CORES's. Attention cuts long sequences into as
 * many pieces as so many cores can share out evenly. Results do not depend on the number of threads; on this number
 * they depend by rounding, so the same one gives the same bits on machines of different size. */
FASTOPS_API int32_t fastops_cores(void);
/* Why FASTOPS_CORES cannot be had (attention refuses to run then), or NULL. */
FASTOPS_API const char* fastops_cores_refusal(void);
/* Plans for n cores from the next call on, in the whole process; 0: back to automatic. FASTOPS_ERR_VALUE below 0. */
FASTOPS_API fastops_status fastops_cores_set(int32_t n, char* message);

/* ---- attention ----------------------------------------------------------------------------------------------- */

typedef enum fastops_align {
  FASTOPS_ALIGN_BOTTOM_RIGHT = 0, /* query i stands at key position i + Sk - Sq (flash-attention >= 2.1) */
  FASTOPS_ALIGN_TOP_LEFT = 1      /* query i stands at key position i (torch's is_causal) */
} fastops_align;

/* clang-format off */
/* softmax(mask(softcap(scale * q k^T) + bias + alibi)) v, with these layouts, told apart by which tensors are given:
 *   dense  : q [B,Sq,Hq,D]  k [B,Sk,Hkv,D]    v [B,Sk,Hkv,Dv]    out [B,Sq,Hq,Dv]  lse [B,Hq,Sq]
 *   ragged : q [T,Hq,D]     k [Tk,Hkv,D]      v [Tk,Hkv,Dv]      out [T,Hq,Dv]     lse [Hq,T]
 *            with cu_seqlens_q and cu_seqlens_k
 *   paged  : q [T,Hq,D]     k [P,page,Hkv,D]  v [P,page,Hkv,Dv]  out [T,Hq,Dv]     lse [Hq,T]
 *            with block_table and seq_lens; without cu_seqlens_q each sequence has T / B queries
 * A query at position p sees key j iff p - window_left <= j <= p + window_right (-1: unbounded); causal is
 * window_right = 0. D and Dv: 1..256. q, k, v, out: one dtype of fp32, fp16, bf16 (out may also be fp32). */
/* clang-format on */

/* A quantised paged cache. Each of K and V is int8, e4m3, or uint8 with codes of 8, 4 or 2 bits (the first channel in
 * the lowest ones), or has q's dtype and no scales. A code stands for (code - zero) scale     zero given code scale +
 * min        min given; neither: code scale Scales (fp32, fp16, bf16; zero and min have their dtype and shape) are [1]
 * of the whole cache [Hkv]                   of each head [P,page,Hkv]            of each key and head
 *   [P,page/g,Hkv,D/c]      of g keys (a power of two) and c channels: c a multiple of 8, or 1
 * int8 and e4m3 may come without scales (1). */
typedef struct fastops_kv_quant {
  uint32_t struct_size;
  int32_t k_bits, v_bits; /* of uint8: 8, 4 or 2; 0 for other dtypes */
  int32_t reserved;
  fastops_tensor k_scale, k_zero, k_min, v_scale, v_zero, v_min;
  /* Optional: keys from packed_lens[b] on are not in pages but here, key j in row j % R, in q's dtype. */
  fastops_tensor k_recent, v_recent; /* [B,R,Hkv,D], [B,R,Hkv,Dv] */
  fastops_tensor packed_lens;        /* int32 [B]: seq_lens[b] - R <= packed_lens[b] <= seq_lens[b] */
} fastops_kv_quant;

typedef struct fastops_attention_desc {
  uint32_t struct_size;
  int32_t align; /* fastops_align */
  fastops_tensor q, k, v, out;
  fastops_tensor lse;          /* optional, fp32 */
  fastops_tensor cu_seqlens_q; /* int32 [B+1], non-decreasing from 0 to at most T */
  fastops_tensor cu_seqlens_k; /* int32 [B+1] */
  fastops_tensor block_table;  /* int32 [B, max_pages]: only the pages that seq_lens needs are read */
  fastops_tensor seq_lens;     /* int32 [B] */
  fastops_tensor bias;  /* optional [B,Hq,Sq,Sk], dense layout only: bool (true = attend), or added, fp32/fp16/bf16 */
  fastops_tensor sinks; /* optional fp32 [Hq]: one more logit per head in the denominator and in the LSE */
  fastops_tensor alibi_slopes; /* optional fp32 [Hq] or [B,Hq]: adds -slope * |p - j| */
  float scale;
  float softcap; /* > 0: s = softcap * tanh(s / softcap) after scaling */
  int64_t window_left, window_right;
  const fastops_kv_quant* kv; /* paged layout: NULL, or how k and v are quantised */
} fastops_attention_desc;

FASTOPS_API fastops_status fastops_attention_check(const fastops_attention_desc* desc, char* message);
/* Bytes of scratch for env->num_threads threads: at most 3/4 MiB each (7/8 for quantised pages), and for the pieces of
 * cut sequences 1/8 MiB for each core that plans are made for (3/8 at least); together at most 1 MiB a thread where
 * every core has one. */
FASTOPS_API fastops_status fastops_attention_workspace(const fastops_attention_desc* desc, const fastops_env* env,
                                                       size_t* bytes);
FASTOPS_API fastops_status fastops_attention_fwd(const fastops_attention_desc* desc, fastops_env* env);

/* Gradients for the dense and ragged layouts (paged: FASTOPS_ERR_UNSUPPORTED). fwd.out and fwd.lse hold the forward's
 * results. No gradient for alibi_slopes and bias. Recomputes the probabilities tile by tile: no memory that grows with
 * Sq x Sk. */
typedef struct fastops_attention_bwd_desc {
  uint32_t struct_size;
  int32_t reserved;
  fastops_attention_desc fwd;
  fastops_tensor dout;       /* like out */
  fastops_tensor dlse;       /* optional, like lse: the gradient that reached the LSE */
  fastops_tensor dq, dk, dv; /* like q, k, v; every element is written */
  fastops_tensor dsinks;     /* optional fp32 [Hq] */
} fastops_attention_bwd_desc;

FASTOPS_API fastops_status fastops_attention_bwd_check(const fastops_attention_bwd_desc* desc, char* message);
FASTOPS_API fastops_status fastops_attention_bwd_workspace(const fastops_attention_bwd_desc* desc,
                                                           const fastops_env* env, size_t* bytes);
FASTOPS_API fastops_status fastops_attention_bwd(const fastops_attention_bwd_desc* desc, fastops_env* env);

/* ---- merge_states -------------------------------------------------------------------------------------------- */

/* Joins n attention results over disjoint key sets: out = sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i).
 *   outs[i] [B,S,H,Dv] with lses[i] [B,H,S], or outs[i] [T,H,Dv] with lses[i] [H,T]; all of one shape and dtype.
 * Safe where every lse_i is -inf (out = 0, lse = -inf). */
typedef struct fastops_merge_states_desc {
  uint32_t struct_size;
  int32_t count; /* >= 1 */
  const fastops_tensor* outs;
  const fastops_tensor* lses;
  fastops_tensor out;
  fastops_tensor lse;
} fastops_merge_states_desc;

FASTOPS_API fastops_status fastops_merge_states_check(const fastops_merge_states_desc* desc, char* message);
FASTOPS_API fastops_status fastops_merge_states(const fastops_merge_states_desc* desc, fastops_env* env);

/* ---- int4_linear --------------------------------------------------------------------------------------------- */

/* Canonical INT4 codes: uint8 [N, K / 2], input feature 2 j in the low nibble of byte j, 2 j + 1 in the high one.
 * Packed for the CPU: uint8 [ceil(N / 16), K / 8, 16, 4], made once by fastops_int4_pack; scales, zeros and mins go
 * with it as [ceil(N / 16), groups, 16], anything in the places behind feature N. */
FASTOPS_API fastops_status fastops_int4_pack(const fastops_tensor* codes, const fastops_tensor* packed, char* message);
/* 2:4 sparse: two of each four neighbouring columns are kept, the others are zero weights. Codes of those kept, in
 * order: uint8 [N, K / 4] as above; kept: uint8 [N, K / 8], four places (0 to 3, the first in the lowest two bits) a
 * byte. Packed: uint8 [ceil(N / 16), K / 8, 16, 3], 3 bits a weight. */
FASTOPS_API fastops_status fastops_int4_pack24(const fastops_tensor* codes, const fastops_tensor* kept,
                                               const fastops_tensor* packed, char* message);

/* out[m,n] = sum_k x[m,perm[k]] w[n,k] + bias[n] with, in group g = k / (K / groups),  K: columns of the codes
 *   w[n,k] = (code - zeros[n,g]) scales[n,g]    zeros given; without it 8
 *   w[n,k] = code scales[n,g] - mins[n,g]       mins given
 *   w[n,k] = (code - column_zeros[s,k]) scales[n,g]   column_zeros given
 * times column_scales[s,k] where given, with s = n / (N / slices): groups along the outputs of one input (AdaDim).
 * The codes may have P times as many columns as x, P planes that add up: column k belongs to feature k modulo x's
 * columns. Two planes, one of them with 16 times the other's scales, are 8-bit weights.
 * activations: x (times column_scales) as it is; or each row of it is rounded to int8 (absmax / 127) and products are
 * integer; or each number is rounded to bf16. Sums of floating products are fp32. */
typedef enum fastops_activations {
  FASTOPS_ACTIVATIONS_FLOAT = 0,
  FASTOPS_ACTIVATIONS_INT8 = 1,
  FASTOPS_ACTIVATIONS_BF16 = 2,
} fastops_activations;
typedef struct fastops_int4_linear_desc {
  uint32_t struct_size;
  int32_t activations;
  fastops_tensor x;      /* [M, K / P] fp32, fp16, bf16; K / P a multiple of 8 */
  fastops_tensor out;    /* [M, N] x's dtype, or fp32 */
  fastops_tensor codes;  /* packed, K columns; with 2:4 sparse ones none of zeros, mins, column_zeros */
  fastops_tensor scales; /* [ceil(N / 16), groups, 16] fp32, fp16, bf16; groups divides K / 8, P divides groups */
  fastops_tensor zeros;  /* optional, like scales */
  fastops_tensor mins;   /* optional, like scales; not with zeros */
  fastops_tensor perm;   /* optional int32 [K], each from 0 to K / P - 1 */
  fastops_tensor bias;   /* optional fp32 [N] */
  int32_t eight; /* P is 2 and the first plane's scales are 16 times the second's (taken on trust): products of many
                  * rows may then read both planes as one of 8 bits. Without zeros, mins, perm, columns only */
  fastops_tensor column_scales; /* optional fp32 [slices, K]; N / slices a multiple of 16, or slices 1 */
  fastops_tensor column_zeros;  /* optional, like column_scales; not with zeros or mins */
} fastops_int4_linear_desc;

FASTOPS_API fastops_status fastops_int4_linear_check(const fastops_int4_linear_desc* desc, char* message);
/* Bytes of scratch: x as the kernels read it (256 rows of (K + 16) x 4 at most, of all slices), its sums
 * over groups, and 0.4 MiB for each thread. */
FASTOPS_API fastops_status fastops_int4_linear_workspace(const fastops_int4_linear_desc* desc, const fastops_env* env,
                                                         size_t* bytes);
FASTOPS_API fastops_status fastops_int4_linear(const fastops_int4_linear_desc* desc, fastops_env* env);

/* ---- lut_linear: dense and sparse ---------------------------------------------------------------------------- */

/* out[m,n] = sum_k x[m,k] table[n,code[n,k]] + sum_{i in row n} x[m,columns[i]] values[i] + bias[n]
 * Codes: uint8 [N, ceil(K / 32), 16]; of 32 neighbouring input features number j stands in the low nibble of byte j,
 * 16 + j in the high one; anything behind feature K. Row n of the sparse part is row_starts[n] to row_starts[n + 1]. */
typedef struct fastops_lut_linear_desc {
  uint32_t struct_size;
  uint32_t reserved;
  fastops_tensor x;          /* [M, K] fp32, fp16, bf16 */
  fastops_tensor out;        /* [M, N] x's dtype, or fp32 */
  fastops_tensor codes;      /* contiguous */
  fastops_tensor table;      /* fp32 [N, 16], contiguous */
  fastops_tensor row_starts; /* optional int32 [N + 1], together with columns and values */
  fastops_tensor columns;    /* int32 [count], each from 0 to K - 1 */
  fastops_tensor values;     /* fp32 [count] */
  fastops_tensor bias;       /* optional fp32 [N] */
} fastops_lut_linear_desc;

FASTOPS_API fastops_status fastops_lut_linear_check(const fastops_lut_linear_desc* desc, char* message);
/* Bytes of scratch: at most 256 rows of x in fp32, and 0.1 MiB for each thread. */
FASTOPS_API fastops_status fastops_lut_linear_workspace(const fastops_lut_linear_desc* desc, const fastops_env* env,
                                                        size_t* bytes);
FASTOPS_API fastops_status fastops_lut_linear(const fastops_lut_linear_desc* desc, fastops_env* env);

/* ---- norm: RMS norm and layer norm ---------------------------------------------------------------------------- */

/* With s = x (+ residual), in fp32, over the last dimension:
 *   layer = 0: out = s rstd (weight + weight_offset)            rstd = 1 / sqrt(mean(s^2) + eps)
 *   layer = 1: out = (s - mean) rstd (weight + weight_offset) + bias   rstd = 1 / sqrt(var(s) + eps)
 * One rounding at the end. out may be x, sum may be residual. With an int8 (e4m3) out each row is divided by its
 * scale = absmax / 127 (448), 1 for a row of zeros, and rounded to nearest. */
typedef struct fastops_norm_desc {
  uint32_t struct_size;
  int32_t layer;
  fastops_tensor x;          /* [..., N] fp32, fp16, bf16 */
  fastops_tensor residual;   /* optional, like x */
  fastops_tensor sum;        /* with residual: like x, takes x + residual */
  fastops_tensor weight;     /* optional [N]: x's dtype or fp32 */
  fastops_tensor bias;       /* optional [N], layer = 1 only: x's dtype or fp32 */
  fastops_tensor out;        /* x's shape: x's dtype, fp32, int8 or e4m3 */
  fastops_tensor scales;     /* with int8, e4m3: contiguous fp32, one for each row */
  fastops_tensor mean, rstd; /* optional, contiguous fp32, one for each row: what the backward needs */
  float eps, weight_offset;
} fastops_norm_desc;

FASTOPS_API fastops_status fastops_norm_check(const fastops_norm_desc* desc, char* message);
/* Bytes of scratch: (2 + threads) x N x 4. */
FASTOPS_API fastops_status fastops_norm_workspace(const fastops_norm_desc* desc, const fastops_env* env, size_t* bytes);
FASTOPS_API fastops_status fastops_norm(const fastops_norm_desc* desc, fastops_env* env);

/* Gradients of out (dout) and, where given, of sum (dsum). */
typedef struct fastops_norm_bwd_desc {
  uint32_t struct_size;
  int32_t layer;
  fastops_tensor dout, s;        /* [..., N], one dtype; s: what was normalised */
  fastops_tensor dsum;           /* optional, like s */
  fastops_tensor weight;         /* optional [N] */
  fastops_tensor mean, rstd;     /* as the forward left them; mean with layer = 1 only */
  fastops_tensor ds;             /* like s */
  fastops_tensor dweight, dbias; /* optional fp32 [N] */
  float weight_offset;
} fastops_norm_bwd_desc;

FASTOPS_API fastops_status fastops_norm_bwd_check(const fastops_norm_bwd_desc* desc, char* message);
/* Bytes of scratch: N x 4 for the weight and as much for each of at most 64 groups of rows and each of dweight, dbias.
 */
FASTOPS_API fastops_status fastops_norm_bwd_workspace(const fastops_norm_bwd_desc* desc, const fastops_env* env,
                                                      size_t* bytes);
FASTOPS_API fastops_status fastops_norm_bwd(const fastops_norm_bwd_desc* desc, fastops_env* env);

/* ---- gated: activation(gate) * up ---------------------------------------------------------------------------- */

typedef enum fastops_activation {
  FASTOPS_SILU = 0,
  FASTOPS_GELU_TANH = 1,
  FASTOPS_GELU = 2 /* by the error function */
} fastops_activation;

/* out = activation(gate) up, in fp32 with one rounding. All [..., N], one shape and dtype of fp32, fp16, bf16; out may
 * be gate or up. Backward: dout given; dgate and dup are written (they may be gate and up), out is not used. */
typedef struct fastops_gated_desc {
  uint32_t struct_size;
  int32_t activation;
  fastops_tensor gate, up, out;
  fastops_tensor dout, dgate, dup;
} fastops_gated_desc;

FASTOPS_API fastops_status fastops_gated_check(const fastops_gated_desc* desc, char* message);
FASTOPS_API fastops_status fastops_gated(const fastops_gated_desc* desc, fastops_env* env);

/* ---- rope: rotary embedding of q and k, after an RMS norm of each head where weights are given ---------------- */

/* For each token and head, with R = 2 * (last dimension of cos) <= D and pairs (i, i + R / 2), or (2 i, 2 i + 1) when
 * interleaved:  (a, b) -> (a cos_i - b sin_i, b cos_i + a sin_i); elements from R on are copied. inverse = 1 turns the
 * other way (the backward). In fp32, one rounding.
 * k may be absent. With slots, token t's k (and v) go to row slots[t] of k_cache (v_cache) seen as
 * [pages * page, Hkv, D], a negative slot goes nowhere, and k_out may be absent. */
typedef struct fastops_rope_desc {
  uint32_t struct_size;
  int32_t interleaved, inverse;
  fastops_tensor q, q_out;           /* [B,S,Hq,D] or [T,Hq,D]; q_out may be q */
  fastops_tensor k, k_out;           /* [B,S,Hkv,D] or [T,Hkv,D] */
  fastops_tensor cos, sin;           /* [S,R/2], [B,S,R/2] or [T,R/2]; with positions [P,R/2]. fp32, fp16, bf16 */
  fastops_tensor positions;          /* optional int32 or int64 [S], [B,S] or [T], each from 0 to P - 1 */
  fastops_tensor q_weight, k_weight; /* optional [D]: RMS norm first. q's dtype or fp32 */
  fastops_tensor v;                  /* optional, with slots: [B,S,Hkv,Dv] or [T,Hkv,Dv] */
  fastops_tensor k_cache, v_cache;   /* [P,page,Hkv,D], [P,page,Hkv,Dv], q's dtype */
  fastops_tensor slots;              /* optional int64 [B * S] or [T] */
  float eps, weight_offset;
} fastops_rope_desc;

FASTOPS_API fastops_status fastops_rope_check(const fastops_rope_desc* desc, char* message);
FASTOPS_API fastops_status fastops_rope(const fastops_rope_desc* desc, fastops_env* env);

/* ---- kv_append: new keys and values go behind those a paged cache has ------------------------------------------- */

/* Row cu_seqlens[b] + i of k and v becomes token seq_lens[b] + i of sequence b. A cache of k's dtype gets the numbers
 * as they are; a quantised one (kv, as attention_paged reads it) gets codes and, where scales belong to tokens, scales
 * and zeros or minima: over the smallest and largest number of the group for uint8, the largest magnitude for int8 and
 * e4m3. Scales of [1] and [Hkv] are taken as they are (none: 1). With kv.recent, new tokens go to the window, and what
 * then exceeds R - 32 of them leaves it for the pages, its oldest 32 at a time; packed_lens is updated. Only then may
 * tokens share scales: 2 to 32 of them. No page may belong to two sequences where it is written. new_lens may be
 * seq_lens. */
typedef struct fastops_kv_append_desc {
  uint32_t struct_size;
  int32_t reserved;
  fastops_tensor k, v;             /* [T,Hkv,D], [T,Hkv,Dv]; D and Dv 1..256, in quantised caches multiples of 8 */
  fastops_tensor k_cache, v_cache; /* [P,page,Hkv,D], [P,page,Hkv,Dv], or D * bits / 8 bytes of codes */
  fastops_tensor block_table;      /* int32 [B, max_pages]: only the pages that are written to are read */
  fastops_tensor seq_lens;         /* int32 [B], before the call */
  fastops_tensor cu_seqlens;       /* optional int32 [B+1], rising from 0 to T; without it T / B tokens each */
  fastops_tensor new_lens;         /* int32 [B], written */
  const fastops_kv_quant* kv;      /* NULL, or how the caches are quantised */
} fastops_kv_append_desc;

FASTOPS_API fastops_status fastops_kv_append_check(const fastops_kv_append_desc* desc, char* message);
FASTOPS_API fastops_status fastops_kv_append(const fastops_kv_append_desc* desc, fastops_env* env);

/* ---- scale_add: the skeleton that a new operator copies (docs/adding-an-op.md) -------------------------------- */

/* out = alpha * x + y, element by element, in fp32 with one rounding at the end. x, y, out: one shape and one dtype of
 * fp32, fp16, bf16; out may be x or y itself. */
typedef struct fastops_scale_add_desc {
  uint32_t struct_size;
  float alpha;
  fastops_tensor x, y, out;
} fastops_scale_add_desc;

FASTOPS_API fastops_status fastops_scale_add_check(const fastops_scale_add_desc* desc, char* message);
FASTOPS_API fastops_status fastops_scale_add(const fastops_scale_add_desc* desc, fastops_env* env);

#ifdef __cplusplus
}
#endif
#endif /* FASTOPS_FASTOPS_H */
