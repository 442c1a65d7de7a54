// Random descriptors at the C API. Each starts as a valid call and has a few fields replaced by odd values. Whatever
// comes: no crash, a known status, a sentence with every refusal; and a call that check() accepts and whose memory is
// really there runs, stays inside its tensors (they end at unreadable pages) and gives the same bits on 1 and 3
// threads.
//   fuzz SEED COUNT     deterministic; prints the seed of the descriptor under test when something is wrong
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "fastops/fastops.h"

namespace {

uint64_t g_seed = 0;
#define REQUIRE(condition, ...)                                                                     \
  do {                                                                                              \
    if (!(condition)) {                                                                             \
      std::fprintf(stderr, "seed %llu: " #condition ": ", static_cast<unsigned long long>(g_seed)); \
      std::fprintf(stderr, __VA_ARGS__);                                                            \
      std::fprintf(stderr, "\n");                                                                   \
      std::exit(1);                                                                                 \
    }                                                                                               \
  } while (0)

struct Random {
  std::mt19937_64 engine;
  int64_t below(int64_t n) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(n)); }
  bool one_in(int64_t n) { return below(n) == 0; }
  int64_t pick(std::initializer_list<int64_t> from) { return from.begin()[below(static_cast<int64_t>(from.size()))]; }
};

// Memory between unreadable pages, handed out from the end so that one step too far is a crash.
class Region {
 public:
  static constexpr int64_t kSize = 1 << 20;
  Region() {
    const long page = sysconf(_SC_PAGESIZE);
    char* base = static_cast<char*>(mmap(nullptr, static_cast<size_t>(kSize + 2 * page), PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    REQUIRE(base != MAP_FAILED, "mmap");
    REQUIRE(mprotect(base, static_cast<size_t>(page), PROT_NONE) == 0, "mprotect");
    REQUIRE(mprotect(base + page + kSize, static_cast<size_t>(page), PROT_NONE) == 0, "mprotect");
    begin_ = base + page;
  }
  char* last(int64_t bytes) const { return begin_ + kSize - bytes; }
  bool holds(const char* from, const char* to) const { return from >= begin_ && to <= begin_ + kSize; }

 private:
  char* begin_;
};

enum Slot { Q, K, V, OUT, LSE, CU_Q, CU_K, TABLE, LENS, BIAS, SINKS, SLOPES, SCRATCH, SLOTS };
Region& region(int slot) {
  static Region all[SLOTS];
  return all[slot];
}

int64_t bytes_of(int32_t dtype) {
  switch (dtype) {
    case FASTOPS_F16:
    case FASTOPS_BF16:
      return 2;
    case FASTOPS_BOOL:
    case FASTOPS_U8:
    case FASTOPS_I8:
    case FASTOPS_F8_E4M3:
      return 1;
    case FASTOPS_I64:
    case FASTOPS_F64:
      return 8;
    default:
      return 4;
  }
}

fastops_tensor dense(int slot, int32_t dtype, std::initializer_list<int64_t> size) {
  fastops_tensor t{};
  t.ndim = static_cast<int32_t>(size.size());
  t.dtype = dtype;
  int64_t step = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    t.size[i] = size.begin()[i];
    t.stride[i] = step;
    step *= size.begin()[i];
  }
  REQUIRE(step * bytes_of(dtype) <= Region::kSize, "base tensor too large");
  t.data = region(slot).last(step * bytes_of(dtype));
  return t;
}

// Whether every element the descriptor names lies in the slot's memory.
bool in_memory(int slot, const fastops_tensor& t) {
  if (t.ndim == 0) return true;
  __int128 low = 0, high = 0;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.size[i] == 0) return true;
    const __int128 reach = static_cast<__int128>(t.size[i] - 1) * t.stride[i];
    (reach < 0 ? low : high) += reach;
  }
  if (low < -Region::kSize || high > Region::kSize) return false;
  const char* data = static_cast<const char*>(t.data);
  const int64_t e = bytes_of(t.dtype);
  return region(slot).holds(data + static_cast<int64_t>(low) * e, data + (static_cast<int64_t>(high) + 1) * e);
}

