// What each instruction of the vocabulary gives for fixed inputs: built by nvcc on a GPU's machine, by any other
// compiler for the emulator, and compared by tools/instructions.py.
//   instructions [ARCH]      prints "name kind words..." for what compute capability ARCH / 10 has (default: all)
// kind: "bits" must agree bit by bit; "sum" is a floating-point sum whose order and width of addition the hardware
// chooses, "ulp" an approximation (tools/instructions.py holds their bounds).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/arch/arch.h"
#include "cuda/launch.h"
#include "cuda/layout/tile.h"
#include "cuda/tensor_map.h"

namespace fastops::cuda {

struct Run {
  const uint32_t* in;  // 4096 words
  uint32_t* out;       // 8192 words
};
// Whole numbers from -8 to 7, whose products and sums are exact; and numbers with all their bits, around 1.
template <class T>
FASTOPS_DEVICE uint32_t whole_pair(uint32_t random) {
  return pack2<T>(static_cast<float>(static_cast<int>(random & 15) - 8),
                  static_cast<float>(static_cast<int>(random >> 8 & 15) - 8));
}
template <class T>
FASTOPS_DEVICE uint32_t real_pair(uint32_t random) {
  const float low = static_cast<float>(random & 0xffff) / 32768.0f - 1.0f;
  return pack2<T>(low, static_cast<float>(random >> 16) / 32768.0f - 1.0f);
}

FASTOPS_KERNEL(32, 1) lop3_and_prmt(const Run a) {
  const int l = lane_index();
  const uint32_t selects[4] = {0x5410, 0x7632, 0x0123, 0x6204};
  for (int i = 0; i < 4; ++i) {
    a.out[8 * l + i] = and_or(a.in[8 * l + i], 0x000f000fu << i, 0x64006400u);
    a.out[8 * l + 4 + i] = permute_bytes(a.in[8 * l + i], a.in[8 * l + 4 + i], selects[i]);
  }
}
template <class T>
FASTOPS_KERNEL(32, 1)
pairs(const Run a) {  // fma on two halves, rounding two numbers, and one, and back
  const int l = lane_index();
  for (int i = 0; i < 8; ++i) {
    const uint32_t *x = a.in + 24 * l + 3 * i, y = real_pair<T>(x[2]);
    uint32_t* to = a.out + 32 * l + 4 * i;
    to[0] = fma2<T>(real_pair<T>(x[0]), real_pair<T>(x[1]), y);
    const float f = as_float((x[0] & 0x807fffff) | (96 + (x[1] & 63)) << 23);  // 2^-31 to 2^32: overflows fp16
    to[1] = pack2<T>(f, as_float((x[2] & 0x807fffff) | 0x3f800000));
    T half;
    narrow(f, &half);
    to[2] = half.bits;
    to[3] = as_bits(widen(half));
  }
}
FASTOPS_KERNEL(32, 1) powers(const Run a) {
  const int l = lane_index();
  for (int i = 0; i < 16; ++i)
    a.out[16 * l + i] = as_bits(ex2(-static_cast<float>(a.in[16 * l + i] & 0xffff) / 2048.0f));
}
FASTOPS_KERNEL(32, 1) shuffles(const Run a) {
  const int l = lane_index();
  const float x = static_cast<float>(a.in[l] & 0xffff);
  for (int i = 0; i < 5; ++i) a.out[8 * l + i] = as_bits(shuffle_xor(x, 1 << i));
  a.out[8 * l + 5] = as_bits(shuffle(x, (l * 7 + 3) % 32));
  a.out[8 * l + 6] = static_cast<uint32_t>(uniform(static_cast<int>(a.in[0])));
  a.out[8 * l + 7] = any_lane(a.in[l] % 61 == 7) ? 2u : any_lane(a.in[l] % 5 == 0) ? 1u : 0u;
}
FASTOPS_KERNEL(32, 1) matrices(const Run a) {  // cp.async, a quarter of the pieces absent, then ldmatrix
  char* s = dynamic_shared();
  const int l = lane_index();
  for (int i = l; i < 64; i += 32) cp_async16(s + 16 * i, a.in + 4 * i, i % 4 != 1);
  cp_async_commit();
  cp_async_wait<0>();
  block_sync();
  uint32_t plain[4], turned[4];
  ldmatrix_x4(plain, s + 16 * ((l * 5 + 3) % 64));
  ldmatrix_x4_trans(turned, s + 16 * ((l * 3 + 1) % 64));
  for (int i = 0; i < 4; ++i) {
    a.out[8 * l + i] = plain[i];
    a.out[8 * l + 4 + i] = turned[i];
  }
}
template <class T, bool kWhole>
FASTOPS_KERNEL(32, 1)
products(const Run a) {
  const int l = lane_index();
  const auto pair = [&](int i) {
    const uint32_t x = a.in[8 * l + i];
    return kWhole ? whole_pair<T>(x) : real_pair<T>(x);
  };
  const uint32_t x[4] = {pair(0), pair(1), pair(2), pair(3)};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(4 * l + i);
  mma_m16n8k16<T>(d, x, pair(4), pair(5));
  for (int i = 0; i < 4; ++i) a.out[4 * l + i] = as_bits(d[i]);
}
FASTOPS_KERNEL(32, 1) byte_products(const Run a) {
  const int l = lane_index();
  const uint32_t* x = a.in + 8 * l;
  const uint32_t rows[4] = {x[0], x[1], x[2], x[3]};
  int32_t d[4] = {l, -l, 1 << 20, 7};
  mma_m16n8k32_s8u8(d, rows, x[4], x[5]);
  for (int i = 0; i < 4; ++i) a.out[4 * l + i] = static_cast<uint32_t>(d[i]);
}

// ---- sm_90a ---------------------------------------------------------------------------------------------------------

struct Boxed {
  Run run;
  TensorMap map;  // in as [2][3][20][32 words], boxes of 16 rows
};
FASTOPS_KERNEL(64, 1) boxes(FASTOPS_ARGUMENT Boxed b) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  char* tile = dynamic_shared();
  auto* bar = reinterpret_cast<Mbarrier*>(tile + 2048);
  if (thread_index() == 0) {
    mbarrier_init(bar, 1);
    mbarrier_ready();
  }
  block_sync();
  const int corners[3][4] = {{0, 0, 0, 0}, {0, 9, 2, 1}, {0, -5, 1, 0}};
  for (int i = 0; i < 3; ++i) {
    if (thread_index() == 0) {
      mbarrier_arrive_expect(bar, 2048);
      tma_load(tile, &b.map, bar, corners[i][0], corners[i][1], corners[i][2], corners[i][3]);
    }
    mbarrier_wait(bar, i & 1);
    for (int w = thread_index(); w < 512; w += 64) b.run.out[512 * i + w] = reinterpret_cast<uint32_t*>(tile)[w];
    block_sync();
  }
#endif
}
// Two blocks, each fetching one box for both; the blocks tell each other when it has been read.
FASTOPS_KERNEL(64, 1) shared_boxes(FASTOPS_ARGUMENT Boxed b) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  char* tile = dynamic_shared();
  auto *full = reinterpret_cast<Mbarrier*>(tile + 4096), *empty = full + 1;
  const int rank = cluster_rank();
  if (thread_index() == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, 2);
    mbarrier_ready();
  }
  cluster_sync();
  for (int i = 0; i < 2; ++i) {
    if (thread_index() == 0) {
      mbarrier_arrive_expect(full, 4096);
      tma_load_all(tile + 2048 * rank, &b.map, full, 3, 0, 4 * i, rank + i, rank);
    }
    mbarrier_wait(full, i & 1);
    for (int w = thread_index(); w < 1024; w += 64)
      b.run.out[(2 * i + rank) * 1024 + w] = reinterpret_cast<uint32_t*>(tile)[w];
    block_sync();
    if (thread_index() < 2) mbarrier_arrive_at(empty, thread_index());
    mbarrier_wait(empty, i & 1);
  }
  cluster_arrive();
  cluster_wait();
