// A tensor as rows: its last dimensions dense or known, everything before them counted by one number.
#pragma once
#include <cstdint>

#include "core/checks.h"
#include "core/dtype.h"
#include "fastops/fastops.h"

namespace fastops {

class Rows {
 public:
  Rows() = default;
  // Over all but the last `trailing` dimensions; an absent tensor has no rows.
  explicit Rows(const fastops_tensor& t, int trailing = 1) : data_(static_cast<char*>(t.data)) {
    count = given(t) ? 1 : 0;
    for (int i = 0; i + trailing < t.ndim; ++i) {
      count *= t.size[i];
      if (t.size[i] == 1) continue;
      const int64_t stride = t.stride[i] * size_of(t.dtype);
      if (dims_ > 0 && stride_[dims_ - 1] == stride * t.size[i]) {  // dense behind the one before: one dimension
        size_[dims_ - 1] *= t.size[i];
        stride_[dims_ - 1] = stride;
      } else {
        size_[dims_] = t.size[i];
        stride_[dims_++] = stride;
      }
    }
  }
  FASTOPS_SHARED char* at(int64_t row) const {
    if (dims_ <= 1) return data_ + row * stride_[0];
    int64_t offset = 0;
    for (int i = dims_ - 1; i > 0; --i) {
      offset += row % size_[i] * stride_[i];
      row /= size_[i];
    }
    return data_ + offset + row * stride_[0];
  }
  // Whether every row begins at a multiple of `bytes`.
  bool aligned(uintptr_t bytes) const {
    if (reinterpret_cast<uintptr_t>(data_) % bytes != 0) return false;
    for (int i = 0; i < dims_; ++i)
      if (stride_[i] % static_cast<int64_t>(bytes) != 0) return false;
    return true;
  }
  FASTOPS_SHARED explicit operator bool() const { return data_ != nullptr; }

  int64_t count = 0;

 private:
  char* data_ = nullptr;
  int dims_ = 0;
  int64_t size_[FASTOPS_MAX_DIMS] = {};
  int64_t stride_[FASTOPS_MAX_DIMS] = {};  // in bytes
};

}  // namespace fastops