bool overlaps_itself(const fastops_tensor& t) {  // roughly: enough to leave out results that depend on who writes last
  for (int i = 0; i < t.ndim; ++i)
    for (int j = 0; j < t.ndim; ++j)
      if (t.size[i] > 1 && (t.stride[i] == 0 ||
                            (i != j && t.size[j] > 1 && std::llabs(t.stride[i]) < t.size[j] * std::llabs(t.stride[j]) &&
                             std::llabs(t.stride[i]) >= std::llabs(t.stride[j]))))
        return true;
  return false;
}

void spoil_number(Random& r, int64_t* x, bool wild) {
  if (wild)
    *x = r.pick({-1, 0, 1, 2, 3, 7, 8, 255, 256, 257, -8, INT64_MAX, INT64_MIN, INT64_MAX / 2, int64_t{1} << 31,
                 (int64_t{1} << 32) + 1, int64_t{1} << 40, -(int64_t{1} << 40)});
  else
    *x += r.pick({-2, -1, 1, 2});
}

// Index tensors are read by check(), so what they claim must be there: only small sizes and strides.
void spoil_tensor(Random& r, fastops_tensor* t, bool is_index) {
  switch (r.below(is_index ? 4 : 6)) {
    case 0:
      t->dtype = static_cast<int32_t>(r.pick({-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1000}));
      break;
    case 1:
      t->ndim = static_cast<int32_t>(r.below(FASTOPS_MAX_DIMS + 1));
      break;
    case 2:
      *t = fastops_tensor{};
      break;
    case 3:
      if (is_index) {
        if (t->ndim > 0) t->size[0] = std::max<int64_t>(0, t->size[0] + r.pick({-1, -2}));
      } else {
        t->data = nullptr;
      }
      break;
    case 4:
      spoil_number(r, &t->size[r.below(FASTOPS_MAX_DIMS)], r.one_in(2));
      break;
    default:
      spoil_number(r, &t->stride[r.below(FASTOPS_MAX_DIMS)], r.one_in(2));
      break;
  }
}

void run_threads(void*, int64_t n, int64_t, fastops_range_fn f, void* arg) {
  std::vector<std::thread> pool;
  for (int64_t i = 1; i < n; ++i) pool.emplace_back([=] { f(arg, i, i + 1); });
  f(arg, 0, 1);
  for (std::thread& t : pool) t.join();
}

void sane(fastops_status status, const char* message) {
  REQUIRE(status >= FASTOPS_OK && status <= FASTOPS_ERR_WORKSPACE, "status %d", status);
  REQUIRE(status != FASTOPS_ERR_INTERNAL, "%s", message);
  REQUIRE(std::memchr(message, 0, FASTOPS_MESSAGE_SIZE) != nullptr, "message not ended");
  REQUIRE((status == FASTOPS_OK) == (message[0] == 0), "status %d with message '%s'", status, message);
}

int64_t work(const fastops_attention_desc& d) {
  double n = 1;
  for (const fastops_tensor* t : {&d.q, &d.k, &d.v})
    for (int i = 0; i < t->ndim; ++i) n = std::max(n, static_cast<double>(t->size[i]));
  double rows = 1;
  for (int i = 0; i < d.q.ndim; ++i) rows *= static_cast<double>(d.q.size[i]);
  double keys = d.k.ndim > 1 ? static_cast<double>(d.k.size[1]) * static_cast<double>(d.k.size[0]) : 1;
  return n > 1e5 || rows * keys > 2e7 ? INT64_MAX : 1;
}

struct Count {
  int accepted = 0, refused = 0;
} g_count;

