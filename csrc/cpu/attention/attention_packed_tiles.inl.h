// Packed for AMX: products by tiles. An fp16 or fp32 number is the sum of two or three bf16 (8 bits of its significand
// each), and a product of two such sums is that of their parts, but for the smallest ones (amx_tile.inl.h): 3, 4 or 6
// products instead of one, where a tile does in 16 cycles what 256 FMAs do in 128. Their error is that of fp32.
//
// The parts of a NaN are NaNs, those of an infinity, and of a number of 2^127 or more that the first part rounds up to
// one, also: values are then weighed key by key, and where q or K has one, the item is computed once more by Packed
// (`sound`). Numbers below 2^-110 lose their last bits: tiles take subnormal bf16 for zeros.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

#if defined(FASTOPS_HAS_AMX)
template <class T>
struct PackedTiles : Packed<T> {
  using Packed<T>::w;
  static constexpr int kParts = sizeof(T) == 4 ? 3 : kIsBf16<T> ? 1 : 2;
  static constexpr int kKeys = packed_tile_keys(kParts);
  static_assert(kKeys % 32 == 0 && kKeys <= kMaxKeyTile);
  int64_t k_part, v_part;  // units between parts
  vf largest = vzero();    // magnitude of q and K, NaNs apart
  RowStream ahead;         // rows of the next tile, asked for while this one is multiplied
  int lines = 0;           // of them, for each block of a product
  static constexpr float kTooLarge = 0x1p127f;
  static int rows_at_once() { return kPackedRows; }

  PackedTiles(Work<T>& work, const AttentionParams& p) : Packed<T>(work, p) {
    w.BK = w.tile = kKeys;
    w.depth = (w.D + 31) / 32 * 16;  // a tile row holds 16 units
    w.ldq = kParts * w.depth;
    k_part = static_cast<int64_t>(w.depth) * kKeys;
    v_part = static_cast<int64_t>(kKeys / 2) * w.VP;
  }
  bool sound() const { return kParts == 1 || vhmax(largest) < kTooLarge; }

  // The parts of x, in the upper halves of lanes. Nothing is left to round in the last one, and a NaN with all bits
  // set, which rounds to -0, stays one there.
  static FASTOPS_INLINE void split(vf x, vf (&part)[kParts]) {
    FASTOPS_UNROLL
    for (int i = 0; i + 1 < kParts; ++i) {
      part[i] = vround_bf16(x);
      x = vsub(x, part[i]);
    }
    part[kParts - 1] = x;
  }
  // One vector of 32-bit units for each part: a in the lower half of a lane, b in the upper one.
  static FASTOPS_INLINE void store_parts(vf a, vf b, float* to, int64_t step) {
    vf first[kParts], second[kParts];
    split(a, first);
    split(b, second);
    FASTOPS_UNROLL
    for (int i = 0; i < kParts; ++i) vstore(to + i * step, vupper_pairs(first[i], second[i]));
  }
  template <class U>
  static FASTOPS_INLINE vf load_of(const U* row, int d, int size) {  // zero beyond `size`
    return d + W <= size ? vload(row + d) : d < size ? vloadn(row + d, size - d) : vzero();
  }

  void load_q(const AttentionParams& p, const AttentionItem& it, const Sequence& seq, int h) {
    if constexpr (kParts == 1) {
      load_q_rows(p, it, seq, w, h);
    } else {
      if (p.dtype == 1) return load_q_as<float>(p, it, seq, h);
      if (p.dtype == 2) return load_q_as<f16>(p, it, seq, h);
      load_q_as<bf16>(p, it, seq, h);
    }
  }
  template <class Q>
  void load_q_as(const AttentionParams& p, const AttentionItem& it, const Sequence& seq, int h) {
    const Q* base = reinterpret_cast<const Q*>(p.q) + it.b * p.q_sb + seq.q0 * p.q_ss + (it.hkv + h) * p.G * p.q_sh;
    for (int r = 0; r < w.rows; ++r) {
      const int64_t at = it.row0 + r;
      const Q* src = base + at / p.G * p.q_ss + at % p.G * p.q_sh;
      float* dst = w.q + (static_cast<int64_t>(h) * w.rows + r) * w.ldq;
      for (int d = 0; d < 2 * w.depth; d += 2 * W) {
        const vf first = load_of(src, d, w.D), second = load_of(src, d + W, w.D);
        vf a[kParts], b[kParts];
        split(first, a);
        split(second, b);
        note(first);
        note(second);
        for (int i = 0; i < kParts; ++i) vistore(dst + i * w.depth + d / 2, vupper(a[i], b[i]));
      }
    }
  }

