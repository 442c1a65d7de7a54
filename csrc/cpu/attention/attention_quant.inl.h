// The tile source of quantised pages. A run of keys is decoded into scratch for all heads of the item, each page read
// once and in memory order, and the tile loop sees ordinary rows. Formats and layouts: docs/ops/attention_paged.md.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

template <int kKind>
constexpr int kCodeBits = kKind == kKvU4   ? 4
                          : kKind == kKvU2 ? 2
                                           : 8;

// W codes of a row from element d on, d a multiple of W.
template <int kKind>
FASTOPS_INLINE vf codes_at(const uint8_t* row, int d) {
  const uint8_t* p = row + d * kCodeBits<kKind> / 8;
  if constexpr (kKind == kKvI8) return vload_i8(p);
  if constexpr (kKind == kKvF8) return vload_f8(p);
  if constexpr (kKind == kKvU8) return vload_u8(p);
  if constexpr (kKind == kKvU4) return vload_u4(p);
  if constexpr (kKind == kKvU2) return vload_u2(p);
}

// The last n < W codes: no byte behind the row is read.
template <int kKind>
FASTOPS_INLINE vf codes_atn(const uint8_t* row, int d, int n) {
  uint8_t tail[W] = {};
  std::memcpy(tail, row + d * kCodeBits<kKind> / 8, static_cast<size_t>(n * kCodeBits<kKind> / 8));
  return codes_at<kKind>(tail, 0);
}

#if defined(FASTOPS_HAS_BF16_DOT)
template <int kKind>
constexpr bool kFewCodes = kKind == kKvU4 || kKind == kKvU2;
// Every value that codes of few bits stand for, again and again.
template <int kKind>
FASTOPS_INLINE __m512i values_of(vf scale, vf shift) {
  const vf lanes = vlanes();
  const vf code = kKind == kKvU4 ? lanes : vsub(lanes, vmul(vset(4), _mm512_floor_ps(vmul(lanes, vset(0.25f)))));
  return _mm512_broadcast_i64x4(vnarrow_bf16(vfma(code, scale, shift)));
}
// `groups` runs of 32 codes with a scale and a shift each.
template <int kKind>
FASTOPS_INLINE void decode_runs(const uint8_t* row, int groups, const float* scale, const float* shift, bf16* out) {
  constexpr int kRun = 2 * W;
  for (int c = 0; c < groups; ++c, row += kRun * kCodeBits<kKind> / 8, out += kRun) {
    const __m512i table = values_of<kKind>(vset(scale[c]), vset(shift[c]));
    _mm512_storeu_si512(out, vlookup_bf16<kCodeBits<kKind>>(row, table));
  }
}
#endif

// out = code * scale + shift, for n codes that share them.
template <int kKind, class T>
FASTOPS_INLINE void decode_same(const uint8_t* row, int n, float scale, float shift, T* out) {
  const vf s = vset(scale), m = vset(shift);
  int d = 0;
#if defined(FASTOPS_HAS_BF16_DOT)
  if constexpr (kIsBf16<T> && kKind == kKvF8) {  // as they are, where nothing is to be multiplied
    if (scale == 1.0f && shift == 0.0f)
      for (; d + 2 * W <= n; d += 2 * W) _mm512_storeu_si512(out + d, vload_f8_bf16(row + d));
  }
  if constexpr (kIsBf16<T> && kFewCodes<kKind>) {
    const __m512i table = values_of<kKind>(s, m);
    for (; d + 2 * W <= n; d += 2 * W)
      _mm512_storeu_si512(out + d, vlookup_bf16<kCodeBits<kKind>>(row + d * kCodeBits<kKind> / 8, table));
  }
#endif
  for (; d + W <= n; d += W) vstore(out + d, vfma(codes_at<kKind>(row, d), s, m));
  if (d < n) vstoren(out + d, vfma(codes_atn<kKind>(row, d, n - d), s, m), n - d);
}

// The same with a scale and a shift for each channel.
template <int kKind, class T>
FASTOPS_INLINE void decode_each(const uint8_t* row, int n, const float* scale, const float* shift, T* out) {
  int d = 0;
  for (; d + W <= n; d += W) vstore(out + d, vfma(codes_at<kKind>(row, d), vload(scale + d), vload(shift + d)));
  if (d < n) {
    const int left = n - d;
    const vf x = vfma(codes_atn<kKind>(row, d, left), vloadn(scale + d, left), vloadn(shift + d, left));
    vstoren(out + d, x, left);
  }
}

template <class From, class T>
inline void copy_row_as(const char* row, int n, T* out) {
  const From* x = reinterpret_cast<const From*>(row);
  int d = 0;
  for (; d + W <= n; d += W) vstore(out + d, vload(x + d));
  if (d < n) vstoren(out + d, vloadn(x + d, n - d), n - d);
}
template <class T>
inline void copy_row(const char* row, int32_t dtype, int n, T* out) {
  if (dtype == 1) copy_row_as<float>(row, n, out);
  if (dtype == 2) copy_row_as<f16>(row, n, out);
  if (dtype == 3) copy_row_as<bf16>(row, n, out);
}

