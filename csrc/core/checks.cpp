#include "core/checks.h"

#include <cstdarg>
#include <cstdio>

#include "core/isa.h"

namespace fastops {
namespace {

const char* list(char (&buffer)[160], const int64_t* sizes, int n) {
  int at = std::snprintf(buffer, sizeof buffer, "[");
  for (int i = 0; i < n && at < 140; ++i)
    at += std::snprintf(buffer + at, sizeof buffer - static_cast<size_t>(at), i ? ", %lld" : "%lld",
                        static_cast<long long>(sizes[i]));
  std::snprintf(buffer + at, sizeof buffer - static_cast<size_t>(at), "]");
  return buffer;
}

}  // namespace

bool Checks::fail(fastops_status status, const char* format, ...) {
  if (status_ != FASTOPS_OK) return false;
  status_ = status;
  char text[FASTOPS_MESSAGE_SIZE];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  set_message(message_, "%s: %s", op_, text);
  return false;
}

bool Checks::can_run() {
  const char* refusal = isa_refusal();
  return refusal == nullptr || fail(FASTOPS_ERR_UNSUPPORTED, "%s", refusal);
}

bool Checks::struct_size(uint32_t got, size_t want) {
  return got == want || fail(FASTOPS_ERR_VALUE, "struct_size is %u, this library knows %zu", got, want);
}

bool Checks::well_formed(const char* name, const fastops_tensor& t, bool dense) {
  if (t.ndim < 1 || t.ndim > FASTOPS_MAX_DIMS)
    return fail(FASTOPS_ERR_VALUE, "%s has %d dimensions, allowed: 1 to %d", name, t.ndim, FASTOPS_MAX_DIMS);
  bool empty = false;
  int64_t all = 8;  // bytes, at most
  for (int i = 0; i < t.ndim; ++i) {
    if (t.size[i] < 0) return fail(FASTOPS_ERR_VALUE, "%s has a negative size", name);
    empty = empty || t.size[i] == 0;
    if (__builtin_mul_overflow(all, t.size[i] > 0 ? t.size[i] : 1, &all))
      return fail(FASTOPS_ERR_VALUE, "%s has more elements than memory can hold", name);
  }
  if (dense && !empty && last(t) > 1 && t.stride[t.ndim - 1] != 1)
    return fail(FASTOPS_ERR_VALUE, "the last dimension of %s must be contiguous (stride 1), got stride %lld", name,
                static_cast<long long>(t.stride[t.ndim - 1]));
  return empty || t.data != nullptr || fail(FASTOPS_ERR_VALUE, "%s has no data", name);
}

bool Checks::floats(const char* name, const fastops_tensor& t) {
  if (!is_float(t.dtype)) return fail(FASTOPS_ERR_TYPE, "%s must be float32, float16 or bfloat16", name);
  return well_formed(name, t);
}

bool Checks::same_dtype(const char* name, const fastops_tensor& t, const char* like, const fastops_tensor& x) {
  return t.dtype == x.dtype || fail(FASTOPS_ERR_TYPE, "%s differs from %s in dtype", name, like);
}

bool Checks::dtype_or_f32(const char* name, const fastops_tensor& t, const char* like, const fastops_tensor& x) {
  return t.dtype == x.dtype || t.dtype == FASTOPS_F32 ||
         fail(FASTOPS_ERR_TYPE, "%s must have %s's dtype or be float32", name, like);
}

bool Checks::same_shape(const char* name, const fastops_tensor& t, const char* like, const fastops_tensor& x) {
  bool same = t.ndim == x.ndim;
  for (int i = 0; same && i < x.ndim; ++i) same = t.size[i] == x.size[i];
  if (same) return true;
  char a[160], b[160];
  return fail(FASTOPS_ERR_VALUE, "%s has shape %s, %s %s; they must agree", name, list(a, t.size, t.ndim), like,
              list(b, x.size, x.ndim));
}

bool Checks::sizes(const char* name, const fastops_tensor& t, int ndim, const int64_t* want) {
  bool same = t.ndim == ndim;
  for (int i = 0; same && i < ndim; ++i) same = t.size[i] == want[i];
  if (same) return true;
  char a[160], b[160];
  return fail(FASTOPS_ERR_VALUE, "%s has shape %s, must be %s", name, list(a, t.size, t.ndim), list(b, want, ndim));
}

bool Checks::per_row(const char* name, const fastops_tensor& t, const fastops_tensor& x) {
  if (t.dtype != FASTOPS_F32) return fail(FASTOPS_ERR_TYPE, "%s must be float32", name);
  if (t.ndim > 0 && !well_formed(name, t)) return false;
  int64_t rows = 1;
  for (int i = 0; i + 1 < x.ndim; ++i) rows *= x.size[i];
  if (elements(t) != rows || (rows > 0 && t.data == nullptr))
    return fail(FASTOPS_ERR_VALUE, "%s must have one element for each of %lld rows", name,
                static_cast<long long>(rows));
  return rows == 0 || contiguous(name, t);
}

bool Checks::contiguous(const char* name, const fastops_tensor& t) {
  int64_t step = 1;
  for (int i = t.ndim; i-- > 0; step *= t.size[i])
    if (t.size[i] > 1 && t.stride[i] != step) return fail(FASTOPS_ERR_VALUE, "%s must be contiguous", name);
  return true;
}

}  // namespace fastops
