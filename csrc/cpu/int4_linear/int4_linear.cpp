// The int4_linear C API on the CPU: check, prepare the rows of x, share the output features out.
#include "cpu/int4_linear/int4_linear.h"

#include <cstring>
#include <initializer_list>

#include "core/parallel.h"
#include "core/status.h"
#include "fastops/fastops.h"

namespace fastops::cpu {
namespace {

#define REFUSE(status, ...)            \
  do {                                 \
    set_message(message, __VA_ARGS__); \
    return status;                     \
  } while (0)

using Int = long long;

bool is_dense(const fastops_tensor& t) {
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.size[i] != 1 && t.stride[i] != stride) return false;
    stride *= t.size[i];
  }
  return true;
}

// A dense tensor of this shape, with data unless it is empty.
fastops_status check_dense(const char* op, const char* name, const fastops_tensor& t, int ndim, const int64_t* size,
                           char* message) {
  if (t.ndim != ndim) REFUSE(FASTOPS_ERR_VALUE, "%s: %s has %d dimensions, must have %d", op, name, t.ndim, ndim);
  bool empty = false;
  for (int i = 0; i < ndim; ++i) {
    if (t.size[i] != size[i])
      REFUSE(FASTOPS_ERR_VALUE, "%s: %s has size %lld in dimension %d, must be %lld", op, name, Int{t.size[i]}, i,
             Int{size[i]});
    empty = empty || size[i] == 0;
  }
  if (!empty && t.data == nullptr) REFUSE(FASTOPS_ERR_VALUE, "%s: %s has no data", op, name);
  if (!empty && !is_dense(t)) REFUSE(FASTOPS_ERR_VALUE, "%s: %s must be contiguous", op, name);
  return FASTOPS_OK;
}

fastops_status check_rows(const char* name, const fastops_tensor& t, char* message) {
  if (t.ndim != 2) REFUSE(FASTOPS_ERR_VALUE, "int4_linear: %s has %d dimensions, must have 2", name, t.ndim);
  if (t.size[0] < 0 || t.size[1] < 0 || t.size[0] > INT32_MAX || t.size[1] > INT32_MAX)
    REFUSE(FASTOPS_ERR_VALUE, "int4_linear: %s has shape [%lld, %lld]", name, Int{t.size[0]}, Int{t.size[1]});
  if (!is_float(t.dtype)) REFUSE(FASTOPS_ERR_TYPE, "int4_linear: %s must be float32, float16 or bfloat16", name);
  const bool empty = t.size[0] == 0 || t.size[1] == 0;
  if (!empty && t.data == nullptr) REFUSE(FASTOPS_ERR_VALUE, "int4_linear: %s has no data", name);
  if (!empty && t.size[1] > 1 && t.stride[1] != 1)
    REFUSE(FASTOPS_ERR_VALUE, "int4_linear: the last dimension of %s must be contiguous (stride 1), got stride %lld",
           name, Int{t.stride[1]});
  return FASTOPS_OK;
}