  FASTOPS_INLINE void note(vf x) { largest = _mm512_max_ps(_mm512_abs_ps(x), largest); }  // (the second of a NaN)

  // K -> for each part [depth][BK]: pairs of channels down, keys across.
  void pack_k_parts(int n) {
    for (int j = 0; j < n; j += W) {
      for (int d = 0; d < 2 * w.depth; d += W) {
        vf r[W];
        for (int i = 0; i < W; ++i) note(r[i] = load_of(j + i < n ? w.kr[j + i] : w.zero_row, d, w.D));
        vtranspose(r);
        float* dst = w.k + static_cast<int64_t>(d / 2) * w.BK + j;
        FASTOPS_UNROLL
        for (int i = 0; i < W; i += 2, dst += w.BK) store_parts(r[i], r[i + 1], dst, k_part);
      }
    }
  }
  // V -> for each part [keys / 2][VP]: pairs of keys.
  void pack_v_parts(int n) {
    vf poison = vzero();
    for (int u = 0; u < value_units(n); ++u) {
      const T* a = 2 * u < n ? w.vr[2 * u] : w.zero_row;
      const T* b = 2 * u + 1 < n ? w.vr[2 * u + 1] : w.zero_row;
      float* dst = w.v + static_cast<int64_t>(u) * w.VP;
      for (int d = 0; d < w.VP; d += W) {
        const vf x = load_of(a, d, w.Dv), y = load_of(b, d, w.Dv);
        poison = vfma(vadd(x, x), vzero(), vfma(vadd(y, y), vzero(), poison));
        store_parts(x, y, dst + d, v_part);
      }
    }
    this->v_is_finite = vall_finite(poison);
  }
  static int value_units(int n) { return (n + 31) / 32 * 16; }

  void prepare(int n, int next) {
    if constexpr (kParts == 1) {
      this->pack_k(n, 0);
      this->pack_v(n, 0, value_units(n));
    } else {
      pack_k_parts(n);
      pack_v_parts(n);
    }
    const int64_t k_bytes = w.D * static_cast<int64_t>(sizeof(T)), v_bytes = w.Dv * static_cast<int64_t>(sizeof(T));
    ahead = RowStream(w.kr + w.tile, next, k_bytes, w.vr + w.tile, next, v_bytes);
    const int blocks = (w.rows + 31) / 32 * ((n + 31) / 32 + (w.Dv + 31) / 32);
    lines = static_cast<int>(next * (k_bytes + v_bytes) / 64 / blocks) + 1;
  }
  static constexpr bool kSeesV = kParts > 1;  // where it is not finite, all rows add it key by key

  void scores(int r0, int rows, int n) {
    const int cols = (n + W - 1) / W * W;
    tile_gemm<DotBf16, kParts, kParts, kParts == 2>(w.q + r0 * w.ldq, w.ldq, w.k, w.BK, w.s, w.BK, rows, cols, w.depth,
                                                    false, {w.depth, k_part}, [this] { ahead.step(lines); });
  }
  void accumulate(int r0, int rows, int n) {
    const int cols = (w.Dv + W - 1) / W * W;
    tile_gemm<DotBf16, kParts, kParts>(w.p16, kParts * w.BK / 2, w.v, w.VP, w.st.o + static_cast<int64_t>(r0) * w.VP,
                                       w.VP, rows, cols, value_units(n), true, {w.BK / 2, v_part},
                                       [this] { ahead.step(lines); });
  }
};
#endif

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
