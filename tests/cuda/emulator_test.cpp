// The emulator: each instruction against layouts written out by hand from the PTX ISA, and each kind of wrong program
// seen.
//   emulator_test NAME      prints nothing and returns 0, or says what is wrong
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "cuda/arch/arch.h"
#include "cuda/launch.h"
#include "cuda/layout/numbers.h"
#include "cuda/layout/tile.h"
#include "cuda/tensor_map.h"

using namespace fastops;
using namespace fastops::cuda;

namespace {

std::string g_wrong;
#define EXPECT(condition, ...)                                                                 \
  do {                                                                                         \
    if (!(condition) && g_wrong.empty()) {                                                     \
      char text[400];                                                                          \
      std::snprintf(text, sizeof text, __VA_ARGS__);                                           \
      g_wrong = std::string(#condition) + " (line " + std::to_string(__LINE__) + "): " + text; \
    }                                                                                          \
  } while (0)

struct Outcome {
  fastops_status status;
  std::string message;
};
template <auto kKernel, class Args>
Outcome start(const Args& args, int threads, size_t shared, uint64_t seed = 0, int64_t blocks = 1) {
  char message[FASTOPS_MESSAGE_SIZE] = "";
  fastops_cuda_env env{};
  env.struct_size = sizeof env;
  env.message = message;
  env.seed = seed;
  const fastops_status status = launch<kKernel>({blocks, 1, 1, threads, shared}, &env, args);
  return {status, message};
}

// ---- instructions --------------------------------------------------------------------------------------------------

struct Words {
  uint32_t* out;
};

// Element (i, r, c) of four 8x8 matrices is 1000 i + 10 r + c.
template <bool kTrans>
void ldmatrix_kernel(Words a) {
  auto* m = reinterpret_cast<uint16_t*>(dynamic_shared());
  for (int e = thread_index(); e < 256; e += 32)
    m[e] = static_cast<uint16_t>(1000 * (e / 64) + 10 * (e / 8 % 8) + e % 8);
  block_sync();
  uint32_t r[4];
  if (kTrans)
    ldmatrix_x4_trans(r, m + 8 * lane_index());
  else
    ldmatrix_x4(r, m + 8 * lane_index());
  for (int i = 0; i < 4; ++i) a.out[4 * lane_index() + i] = r[i];
}
void test_ldmatrix() {
  uint32_t out[128];
  EXPECT(start<ldmatrix_kernel<false>>(Words{out}, 32, 512).status == FASTOPS_OK, "did not run");
  // PTX ISA, ldmatrix: "row 0: thread 0 holds elements 0 and 1, thread 1 holds 2 and 3", lane 5 therefore row 1,
  // columns 2, 3.
  EXPECT(out[0] == (0u | 1u << 16), "lane 0, matrix 0: %x", out[0]);
  EXPECT(out[4 * 5 + 0] == (12u | 13u << 16), "lane 5, matrix 0: %x", out[20]);
  EXPECT(out[4 * 31 + 3] == (3076u | 3077u << 16), "lane 31, matrix 3: %x", out[127]);
  EXPECT(start<ldmatrix_kernel<true>>(Words{out}, 32, 512).status == FASTOPS_OK, "did not run");
  EXPECT(out[4 * 5 + 0] == (21u | 31u << 16), "lane 5, matrix 0, transposed: rows 2, 3 of column 1, got %x", out[20]);
  EXPECT(out[4 * 31 + 2] == (2067u | 2077u << 16), "lane 31, matrix 2, transposed: %x", out[126]);
}

// The reverse: element (r, c) of a matrix in the lanes' registers comes to rest at row c, place r.
void stmatrix_kernel(Words a) {
  auto* m = reinterpret_cast<uint16_t*>(dynamic_shared());
  uint32_t r[4];
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half) {
      const int value = 1000 * i + 10 * (lane_index() / 4) + lane_index() % 4 * 2 + half;
      r[i] = half == 0 ? static_cast<uint32_t>(value) : r[i] | static_cast<uint32_t>(value) << 16;
    }
  stmatrix_x4_trans(m + 8 * lane_index(), r);
  block_sync();
  for (int e = lane_index(); e < 256; e += 32) a.out[e] = m[e];
}
void test_stmatrix() {
  uint32_t out[256];
  EXPECT(start<stmatrix_kernel>(Words{out}, 32, 512).status == FASTOPS_OK, "did not run");
  for (int i = 0; i < 4; ++i)
    for (int row = 0; row < 8; ++row)
      for (int at = 0; at < 8; ++at) {
        const auto want = static_cast<uint32_t>(1000 * i + 10 * at + row);
        EXPECT(out[64 * i + 8 * row + at] == want, "matrix %d row %d place %d is %u", i, row, at,
               out[64 * i + 8 * row + at]);
      }
}

// a has one 1 at (row, k), b one 1 at (k, column), in bf16: d is 1 at (row, column) alone. The lane and register of
// each are written out from the figures of mma.m16n8k16.
struct MmaCase {
  int a_lane, a_register, a_half, b_lane, b_register, b_half, d_lane, d_register;
  float* out;
};
template <class T>
void mma_kernel(MmaCase c) {
  uint32_t a[4] = {}, b[2] = {};
  T one;
  narrow(1.0f, &one);
  if (lane_index() == c.a_lane) a[c.a_register] = static_cast<uint32_t>(one.bits) << (16 * c.a_half);
  if (lane_index() == c.b_lane) b[c.b_register] = static_cast<uint32_t>(one.bits) << (16 * c.b_half);
  float d[4] = {0.5f, 0.5f, 0.5f, 0.5f};
  mma_m16n8k16<T>(d, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) c.out[4 * lane_index() + i] = d[i];
}
void test_mma() {
  const MmaCase cases[] = {
      // a (0, 0): lane 0, register 0. b (0, 0): lane 0, register 0. d (0, 0): lane 0, register 0.
      {0, 0, 0, 0, 0, 0, 0, 0, nullptr},
      // a (row 9, k 3): row 9 = 1 + 8, lanes 4 to 7, register 1; k 3: lane 5, upper half. b (k 3, column 6): lanes 24
      // to 27,
      // k 3: lane 25, register 0, upper half. d (row 9, column 6): lanes 4 to 7, columns 6, 7: lane 7, register 2.
      {5, 1, 1, 25, 0, 1, 7, 2, nullptr},
      // a (row 2, k 12): k 8 + 4, lane 8 + 2, register 2. b (k 12, column 1): lane 4 + 2, register 1. d (2, 1): lane
      // 8, 1.
      {10, 2, 0, 6, 1, 0, 8, 1, nullptr},
      // a (row 15, k 15): lane 31, register 3, upper. b (15, 7): lane 31, register 1, upper. d (15, 7): lane 31,
      // register 3.
      {31, 3, 1, 31, 1, 1, 31, 3, nullptr},
  };
  for (MmaCase c : cases) {
    float out[128];
    c.out = out;
    for (int type = 0; type < 2; ++type) {
      const Outcome o = type ? start<mma_kernel<bf16>>(c, 32, 0) : start<mma_kernel<f16>>(c, 32, 0);
      EXPECT(o.status == FASTOPS_OK, "%s", o.message.c_str());
      for (int i = 0; i < 128; ++i) {
        const float want = i == 4 * c.d_lane + c.d_register ? 1.5f : 0.5f;
        EXPECT(out[i] == want, "lane %d register %d is %g", i / 4, i % 4, static_cast<double>(out[i]));
      }
    }
  }
  MmaCase mismatch = cases[0];  // another k: no product
  float out[128];
  mismatch.out = out;
  mismatch.b_half = 1;
  start<mma_kernel<f16>>(mismatch, 32, 0);
  for (float x : out) EXPECT(x == 0.5f, "k 0 met k 1");
}

struct Floats {
  float* out;
};
void shuffle_kernel(Floats a) {
  const float x = static_cast<float>(lane_index());
  a.out[2 * lane_index()] = shuffle_xor(x, 5);
  a.out[2 * lane_index() + 1] = shuffle(x, 7);
}
void test_shuffle() {
  float out[64];
  EXPECT(start<shuffle_kernel>(Floats{out}, 32, 0).status == FASTOPS_OK, "did not run");
  for (int i = 0; i < 32; ++i) EXPECT(out[2 * i] == static_cast<float>(i ^ 5) && out[2 * i + 1] == 7.0f, "lane %d", i);
}

// ---- cp.async: results appear at the wait, and no earlier
// -------------------------------------------------------------

struct CopyArgs {
  const uint32_t* from;
  uint32_t* out;
  int newest;  // groups the wait leaves open
};
void copy_kernel(CopyArgs a) {  // three groups of 16 bytes; the third has nothing to read
  auto* s = reinterpret_cast<uint32_t*>(dynamic_shared());
  for (int g = 0; g < 3; ++g) {
    cp_async16(s + 4 * g, a.from + 4 * g, g < 2);
    cp_async_commit();
  }
  for (int i = 0; i < 12; ++i) a.out[i] = s[i];
  if (a.newest == 2) cp_async_wait<2>();
  if (a.newest == 1) cp_async_wait<1>();
  if (a.newest == 0) cp_async_wait<0>();
  for (int i = 0; i < 12; ++i) a.out[12 + i] = s[i];
  cp_async_wait<0>();
}
void test_cp_async() {
  alignas(16) uint32_t from[12], out[24];
  for (uint32_t i = 0; i < 12; ++i) from[i] = i + 1;
  for (int newest = 0; newest < 3; ++newest) {
    const Outcome o = start<copy_kernel>(CopyArgs{from, out, newest}, 1, 64);
    EXPECT(o.status == FASTOPS_OK, "%s", o.message.c_str());
    for (int i = 0; i < 12; ++i) EXPECT(out[i] == 0xffffffffu, "word %d was there before the wait", i);
    for (int i = 0; i < 12; ++i) {
      const bool landed = i / 4 < 3 - newest;
      const uint32_t want = !landed ? 0xffffffffu : i < 8 ? from[i] : 0u;
      EXPECT(out[12 + i] == want, "wait %d: word %d is %x", newest, i, out[12 + i]);
    }
  }
}

// ---- wrong programs
// --------------------------------------------------------------------------------------------------

void expect_failure(const char* name, const Outcome& o, const char* phrase) {
  EXPECT(o.status == FASTOPS_ERR_INTERNAL && o.message.find(phrase) != std::string::npos, "%s: status %d, '%s'", name,
         o.status, o.message.c_str());
}
void unwaited_kernel(CopyArgs a) { cp_async16(dynamic_shared(), a.from, true); }
void outside_kernel(CopyArgs a) { cp_async16(dynamic_shared() + 64, a.from, true); }
void crooked_kernel(CopyArgs a) { cp_async16(dynamic_shared() + 8, a.from, true); }
void divergent_kernel(Floats) {
  if (lane_index() < 16)
    warp_sync();
  else
    block_sync();
}
void partly_kernel(Floats) {
  if (lane_index() < 16) warp_sync();
}
void early_kernel(Floats) {
  if (warp_index() == 0) return;
  block_sync();  // the barrier counts threads that have not ended
}
void test_wrong_programs() {
  alignas(16) uint32_t from[4] = {};
  const CopyArgs c{from, nullptr, 0};
  float out[1];
  expect_failure("unwaited", start<unwaited_kernel>(c, 1, 64), "1 cp.async copies that nobody waited for");
  expect_failure("outside", start<outside_kernel>(c, 1, 64), "shared address 64 outside the 64 bytes");
  expect_failure("crooked", start<crooked_kernel>(c, 1, 64), "shared address 8 is not a multiple of 16");
  expect_failure("divergent", start<divergent_kernel>(Floats{out}, 64, 0),
                 "lanes 16 to 31 block_sync (emulator_test.cpp:");
  expect_failure("partly", start<partly_kernel>(Floats{out}, 32, 0), "lanes of warp 0 do not meet");
  EXPECT(start<early_kernel>(Floats{out}, 64, 0).status == FASTOPS_OK, "an ended warp held up the barrier");
}

// Warp 0 writes what the others read. Without the barrier some order of warps must show it.
template <bool kBarrier>
void race_kernel(Floats a) {
  auto* s = reinterpret_cast<float*>(dynamic_shared());
  if (warp_index() == 0) s[lane_index()] = 1.0f;
  if (kBarrier) block_sync();
  a.out[thread_index()] = s[lane_index()];
}
void test_races_show() {
  bool seen = false;
  for (uint64_t seed = 0; seed < 16; ++seed) {
    float out[128];
    EXPECT(start<race_kernel<true>>(Floats{out}, 128, 128, seed).status == FASTOPS_OK, "did not run");
    for (float x : out) EXPECT(x == 1.0f, "with the barrier");
    start<race_kernel<false>>(Floats{out}, 128, 128, seed);
    for (float x : out) seen = seen || x != 1.0f;
  }
  EXPECT(seen, "sixteen orders of warps hid a missing barrier");
}

// Bytes: a has one -3 at (row, k), b one 200 at (k, column); lanes, registers and bytes from the figures of
// mma.m16n8k32.
struct MmaBytesCase {
  int a_lane, a_register, a_byte, b_lane, b_register, b_byte, d_lane, d_register;
  int32_t* out;
};
void mma_bytes_kernel(MmaBytesCase c) {
  uint32_t a[4] = {}, b[2] = {};
  if (lane_index() == c.a_lane) a[c.a_register] = 0xfdu << (8 * c.a_byte);
  if (lane_index() == c.b_lane) b[c.b_register] = 200u << (8 * c.b_byte);
  int32_t d[4] = {7, 7, 7, 7};
  mma_m16n8k32_s8u8(d, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) c.out[4 * lane_index() + i] = d[i];
}
void test_mma_bytes() {
  const MmaBytesCase cases[] = {
      {0, 0, 0, 0, 0, 0, 0, 0, nullptr},  // a (0, 0), b (0, 0), d (0, 0)
      // a (row 9, k 6): lanes 4 to 7, k 4 to 7: lane 5, register 1, byte 2. b (k 6, column 6): lane 25, register 0,
      // byte
      // 2. d (row 9, column 6): lane 7, register 2.
      {5, 1, 2, 25, 0, 2, 7, 2, nullptr},
      // a (row 2, k 27): 16 + 11, lane 8 + 2, register 2, byte 3. b (k 27, column 1): lane 4 + 2, register 1, byte 3.
      // d (2, 1): lane 8, register 1.
      {10, 2, 3, 6, 1, 3, 8, 1, nullptr},
      {31, 3, 3, 31, 1, 3, 31, 3, nullptr},
  };
  for (MmaBytesCase c : cases) {
    int32_t out[128];
    c.out = out;
    EXPECT(start<mma_bytes_kernel>(c, 32, 0).status == FASTOPS_OK, "did not run");
    for (int i = 0; i < 128; ++i)
      EXPECT(out[i] == (i == 4 * c.d_lane + c.d_register ? 7 - 600 : 7), "lane %d register %d is %d", i / 4, i % 4,
             out[i]);
  }
}

// ---- layouts
// ---------------------------------------------------------------------------------------------------------

template <int kColumns>
void check_swizzle() {
  using L = Swizzled<kColumns>;
  std::set<int> seen;
  for (int r = 0; r < 64; ++r)
    for (int c = 0; c < L::kChunks; ++c) {
      const int at = L::at(r, c);
      EXPECT(at % kChunk == 0 && at >= r * kColumns && at < (r + 1) * kColumns, "row %d chunk %d at %d", r, c, at);
      EXPECT(seen.insert(at).second, "row %d chunk %d shares its place", r, c);
    }
  // An ldmatrix phase reads eight rows at one chunk: 8 x 16 bytes over 32 banks of 4 bytes, each bank once.
  for (int r0 = 0; r0 < 64; r0 += 8)
    for (int c = 0; c < L::kChunks; ++c) {
      std::set<int> banks;
      for (int r = r0; r < r0 + 8; ++r) banks.insert(L::at(r, c) * 2 / 16 % 8);
      EXPECT(banks.size() == 8, "rows from %d, chunk %d: %zu groups of banks", r0, c, banks.size());
    }
}
void test_swizzle() {
  check_swizzle<64>();
  check_swizzle<128>();
  check_swizzle<256>();
}

#include "emulator_test_sm90.h"

}  // namespace