fastops_status check(const fastops_int4_linear_desc& d, Int4Params* p, char* message) {
  const char* op = "int4_linear";
  if (d.struct_size != sizeof d)
    REFUSE(FASTOPS_ERR_VALUE, "int4_linear: struct_size is %u, this library knows %zu", d.struct_size, sizeof d);
  fastops_status status = check_rows("x", d.x, message);
  if (status == FASTOPS_OK) status = check_rows("out", d.out, message);
  if (status != FASTOPS_OK) return status;
  const int64_t M = d.x.size[0], features = d.x.size[1], N = d.out.size[1], blocks = (N + kInt4Block - 1) / kInt4Block;
  const int64_t words = d.codes.ndim == 4 ? d.codes.size[1] : 0;
  const int64_t K = words > 0 && words <= INT32_MAX ? words * 8 : features;
  const int64_t planes = features > 0 ? K / features : 0;
  if (d.out.dtype != d.x.dtype && d.out.dtype != FASTOPS_F32)
    REFUSE(FASTOPS_ERR_TYPE, "int4_linear: out must have x's dtype or float32");
  if (d.out.size[0] != M)
    REFUSE(FASTOPS_ERR_VALUE, "int4_linear: out has %lld rows, x has %lld", Int{d.out.size[0]}, Int{M});
  if (features == 0 || features % 8 != 0)
    REFUSE(FASTOPS_ERR_VALUE, "int4_linear: K is %lld, must be a multiple of 8", Int{features});
  if (planes < 1 || K % features != 0 || K > INT32_MAX)
    REFUSE(FASTOPS_ERR_VALUE, "int4_linear: codes have %lld columns, must be x's %lld, or several times that", Int{K},
           Int{features});
  if (d.activations < FASTOPS_ACTIVATIONS_FLOAT || d.activations > FASTOPS_ACTIVATIONS_BF16)
    REFUSE(FASTOPS_ERR_VALUE, "int4_linear: activations is %d, must be 0 (float), 1 (int8) or 2 (bfloat16)",
           d.activations);
  if (d.codes.dtype != FASTOPS_U8) REFUSE(FASTOPS_ERR_TYPE, "int4_linear: codes must be uint8");
  const bool sparse = d.codes.ndim == 4 && d.codes.size[3] == kInt4Word24 / kInt4Block;
  const int64_t codes_size[4] = {blocks, K / 8, kInt4Block, sparse ? 3 : 4};
  status = check_dense(op, "codes", d.codes, 4, codes_size, message);
  if (status != FASTOPS_OK) return status;
  const int64_t groups = d.scales.ndim == 3 ? d.scales.size[1] : 0;
  if (groups < 1 || K / 8 % groups != 0)
    REFUSE(FASTOPS_ERR_VALUE, "int4_linear: scales have %lld groups, must divide K / 8 = %lld", Int{groups},
           Int{K / 8});
  if (groups % planes != 0)
    REFUSE(FASTOPS_ERR_VALUE, "int4_linear: scales have %lld groups, must be a multiple of the %lld planes of codes",
           Int{groups}, Int{planes});
  const int64_t scales_size[3] = {blocks, groups, kInt4Block};
  const struct {
    const char* name;
    const fastops_tensor& t;
  } like[] = {{"scales", d.scales}, {"zeros", d.zeros}, {"mins", d.mins}};
  for (const auto& each : like) {
    if (&each.t != &d.scales && !given(each.t)) continue;
    if (!is_float(each.t.dtype) || each.t.dtype != d.scales.dtype)
      REFUSE(FASTOPS_ERR_TYPE, "int4_linear: %s must be float32, float16 or bfloat16, all of one dtype", each.name);
    status = check_dense(op, each.name, each.t, 3, scales_size, message);
    if (status != FASTOPS_OK) return status;
  }
  if (given(d.zeros) + given(d.mins) + given(d.column_zeros) > 1)
    REFUSE(FASTOPS_ERR_VALUE, "int4_linear: give one of zeros, mins and column_zeros");
  if (sparse && (given(d.zeros) || given(d.mins) || given(d.column_zeros)))
    REFUSE(FASTOPS_ERR_VALUE, "int4_linear: 2:4 sparse codes are symmetric: no zeros, mins or column_zeros");
  int64_t slices = 1;
  if (given(d.column_scales)) {
    slices = d.column_scales.ndim == 2 ? d.column_scales.size[0] : 0;
    if (slices < 1 || (slices > 1 && (N % slices != 0 || N / slices % kInt4Block != 0)))
      REFUSE(FASTOPS_ERR_VALUE,
             "int4_linear: column_scales have %lld slices, must be 1 or divide N = %lld into "
             "multiples of %d",
             Int{slices}, Int{N}, kInt4Block);
  } else if (given(d.column_zeros)) {
    REFUSE(FASTOPS_ERR_VALUE, "int4_linear: column_zeros need column_scales");
  }
  const int64_t columns_size[2] = {slices, K};
  for (const fastops_tensor* t : {&d.column_scales, &d.column_zeros}) {
    if (!given(*t)) continue;
    const char* name = t == &d.column_scales ? "column_scales" : "column_zeros";
    if (t->dtype != FASTOPS_F32) REFUSE(FASTOPS_ERR_TYPE, "int4_linear: %s must be float32", name);
    status = check_dense(op, name, *t, 2, columns_size, message);
    if (status != FASTOPS_OK) return status;
  }
  if (given(d.perm)) {
    if (d.perm.dtype != FASTOPS_I32) REFUSE(FASTOPS_ERR_TYPE, "int4_linear: perm must be int32");
    status = check_dense(op, "perm", d.perm, 1, &K, message);
    if (status != FASTOPS_OK) return status;
    for (int64_t k = 0; k < K; ++k) {
      const int32_t at = static_cast<const int32_t*>(d.perm.data)[k];
      if (at < 0 || at >= features)
        REFUSE(FASTOPS_ERR_VALUE, "int4_linear: perm[%lld] is %d, must be from 0 to %lld", Int{k}, at,
               Int{features - 1});
    }
  }
  if (d.eight != 0 &&
      (planes != 2 || sparse || given(d.zeros) || given(d.mins) || given(d.perm) || given(d.column_scales)))
    REFUSE(FASTOPS_ERR_VALUE,
           "int4_linear: eight needs two planes (there are %lld), no zeros, mins, perm, column_scales or sparsity",
           Int{planes});
  if (given(d.bias)) {
    if (d.bias.dtype != FASTOPS_F32) REFUSE(FASTOPS_ERR_TYPE, "int4_linear: bias must be float32");
    status = check_dense(op, "bias", d.bias, 1, &N, message);
    if (status != FASTOPS_OK) return status;
  }
  *p = Int4Params{};
  p->M = M;
  p->N = N;
  p->K = K;
  p->features = features;
  p->groups = groups;
  p->group = K / groups;
  p->x = static_cast<const char*>(d.x.data);
  p->x_sm = d.x.stride[0];
  p->dtype = d.x.dtype;
  p->out = static_cast<char*>(d.out.data);
  p->out_sm = d.out.stride[0];
  p->out_dtype = d.out.dtype;
  p->codes = static_cast<const uint8_t*>(d.codes.data);
  p->word_bytes = sparse ? kInt4Word24 : kInt4Word;
  p->slices = slices;
  p->column_scales = static_cast<const float*>(d.column_scales.data);
  p->column_zeros = static_cast<const float*>(d.column_zeros.data);
  p->scales = static_cast<const char*>(d.scales.data);
  p->zeros = static_cast<const char*>(d.zeros.data);
  p->mins = static_cast<const char*>(d.mins.data);
  p->scale_dtype = d.scales.dtype;
  p->perm = static_cast<const int32_t*>(d.perm.data);
  p->bias = static_cast<const float*>(d.bias.data);
  p->int8 = d.activations == FASTOPS_ACTIVATIONS_INT8;
  p->rounded = d.activations == FASTOPS_ACTIVATIONS_BF16;
  p->eight = d.eight != 0;
  p->many = M > kInt4FewRows;
  p->wide = M >= kInt4ManyRows;
  return FASTOPS_OK;
}