// Runs an accepted call on 1 and 3 threads and compares `outs`' memory.
template <class Run, class Need>
void run(Run call, Need need, std::initializer_list<int> outs, bool compare) {
  std::vector<char> first;
  for (int n : {1, 3}) {
    char message[FASTOPS_MESSAGE_SIZE] = "";
    fastops_env env{};
    env.struct_size = sizeof env;
    env.num_threads = n;
    env.parallel_for = &run_threads;
    env.message = message;
    size_t bytes = 0;
    sane(need(&env, &bytes), message);
    REQUIRE(bytes <= static_cast<size_t>(Region::kSize) * 3, "workspace of %zu bytes", bytes);
    std::vector<char> large;
    if (bytes <= static_cast<size_t>(Region::kSize)) {  // ends where its last 64-byte line does
      env.workspace = region(SCRATCH).last(static_cast<int64_t>((bytes + 63) / 64 * 64));
    } else {
      large.resize(bytes + 64);
      env.workspace = large.data() + (64 - reinterpret_cast<uintptr_t>(large.data()) % 64) % 64;
    }
    env.workspace_size = bytes;
    const fastops_status status = call(&env);
    sane(status, message);
    REQUIRE(status == FASTOPS_OK, "check() accepts, the call says: %s", message);
    REQUIRE(env.variant != nullptr, "no variant");
    std::vector<char> now;
    for (int slot : outs) now.insert(now.end(), region(slot).last(Region::kSize), region(slot).last(0));
    if (n == 1) first = now;
    REQUIRE(!compare || first == now, "1 and 3 threads differ");
  }
}

