// The scale_add C API on the CPU: check, reduce to dense rows, share the rows out.
#include "cpu/scale_add/scale_add.h"

#include "core/isa.h"
#include "core/parallel.h"
#include "core/status.h"
#include "fastops/fastops.h"

namespace fastops::cpu {
namespace {

constexpr int64_t kItemSize = 32768;  // elements: some microseconds of work, so that handing out items costs nothing

// The best variant with its own code here: what is good for AVX-512 is good for everything above it.
struct Variant {
  const ScaleAddTable& table;
  Isa isa;
};
Variant choose(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return {avx512::scale_add_table, Isa::avx512};
  if (isa == Isa::avx2) return {avx2::scale_add_table, Isa::avx2};
#endif
  (void)isa;
  return {scalar::scale_add_table, Isa::scalar};
}

#define REFUSE(status, ...)            \
  do {                                 \
    set_message(message, __VA_ARGS__); \
    return status;                     \
  } while (0)

fastops_status check_one(const char* name, const fastops_tensor& t, const fastops_tensor& x, char* message) {
  if (t.ndim < 0 || t.ndim > FASTOPS_MAX_DIMS)
    REFUSE(FASTOPS_ERR_VALUE, "scale_add: %s has %d dimensions, allowed: 0 to %d", name, t.ndim, FASTOPS_MAX_DIMS);
  if (t.dtype != FASTOPS_F32 && t.dtype != FASTOPS_F16 && t.dtype != FASTOPS_BF16)
    REFUSE(FASTOPS_ERR_TYPE, "scale_add: %s must be float32, float16 or bfloat16", name);
  if (t.dtype != x.dtype) REFUSE(FASTOPS_ERR_TYPE, "scale_add: %s differs from x in dtype", name);
  if (t.ndim != x.ndim)
    REFUSE(FASTOPS_ERR_VALUE, "scale_add: %s has %d dimensions, x has %d; they must agree", name, t.ndim, x.ndim);
  bool empty = false;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.size[i] < 0 || t.size[i] != x.size[i])
      REFUSE(FASTOPS_ERR_VALUE, "scale_add: %s has size %lld in dimension %d, x has %lld; they must agree", name,
             static_cast<long long>(t.size[i]), i, static_cast<long long>(x.size[i]));
    empty = empty || t.size[i] == 0;
  }
  if (t.ndim > 0 && !empty && t.size[t.ndim - 1] > 1 && t.stride[t.ndim - 1] != 1)
    REFUSE(FASTOPS_ERR_VALUE, "scale_add: the last dimension of %s must be contiguous (stride 1), got stride %lld",
           name, static_cast<long long>(t.stride[t.ndim - 1]));
  if (t.data == nullptr && !empty) REFUSE(FASTOPS_ERR_VALUE, "scale_add: %s has no data", name);
  return FASTOPS_OK;
}

fastops_status check(const fastops_scale_add_desc& d, char* message) {
  if (d.struct_size != sizeof d)
    REFUSE(FASTOPS_ERR_VALUE, "scale_add: struct_size is %u, this library knows %zu", d.struct_size, sizeof d);
  fastops_status status = check_one("x", d.x, d.x, message);
  if (status == FASTOPS_OK) status = check_one("y", d.y, d.x, message);
  if (status == FASTOPS_OK) status = check_one("out", d.out, d.x, message);
  return status;
}
#undef REFUSE

// x, y and out as rows of `columns` dense elements; dimensions that lie dense behind one another in all three are one.
struct Rows {
  const fastops_tensor* tensors[3];
  int leading;  // dimensions that count rows
  int64_t count = 1, columns = 1;

  explicit Rows(const fastops_scale_add_desc& d) : tensors{&d.x, &d.y, &d.out}, leading(d.x.ndim) {
    while (leading > 0 && dense(leading - 1)) columns *= d.x.size[--leading];
    for (int i = 0; i < leading; ++i) count *= d.x.size[i];
  }
  bool dense(int dim) const {
    if (tensors[0]->size[dim] == 1) return true;
    for (const fastops_tensor* t : tensors)
      if (t->stride[dim] != columns) return false;
    return true;
  }
  int64_t offset(int tensor, int64_t row) const {
    const fastops_tensor& t = *tensors[tensor];
    int64_t at = 0;
    for (int i = leading - 1; i >= 0; --i) {
      at += row % t.size[i] * t.stride[i];
      row /= t.size[i];
    }
    return at;
  }
};

}  // namespace
}  // namespace fastops::cpu

using namespace fastops;
using namespace fastops::cpu;

extern "C" fastops_status fastops_scale_add_check(const fastops_scale_add_desc* desc, char* message) {
  return check(*desc, message);
}

extern "C" fastops_status fastops_scale_add(const fastops_scale_add_desc* desc, fastops_env* env) {
  const fastops_scale_add_desc& d = *desc;
  const fastops_status status = check(d, env->message);
  if (status != FASTOPS_OK) return status;
  if (const char* refusal = isa_refusal()) {
    set_message(env->message, "%s", refusal);
    return FASTOPS_ERR_UNSUPPORTED;
  }
  const Variant variant = choose(active_isa());
  env->variant = isa_name(variant.isa);
  const Rows rows(d);
  if (rows.count == 0 || rows.columns == 0) return FASTOPS_OK;
  // An item is a piece of one long row, or several short rows.
  const int64_t rows_per_item = rows.columns < kItemSize ? kItemSize / rows.columns : 1;
  const int64_t pieces = (rows.columns + kItemSize - 1) / kItemSize;
  const int64_t items = (rows.count + rows_per_item - 1) / rows_per_item * pieces;
  const int64_t esize = d.x.dtype == FASTOPS_F32 ? 4 : 2;
  parallel_items(*env, items, [&](int64_t item, int) {
    const int64_t first = item / pieces * rows_per_item, begin = item % pieces * kItemSize;
    const int64_t last = first + rows_per_item < rows.count ? first + rows_per_item : rows.count;
    const int64_t n = rows.columns - begin < kItemSize ? rows.columns - begin : kItemSize;
    for (int64_t row = first; row < last; ++row) {
      const auto at = [&](int tensor) {
        return static_cast<char*>(rows.tensors[tensor]->data) + (rows.offset(tensor, row) + begin) * esize;
      };
      variant.table.run(at(0), at(1), at(2), n, d.alpha, d.x.dtype);
    }
  });
  return FASTOPS_OK;
}
