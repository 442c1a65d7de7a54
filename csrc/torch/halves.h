// The two halves of the last dimension, for gate and up in one tensor.
#pragma once
#include "fastops/fastops.h"

namespace fastops::binding {

// False where the last dimension is odd. Of x's dtype only the width matters: 4 bytes or 2.
inline bool halve(fastops_tensor* first, fastops_tensor* second) {
  const int64_t n = first->ndim > 0 ? first->size[first->ndim - 1] : 1;
  if (n % 2 != 0) return false;
  if (first->ndim > 0) first->size[first->ndim - 1] = n / 2;
  *second = *first;
  const int64_t width = first->dtype == FASTOPS_F32 ? 4 : 2;
  if (first->data != nullptr) second->data = static_cast<char*>(first->data) + n / 2 * width;
  return true;
}

}  // namespace fastops::binding