void fuzz_attention(Random& r) {
  REQUIRE(fastops_cores_set(static_cast<int32_t>(r.pick({0, 1, 2, 5, 40})), nullptr) == FASTOPS_OK, "refused");
  const int32_t dtype = static_cast<int32_t>(r.pick({FASTOPS_F32, FASTOPS_F16, FASTOPS_BF16}));
  const int64_t B = 1 + r.below(3), Hkv = 1 + r.below(2), H = Hkv * (1 + r.below(4)),
                Sq = r.below(r.one_in(3) ? 40 : 4), wide = std::max<int64_t>(72 * Hkv, H * Sq),
                most = Region::kSize / 4 / B / wide - 40,  // and two pages
      Sk = r.below(r.one_in(8) ? std::min<int64_t>(900, most) : 40), D = 8 * (1 + r.below(9)),
                Dv = r.one_in(2) ? D : 8 * (1 + r.below(9));
  const int layout = static_cast<int>(r.below(3));
  fastops_attention_desc d{};
  d.struct_size = sizeof d;
  d.align = static_cast<int32_t>(r.below(2));
  d.scale = r.one_in(8) ? std::numeric_limits<float>::infinity() : 0.2f;
  d.softcap = static_cast<float>(r.pick({0, 0, 0, 5}));
  d.window_left = r.pick({-1, -1, 0, 5});
  d.window_right = r.pick({-1, 0, 3});
  auto* cu_q = reinterpret_cast<int32_t*>(region(CU_Q).last(4 * (B + 1)));
  auto* cu_k = reinterpret_cast<int32_t*>(region(CU_K).last(4 * (B + 1)));
  for (int64_t b = 0; b <= B; ++b) {
    cu_q[b] = static_cast<int32_t>(b * Sq);
    cu_k[b] = static_cast<int32_t>(b * Sk);
  }
  if (layout == 0) {
    d.q = dense(Q, dtype, {B, Sq, H, D});
    d.k = dense(K, dtype, {B, Sk, Hkv, D});
    d.v = dense(V, dtype, {B, Sk, Hkv, Dv});
    d.out = dense(OUT, dtype, {B, Sq, H, Dv});
    d.lse = dense(LSE, FASTOPS_F32, {B, H, Sq});
    if (r.one_in(3))
      d.bias = dense(BIAS, static_cast<int32_t>(r.pick({FASTOPS_F32, FASTOPS_BOOL, dtype})), {B, H, Sq, Sk});
  } else {
    d.q = dense(Q, dtype, {B * Sq, H, D});
    d.out = dense(OUT, dtype, {B * Sq, H, Dv});
    d.lse = dense(LSE, FASTOPS_F32, {H, B * Sq});
    d.cu_seqlens_q = dense(CU_Q, FASTOPS_I32, {B + 1});
    if (layout == 1) {
      d.k = dense(K, dtype, {B * Sk, Hkv, D});
      d.v = dense(V, dtype, {B * Sk, Hkv, Dv});
      d.cu_seqlens_k = dense(CU_K, FASTOPS_I32, {B + 1});
    } else {
      const int64_t page = int64_t{1} << r.below(5), pages = (Sk + page - 1) / page + 1, P = B * pages;
      d.k = dense(K, dtype, {P, page, Hkv, D});
      d.v = dense(V, dtype, {P, page, Hkv, Dv});
      d.block_table = dense(TABLE, FASTOPS_I32, {B, pages});
      d.seq_lens = dense(LENS, FASTOPS_I32, {B});
      for (int64_t i = 0; i < P; ++i) static_cast<int32_t*>(d.block_table.data)[i] = static_cast<int32_t>(r.below(P));
      for (int64_t b = 0; b < B; ++b) static_cast<int32_t*>(d.seq_lens.data)[b] = static_cast<int32_t>(Sk);
      if (r.one_in(2)) d.cu_seqlens_q = fastops_tensor{};
      if (r.one_in(6))
        static_cast<int32_t*>(d.block_table.data)[r.below(P)] =
            static_cast<int32_t>(r.pick({-1, P, INT32_MAX, INT32_MIN}));
      if (r.one_in(6))
        static_cast<int32_t*>(d.seq_lens.data)[r.below(B)] =
            static_cast<int32_t>(r.pick({-1, 0, pages * page, pages * page + 1, INT32_MAX, INT32_MIN}));
    }
  }
  if (r.one_in(8)) cu_q[r.below(B + 1)] = static_cast<int32_t>(r.pick({-1, 0, 1, 1000, INT32_MAX, INT32_MIN}));
  if (r.one_in(8)) cu_k[r.below(B + 1)] = static_cast<int32_t>(r.pick({-1, 0, 1, 1000, INT32_MAX, INT32_MIN}));
  if (r.one_in(4)) d.sinks = dense(SINKS, FASTOPS_F32, {H});
  if (r.one_in(4)) d.alibi_slopes = r.one_in(2) ? dense(SLOPES, FASTOPS_F32, {H}) : dense(SLOPES, FASTOPS_F32, {B, H});
  if (r.one_in(4)) d.lse = fastops_tensor{};

  fastops_tensor* tensors[] = {
      &d.q,           &d.k,        &d.v,    &d.out,   &d.lse,         &d.cu_seqlens_q, &d.cu_seqlens_k,
      &d.block_table, &d.seq_lens, &d.bias, &d.sinks, &d.alibi_slopes};
  for (int64_t n = r.pick({0, 1, 1, 2, 3}); n > 0; --n) {
    const int64_t which = r.below(14);
    if (which < 12)
      spoil_tensor(r, tensors[which], which >= CU_Q && which <= LENS);
    else if (which == 12)
      d.struct_size = static_cast<uint32_t>(r.pick({0, 8, sizeof d - 8, sizeof d, sizeof d + 8, -1}));
    else if (r.one_in(2))
      spoil_number(r, r.one_in(2) ? &d.window_left : &d.window_right, true);
    else
      (r.one_in(2) ? d.scale : d.softcap) = static_cast<float>(r.pick({-1, 0, 1, INT64_MAX})) *
                                            (r.one_in(2) ? 1.0f : std::numeric_limits<float>::quiet_NaN());
  }
  char message[FASTOPS_MESSAGE_SIZE] = "";
  const fastops_status status = fastops_attention_check(&d, message);
  sane(status, message);
  ++(status == FASTOPS_OK ? g_count.accepted : g_count.refused);
  if (status != FASTOPS_OK) {
    fastops_env env{};
    env.struct_size = sizeof env;
    REQUIRE(fastops_attention_fwd(&d, &env) == status, "check() and the call differ on: %s", message);
    return;
  }
  for (int i = 0; i < 12; ++i)
    if (!in_memory(i, *tensors[i])) return;
  if (work(d) == INT64_MAX) return;
  run([&](fastops_env* env) { return fastops_attention_fwd(&d, env); },
      [&](fastops_env* env, size_t* bytes) { return fastops_attention_workspace(&d, env, bytes); }, {OUT, LSE},
      !overlaps_itself(d.out) && !overlaps_itself(d.lse));
}

