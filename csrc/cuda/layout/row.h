// Sixteen bytes, or one element, of a row at a time: what the fused operators read and write.
#pragma once
#include "cuda/layout/numbers.h"

namespace fastops::cuda {

// kElements of T from a row, as floats, and back: one 16-byte access where kElements fills it.
template <class T, int kElements>
FASTOPS_DEVICE void load_elements(const char* row, int64_t at, float (&x)[kElements]) {
  const T* from = reinterpret_cast<const T*>(row) + at;
  if constexpr (kElements * sizeof(T) == 16) {
    union {
      Bytes16 bytes;
      T element[kElements];
    } all{load16(from)};
    FASTOPS_UNROLL
    for (int i = 0; i < kElements; ++i) x[i] = widen(all.element[i]);
  } else {
    FASTOPS_UNROLL
    for (int i = 0; i < kElements; ++i) x[i] = widen(from[i]);
  }
}
template <class T, int kElements>
FASTOPS_DEVICE void store_elements(char* row, int64_t at, const float (&x)[kElements]) {
  T* to = reinterpret_cast<T*>(row) + at;
  if constexpr (kElements * sizeof(T) == 16) {
    union {
      Bytes16 bytes;
      T element[kElements];
    } all;
    FASTOPS_UNROLL
    for (int i = 0; i < kElements; ++i) narrow(x[i], &all.element[i]);
    store16(to, all.bytes);
  } else {
    FASTOPS_UNROLL
    for (int i = 0; i < kElements; ++i) narrow(x[i], to + i);
  }
}
// A vector of x's dtype or fp32 (a weight), any alignment.
template <class T, int kElements>
FASTOPS_DEVICE void load_vector(const void* vector, bool f32, int64_t at, float (&x)[kElements]) {
  FASTOPS_UNROLL
  for (int i = 0; i < kElements; ++i)
    x[i] = f32 ? static_cast<const float*>(vector)[at + i] : widen(static_cast<const T*>(vector)[at + i]);
}

// Over all threads of a block of whole warps; `room` holds 33 floats of shared memory. Every thread gets the result.
template <class Combine>
FASTOPS_DEVICE float block_reduce(float x, float* room, Combine combine) {
  for (int mask = 16; mask > 0; mask >>= 1) x = combine(x, shuffle_xor(x, mask));
  const int warps = block_threads() / 32;
  if (lane_index() == 0) room[warp_index()] = x;
  block_sync();
  if (thread_index() == 0) {
    float all = room[0];
    for (int w = 1; w < warps; ++w) all = combine(all, room[w]);
    room[32] = all;
  }
  block_sync();
  const float result = room[32];
  block_sync();  // the room may be used again
  return result;
}
FASTOPS_DEVICE float block_sum(float x, float* room) {
  return block_reduce(x, room, [](float a, float b) { return a + b; });
}
FASTOPS_DEVICE float block_max(float x, float* room) {
  return block_reduce(x, room, [](float a, float b) { return maximum_or_nan(a, b); });
}

}  // namespace fastops::cuda
