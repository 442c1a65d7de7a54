// 16-bit storage types and their exact scalar conversions: the portable variant's arithmetic and everybody's tails.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FASTOPS_SHARED __host__ __device__ inline
#else
#define FASTOPS_SHARED inline
#endif

namespace fastops {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

namespace detail {
FASTOPS_SHARED float as_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
FASTOPS_SHARED uint32_t as_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
}  // namespace detail

FASTOPS_SHARED float to_f32(float x) { return x; }
FASTOPS_SHARED float to_f32(bf16 x) { return detail::as_float(static_cast<uint32_t>(x.bits) << 16); }
FASTOPS_SHARED float to_f32(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  // A half exponent field of 31 (inf, NaN) must become 255; all others only need the bias moved, which a
  // multiplication by 2^112 does for subnormals too.
  const float moved = rest >= 0x0f800000u ? detail::as_float(rest | 0x7f800000u)
                                          : detail::as_float(rest) * detail::as_float(0x77800000u);
  return detail::as_float(detail::as_bits(moved) | sign);
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
FASTOPS_SHARED void from_f32(float x, float* out) { *out = x; }
FASTOPS_SHARED void from_f32(float x, bf16* out) {
  const uint32_t u = detail::as_bits(x);
  out->bits = (u & 0x7fffffffu) > 0x7f800000u ? static_cast<uint16_t>((u >> 16) | 0x40u)
                                              : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
FASTOPS_SHARED void from_f32(float x, f16* out) {
  const uint32_t u = detail::as_bits(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t mag = u & 0x7fffffffu;
  if (mag > 0x7f800000u) {
    out->bits = sign | 0x7e00u;
  } else if (mag >= 0x477ff000u) {  // rounds to 65536 or more
    out->bits = sign | 0x7c00u;
  } else if (mag < 0x38800000u) {  // subnormal half: adding 0.5 lets the fp32 adder do the rounding at bit 24
    const float shifted = detail::as_float(mag) + 0.5f;
    out->bits = sign | static_cast<uint16_t>(detail::as_bits(shifted) - 0x3f000000u);
  } else {
    out->bits = sign | static_cast<uint16_t>((mag - 0x38000000u + 0x0fffu + ((mag >> 13) & 1u)) >> 13);
  }
}

// e4m3, finite only: beyond 448 (an infinity, too) becomes 448.
FASTOPS_SHARED uint8_t to_f8(float x) {
  const uint32_t u = detail::as_bits(x), mag = u & 0x7fffffffu;
  uint32_t y;
  if (mag > 0x7f800000u) {
    y = 0x7f;
  } else if (mag < 0x3c800000u) {  // below 2^-6 the adder rounds, at the unit 2^-9
    y = detail::as_bits(detail::as_float(mag) + 16384.0f) - 0x46800000u;
  } else {
    y = (mag + 0x7ffffu + ((mag >> 20) & 1u) - (120u << 23)) >> 20;
    if (y > 0x7e) y = 0x7e;
  }
  return static_cast<uint8_t>(y | ((u >> 24) & 0x80u));
}

FASTOPS_SHARED float from_f8(uint8_t y) {
  const uint32_t mag = y & 0x7fu, sign = static_cast<uint32_t>(y & 0x80u) << 24;
  float x;
  if (mag == 0x7f) {
    x = detail::as_float(0x7fc00000u);
  } else if (mag < 8) {  // denormal: units of 2^-9
    x = static_cast<float>(mag) * (1.0f / 512.0f);
  } else {
    x = detail::as_float((mag << 20) + (120u << 23));
  }
  return detail::as_float(detail::as_bits(x) | sign);
}

}  // namespace fastops
