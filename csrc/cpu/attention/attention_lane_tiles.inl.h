// Decode in bf16 by AMX: 16 keys' rows are read as a tile where they lie, and give the scores of all rows of q that fit
// a vector, one in each lane (attention_lanes.inl.h). What no tile can be read from (a last, partial one; small pages)
// is copied first.
//
// A product wants pairs of keys next to each other in every column of V, where V has pairs of channels. So P is written
// as pairs (p, 0) in one row and (0, p) in another: the first sums even channels, the second odd ones, and V stays
// where it lies. The eight rows of q a group has at most take the 16 rows of a tile.
//
// Zeros meet numbers that are not theirs in both products: of other heads, and of the neighbouring channel. An inf or
// NaN makes those NaN, and such items are computed once more by Lanes (`sound`).
namespace fastops::cpu::FASTOPS_ISA {
namespace {

#if defined(FASTOPS_HAS_AMX)
struct LaneTiles : LaneRows<Direct<bf16>, false, true> {
  using Rows = LaneRows<Direct<bf16>, false, true>;
  static constexpr int kTile = 256;  // units of one
  static constexpr int kKeys = 16;   // of one
  static constexpr int kChannels = 32;
  static constexpr int kLeastRows = 3;
  static constexpr int64_t kAhead = 64 << 10;  // of K, or of V, in a tile: asked for a tile ahead
  static constexpr int kKeysTogether = kKeys;  // pages of 16 keys and more then hold whole tiles
  int q_tiles, v_tiles;                        // of a head
  int weighed;                                 // keys weighed together
  float *copies, *p16;  // four tiles; and [heads of a vector][keys weighed together / 16] tiles of P
  int copy = 0;
  bool finite = true;

  LaneTiles(Work<bf16>& work, const AttentionParams& p)
      : Rows(work, p),
        q_tiles(work.D / kChannels),
        v_tiles(work.Dv / kChannels),
        copies(work.k),
        p16(work.k + 4 * kTile) {
    columns = w.Dv;
    part = W;
    held = kDirectRows;
    q_floats = 0;
    const int64_t room = (w.v - p16) + static_cast<int64_t>(attention_key_tile(w.D, w.Dv)) * w.VP;
    const int64_t fit = room / (group * W) / kKeys * kKeys;
    plan_tile(lanes);
    w.tile = w.BK = keys(kAhead, 2 * kKeys, w.tile);
    weighed = fit < w.tile ? static_cast<int>(fit) : w.tile;
    block = lead = w.tile;
    std::memset(w.q, 0, sizeof(float) * static_cast<size_t>(rows_held() / per * w.heads * q_tiles * kTile));
    take(0);
  }
  // Fewer rows are as fast, or faster, where Lanes multiplies them.
  static bool fits(const AttentionParams& p, const AttentionItem& it) {
    return it.rows >= kLeastRows && it.rows <= kSharedRows && p.D % kChannels == 0 && p.Dv % kChannels == 0;
  }
  void take(int first) {
    Rows::take(first);
    q = w.q + static_cast<int64_t>(first / per) * w.heads * q_tiles * kTile;
  }

  // q as [heads][tiles]: the lanes of a head, zeros elsewhere.
  void load_q(const AttentionParams& p, const AttentionItem& it, const Sequence& seq, int h) {
    const bf16* base =
        reinterpret_cast<const bf16*>(p.q) + it.b * p.q_sb + seq.q0 * p.q_ss + (it.hkv + h) * p.G * p.q_sh;
    for (int r = 0; r < rows_held(); ++r) {
      if (r % per == 0) take(r);
      const int64_t at = it.row0 + row_or_last(r % per);
      const bf16* src = base + at / p.G * p.q_ss + at % p.G * p.q_sh;
      float* dst = q + static_cast<int64_t>(h) * q_tiles * kTile + lane_of(h, r % per) % W;
      for (int d = 0; d < w.D; d += 2, dst += W) std::memcpy(dst, src + d, 4);
    }
    take(0);
  }

  void begin(int n) const {
    RowStream first(w.kr + w.tile, n, k_bytes, nullptr, 0, 0);
    first.step(1 << 10);
  }

