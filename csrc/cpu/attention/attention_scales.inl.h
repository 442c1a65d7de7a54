// The scales of a run of keys of a quantised cache whose codes are multiplied as they are (one scale, and one zero or
// minimum, a key and head): a vector of 16 keys for each head, and what stands for code 0 as these modes see it.
#if defined(FASTOPS_HAS_VNNI)
namespace fastops::cpu::FASTOPS_ISA {
namespace {

// Whether both sides of a cache are of that kind, with no scales or one for a key and head.
inline bool codes_of_keys(const AttentionParams& p, const AttentionItem& it, int32_t kind) {
  const auto same = [&](const KvSide& q, int dim) {
    return q.kind == kind && ((!q.scale && !q.shift) || (!q.each && q.channels == dim));
  };
  return it.rows <= kDirectRows && p.packed == nullptr && same(p.kq, p.D) && same(p.vq, p.Dv);
}
inline bool one_scale_a_key(const AttentionParams& p, const AttentionItem& it, int32_t kind) {
  return codes_of_keys(p, it, kind) && p.kq.scale && p.vq.scale;
}

struct KeyScales {
  int heads, tile;
  float *ks, *kb, *vs, *vb;  // [heads][tile]

  KeyScales(int item_heads, int keys, float* scratch)
      : heads(item_heads),
        tile(keys),
        ks(scratch),
        kb(ks + heads * tile),
        vs(kb + heads * tile),
        vb(vs + heads * tile) {}
  float* end() const { return vb + heads * tile; }

  // The numbers of keys [key, key + n). A shift stands for `middle` times the scale and a minimum, or less a zero.
  void load(const AttentionParams& p, const AttentionItem& it, const int32_t* page_table, int64_t key, int n,
            float middle) {
    side(p, p.kq, it, page_table, key, n, middle, ks, kb);
    side(p, p.vq, it, page_table, key, n, middle, vs, vb);
  }