fastops_status no_workspace(fastops_env*, size_t*) { return FASTOPS_OK; }

void fuzz_merge_states(Random& r) {
  const int32_t dtype = static_cast<int32_t>(r.pick({FASTOPS_F32, FASTOPS_F16, FASTOPS_BF16}));
  const int64_t B = 1 + r.below(3), S = r.below(40), H = 1 + r.below(4), D = 1 + r.below(64);
  const bool four = r.one_in(2);
  const auto state = [&](int slot) { return four ? dense(slot, dtype, {B, S, H, D}) : dense(slot, dtype, {S, H, D}); };
  const auto sums = [&](int slot) {
    return four ? dense(slot, FASTOPS_F32, {B, H, S}) : dense(slot, FASTOPS_F32, {H, S});
  };
  fastops_tensor outs[] = {state(Q), state(K), state(V)}, lses[] = {sums(BIAS), sums(SINKS), sums(SLOPES)};
  fastops_merge_states_desc d{};
  d.struct_size = sizeof d;
  d.count = static_cast<int32_t>(1 + r.below(3));
  d.outs = outs;
  d.lses = lses;
  d.out = state(OUT);
  d.lse = sums(LSE);
  fastops_tensor* tensors[] = {&outs[0], &outs[1], &outs[2], &d.out, &d.lse, &lses[0], &lses[1], &lses[2]};
  const int slots[] = {Q, K, V, OUT, LSE, BIAS, SINKS, SLOPES};
  for (int64_t n = r.pick({0, 1, 1, 2}); n > 0; --n) {
    const int64_t which = r.below(9);
    if (which < 8)
      spoil_tensor(r, tensors[which], false);
    else if (r.one_in(2))
      d.count = static_cast<int32_t>(r.pick({-1, 0, INT32_MIN}));
    else
      d.struct_size = static_cast<uint32_t>(r.pick({0, sizeof d + 8}));
  }
  char message[FASTOPS_MESSAGE_SIZE] = "";
  const fastops_status status = fastops_merge_states_check(&d, message);
  sane(status, message);
  ++(status == FASTOPS_OK ? g_count.accepted : g_count.refused);
  if (status != FASTOPS_OK) return;
  for (int i = 0; i < 8; ++i) {
    const bool used = i == 3 || i == 4 || (i < 3 ? i : i - 5) < d.count;
    if (used && !in_memory(slots[i], *tensors[i])) return;
  }
  run([&](fastops_env* env) { return fastops_merge_states(&d, env); }, no_workspace, {OUT, LSE},
      !overlaps_itself(d.out) && !overlaps_itself(d.lse));
}