  // 16 rows as a tile reads them; `step` 0: they have to be copied.
  struct Place {
    const bf16* first;
    int64_t step;
  };
  static Place place_of(const bf16* const* rows, int n) {
    const int64_t step = n < kKeys ? 0 : rows[1] - rows[0];
    bool even = true;
    for (int j = 2; j < kKeys && step != 0; ++j) even = even && rows[j] - rows[j - 1] == step;
    return {rows[0], even ? step * static_cast<int64_t>(sizeof(bf16)) : 0};
  }
  template <int I>
  FASTOPS_INLINE void load(Tiles& t, const Place& at, const bf16* const* rows, int n, int64_t offset) {
    if (at.step != 0) return t.load<I>(at.first + offset, at.step);
    float* to = copies + copy++ % 4 * kTile;
    for (int j = 0; j < kKeys; ++j)
      _mm512_store_si512(to + j * W, j < n ? _mm512_loadu_si512(rows[j] + offset) : _mm512_setzero_si512());
    t.load<I>(to, 64);
  }

  // Scores as [keys][lanes].
  void scores(int, int, int n) {
    RowStream stream = asks ? RowStream(w.kr, 0, k_bytes, w.vr, n, v_bytes) : RowStream();
    const int lines = (kKeys * w.Dv + w.D - 1) / w.D;
    for (int j = 0; j < n; j += 4 * kKeys) {
      Place at[4];
      const bf16* const* rows = w.kr + j;
      const int count = n - j < 4 * kKeys ? (n - j + kKeys - 1) / kKeys : 4;
      for (int b = 0; b < count; ++b) at[b] = place_of(rows + b * kKeys, n - j - b * kKeys);
      for (int g = 0; g < groups; ++g) {
        const int last = (g + 1) * group < w.heads ? (g + 1) * group : w.heads;
        Tiles t;
        t.zero<0>();
        t.zero<1>();
        t.zero<2>();
        t.zero<3>();
        for (int h = g * group; h < last; ++h)
          for (int c = 0; c < q_tiles; ++c) {
            const int64_t offset = h * w.k_step + c * kChannels;
            t.load<6>(q + static_cast<int64_t>(h * q_tiles + c) * kTile, 64);
            const auto one = [&](auto b) FASTOPS_LAMBDA {
              constexpr int kAt = decltype(b)::value, kA = 4 + kAt % 2;
              if (kAt >= count) return;
              stream.step(lines - lines / 2);
              load<kA>(t, at[kAt], rows + kAt * kKeys, n - j - kAt * kKeys, offset);
              stream.step(lines / 2);
              t.dot_bf16<kAt, kA, 6>();
            };
            each_of<4>(one);
          }
        float* s = w.s + static_cast<int64_t>(j) * lanes + g * W;
        const int64_t step = lanes * 4, next_s = static_cast<int64_t>(kKeys) * lanes;
        t.store<0>(s, step);
        if (count > 1) t.store<1>(s + next_s, step);
        if (count > 2) t.store<2>(s + 2 * next_s, step);
        if (count > 3) t.store<3>(s + 3 * next_s, step);
      }
    }
  }

  // Scores into probabilities, as softmax_rows has it, where they stand.
  void softmax(const AttentionParams& p, int64_t key, int n, bool masked) {
    const float c = p.scale * kLog2e;
    for (int g = 0; g < groups; ++g) {
      float* s = w.s + g * W;
      if (masked) mask(s, key, n);
      const vf mc = offset(g, largest(s, n), c), cv = vset(c);
      vf sum = vzero();
      for (int j = 0; j < n; ++j, s += lanes) {
        const vf e = vexp2<kExpDegree<bf16>>(vfma(vload(s), cv, mc));
        sum = vadd(sum, e);
        vstore(s, e);
      }
      vstore(l + g * W, vadd(vload(l + g * W), sum));
    }
  }