 private:
  void side(const AttentionParams& p, const KvSide& q, const AttentionItem& it, const int32_t* page_table, int64_t key,
            int n, float middle, float* scale, float* shift) const {
    const vf centre = vset(middle);
    const int64_t scale_head = it.hkv * q.scale_s[2], shift_head = it.hkv * q.shift_s[2];
    for (int j = 0; j < n; j += W) {
      int64_t at[W], shift_at[W];  // of each key
      const int64_t slot = (key + j) & p.page_mask;
      const bool one_page = slot + W <= p.page_mask + 1 && j + W <= n;
      for (int i = 0; i < W; ++i) {
        if (i > 0 && one_page && q.group_shift == 0) {
          at[i] = at[i - 1] + q.scale_s[1];
          shift_at[i] = shift_at[i - 1] + q.shift_s[1];
          continue;
        }
        const int64_t t = key + (j + i < n ? j + i : n - 1), page = page_table[(t >> p.page_shift) * p.table_sp];
        const int64_t group = (t & p.page_mask) >> q.group_shift;
        at[i] = page * q.scale_s[0] + group * q.scale_s[1] + scale_head;
        shift_at[i] = page * q.shift_s[0] + group * q.shift_s[1] + shift_head;
      }
      vf s[W], z[W];
      heads_of(q.scale, q.scale_dtype, at, q.scale_s, s);
      if (q.shift) heads_of(q.shift, q.scale_dtype, shift_at, q.shift_s, z);
      for (int h = 0; h < heads; ++h) {
        vstore(scale + h * tile + j, s[h]);
        const vf zero = q.shift ? z[h] : vzero();
        vstore(shift + h * tile + j, q.shift_is_zero ? vmul(vsub(centre, zero), s[h]) : vfma(centre, s[h], zero));
      }
    }
  }
  // Numbers of the item's heads, a vector of 16 keys for each head. at: where the first head's stands for each key.
  void heads_of(const char* base, int32_t dtype, const int64_t (&at)[W], const int64_t (&step)[4], vf (&out)[W]) const {
    if (step[1] == 1 && at[W - 1] - at[0] == W - 1) {  // keys lie side by side
      for (int h = 0; h < heads; ++h) out[h] = numbers(base, dtype, at[0] + h * step[2], W);
      return;
    }
    if (step[2] == 1 && heads <= 8) {  // two keys in a vector, whose quarters are turned and put in order
      vf x[8];
      for (int i = 0; i < 8; ++i) x[i] = pair(base, dtype, at[i / 4 * 8 + i % 4], at[i / 4 * 8 + i % 4 + 4]);
      for (int i = 0; i < 8; i += 4) {
        const vf ab = _mm512_unpacklo_ps(x[i], x[i + 1]), cd = _mm512_unpacklo_ps(x[i + 2], x[i + 3]);
        const vf AB = _mm512_unpackhi_ps(x[i], x[i + 1]), CD = _mm512_unpackhi_ps(x[i + 2], x[i + 3]);
        x[i] = _mm512_shuffle_ps(ab, cd, 0x44);
        x[i + 1] = _mm512_shuffle_ps(ab, cd, 0xee);
        x[i + 2] = _mm512_shuffle_ps(AB, CD, 0x44);
        x[i + 3] = _mm512_shuffle_ps(AB, CD, 0xee);
      }
      for (int i = 0; i < 4; ++i) {
        out[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
        out[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
      }
      return;
    }
    for (int i = 0; i < W; ++i) {
      if (step[2] == 1) {
        out[i] = numbers(base, dtype, at[i], heads);
        continue;
      }
      float x[W] = {};
      for (int h = 0; h < heads; ++h) x[h] = number_at(base, dtype, at[i] + h * step[2]);
      out[i] = vload(x);
    }
    vtranspose(out);
  }
  static vf numbers(const char* base, int32_t dtype, int64_t at, int n) {
    if (dtype == 2) return vloadn(reinterpret_cast<const f16*>(base) + at, n);
    if (dtype == 1) return vloadn(reinterpret_cast<const float*>(base) + at, n);
    return vloadn(reinterpret_cast<const bf16*>(base) + at, n);
  }
  // Up to eight numbers at `at`, and as many at `then`.
  vf pair(const char* base, int32_t dtype, int64_t at, int64_t then) const {
    const auto m = static_cast<__mmask8>((1u << heads) - 1u);
    if (dtype == 1) {
      const auto* x = reinterpret_cast<const float*>(base);
      return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_maskz_loadu_ps(m, x + at)),
                                _mm256_maskz_loadu_ps(m, x + then), 1);
    }
    const auto* x = reinterpret_cast<const uint16_t*>(base);
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_maskz_loadu_epi16(m, x + at)),
                                                 _mm_maskz_loadu_epi16(m, x + then), 1);
    if (dtype == 2) return _mm512_cvtph_ps(both);
    return vi_as_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(both), 16));
  }
};

// The same key by key: what a vector holds belongs to one key, a head in each lane.
struct HeadNumbers {
  struct Pair {
    vf scale, shift;
  };
  struct Places {
    int64_t scale, shift;  // of a key's first head; shift 0 where there are none
  };
  const KvSide& q;
  int heads;
  Places *now, *next;  // of a tile, and of the one behind it

  HeadNumbers(const KvSide& side, int item_heads, Places* scratch)
      : q(side), heads(item_heads), now(scratch), next(scratch + kDirectKeys) {}
  Places* end() const { return (now < next ? now : next) + 2 * kDirectKeys; }
  // What `at` has to know: the type of numbers that lie side by side, 0 for others.
  int layout() const { return q.scale_s[2] == 1 && (q.shift == nullptr || q.shift_s[2] == 1) ? q.scale_dtype : 0; }

  // Finds the numbers of the next tile, keys [key, key + n), and asks for their lines.
  void find(const AttentionParams& p, const AttentionItem& it, const int32_t* page_table, int64_t key, int n) {
    const int size = q.scale_dtype == 1 ? 4 : 2;
    for (int j = 0; j < n;) {
      const int64_t t = key + j, page = page_table[(t >> p.page_shift) * p.table_sp];
      const int64_t scale = page * q.scale_s[0] + it.hkv * q.scale_s[2];
      const int64_t shift = page * q.shift_s[0] + it.hkv * q.shift_s[2];
      const int64_t slot = t & p.page_mask, left = p.page_mask + 1 - slot;
      const int run = left < n - j ? static_cast<int>(left) : n - j;
      const int64_t step = q.scale_s[1], shift_step = q.shift_s[1];
      if (q.group_shift == 0) {
        Places at{scale + slot * step, shift + slot * shift_step};
        for (int i = 0; i < run; ++i, at = {at.scale + step, at.shift + shift_step}) next[j + i] = at;
      } else {
        for (int i = 0; i < run; ++i) {
          const int64_t group = (slot + i) >> q.group_shift;
          next[j + i] = {scale + group * step, shift + group * shift_step};
        }
      }
      ask(q.scale, next[j].scale, next[j + run - 1].scale, size);
      if (q.shift) ask(q.shift, next[j].shift, next[j + run - 1].shift, size);
      j += run;
    }
  }
  void advance() {
    Places* was = now;
    now = next;
    next = was;
  }