#endif
}
FASTOPS_KERNEL(32, 1) matrices_back(const Run a) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  auto* s = reinterpret_cast<uint32_t*>(dynamic_shared());
  const int l = lane_index();
  const uint32_t r[4] = {a.in[4 * l], a.in[4 * l + 1], a.in[4 * l + 2], a.in[4 * l + 3]};
  stmatrix_x4_trans(s + 4 * (l * 5 % 32), r);
  block_sync();
  for (int i = 0; i < 4; ++i) a.out[4 * l + i] = s[4 * l + i];
#endif
}
// 64 x 64 sums of 64 k, both operands from shared memory; then with rows of the first from registers, the second along
// n and along k.
template <class T, bool kWhole>
FASTOPS_KERNEL(128, 1)
group_products(const Run a) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Tile = Columns64<64>;
  char *x = dynamic_shared(), *y = x + 64 * 128;
  for (int i = thread_index(); i < 64 * 32; i += 128) {
    const int r = i / 32, c = i % 32 * 2;
    const auto at = [&](char* tile) { return reinterpret_cast<uint32_t*>(tile + (Tile::at(r, c / 8) + c % 8) * 2); };
    *at(x) = kWhole ? whole_pair<T>(a.in[i]) : real_pair<T>(a.in[i]);
    *at(y) = kWhole ? whole_pair<T>(a.in[2048 + i]) : real_pair<T>(a.in[2048 + i]);
  }
  fence_proxy_async();
  block_sync();
  const int lane = lane_index(), row = warp_index() * 16 + lane / 4;
  for (int way = 0; way < 3; ++way) {
    float d[8][4] = {};
    uint32_t r[4][4];
    for (int k = 0; k < 4; ++k)
      for (int i = 0; i < 4; ++i) {
        const int c = 16 * k + i / 2 * 8 + lane % 4 * 2;
        r[k][i] = *reinterpret_cast<uint32_t*>(x + (Tile::at(row + i % 2 * 8, c / 8) + c % 8) * 2);
      }
    wgmma_hold(d);
    wgmma_fence();
    FASTOPS_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (way == 0)
        wgmma_ss<T>(d, wgmma_tile(x + 32 * k, 0, 1024), wgmma_tile(y + 32 * k, 0, 1024), k > 0);
      else if (way == 1)
        wgmma_rs<T>(d, r[k], wgmma_tile(y + 2048 * k, 64 * 128, 1024), k > 0);
      else
        wgmma_rs_along_k<T>(d, r[k], wgmma_tile(y + 32 * k, 0, 1024), k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(d);
    for (int i = 0; i < 4; ++i) {  // every tile counts, in numbers that are exact where the sums are
      float y = 0.0f;
      for (int n = 0; n < 8; ++n) y += static_cast<float>(n + 1) * d[n][i];
      a.out[(way * 128 + thread_index()) * 4 + i] = as_bits(y);
    }
  }
#endif
}

}  // namespace fastops::cuda