int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t block_rows(int64_t rows) { return rows < kInt4RowBlock ? rows : kInt4RowBlock; }
// Slices of the output whose rows of x are prepared together: each has its own, scaled by its columns.
int64_t slices_at_once(const Int4Params& p) {
  const int64_t room = kInt4RowBlock / (p.M < 1 ? 1 : block_rows(p.M));
  return p.slices < room ? p.slices : room;
}
// What slice `slice` reads and writes; its prepared rows stand at `place`.
Int4Params slice_of(const Int4Params& p, int64_t slice, int64_t place) {
  Int4Params q = p;
  if (p.slices == 1) return q;
  q.N = p.N / p.slices;
  const int64_t n = slice * q.N, block = n / kInt4Block, numbers = block * p.groups * kInt4Block;
  const int64_t bytes = numbers * size_of(p.scale_dtype);
  q.codes += block * (p.K / 8) * p.word_bytes;
  q.scales += bytes;
  if (q.zeros) q.zeros += bytes;
  if (q.mins) q.mins += bytes;
  q.column_scales += slice * p.K;
  if (q.column_zeros) q.column_zeros += slice * p.K;
  if (q.bias) q.bias += n;
  q.out += n * size_of(p.out_dtype);
  q.a += place * p.M * p.a_row;
  q.sums += place * p.M * p.groups;
  q.row_scale += place * p.M;
  return q;
}

