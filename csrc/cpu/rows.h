// How rows are shared out, and which variant takes them.
#pragma once
#include <cstdint>

#include "core/checks.h"
#include "core/isa.h"
#include "core/rows.h"
#include "fastops/fastops.h"

namespace fastops::cpu {

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

// Whether so many elements are so little work for each thread that every one has its fixed share (core/parallel.h).
inline bool is_brief(int64_t elements, const fastops_env& env) {
  return elements <= (int64_t{1} << 17) * env.num_threads;
}

// Threads for a product with an [N, K] weight.
inline int linear_workers(const fastops_env* env, int64_t N, int64_t K) {
  constexpr int64_t kSerialWork = 100000;  // weights under which waking a thread costs more than it saves
  if (env == nullptr || env->parallel_for == nullptr || env->num_threads <= 1 || N * K < kSerialWork) return 1;
  return env->num_threads;
}

// The best variant with code of its own, for operators that have scalar, AVX2, AVX-512 and AVX-512 BF16 code: that of
// avx512 serves avx512_vnni, too.
template <class Table>
struct Variant {
  const Table& table;
  const char* name;
};
#if defined(__x86_64__)
#define FASTOPS_CHOOSE(Table, table)                                                                 \
  (active_isa() >= Isa::avx512_bf16 ? Variant<Table>{avx512_bf16::table, isa_name(Isa::avx512_bf16)} \
   : active_isa() >= Isa::avx512    ? Variant<Table>{avx512::table, isa_name(Isa::avx512)}           \
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
// The same for operators that have code for every variant.
#define FASTOPS_CHOOSE_ANY(Table, table)                                                               \
  (active_isa() == Isa::amx           ? Variant<Table>{amx::table, isa_name(Isa::amx)}                 \
   : active_isa() == Isa::amx_emu     ? Variant<Table>{amx_emu::table, isa_name(Isa::amx_emu)}         \
   : active_isa() == Isa::avx512_vnni ? Variant<Table>{avx512_vnni::table, isa_name(Isa::avx512_vnni)} \
                                      : FASTOPS_CHOOSE(Table, table))
#define FASTOPS_DECLARE_ANY_TABLES(Table, table) \
  FASTOPS_DECLARE_TABLES(Table, table)           \
  namespace avx512_vnni {                        \
  extern const Table table;                      \
  }                                              \
  namespace amx {                                \
  extern const Table table;                      \
  }                                              \
  namespace amx_emu {                            \
  extern const Table table;                      \
  }
#else
#define FASTOPS_CHOOSE_ANY(Table, table) FASTOPS_CHOOSE(Table, table)
#define FASTOPS_DECLARE_ANY_TABLES(Table, table) FASTOPS_DECLARE_TABLES(Table, table)
#define FASTOPS_CHOOSE(Table, table) (Variant<Table>{scalar::table, isa_name(Isa::scalar)})
#define FASTOPS_DECLARE_TABLES(Table, table) \
  namespace scalar {                         \
  extern const Table table;                  \
  }
#endif

}  // namespace fastops::cpu