#if !defined(__CUDACC_RTC__)
using namespace fastops;
using namespace fastops::cuda;

namespace {

// Memory both sides can read, and a launch that is over when it returns.
#if defined(__CUDACC__)
uint32_t* words(size_t n) {
  void* p = nullptr;
  if (cudaMallocManaged(&p, n * 4) != cudaSuccess) std::exit(2);
  return static_cast<uint32_t*>(p);
}
bool finish() { return cudaDeviceSynchronize() == cudaSuccess; }
#else
uint32_t* words(size_t n) { return static_cast<uint32_t*>(std::aligned_alloc(64, n * 4)); }
bool finish() { return true; }
#endif

int g_failed = 0;
template <auto kKernel, class Args>
void line(const char* name, const char* kind, const Args& args, const Run& run, int threads, size_t shared, int count,
          int blocks = 1) {
  char message[FASTOPS_MESSAGE_SIZE] = "";
  fastops_cuda_env env{};
  env.struct_size = sizeof env;
  env.message = message;
  if (launch<kKernel>({blocks, 1, 1, threads, shared, blocks}, &env, args) != FASTOPS_OK || !finish()) {
    std::fprintf(stderr, "%s did not run: %s\n", name, message);
    g_failed = 1;
    return;
  }
  std::printf("%s %s", name, kind);
  for (int i = 0; i < count; ++i) std::printf(" %x", run.out[i]);
  std::printf("\n");
}

}  // namespace

int main(int count, char** arguments) {
  const int arch = count > 1 ? std::atoi(arguments[1]) : 90;
  Run run{words(4096), words(8192)};
  auto* in = const_cast<uint32_t*>(run.in);
  uint64_t state = 1;
  for (int i = 0; i < 4096; ++i) {  // Knuth's MMIX generator, its upper half
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    in[i] = static_cast<uint32_t>(state >> 32);
  }
  line<lop3_and_prmt>("lop3_prmt", "bits", run, run, 32, 0, 256);
  line<pairs<f16>>("pairs_f16", "bits", run, run, 32, 0, 1024);
  line<pairs<bf16>>("pairs_bf16", "bits", run, run, 32, 0, 1024);
  line<powers>("ex2", "ulp", run, run, 32, 0, 512);
  line<shuffles>("shuffles", "bits", run, run, 32, 0, 256);
  line<matrices>("cp_async_ldmatrix", "bits", run, run, 32, 1024, 256);
  line<products<f16, true>>("mma_f16", "bits", run, run, 32, 0, 128);
  line<products<bf16, true>>("mma_bf16", "bits", run, run, 32, 0, 128);
  line<products<f16, false>>("mma_f16_real", "sum", run, run, 32, 0, 128);
  line<products<bf16, false>>("mma_bf16_real", "sum", run, run, 32, 0, 128);
  line<byte_products>("mma_s8u8", "bits", run, run, 32, 0, 128);
  if (arch < 90 || arch >= 100) return g_failed;
  Boxed boxed{run, {}};
  fastops_cuda_env env{};
  env.struct_size = sizeof env;
  if (!tensor_map({run.in, {64, 20, 3, 2}, {64, 20 * 64, 3 * 20 * 64}, 16}, &env, &boxed.map)) return 3;
  line<matrices_back>("stmatrix", "bits", run, run, 32, 512, 128);
  line<boxes>("tma", "bits", boxed, run, 64, 3072, 1536);
  line<shared_boxes>("cluster", "bits", boxed, run, 64, 4096 + 64, 4096, 2);
  line<group_products<f16, true>>("wgmma_f16", "bits", run, run, 128, 128 * 128, 1536);
  line<group_products<bf16, true>>("wgmma_bf16", "bits", run, run, 128, 128 * 128, 1536);
  line<group_products<f16, false>>("wgmma_f16_real", "sum", run, run, 128, 128 * 128, 1536);
  line<group_products<bf16, false>>("wgmma_bf16_real", "sum", run, run, 128, 128 * 128, 1536);
  return g_failed;
}
#endif