inline float number_at(const char* base, int32_t dtype, int64_t i) {
  if (dtype == 1) return reinterpret_cast<const float*>(base)[i];
  return dtype == 2 ? to_f32(reinterpret_cast<const f16*>(base)[i]) : to_f32(reinterpret_cast<const bf16*>(base)[i]);
}

// One scale for a whole cache of e4m3 (vLLM's) need not meet every code: that of K goes into the scores' scale, that of
// V to the end. Takes them out of `p`.
inline void fold_scales(AttentionParams& p, AttentionItem& it) {
  const auto take = [](KvSide& q) {
    if (q.kind != kKvF8 || q.scale == nullptr || q.shift != nullptr) return 1.0f;
    for (int64_t step : q.scale_s)
      if (step != 0) return 1.0f;
    const float scale = number_at(q.scale, q.scale_dtype, 0);
    q.scale = nullptr;
    return scale;
  };
  if (p.packed != nullptr) return;  // its recent tokens have none
  p.scale *= take(p.kq);
  it.v_factor = take(p.vq);
}

template <class T>
struct QuantSource {
  using Elem = T;
  static constexpr bool kDecodes = true;
  const AttentionParams& p;
  const AttentionItem& it;
  const int32_t* table;
  int64_t packed;  // keys before it lie in pages, the others in the window of recent ones
  int heads;

  QuantSource(const AttentionParams& params, const AttentionItem& item, const Sequence& s)
      : p(params),
        it(item),
        table(p.table + it.b * p.table_sb),
        packed(p.packed ? p.packed[it.b * p.packed_stride] : s.Sk),
        heads(static_cast<int>(it.heads)) {}

  // Rows of keys [key, key + n) into `raw`; the pages of the next `ahead` keys are asked for meanwhile.
  void decode(int64_t key, int n, int ahead, T* raw, const T** kr, const T** vr) const {
    T* raw_v = raw + static_cast<int64_t>(n) * heads * p.D;
    for (int j = 0; j < n; ++j) {
      kr[j] = raw + static_cast<int64_t>(j) * heads * p.D;
      vr[j] = raw_v + static_cast<int64_t>(j) * heads * p.Dv;
    }
    side(p.kq, p.k, p.k_sb, p.k_ss, p.k_sh, p.D, key, n, ahead, raw);
    side(p.vq, p.v, p.v_sb, p.v_ss, p.v_sh, p.Dv, key, n, ahead, raw_v);
  }

 private:
  void side(const KvSide& q, const char* codes, int64_t sb, int64_t ss, int64_t sh, int dim, int64_t key, int n,
            int ahead, T* out) const {
    if (q.kind == kKvPlain) return rows<kKvPlain>(q, codes, sb, ss, sh, dim, key, n, ahead, out);
    if (q.kind == kKvI8) return rows<kKvI8>(q, codes, sb, ss, sh, dim, key, n, ahead, out);
    if (q.kind == kKvF8) return rows<kKvF8>(q, codes, sb, ss, sh, dim, key, n, ahead, out);
    if (q.kind == kKvU8) return rows<kKvU8>(q, codes, sb, ss, sh, dim, key, n, ahead, out);
    if (q.kind == kKvU4) return rows<kKvU4>(q, codes, sb, ss, sh, dim, key, n, ahead, out);
    return rows<kKvU2>(q, codes, sb, ss, sh, dim, key, n, ahead, out);
  }

