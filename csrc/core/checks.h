// What every operator asks of its tensors, in one phrasing.
#pragma once
#include <cstdint>

#include "core/status.h"
#include "fastops/fastops.h"

namespace fastops {

inline bool is_float(int32_t dtype) { return dtype == FASTOPS_F32 || dtype == FASTOPS_F16 || dtype == FASTOPS_BF16; }
inline int64_t size_of(int32_t dtype) {
  return dtype == FASTOPS_F32 || dtype == FASTOPS_I32   ? 4
         : dtype == FASTOPS_I64 || dtype == FASTOPS_F64 ? 8
         : dtype == FASTOPS_BOOL || dtype >= FASTOPS_U8 ? 1
                                                        : 2;
}
inline bool given(const fastops_tensor& t) { return t.ndim > 0 || t.data != nullptr; }
inline int64_t last(const fastops_tensor& t) { return t.size[t.ndim - 1]; }
inline int64_t elements(const fastops_tensor& t) {
  int64_t n = 1;
  for (int i = 0; i < t.ndim; ++i) n *= t.size[i];
  return n;
}

// Each question returns whether the answer is yes; the first no writes the message and the status.
class Checks {
 public:
  Checks(const char* op, char* message) : op_(op), message_(message) {}
  fastops_status status() const { return status_; }

  bool fail(fastops_status status, const char* format, ...) __attribute__((format(printf, 3, 4)));
  bool can_run();  // no: the instruction set that was asked for cannot be had
  bool struct_size(uint32_t got, size_t want);
  // 1 to 5 sizes that are not negative, data where there are elements; with `dense`, a dense last dimension.
  bool well_formed(const char* name, const fastops_tensor& t, bool dense = true);
  bool floats(const char* name, const fastops_tensor& t);  // well formed; fp32, fp16 or bf16
  bool same_dtype(const char* name, const fastops_tensor& t, const char* like, const fastops_tensor& x);
  // x's dtype or fp32
  bool dtype_or_f32(const char* name, const fastops_tensor& t, const char* like, const fastops_tensor& x);
  bool same_shape(const char* name, const fastops_tensor& t, const char* like, const fastops_tensor& x);
  bool sizes(const char* name, const fastops_tensor& t, int ndim, const int64_t* want);  // of any strides
  bool shape(const char* name, const fastops_tensor& t, int ndim, const int64_t* want) {
    return sizes(name, t, ndim, want) && well_formed(name, t);
  }
  bool vector(const char* name, const fastops_tensor& t, int64_t n) { return shape(name, t, 1, &n); }
  bool contiguous(const char* name, const fastops_tensor& t);
  // Contiguous fp32 with one element for each row of x.
  bool per_row(const char* name, const fastops_tensor& t, const fastops_tensor& x);

 private:
  const char* op_;
  char* message_;
  fastops_status status_ = FASTOPS_OK;
};

}  // namespace fastops
