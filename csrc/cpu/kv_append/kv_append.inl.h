// Quantising what enters a KV cache, the arithmetic of fastops.kv.quantize step by step, so that codes and scales are
// the same bits: with zeros QServe's KV4 (section 4.2), with minima and groups KIVI (section 3.3), otherwise symmetric.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

// A group at work. Scales and offsets stand once for each channel, so that codes need no notion of groups.
struct Appending {
  alignas(64) float low[kMaxHeadDim + 16], high[kMaxHeadDim + 16], scale[kMaxHeadDim + 16], offset[kMaxHeadDim + 16];
  alignas(64) uint8_t codes[kMaxHeadDim + 64];
};

inline int append_bits(int32_t kind) { return kind == kKvU4 ? 4 : kind == kKvU2 ? 2 : 8; }
inline bool append_signed(int32_t kind) { return kind == kKvI8 || kind == kKvF8; }
inline float append_top(int32_t kind) {  // the largest code
  return kind == kKvI8 ? 127.0f : kind == kKvF8 ? 448.0f : static_cast<float>((1 << append_bits(kind)) - 1);
}

// x as the scales' dtype has it, and to `at` of them.
inline float append_store(float x, int32_t dtype, char* to, int64_t at) {
  if (dtype == FASTOPS_F32) {
    reinterpret_cast<float*>(to)[at] = x;
    return x;
  }
  if (dtype == FASTOPS_F16) {
    f16* p = reinterpret_cast<f16*>(to) + at;
    from_f32(x, p);
    return to_f32(*p);
  }
  bf16* p = reinterpret_cast<bf16*>(to) + at;
  from_f32(x, p);
  return to_f32(*p);
}

template <class T>
FASTOPS_INLINE vf append_take(const char* row, int d, int n) {
  const T* p = reinterpret_cast<const T*>(row) + d;
  return n >= W ? vload(p) : vloadn(p, n);
}

// The smallest and largest number of each channel, over the tokens; returns whether all numbers are finite.
template <class T>
bool append_range(const AppendGroup& g, Appending& a) {
  vf poison = vzero();
  for (int d = 0; d < g.dim; d += W) {
    vf low = append_take<T>(g.rows[0], d, g.dim - d), high = low;
    poison = vfma(low, vzero(), poison);
    for (int t = 1; t < g.tokens; ++t) {
      const vf x = append_take<T>(g.rows[t], d, g.dim - d);
      low = vmin(low, x);
      high = vmax(high, x);
      poison = vfma(x, vzero(), poison);
    }
    vstore(a.low + d, low);
    vstore(a.high + d, high);
  }
  if (vall_finite(poison)) return true;
  for (int d = 0; d < g.dim; ++d) {  // once more, a NaN taking over
    float low = to_f32(reinterpret_cast<const T*>(g.rows[0])[d]), high = low;
    for (int t = 1; t < g.tokens; ++t) {
      const float x = to_f32(reinterpret_cast<const T*>(g.rows[t])[d]);
      if (!(x >= low)) low = x;
      if (!(x <= high)) high = x;
      if (x != x) break;
    }
    a.low[d] = low;
    a.high[d] = high;
  }
  return false;
}

// The smallest and largest of n channels' ranges.
FASTOPS_INLINE void append_reduce(const Appending& a, int d, int n, bool finite, float* low, float* high) {
  if (finite && n >= W) {  // n is a multiple of 8: the last vector may overlap the one before
    vf lo = vload(a.low + d), hi = vload(a.high + d);
    for (int i = W; i < n; i += W) {
      const int at = d + (i + W <= n ? i : n - W);
      lo = vmin(lo, vload(a.low + at));
      hi = vmax(hi, vload(a.high + at));
    }
    *low = -vhmax(vsub(vzero(), lo));
    *high = vhmax(hi);
    return;
  }
  *low = a.low[d];
  *high = a.high[d];
  for (int i = d + 1; i < d + n; ++i) {
    if (!(a.low[i] >= *low)) *low = a.low[i];
    if (!(a.high[i] <= *high)) *high = a.high[i];
    if (a.low[i] != a.low[i]) break;
  }
}