void fuzz_scale_add(Random& r) {
  const int32_t dtype = static_cast<int32_t>(r.pick({FASTOPS_F32, FASTOPS_F16, FASTOPS_BF16}));
  const int64_t a = r.below(9), b = r.below(9), c = r.below(300);
  fastops_scale_add_desc d{};
  d.struct_size = sizeof d;
  d.alpha = 0.5f;
  d.x = dense(Q, dtype, {a, b, c});
  d.y = dense(K, dtype, {a, b, c});
  d.out = dense(OUT, dtype, {a, b, c});
  fastops_tensor* tensors[] = {&d.x, &d.y, &d.out};
  const int slots[] = {Q, K, OUT};
  for (int64_t n = r.pick({0, 1, 1, 2}); n > 0; --n) {
    if (r.one_in(12))
      d.struct_size = static_cast<uint32_t>(r.pick({0, sizeof d + 8}));
    else
      spoil_tensor(r, tensors[r.below(3)], false);
  }
  char message[FASTOPS_MESSAGE_SIZE] = "";
  const fastops_status status = fastops_scale_add_check(&d, message);
  sane(status, message);
  ++(status == FASTOPS_OK ? g_count.accepted : g_count.refused);
  if (status != FASTOPS_OK) return;
  for (int i = 0; i < 3; ++i)
    if (!in_memory(slots[i], *tensors[i])) return;
  run([&](fastops_env* env) { return fastops_scale_add(&d, env); }, no_workspace, {OUT}, !overlaps_itself(d.out));
}

void fuzz_int4_linear(Random& r) {
  const auto floating = [&] { return static_cast<int32_t>(r.pick({FASTOPS_F32, FASTOPS_F16, FASTOPS_BF16})); };
  const int32_t dtype = floating(), scale_dtype = floating();
  const int64_t M = r.one_in(6) ? 40 + r.below(30) : r.below(12), N = r.below(100);  // as many as take other panels
  const int64_t groups = 1 + r.below(4), features = groups * 8 * (1 + r.below(6));
  const int64_t blocks = (N + 15) / 16;
  fastops_int4_linear_desc d{};
  d.struct_size = sizeof d;
  d.activations = static_cast<int32_t>(r.below(4));
  const int64_t planes = groups % 2 == 0 && features % 16 == 0 && r.one_in(3) ? 2 : 1;
  d.eight = planes == 2 ? r.one_in(2) : r.one_in(30);
  d.x = dense(Q, dtype, {M, features / planes});
  d.out = dense(OUT, r.one_in(3) ? FASTOPS_F32 : dtype, {M, N});
  d.codes = dense(K, FASTOPS_U8, {blocks, features / 8, 16, 4});
  d.scales = dense(V, scale_dtype, {blocks, groups, 16});
  if (r.one_in(3))
    d.zeros = dense(BIAS, scale_dtype, {blocks, groups, 16});
  else if (r.one_in(2))
    d.mins = dense(BIAS, scale_dtype, {blocks, groups, 16});
  if (r.one_in(3)) {
    d.perm = dense(CU_Q, FASTOPS_I32, {features});
    for (int64_t k = 0; k < features; ++k)
      static_cast<int32_t*>(d.perm.data)[k] = static_cast<int32_t>(r.below(features / planes));
    if (r.one_in(4))
      static_cast<int32_t*>(d.perm.data)[r.below(features)] =
          static_cast<int32_t>(r.pick({-1, features, INT32_MAX, INT32_MIN}));
  }
  if (r.one_in(2)) d.bias = dense(SINKS, FASTOPS_F32, {N});
  if (r.one_in(4)) d.codes = dense(K, FASTOPS_U8, {blocks, features / 8, 16, 3});
  if (r.one_in(4)) {
    const int64_t slices = r.one_in(2) && N > 0 && N % 32 == 0 ? N / 16 : r.pick({1, 1, 2});
    d.column_scales = dense(SLOPES, FASTOPS_F32, {slices, features});
    if (r.one_in(2)) d.column_zeros = dense(LSE, FASTOPS_F32, {slices, features});
  }
  fastops_tensor* tensors[] = {&d.x,    &d.out,  &d.codes, &d.scales,        &d.zeros,
                               &d.mins, &d.perm, &d.bias,  &d.column_scales, &d.column_zeros};
  const int slots[] = {Q, OUT, K, V, BIAS, BIAS, CU_Q, SINKS, SLOPES, LSE};
  for (int64_t n = r.pick({0, 1, 1, 2}); n > 0; --n) {
    const int64_t which = r.below(11);
    if (which < 10)
      spoil_tensor(r, tensors[which], which == 6);
    else
      d.struct_size = static_cast<uint32_t>(r.pick({0, sizeof d + 8}));
  }
  char message[FASTOPS_MESSAGE_SIZE] = "";
  const fastops_status status = fastops_int4_linear_check(&d, message);
  sane(status, message);
  ++(status == FASTOPS_OK ? g_count.accepted : g_count.refused);
  if (status != FASTOPS_OK) return;
  for (int i = 0; i < 10; ++i)
    if (!in_memory(slots[i], *tensors[i])) return;
  run([&](fastops_env* env) { return fastops_int4_linear(&d, env); },
      [&](fastops_env* env, size_t* bytes) { return fastops_int4_linear_workspace(&d, env, bytes); }, {OUT},
      !overlaps_itself(d.out));
}

