// Where the keys of a quantised paged cache come from: eight codes at a time become eight numbers on their way to
// shared memory. Formats and layouts: docs/ops/attention_paged.md.
#pragma once
#include "cuda/attention/attention_rows.cuh"

namespace fastops::cuda {

// Eight codes of `kind` from an address that is a multiple of their bytes (8, 4 or 2).
FASTOPS_DEVICE void load_codes(int32_t kind, const char* at, float (&x)[8]) {
  if (kind == kKvU4 || kind == kKvU2) {
    const int bits = kind == kKvU4 ? 4 : 2;
    const uint32_t word =
        kind == kKvU4 ? *reinterpret_cast<const uint32_t*>(at) : *reinterpret_cast<const uint16_t*>(at);
    FASTOPS_UNROLL
    for (int i = 0; i < 8; ++i) x[i] = static_cast<float>(word >> (bits * i) & ((1u << bits) - 1));
    return;
  }
  const uint64_t word = *reinterpret_cast<const uint64_t*>(at);
  FASTOPS_UNROLL
  for (int i = 0; i < 8; ++i) {
    const auto code = static_cast<uint8_t>(word >> (8 * i));
    x[i] = kind == kKvI8   ? static_cast<float>(static_cast<int8_t>(code))
           : kind == kKvF8 ? from_f8(code)
                           : static_cast<float>(code);
  }
}

template <class T>
struct QuantKeys {
  static constexpr bool kDecodes = true;
  const AttentionParams& p;
  const int32_t* table;
  int64_t packed;
  int b, hkv;
  bool good;
  FASTOPS_DEVICE QuantKeys(const AttentionParams& params, const Sequence& s, int batch, int head)
      : p(params), table(p.table + batch * p.table_sb), packed(s.Sk), b(batch), hkv(head), good(true) {
    if (p.packed == nullptr) return;
    packed = p.packed[b * p.packed_stride];
    good = packed >= 0 && packed <= s.Sk && packed >= s.Sk - p.recent;
    if (!good) packed = s.Sk;
  }

  // Channels 8 c to 8 c + 7 of key j in T. False: its page is no page of the cache.
  template <bool kValues>
  FASTOPS_DEVICE bool load(int64_t j, int c, Bytes16* out) const {
    const KvSide& q = kValues ? p.vq : p.kq;
    if (j >= packed) {
      const int64_t at = b * q.recent_s[0] + j % p.recent * q.recent_s[1] + hkv * q.recent_s[2] + c * kChunk;
      *out = load16(reinterpret_cast<const T*>(q.recent) + at);
      return true;
    }
    const int64_t page = table[(j >> p.page_shift) * p.table_sp], slot = j & p.page_mask;
    if (!good || page < 0 || page >= p.pages) return false;
    const int64_t row =
        kValues ? page * p.v_sb + slot * p.v_ss + hkv * p.v_sh : page * p.k_sb + slot * p.k_ss + hkv * p.k_sh;
    const char* data = kValues ? p.v : p.k;
    if (q.kind == kKvPlain) {
      *out = load16(reinterpret_cast<const T*>(data) + row + c * kChunk);
      return true;
    }
    float x[8];
    load_codes(q.kind, data + row + c * (q.kind == kKvU4 ? 4 : q.kind == kKvU2 ? 2 : 8), x);
    int64_t scale_at = 0, shift_at = 0;
    const int64_t at[4] = {page, slot >> q.group_shift, hkv, q.each ? c * kChunk : c * kChunk / q.channels};
    FASTOPS_UNROLL
    for (int i = 0; i < 4; ++i) {
      scale_at += at[i] * q.scale_s[i];
      shift_at += at[i] * q.shift_s[i];
    }
    const int64_t scale_step = q.each ? q.scale_s[3] : 0, shift_step = q.each ? q.shift_s[3] : 0;
    union {
      Bytes16 bytes;
      T element[8];
    } all;
    float scale = 1.0f, shift = 0.0f;
    FASTOPS_UNROLL
    for (int i = 0; i < 8; ++i) {
      if (i == 0 || q.each) {
        if (q.scale) scale = number_at(q.scale, q.scale_dtype, scale_at + i * scale_step);
        if (q.shift) shift = number_at(q.shift, q.scale_dtype, shift_at + i * shift_step);
        if (q.shift_is_zero) shift *= -scale;
      }
      narrow(x[i] * scale + shift, &all.element[i]);
    }
    *out = all.bytes;
    return true;
  }
};

}  // namespace fastops::cuda