  // P of the keys [j0, j1), for the heads of a vector.
  void turn(int g, int j0, int j1) {
    const int tiles = (j1 - j0 + kKeys - 1) / kKeys, heads = w.heads - g * group < group ? w.heads - g * group : group;
    const vf half = vi_as_bits(_mm512_set1_epi32(0x8000));
    for (int b = 0; b < tiles; ++b) {
      vf x[W];
      FASTOPS_UNROLL
      for (int i = 0; i < W; ++i) {
        const int j = j0 + b * kKeys + i;
        x[i] = j < j1 ? vload(w.s + static_cast<int64_t>(j) * lanes + g * W) : vzero();
      }
      vtranspose(x);
      for (int h = 0; h < heads; ++h)
        for (int r = 0; r < per; ++r) {
          const __m512i sum = _mm512_add_epi32(_mm512_castps_si512(x[h * per + r]), _mm512_castps_si512(half));
          float* to = p16 + (static_cast<int64_t>(h) * tiles + b) * kTile + r * W;
          vistore(to, _mm512_srli_epi32(sum, 16));
          vistore(to + kDirectRows * W, _mm512_and_si512(sum, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
        }
    }
  }

  void accumulate(int, int, int n) {
    RowStream stream = asks ? RowStream(w.vr, 0, v_bytes, w.kr + w.tile, next, k_bytes) : RowStream();
    const int lines = (kKeys * w.D + w.Dv - 1) / w.Dv;
    for (int j = 0; j < n; j += weighed) {
      const int end = j + weighed < n ? j + weighed : n, tiles = (end - j + kKeys - 1) / kKeys;
      Place at[kMaxDirectTiles];
      for (int b = 0; b < tiles; ++b) at[b] = place_of(w.vr + j + b * kKeys, n - j - b * kKeys);
      for (int g = 0; g < groups; ++g) {
        turn(g, j, end);
        const int heads = w.heads - g * group < group ? w.heads - g * group : group, all = heads * v_tiles;
        float* sums = o + static_cast<int64_t>(g) * group * v_tiles * kTile;
        for (int u = 0; u < all; u += 4, sums += 4 * kTile) {
          const int count = all - u < 4 ? all - u : 4;
          const float* weights[4];
          int64_t columns_at[4];
          bool anew[4];  // another head's weights
          for (int i = 0; i < count; ++i) {
            const int h = (u + i) / v_tiles, c = (u + i) % v_tiles;
            weights[i] = p16 + static_cast<int64_t>(h) * tiles * kTile;
            columns_at[i] = (g * group + h) * w.v_step + c * kChannels;
            anew[i] = i == 0 || c == 0;
          }
          Tiles t;
          t.load<0>(sums, 64);
          if (count > 1) t.load<1>(sums + kTile, 64);
          if (count > 2) t.load<2>(sums + 2 * kTile, 64);
          if (count > 3) t.load<3>(sums + 3 * kTile, 64);
          for (int b = 0; b < tiles; ++b) {
            const auto one = [&](auto i) FASTOPS_LAMBDA {
              constexpr int kAt = decltype(i)::value, kB = 6 + kAt % 2;
              if (kAt >= count) return;
              stream.step(lines - lines / 2);
              if (anew[kAt]) t.load<4>(weights[kAt] + b * kTile, 64);
              load<kB>(t, at[b], w.vr + j + b * kKeys, n - j - b * kKeys, columns_at[kAt]);
              stream.step(lines / 2);
              t.dot_bf16<kAt, 4, kB>();
            };
            each_of<4>(one);
          }
          t.store<0>(sums, 64);
          if (count > 1) t.store<1>(sums + kTile, 64);
          if (count > 2) t.store<2>(sums + 2 * kTile, 64);
          if (count > 3) t.store<3>(sums + 3 * kTile, 64);
        }
      }
    }
  }
  static constexpr int kMaxDirectTiles = kDirectKeys / kKeys;

  bool v_finite(int) const { return true; }  // seen at the end
  void accumulate_seen(int) {}
  bool sound() const { return finite; }

  Row row(int h, int r) {
    take(r / per * per);
    const int lane = lane_of(h, r % per);
    float* to = copies;
    vf poison = vset(l[lane] * 0.0f);
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const float* even = o + static_cast<int64_t>(h) * held * w.VP + r % per * W;
    for (int d = 0; d < w.Dv; d += kChannels, even += kTile, to += kChannels) {
      const vf a = vload(even), b = vload(even + kDirectRows * W);
      poison = vfma(a, vzero(), vfma(b, vzero(), poison));
      vstore(to, _mm512_permutex2var_ps(a, low, b));
      vstore(to + W, _mm512_permutex2var_ps(a, high, b));
    }
    finite = finite && vall_finite(poison);
    return {copies, m[lane], l[lane]};
  }
};
#endif

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