#include "fuzz_fused.h"
#include "fuzz_kv.h"

fastops_tensor dense_view(int32_t dtype, void* data, std::initializer_list<int64_t> sizes) {
  fastops_tensor t{};
  t.data = data;
  t.dtype = dtype;
  for (int64_t n : sizes) t.size[t.ndim++] = n;
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    t.stride[i] = stride;
    stride *= t.size[i] > 0 ? t.size[i] : 1;
  }
  return t;
}

fastops_attention_desc plain_attention() {
  fastops_attention_desc d{};
  d.struct_size = sizeof d;
  d.scale = 1.0f;
  d.window_left = d.window_right = -1;
  return d;
}

// For lengths and cores of all kinds.
void bound_workspace() {
  const auto view = [](std::initializer_list<int64_t> sizes) {  // never read
    return dense_view(FASTOPS_F32, region(Q).last(64), sizes);
  };
  for (int64_t D : {8, 64, 72, 128, 136, 256})
    for (int64_t Hkv : {1, 8, 64})
      for (int64_t G : {1, 4, 16})
        for (int64_t Sq : {1, 2, 9, 300, 4096, 100000})
          for (int64_t Sk : {0, 100, 5000, 1000000})
            for (int64_t B : {1, 3, 100})
              for (int cores : {1, 2, 12, 500})
                for (int threads : {1, 2, 96}) {
                  fastops_attention_desc d = plain_attention();
                  d.q = d.out = view({B, Sq, Hkv * G, D});
                  d.k = d.v = view({B, Sk, Hkv, D});
                  fastops_env env{};
                  env.struct_size = sizeof env;
                  env.num_threads = threads;
                  env.parallel_for = &run_threads;
                  size_t bytes = 0;
                  REQUIRE(fastops_cores_set(cores, nullptr) == FASTOPS_OK, "refused");
                  REQUIRE(fastops_attention_workspace(&d, &env, &bytes) == FASTOPS_OK, "refused");
                  bound(bytes, env, 6);
                  bound_kv_workspace(d, &env);
                }
  REQUIRE(fastops_cores_set(0, nullptr) == FASTOPS_OK, "refused");
}

