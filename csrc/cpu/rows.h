// A tensor as rows: its last dimensions dense or known, everything before them counted by one number.
#pragma once
#include <cstdint>

#include "core/checks.h"
#include "core/isa.h"
#include "fastops/fastops.h"

namespace fastops::cpu {

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
  char* at(int64_t row) const {
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
  explicit operator bool() const { return data_ != nullptr; }

  int64_t count = 0;

 private:
  char* data_ = nullptr;
  int dims_ = 0;
  int64_t size_[FASTOPS_MAX_DIMS] = {};
  int64_t stride_[FASTOPS_MAX_DIMS] = {};  // in bytes
};

// Results of at least this size are written past the caches, where the instruction set can: reading their lines first
// would cost a third of the traffic, and they would push out everything else (docs/design/005-fused.md).
constexpr int64_t kStreamBytes = 16 << 20;

// How many of `rows` rows of `work` elements make an item: some microseconds at most, so that threads end together, and
// not so little that handing it out would show.
inline int64_t rows_per_item(int64_t rows, int64_t work, const fastops_env& env) {
  constexpr int64_t kMost = 65536, kLeast = 4096;
  int64_t per = rows / (2 * (env.num_threads > 1 ? env.num_threads : 1));
  if (per * work > kMost) per = kMost / work;
  if (per * work < kLeast) per = kLeast / (work > 0 ? work : 1);
  return per > 1 ? per : 1;
}

// The best variant with code of its own, for operators that have scalar, AVX2, AVX-512 and AVX-512 BF16 code.
template <class Table>
struct Variant {
  const Table& table;
  const char* name;
};
#if defined(__x86_64__)
#define FASTOPS_CHOOSE(Table, table)                                                                 \
  (active_isa() >= Isa::avx512_bf16 ? Variant<Table>{avx512_bf16::table, isa_name(Isa::avx512_bf16)} \
   : active_isa() == Isa::avx512    ? Variant<Table>{avx512::table, isa_name(Isa::avx512)}           \
   : active_isa() == Isa::avx2      ? Variant<Table>{avx2::table, isa_name(Isa::avx2)}               \
                                    : Variant<Table>{scalar::table, isa_name(Isa::scalar)})
#define FASTOPS_DECLARE_TABLES(Table, table) \
  namespace scalar {                         \
  extern const Table table;                  \
  }                                          \
  namespace avx2 {                           \
  extern const Table table;                  \
  }                                          \
  namespace avx512 {                         \
  extern const Table table;                  \
  }                                          \
  namespace avx512_bf16 {                    \
  extern const Table table;                  \
  }
#else
#define FASTOPS_CHOOSE(Table, table) (Variant<Table>{scalar::table, isa_name(Isa::scalar)})
#define FASTOPS_DECLARE_TABLES(Table, table) \
  namespace scalar {                         \
  extern const Table table;                  \
  }
#endif

}  // namespace fastops::cpu