// Into how many parts few rows cut K where the blocks of outputs are too few for the machine's cores: a function of
// the shape and of these, so that results are the same on any number of threads.
int64_t parts_of(const Int4Params& p) {
  const int64_t cores = plan_cores(), blocks = ceil_div(p.N, kInt4Block), most = p.K / 8 / kInt4Part;
  if (p.M > kInt4StreamRows || p.slices > 1 || blocks < 1 || blocks >= cores || most < 2) return 1;
  const int64_t wish = ceil_div(cores, blocks);
  return wish < most ? wish : most;
}
// Into how many chunks of eight rows and more M rows are cut, so that `workers` are done soonest with the chunks of
// `items` items: expanding a panel takes as long as about ten rows. (What is computed stays the same.)
int64_t chunks_of(int64_t M, int64_t items, int64_t workers) {
  int64_t best = 1, soonest = ceil_div(items, workers) * (M + 10);
  for (int64_t n = 2; n <= M / 8 && n <= workers; ++n) {
    const int64_t time = ceil_div(items * n, workers) * (ceil_div(M, n) + 10);
    if (time < soonest) {
      best = n;
      soonest = time;
    }
  }
  return best;
}
// Rows [row, row + n) of p.
Int4Params rows_of(const Int4Params& p, int64_t row, int64_t n) {
  Int4Params q = p;
  q.M = n;
  q.x += row * p.x_sm * size_of(p.dtype);
  q.out += row * p.out_sm * size_of(p.out_dtype);
  q.a += row * p.a_row;
  q.sums += row * p.groups;
  q.row_scale += row;
  return q;
}

struct Layout {
  int64_t a = 0, sums, row_scale, partial, scratch, scratch_bytes, total;
  Layout(const Int4Params& p, const Int4Table& table, int workers, int64_t parts) {
    const int64_t rows = block_rows(p.M) * slices_at_once(p);
    sums = align64(table.row_bytes(p) * (rows + table.rows_read - 1)) + 64;
    row_scale = sums + align64(p.summed() ? rows * p.groups * 4 : 0);
    partial = row_scale + align64(p.int8 ? rows * 4 : 0);
    scratch = partial + (parts > 1 ? parts * p.M * ceil_div(p.N, kInt4Block) * kInt4Block * 4 : 0);
    scratch_bytes = align64(int4_scratch(block_rows(p.M), p.N) * 4);
    total = scratch + scratch_bytes * workers;
  }
};

}  // namespace
}  // namespace fastops::cpu

using namespace fastops;
using namespace fastops::cpu;