// Long sequences are cut into pieces when fewer items than cores are there, or one is longer than the others: what the
// partial results of one row of q take, on one thread.
int64_t pieces(int cores, std::initializer_list<int32_t> lengths, int64_t window = -1) {
  const int64_t B = static_cast<int64_t>(lengths.size()), D = 64, heads = 4;
  std::vector<int32_t> cu_q{0}, cu_k{0};
  for (int32_t n : lengths) {
    cu_q.push_back(cu_q.back() + 1);
    cu_k.push_back(cu_k.back() + n);
  }
  const auto bytes = [&](int32_t last) {  // the last sequence's length
    cu_k.back() = cu_k[cu_k.size() - 2] + last;
    fastops_attention_desc d = plain_attention();
    d.window_left = window;
    d.q = d.out = dense_view(FASTOPS_F32, region(Q).last(64), {B, heads, D});
    d.k = d.v = dense_view(FASTOPS_F32, region(K).last(64), {cu_k.back(), heads, D});
    d.cu_seqlens_q = dense_view(FASTOPS_I32, cu_q.data(), {B + 1});
    d.cu_seqlens_k = dense_view(FASTOPS_I32, cu_k.data(), {B + 1});
    fastops_env env{};
    env.struct_size = sizeof env;
    size_t n = 0;
    REQUIRE(fastops_attention_workspace(&d, &env, &n) == FASTOPS_OK, "refused");
    return static_cast<int64_t>(n);
  };
  REQUIRE(fastops_cores_set(cores, nullptr) == FASTOPS_OK, "refused");
  const int64_t with = bytes(*(lengths.end() - 1));
  REQUIRE(fastops_cores_set(1, nullptr) == FASTOPS_OK, "refused");
  const int64_t none = bytes(0);
  REQUIRE(fastops_cores_set(0, nullptr) == FASTOPS_OK, "refused");
  return (with - none) / (heads * (D + 1) * 4);
}

void check_plans() {
  REQUIRE(pieces(2, {8192}) == 4 && pieces(8, {8192}) == 16 && pieces(1, {8192}) == 0, "one sequence");
  REQUIRE(pieces(64, {8192}) == 64 && pieces(64, {2000}) == 11 && pieces(64, {400}) == 0, "short sequences");
  REQUIRE(pieces(2, {3000, 3000, 3000}) == 6 && pieces(2, {3000, 3000, 3000, 3000}) == 0, "alike");
  REQUIRE(pieces(2, {100, 100, 100, 100, 100, 100, 100, 100, 100, 8192}) == 7, "one long among short ones");
  REQUIRE(pieces(2, {9000, 9001, 9040, 8999}) == 0, "nearly alike");
  REQUIRE(pieces(8, {100000}, 400) == 0 && pieces(8, {100000}, 4000) == 8, "what a window leaves");
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const uint64_t count = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1000;
  bound_workspace();
  check_plans();
  std::mt19937 noise(1);
  for (int slot = 0; slot < SLOTS; ++slot)  // any bits: NaN and infinities too, in 16 bits and in 32
    for (char* p = region(slot).last(Region::kSize); p < region(slot).last(0); p += 4) {
      const float x = static_cast<float>(noise() % 2000) * 1e-3f - 1.0f;
      std::memcpy(p, &x, 4);
      if (noise() % 512 == 0) p[noise() % 4] = static_cast<char>(noise());
    }
  for (g_seed = first; g_seed < first + count; ++g_seed) {
    Random r{std::mt19937_64(g_seed)};
    const int64_t which = r.below(16);
    if (which == 0)
      fuzz_merge_states(r);
    else if (which == 1)
      fuzz_scale_add(r);
    else if (which == 2)
      fuzz_int4_linear(r);
    else if (which == 3)
      fuzz_norm(r);
    else if (which == 4)
      fuzz_norm_bwd(r);
    else if (which == 5)
      fuzz_gated(r);
    else if (which == 6)
      fuzz_rope(r);
    else if (which == 7 || which == 8)
      fuzz_kv(r);
    else if (which == 10)
      fuzz_kv_append(r);
    else if (which == 9)
      fuzz_lut_linear(r);
    else
      fuzz_attention(r);
  }
  std::printf("%d accepted, %d refused\n", g_count.accepted, g_count.refused);
  return g_count.accepted > 0 && g_count.refused > 0 ? 0 : 1;
}