  template <int kKind>
  void rows(const KvSide& q, const char* codes, int64_t sb, int64_t ss, int64_t sh, int dim, int64_t key, int n,
            int ahead, T* out) const {
    const int64_t size = kKind == kKvPlain && p.dtype == 1 ? 4 : kKind == kKvPlain ? 2 : 1;
    const int64_t bytes = (heads - 1) * sh * size + dim * size * (kKind == kKvPlain ? 8 : kCodeBits<kKind>) / 8;
    codes += it.hkv * sh * size;
    sh *= size;
    const auto row_at = [&](int64_t t) {
      return codes +
             (static_cast<int64_t>(table[(t >> p.page_shift) * p.table_sp]) * sb + (t & p.page_mask) * ss) * size;
    };
    const int64_t step = static_cast<int64_t>(heads) * dim;
    alignas(64) float scale[kMaxHeadDim] = {}, shift[kMaxHeadDim] = {};
    const int64_t in_pages = packed - key < n ? (packed > key ? packed - key : 0) : n;
    int64_t j = 0;
    while (j < in_pages) {
      int64_t end = in_pages;
      const int64_t slot = (key + j) & p.page_mask, page = table[((key + j) >> p.page_shift) * p.table_sp];
      if (p.page_mask + 1 - slot < end - j) end = j + p.page_mask + 1 - slot;
      if constexpr (kKind != kKvPlain) {
        if (q.each) {  // the keys of one group share the numbers of each channel
          const int64_t group = int64_t{1} << q.group_shift, left = group - (slot & (group - 1));
          if (left < end - j) end = j + left;
        }
      }
      for (int64_t i = j; i < end; ++i)
        if (i < ahead && key + n + i < packed)
          for (const char *at = row_at(key + n + i), *stop = at + bytes; at < stop; at += 64) vprefetch(at);
      const char* row = codes + (page * sb + slot * ss) * size;
      if constexpr (kKind == kKvPlain) {
        for (; j < end; ++j, row += ss * size)
          for (int h = 0; h < heads; ++h) copy_row(row + h * sh, p.dtype, dim, out + j * step + h * dim);
      } else if (q.scale == nullptr && q.shift == nullptr) {  // codes stand for themselves
        const bool one_run = sh == dim * kCodeBits<kKind> / 8;
        const int runs = one_run ? 1 : heads, length = one_run ? heads * dim : dim;
        for (; j < end; ++j, row += ss)
          for (int h = 0; h < runs; ++h)
            decode_same<kKind>(reinterpret_cast<const uint8_t*>(row + h * sh), length, 1.0f, 0.0f,
                               out + j * step + h * dim);
      } else if (q.each) {
        for (int h = 0; h < heads; ++h) {
          numbers(q, page, slot, h, dim, scale, shift);
          for (int64_t i = j; i < end; ++i)
            decode_each<kKind>(reinterpret_cast<const uint8_t*>(row + (i - j) * ss + h * sh), dim, scale, shift,
                               out + i * step + h * dim);
        }
        j = end;
      } else {
        const int groups = dim / q.channels;
        for (int64_t at = slot; j < end; ++j, ++at, row += ss)
          for (int h = 0; h < heads; ++h) {
            const uint8_t* x = reinterpret_cast<const uint8_t*>(row + h * sh);
            T* y = out + j * step + h * dim;
            numbers(q, page, at, h, groups, scale, shift);
#if defined(FASTOPS_HAS_BF16_DOT)
            if constexpr (kIsBf16<T> && kFewCodes<kKind>) {
              if (q.channels == 2 * W) {
                decode_runs<kKind>(x, groups, scale, shift, y);
                continue;
              }
            }
#endif
            for (int c = 0, from = 0; c < groups; ++c, from += q.channels)
              decode_same<kKind>(x + from * kCodeBits<kKind> / 8, q.channels, scale[c], shift[c], y + from);
          }
      }
    }
    const int64_t q_size = p.dtype == 1 ? 4 : 2;
    for (; j < n; ++j)
      for (int h = 0; h < heads; ++h) {
        const int64_t at = it.b * q.recent_s[0] + (key + j) % p.recent * q.recent_s[1] + (it.hkv + h) * q.recent_s[2];
        copy_row(q.recent + at * q_size, p.dtype, dim, out + j * step + h * dim);
      }
  }

  // What the codes of the first n groups of channels of a key's head are multiplied by, and what is added.
  void numbers(const KvSide& q, int64_t page, int64_t slot, int64_t h, int n, float* scale, float* shift) const {
    const int64_t at[3] = {page, slot >> q.group_shift, it.hkv + h};
    int64_t si = 0, zi = 0;
    for (int i = 0; i < 3; ++i) {
      si += at[i] * q.scale_s[i];
      zi += at[i] * q.shift_s[i];
    }
    numbers_of(q.scale, q.scale_dtype, si, q.scale_s[3], n, 1.0f, scale);
    numbers_of(q.shift, q.scale_dtype, zi, q.shift_s[3], n, 0.0f, shift);
    if (!q.shift_is_zero || q.shift == nullptr) return;
    for (int c = 0; c < n; c += W) vstore(shift + c, vmul(vsub(vzero(), vload(shift + c)), vload(scale + c)));
  }
  // Fills whole vectors, unlike copy_row: a number that is read back at once would wait for a masked store (KIVI: a
  // sixth of all time).
  static void numbers_of(const char* base, int32_t dtype, int64_t at, int64_t step, int n, float otherwise, float* to) {
    if (base == nullptr) {
      for (int c = 0; c < n; c += W) vstore(to + c, vset(otherwise));
    } else if (step != 1) {
      for (int c = 0; c < n; ++c) to[c] = number_at(base, dtype, at + c * step);
    } else if (dtype == 1) {
      run_of(reinterpret_cast<const float*>(base) + at, n, to);
    } else if (dtype == 2) {
      run_of(reinterpret_cast<const f16*>(base) + at, n, to);
    } else {
      run_of(reinterpret_cast<const bf16*>(base) + at, n, to);
    }
  }
  template <class N>
  static void run_of(const N* from, int n, float* to) {
    for (int c = 0; c < n; c += W) vstore(to + c, n - c >= W ? vload(from + c) : vloadn(from + c, n - c));
  }
};

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