// 2^x by a polynomial: within its bound where softmax needs it, 0 for what is masked, and a NaN stays one.
void test_polynomial() {
  double worst = 0.0;
  for (float x = -126.0f; x <= 9.0f; x += 0.00037f) {
    const double error = std::fabs(ex2_polynomial(x) / std::exp2(static_cast<double>(x)) - 1.0);
    if (error > worst) worst = error;
  }
  EXPECT(worst < 4e-6, "relative error %g", worst);
  for (float x : {-127.0f, -500.0f, -1e30f, -infinity()})
    EXPECT(ex2_polynomial(x) == 0.0f, "2^%g is %g", x, ex2_polynomial(x));
  for (float x : {-126.6f, -126.4f, -126.0f})
    EXPECT(ex2_polynomial(x) >= 0.0f && ex2_polynomial(x) < 2e-38f, "2^%g is %g", x, ex2_polynomial(x));
  const float bad = ex2_polynomial(not_a_number());
  EXPECT(bad != bad, "of a NaN it is %g", bad);
}

int main(int argc, char** argv) {
  const std::map<std::string, std::function<void()>> tests = {
      {"stmatrix", test_stmatrix}, {"ldmatrix", test_ldmatrix},
      {"mma", test_mma},           {"shuffle", test_shuffle},
      {"cp_async", test_cp_async}, {"wrong", test_wrong_programs},
      {"races", test_races_show},  {"mma_bytes", test_mma_bytes},
      {"swizzle", test_swizzle},   {"tma", test_tma},
      {"wgmma", test_wgmma},       {"fence", test_fence},
      {"named", test_named},       {"columns64", test_columns64},
      {"cluster", test_cluster},   {"polynomial", test_polynomial},
  };
  if (argc < 2) {
    for (const auto& t : tests) std::printf("%s\n", t.first.c_str());
    return 0;
  }
  tests.at(argv[1])();
  if (!g_wrong.empty()) std::fprintf(stderr, "%s\n", g_wrong.c_str());
  return g_wrong.empty() ? 0 : 1;
}
