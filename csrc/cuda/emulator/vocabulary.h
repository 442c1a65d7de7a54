// The host twins of csrc/cuda/arch/*.cuh: the same names, signatures and meanings, computed from the documented
// fragment layouts. Links to the PTX ISA stand in those files.
#pragma once
#include <cmath>
#include <cstring>

#include "cuda/emulator/block.h"

namespace fastops::cuda {

using emulator::Block;
using emulator::Place;

#define FASTOPS_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- thread
// ----------------------------------------------------------------------------------------------------------
inline int thread_index() { return Block::current().me().index; }
inline int block_threads() { return Block::current().threads(); }
inline int64_t block_x() { return Block::current().index().x; }
inline int64_t block_y() { return Block::current().index().y; }
inline int64_t block_z() { return Block::current().index().z; }
inline int lane_index() { return thread_index() % emulator::kWarp; }
inline int warp_index() { return thread_index() / emulator::kWarp; }
inline char* dynamic_shared() { return Block::current().shared(); }
inline void block_sync(FASTOPS_PLACE) { Block::current().meet_block({"block_sync", file, line}); }
inline void warp_sync(FASTOPS_PLACE) {
  Block::current().meet_warp({"warp_sync", file, line}, nullptr, [](void**) {});
}

struct ShuffleArgs {
  float x, y;
  int from;
};
inline float shuffle_from(ShuffleArgs a, Place place) {
  Block::current().meet_warp(place, &a, [](void** all) {
    for (int i = 0; i < emulator::kWarp; ++i) {
      auto* mine = static_cast<ShuffleArgs*>(all[i]);
      if (mine != nullptr && all[mine->from & 31] != nullptr)
        mine->y = static_cast<ShuffleArgs*>(all[mine->from & 31])->x;
    }
  });
  return a.y;
}
inline float shuffle_xor(float x, int mask, FASTOPS_PLACE) {
  return shuffle_from({x, x, lane_index() ^ mask}, {"shuffle_xor", file, line});
}
inline float shuffle(float x, int lane, FASTOPS_PLACE) { return shuffle_from({x, x, lane}, {"shuffle", file, line}); }

inline int uniform(int x) { return x; }

struct VoteArgs {
  bool mine, any;
};
inline bool any_lane(bool x, FASTOPS_PLACE) {
  VoteArgs a{x, x};
  Block::current().meet_warp({"any_lane", file, line}, &a, [](void** all) {
    bool any = false;
    for (int i = 0; i < emulator::kWarp; ++i) any = any || (all[i] != nullptr && static_cast<VoteArgs*>(all[i])->mine);
    for (int i = 0; i < emulator::kWarp; ++i)
      if (all[i] != nullptr) static_cast<VoteArgs*>(all[i])->any = any;
  });
  return a.any;
}

// ---- cp_async
// --------------------------------------------------------------------------------------------------------
inline void cp_async16(void* shared, const void* global, bool valid, FASTOPS_PLACE) {
  Block::current().copy(static_cast<char*>(shared), valid ? static_cast<const char*>(global) : nullptr,
                        {"cp_async16", file, line});
}
inline uint64_t cache_policy(bool) { return 0; }
inline void cp_async16(void* shared, const void* global, bool valid, uint64_t, FASTOPS_PLACE) {
  cp_async16(shared, global, valid, file, line);
}
inline void cp_async_commit() { Block::current().commit(); }
template <int N>
inline void cp_async_wait() {
  Block::current().wait(N);
}

// ---- ldmatrix
// --------------------------------------------------------------------------------------------------------
struct LdmatrixArgs {
  uint32_t* r;
  const uint16_t* row;
};
template <bool kTrans>
inline void ldmatrix(uint32_t (&r)[4], const void* shared, Place place) {
  Block::current().check_shared(shared, 16, 16, place);
  LdmatrixArgs a{r, static_cast<const uint16_t*>(shared)};
  Block::current().meet_warp(place, &a, [](void** all) {
    for (int lane = 0; lane < emulator::kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        uint32_t pair = 0;
        for (int half = 0; half < 2; ++half) {
          const int major = lane / 4, minor = 2 * (lane % 4) + half;
          const int row = kTrans ? minor : major, column = kTrans ? major : minor;
          pair |= static_cast<uint32_t>(static_cast<LdmatrixArgs*>(all[8 * i + row])->row[column]) << (16 * half);
        }
        static_cast<LdmatrixArgs*>(all[lane])->r[i] = pair;
      }
  });
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared, FASTOPS_PLACE) {
  ldmatrix<false>(r, shared, {"ldmatrix_x4", file, line});
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared, FASTOPS_PLACE) {
  ldmatrix<true>(r, shared, {"ldmatrix_x4_trans", file, line});
}
struct StmatrixArgs {
  const uint32_t* r;
  uint16_t* row;
};
inline void stmatrix_x4_trans(void* shared, const uint32_t (&r)[4], FASTOPS_PLACE) {
  const Place place{"stmatrix_x4_trans", file, line};
  Block::current().check_shared(shared, 16, 16, place);
  StmatrixArgs a{r, static_cast<uint16_t*>(shared)};
  Block::current().meet_warp(place, &a, [](void** all) {
    for (int lane = 0; lane < emulator::kWarp; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 2; ++half)
          static_cast<StmatrixArgs*>(all[8 * i + 2 * (lane % 4) + half])->row[lane / 4] =
              static_cast<uint16_t>(static_cast<StmatrixArgs*>(all[lane])->r[i] >> (16 * half));
  });
}

// ---- mma
// -------------------------------------------------------------------------------------------------------------
struct MmaArgs {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
template <class T>
inline float half_of(uint32_t pair, int half) {
  T x;
  x.bits = static_cast<uint16_t>(pair >> (16 * half));
  return to_f32(x);
}
template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, FASTOPS_PLACE) {
  MmaArgs args{d, a, {b0, b1}};
  Block::current().meet_warp({"mma_m16n8k16", file, line}, &args, [](void** all) {
    float A[16][16], B[8][16];
    for (int lane = 0; lane < emulator::kWarp; ++lane) {
      const auto* x = static_cast<const MmaArgs*>(all[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i) A[g + i % 2 * 8][2 * t + half + i / 2 * 8] = half_of<T>(x->a[i], half);
        for (int i = 0; i < 2; ++i) B[g][2 * t + half + i * 8] = half_of<T>(x->b[i], half);
      }
    }
    for (int lane = 0; lane < emulator::kWarp; ++lane) {
      auto* x = static_cast<MmaArgs*>(all[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += A[g + i / 2 * 8][k] * B[2 * t + i % 2][k];
        x->d[i] += sum;
      }
    }
  });
}

struct MmaBytesArgs {
  int32_t* d;
  const uint32_t* a;
  uint32_t b[2];
};
inline void mma_m16n8k32_s8u8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, FASTOPS_PLACE) {
  MmaBytesArgs args{d, a, {b0, b1}};
  Block::current().meet_warp({"mma_m16n8k32_s8u8", file, line}, &args, [](void** all) {
    int32_t A[16][32], B[8][32];
    for (int lane = 0; lane < emulator::kWarp; ++lane) {
      const auto* x = static_cast<const MmaBytesArgs*>(all[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int byte = 0; byte < 4; ++byte) {
        for (int i = 0; i < 4; ++i)
          A[g + i % 2 * 8][4 * t + byte + i / 2 * 16] = static_cast<int8_t>(x->a[i] >> (8 * byte));
        for (int i = 0; i < 2; ++i) B[g][4 * t + byte + i * 16] = static_cast<uint8_t>(x->b[i] >> (8 * byte));
      }
    }
    for (int lane = 0; lane < emulator::kWarp; ++lane) {
      auto* x = static_cast<MmaBytesArgs*>(all[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 32; ++k) x->d[i] += A[g + i / 2 * 8][k] * B[2 * t + i % 2][k];
    }
  });
}

// ---- math
// ------------------------------------------------------------------------------------------------------------
inline float ex2(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
inline float log_natural(float x) { return std::log(x); }
inline float tanh_precise(float x) { return std::tanh(x); }
inline float erf_precise(float x) { return std::erf(x); }
inline float sqrt_precise(float x) { return std::sqrt(x); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline float round_even(float x) { return std::nearbyint(x); }
inline float absolute(float x) { return std::fabs(x); }
inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float infinity() { return __builtin_inff(); }
inline float not_a_number() { return __builtin_nanf(""); }
template <class T>
inline float widen(T x) {
  return to_f32(x);
}
template <class T>
inline void narrow(float x, T* y) {
  from_f32(x, y);
}
template <class T>
inline uint32_t pack2(float low, float high) {
  T a, b;
  from_f32(low, &a);
  from_f32(high, &b);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}

// ---- memory
inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t select) {
  const uint64_t both = a | static_cast<uint64_t>(b) << 32;
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) y |= static_cast<uint32_t>(both >> (8 * (select >> (4 * i) & 7)) & 255) << (8 * i);
  return y;
}
template <class T>
inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y = 0;
  for (int half = 0; half < 2; ++half) {
    T r;
    from_f32(std::fma(half_of<T>(a, half), half_of<T>(b, half), half_of<T>(c, half)), &r);
    y |= static_cast<uint32_t>(r.bits) << (16 * half);
  }
  return y;
}

// ----------------------------------------------------------------------------------------------------------
struct alignas(16) Bytes16 {
  uint32_t word[4];
};
inline void check_global(const void* p, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0)
    Block::current().fail(std::string(what) + ": the address is not a multiple of 16");
}
inline Bytes16 load16(const void* global) {
  check_global(global, "load16");
  Bytes16 x;
  std::memcpy(&x, global, 16);
  return x;
}
inline void store16(void* global, const Bytes16& x) {
  check_global(global, "store16");
  std::memcpy(global, &x, 16);
}

}  // namespace fastops::cuda