extern "C" fastops_status fastops_int4_pack(const fastops_tensor* codes, const fastops_tensor* packed, char* message) {
  const char* op = "int4_pack";
  if (codes->dtype != FASTOPS_U8 || packed->dtype != FASTOPS_U8)
    REFUSE(FASTOPS_ERR_TYPE, "int4_pack: codes and packed must be uint8");
  if (codes->ndim != 2 || codes->size[1] % 4 != 0 || codes->size[0] < 0)
    REFUSE(FASTOPS_ERR_VALUE, "int4_pack: codes must be [N, K / 2] with K a multiple of 8");
  const int64_t N = codes->size[0], words = codes->size[1] / 4;
  fastops_status status = check_dense(op, "codes", *codes, 2, codes->size, message);
  const int64_t size[4] = {(N + kInt4Block - 1) / kInt4Block, words, kInt4Block, 4};
  if (status == FASTOPS_OK) status = check_dense(op, "packed", *packed, 4, size, message);
  if (status != FASTOPS_OK) return status;
  const auto* from = static_cast<const uint8_t*>(codes->data);
  auto* to = static_cast<uint8_t*>(packed->data);
  for (int64_t block = 0; block < size[0]; ++block)
    for (int64_t w = 0; w < words; ++w)
      for (int64_t lane = 0; lane < kInt4Block; ++lane, to += 4) {
        const int64_t n = block * kInt4Block + lane;
        uint8_t four[4] = {0x88, 0x88, 0x88, 0x88};  // features behind the last one: zero weights
        if (n < N) std::memcpy(four, from + (n * words + w) * 4, 4);
        for (int b = 0; b < 4; ++b) {  // features b and 4 + b of eight
          const int low = four[b / 2] >> (b % 2 * 4) & 15, high = four[2 + b / 2] >> (b % 2 * 4) & 15;
          to[b] = static_cast<uint8_t>(low | high << 4);
        }
      }
  return FASTOPS_OK;
}

extern "C" fastops_status fastops_int4_pack24(const fastops_tensor* codes, const fastops_tensor* kept,
                                              const fastops_tensor* packed, char* message) {
  const char* op = "int4_pack24";
  for (const fastops_tensor* t : {codes, kept, packed})
    if (t->dtype != FASTOPS_U8) REFUSE(FASTOPS_ERR_TYPE, "int4_pack24: codes, kept and packed must be uint8");
  if (codes->ndim != 2 || codes->size[1] % 2 != 0 || codes->size[0] < 0)
    REFUSE(FASTOPS_ERR_VALUE, "int4_pack24: codes must be [N, K / 4] with K a multiple of 8");
  const int64_t N = codes->size[0], words = codes->size[1] / 2, kept_size[2] = {N, words};
  const int64_t size[4] = {(N + kInt4Block - 1) / kInt4Block, words, kInt4Block, 3};
  fastops_status status = check_dense(op, "codes", *codes, 2, codes->size, message);
  if (status == FASTOPS_OK) status = check_dense(op, "kept", *kept, 2, kept_size, message);
  if (status == FASTOPS_OK) status = check_dense(op, "packed", *packed, 4, size, message);
  if (status != FASTOPS_OK) return status;
  const auto *from = static_cast<const uint8_t*>(codes->data), *places = static_cast<const uint8_t*>(kept->data);
  auto* to = static_cast<uint8_t*>(packed->data);
  for (int64_t block = 0; block < size[0]; ++block)
    for (int64_t w = 0; w < words; ++w, to += kInt4Word24)
      for (int64_t lane = 0; lane < kInt4Block; ++lane) {
        const int64_t n = block * kInt4Block + lane, at = n * words + w;
        for (int b = 0; b < 2; ++b) to[2 * lane + b] = n < N ? from[2 * at + b] ^ 0x88 : 0;
        to[2 * kInt4Block + lane] = n < N ? places[at] : 0x44;
      }
  return FASTOPS_OK;
}

extern "C" fastops_status fastops_int4_linear_check(const fastops_int4_linear_desc* desc, char* message) {
  Int4Params p;
  return check(*desc, &p, message);
}

extern "C" fastops_status fastops_int4_linear_workspace(const fastops_int4_linear_desc* desc, const fastops_env* env,
                                                        size_t* bytes) {
  Int4Params p;
  const fastops_status status = check(*desc, &p, env ? env->message : nullptr);
  if (status == FASTOPS_OK)
    *bytes = static_cast<size_t>(
        Layout(p, FASTOPS_CHOOSE_ANY(Int4Table, int4_table).table, linear_workers(env, p.N, p.K), parts_of(p)).total);
  return status;
}