  // Those of key j of this tile. A shift is a minimum, or stands for a zero.
  FASTOPS_INLINE Pair at(int layout, int j) const {
    if (layout == 2) return at<2>(j);
    if (layout == 3) return at<3>(j);
    return layout == 1 ? at<1>(j) : at<0>(j);
  }
  template <int kLayout>
  FASTOPS_INLINE Pair at(int j) const {
    static constexpr int64_t kNone[W / 2] = {};
    const vf s = numbers<kLayout>(q.scale, now[j].scale, q.scale_s[2]);
    const vf z = numbers<kLayout>(q.shift ? q.shift : reinterpret_cast<const char*>(kNone), now[j].shift,
                                  q.shift ? q.shift_s[2] : 0);
    return {s, q.shift_is_zero ? vmul(vsub(vzero(), z), s) : z};
  }

 private:
  // The lines from the numbers at `first` to those at `last`, or of some of them where they lie far apart.
  void ask(const char* base, int64_t first, int64_t last, int size) const {
    const int64_t bytes = (last - first) * size, step = bytes > 64 * kDirectKeys ? bytes / kDirectKeys : 64;
    for (int64_t i = 0; i <= bytes; i += step) vprefetch(base + first * size + i);
    vprefetch(base + last * size + (heads - 1) * size);
  }
  template <int kLayout>
  FASTOPS_INLINE vf numbers(const char* base, int64_t at, int64_t step) const {
    if constexpr (kLayout == 0) {
      return apart(base, at, step);
    } else if constexpr (kLayout == 1) {
      return vloadn(reinterpret_cast<const float*>(base) + at, heads);
    } else if constexpr (kLayout == 2) {
      return vloadn(reinterpret_cast<const f16*>(base) + at, heads);
    } else {
      return vloadn(reinterpret_cast<const bf16*>(base) + at, heads);
    }
  }
  __attribute__((noinline)) vf apart(const char* base, int64_t at, int64_t step) const {
    float x[W] = {};
    for (int h = 0; h < heads; ++h) x[h] = number_at(base, q.scale_dtype, at + h * step);
    return vload(x);
  }
};

// What the modes that multiply codes share.
template <int kKind>
struct Code {  // codes of a kind
  uint8_t bits;
};

template <int kKind>
struct CodeMode {
  static constexpr int kParts = 0;
  static constexpr bool kReadsCodes = true;
  static constexpr bool kStreams = true;
  static bool sound() { return true; }
  static constexpr bool kSeesV = false;
  static constexpr bool kInLanes = false;
  static constexpr int kKeysTogether = 1;
  static int rows_at_once() { return kDirectRows; }
  Work<Code<kKind>>& w;
  const AttentionParams& p;
  int64_t k_bytes, v_bytes;  // of one key, all heads of the item
  int next = 0;              // keys behind this tile to be asked for
  bool asks = true;          // as Direct has it
  KeyScales numbers;

  // Tiles of so many keys.
  CodeMode(Work<Code<kKind>>& work, const AttentionParams& params, int keys)
      : w(work), p(params), numbers(w.heads, w.tile = w.BK = keys, reinterpret_cast<float*>(w.raw)) {
    w.k_step = p.k_sh;
    w.v_step = p.v_sh;
    k_bytes = (w.heads - 1) * w.k_step + bytes(w.D);
    v_bytes = (w.heads - 1) * w.v_step + bytes(w.Dv);
  }
  static int64_t bytes(int64_t dim) { return dim * kCodeBits<kKind> / 8; }

  void prepare(int n, int next_n) {
    next = next_n;
    for (int j = n; j < (n + W - 1) / W * W; ++j) {  // their scores are masked away
      w.kr[j] = w.kr[n - 1];
      w.vr[j] = w.vr[n - 1];
    }
  }
};

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
#endif
