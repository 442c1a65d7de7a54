// What scale_add's C API (scale_add.cpp) and its kernels (scale_add.inl.h, once per instruction set) agree on.
#pragma once
#include <cstdint>

namespace fastops::cpu {

struct ScaleAddTable {
  // out[0, n) = alpha * x[0, n) + y[0, n), dense, `dtype` one of fastops_dtype's floats.
  void (*run)(const char* x, const char* y, char* out, int64_t n, float alpha, int32_t dtype);
};

namespace scalar {
extern const ScaleAddTable scale_add_table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const ScaleAddTable scale_add_table;
}
namespace avx512 {
extern const ScaleAddTable scale_add_table;
}
#endif

}  // namespace fastops::cpu