extern "C" fastops_status fastops_int4_linear(const fastops_int4_linear_desc* desc, fastops_env* env) {
  Int4Params p;
  const fastops_status status = check(*desc, &p, env->message);
  if (status != FASTOPS_OK) return status;
  const char* refusal = isa_refusal();
  if (refusal == nullptr) refusal = plan_refusal();
  if (refusal != nullptr) {
    set_message(env->message, "%s", refusal);
    return FASTOPS_ERR_UNSUPPORTED;
  }
  const auto variant = FASTOPS_CHOOSE_ANY(Int4Table, int4_table);
  const int workers = linear_workers(env, p.N, p.K);
  const int64_t parts = parts_of(p);  // once: the number of cores may be set meanwhile
  const Layout at(p, variant.table, workers, parts);
  if (at.total > 0 && (static_cast<int64_t>(env->workspace_size) < at.total || env->workspace == nullptr)) {
    set_message(env->message, "int4_linear: workspace has %zu bytes, needs %lld", env->workspace_size, Int{at.total});
    return FASTOPS_ERR_WORKSPACE;
  }
  env->variant = variant.name;
  if (p.M == 0 || p.N == 0) return FASTOPS_OK;
  char* ws = static_cast<char*>(env->workspace);
  p.a_row = variant.table.row_bytes(p);
  p.a = p.a_row > 0 ? ws + at.a : nullptr;
  p.sums = reinterpret_cast<float*>(ws + at.sums);
  p.row_scale = reinterpret_cast<float*>(ws + at.row_scale);
  if (parts > 1) p.partial = reinterpret_cast<float*>(ws + at.partial);
  fastops_env inner = *env;
  inner.num_threads = workers;
  const int64_t rows = p.M, x_bytes = p.x_sm * size_of(p.dtype), out_bytes = p.out_sm * size_of(p.out_dtype);
  for (int64_t row = 0; row < rows; row += p.M, p.x += p.M * x_bytes, p.out += p.M * out_bytes) {
    p.M = block_rows(rows - row);
    p.wide = p.M >= kInt4ManyRows;
    const int64_t batch = slices_at_once(p);
    for (int64_t slice = 0; slice < p.slices; slice += batch) {
      const int64_t slices = p.slices - slice < batch ? p.slices - slice : batch;
      if (p.a || p.summed()) {
        fastops_env few = inner;
        if (p.M * slices < 8) few.num_threads = 1;
        parallel_items(few, p.M * slices,
                       [&](int64_t r, int) { variant.table.prepare(slice_of(p, slice + r / p.M, r / p.M), r % p.M); });
      }
      if (p.M <= kInt4StreamRows) {
        // Codes are best read in long runs: a few items for each worker. (What is computed stays the same.)
        const int64_t blocks = ceil_div(p.N / p.slices, kInt4Block), all = blocks * slices;
        const int64_t run = parts > 1 ? 1 : all < 8 * workers ? ceil_div(all, 2 * workers) : ceil_div(all, 8 * workers);
        const int64_t items = ceil_div(blocks, run);
        parallel_items(inner, items * slices * parts, [&](int64_t item, int) {
          const int64_t place = item / parts / items, first = item / parts % items * run;
          variant.table.stream(slice_of(p, slice + place, place), first, first + run < blocks ? first + run : blocks,
                               item % parts, parts);
        });
        if (parts > 1) variant.table.join(p, parts);
        continue;
      }
      const int64_t panels = ceil_div(p.N / p.slices, kInt4Panel), wish = int4_item_panels(p.M, p.N);
      const int64_t run = wish < panels ? wish : panels, items = ceil_div(panels, run) * slices;
      const int64_t chunks = chunks_of(p.M, items, workers);
      parallel_items(inner, items * chunks, [&](int64_t i, int worker) {
        const int64_t item = i % items, row = p.M * (i / items) / chunks, end = p.M * (i / items + 1) / chunks;
        const int64_t place = item / (items / slices), first = item % (items / slices) * run;
        variant.table.panels(rows_of(slice_of(p, slice + place, place), row, end - row), first,
                             first + run < panels ? first + run : panels,
                             reinterpret_cast<float*>(ws + at.scratch + worker * at.scratch_bytes));
      });
    }
  }
  return FASTOPS_OK;
}