// Scales and shifts of every group of channels, to where they are kept; returns whether all scales are finite.
bool append_numbers(const KvSide& side, const AppendGroup& g, Appending& a, bool finite) {
  const float top = append_top(side.kind);
  const int channels = side.each ? 1 : side.channels;
  bool usable = true;
  for (int d = 0, i = 0; d < g.dim; d += channels, ++i) {
    float low, high, s, offset = 0.0f;
    append_reduce(a, d, channels, finite, &low, &high);
    if (g.shift) {
      s = (high - low) / top;
    } else {
      const float below = -low;
      s = (below > high || below != below ? below : high) / top;
    }
    s = append_store(s, side.scale_dtype, g.scale, i * side.scale_s[3]);
    if (s == 0.0f) s = append_store(1.0f, side.scale_dtype, g.scale, i * side.scale_s[3]);  // all one number
    if (g.shift) {
      const float shift =
          append_store(side.shift_is_zero ? -low / s : low, side.scale_dtype, g.shift, i * side.shift_s[3]);
      offset = side.shift_is_zero ? shift : -shift / s;
    }
    usable = usable && s - s == 0.0f;
    if (s - s != 0.0f) {  // infinite or NaN: with codes of 0 every number of the group reads as NaN
      s = __builtin_inff();
      offset = 0.0f;
    }
    for (int c = d; c < d + channels; ++c) {
      a.scale[c] = s;
      a.offset[c] = offset;
    }
  }
  return usable;
}

// Eight bytes of codes in as many bits each.
FASTOPS_INLINE uint64_t append_narrow(uint64_t x, int bits) {
  if (bits == 4) {
    x = (x | x >> 4) & 0x00ff00ff00ff00ffu;
    x = (x | x >> 8) & 0x0000ffff0000ffffu;
    return (x | x >> 16) & 0xffffffffu;
  }
  x = (x | x >> 6) & 0x000f000f000f000fu;
  x = (x | x >> 12) & 0x000000ff000000ffu;
  return (x | x >> 24) & 0xffffu;
}

template <class T, bool kWhole>  // kWhole: e4m3 rounds by itself
void append_codes(const KvSide& side, const AppendGroup& g, Appending& a, bool usable) {
  const vf top = vset(append_top(side.kind)), bottom = append_signed(side.kind) ? vsub(vzero(), top) : vzero();
  const vf middle = vset(side.kind == kKvU8 ? 128.0f : 0.0f);
  const int bits = append_bits(side.kind);
  for (int t = 0; t < g.tokens; ++t) {
    for (int d = 0; d < g.dim; d += W) {
      const vf x = vdiv(append_take<T>(g.rows[t], d, g.dim - d), vload(a.scale + d));
      if constexpr (kWhole) {
        const vf y = vround(vadd(x, vload(a.offset + d)));
        vstore_i8(reinterpret_cast<int8_t*>(a.codes) + d, vsub(vmin(vmax(y, bottom), top), middle));  // NaN: bottom
      } else {
        vstore_f8(a.codes + d, vmin(top, vmax(bottom, x)));
      }
    }
    if (!usable)
      for (int d = 0; d < g.dim; ++d)
        if (a.scale[d] == __builtin_inff()) a.codes[d] = side.kind == kKvU8 ? 0x80 : 0;
    if (bits == 8) {
      if (side.kind == kKvU8)
        for (int d = 0; d < g.dim; ++d) a.codes[d] ^= 0x80;
      std::memcpy(g.codes[t], a.codes, static_cast<size_t>(g.dim));
      continue;
    }
    for (int d = 0; d < g.dim; d += 8) {
      uint64_t eight;
      std::memcpy(&eight, a.codes + d, 8);
      eight = append_narrow(eight, bits);
      std::memcpy(g.codes[t] + d * bits / 8, &eight, static_cast<size_t>(bits));
    }
  }
}

template <class T>
void append_group_as(const KvSide& side, const AppendGroup& g) {
  Appending a;
  bool usable = true;
  if (g.scale) {
    const bool finite = append_range<T>(g, a);
    usable = append_numbers(side, g, a, finite);
  } else {
    for (int d = 0; d < g.dim; ++d) {
      a.scale[d] = g.given_scale;
      a.offset[d] = g.given_offset;
    }
  }
  for (int d = g.dim; d < g.dim + W; ++d) {  // lanes behind the last channel
    a.scale[d] = 1.0f;
    a.offset[d] = 0.0f;
  }
  if (side.kind == kKvF8) return append_codes<T, false>(side, g, a, usable);
  append_codes<T, true>(side, g, a, usable);
}

void append_group(const KvSide& side, const AppendGroup& g) {
  if (g.dtype == FASTOPS_F32) append_group_as<float>(side, g);
  if (g.dtype == FASTOPS_F16) append_group_as<f16>(side, g);
  if (g.dtype == FASTOPS_BF16) append_group_as<bf16>(side, g);
}

}  // namespace

extern const KvAppendTable kv_append_table;
const KvAppendTable kv_append_table = {&append_group};

}  // namespace fastops::cpu::FASTOPS_ISA
