// Decode with a query row in every lane. Where the rows of an item fill a vector (a few KV heads that lie next to each
// other, times the query heads that share each), the scores of a key are one vector for every W rows, so the softmax
// needs no horizontal step, its results stand where the products with V want them, and keys are taken one by one, in
// the order in which they lie in memory.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

// Which lane holds which row, and what one softmax leaves to the next. Base: what reads the rows (Direct, CodeMode).
// Heads share a block of lanes as long as their rows fit: a whole vector, or (kHalves) half of one where that is
// enough.
//
// More rows of a head than a vector takes (kGroups) are taken in groups of as many, `per` each, one after the other in
// every tile; the last row stands for those that are not there.
template <class Base, bool kHalves, bool kGroups = false>
struct LaneRows : Base {
  using Base::w;
  static constexpr bool kInLanes = true;
  static constexpr int block_lanes(int rows) { return kHalves && rows <= W / 2 ? W / 2 : W; }
  int per, row0 = 0;      // rows of a group; the first of the one at work
  int in_block, group;    // heads of a block, and of a vector
  int groups, lanes;      // vectors of all rows, and W times as many; heads there are not stand for the last one
  int columns, part;      // of a row of o; columns that lie side by side in it, for as long as there are so many
  int held;               // rows a head of o has room for
  float *m, *l;           // [lanes]
  float *q, *o;           // of the group at work
  int64_t q_floats = 0;   // of q for a lane
  float* rest = nullptr;  // `rests` times as many, or none: more sums
  int rests = 1;
  int64_t k_at[kDirectHeads + W];  // where the heads of each block start within the row of a key

  template <class... Args>
  LaneRows(Args&&... args) : Base(args...) {
    held = per = rows_of_group(w.rows);
    in_block = block_lanes(per) / per;
    group = W / block_lanes(per) * in_block;
    groups = (w.heads + group - 1) / group;
    lanes = groups * W;
    for (int h = 0; h < groups * group; ++h) k_at[h] = (h < w.heads ? h : w.heads - 1) * w.k_step;
    for (int r = 0; r < w.rows; r += per) {
      take(r);
      for (int i = 0; i < lanes; i += W) {
        vstore(m + i, vset(kNegInf));
        vstore(l + i, vzero());
      }
    }
    take(0);
  }
  static int rows_of_group(int rows) {
    if constexpr (!kGroups) return rows;
    const int count = (rows + kDirectRows - 1) / kDirectRows;
    return (rows + count - 1) / count;
  }
  int rows_at_once() const { return per; }
  int rows_held() const { return (w.rows + per - 1) / per * per; }  // of a head
  int o_rows() const { return rows_held() / per * held; }
  // From now on the rows from `first` on are at work.
  void take(int first) {
    const int g = kGroups ? first / per : 0;
    row0 = first;
    l = w.st.l + g * 2 * lanes;
    m = l + lanes;
    q = w.q + g * lanes * q_floats;
    o = w.st.o + static_cast<int64_t>(g) * w.heads * held * w.VP;
  }

  // Whether the rows fill the lanes well enough.
  static bool fits(const AttentionItem& it) {
    if (W < 8 || it.rows > (kGroups ? kSharedRows : kDirectRows) || (it.heads < 2 && it.rows <= kDirectRows))
      return false;
    const int rows = rows_of_group(static_cast<int>(it.rows)), of = block_lanes(rows);
    const int64_t in_block = of / rows;
    return 5 * it.heads * rows >= 3 * of * ((it.heads + in_block - 1) / in_block);
  }

  // Rows are counted from the first one at work.
  int lane_of(int h, int r) const { return h / in_block * block_lanes(per) + h % in_block * per + r; }
  int head_of(int lane) const { return lane / block_lanes(per) * in_block + lane % block_lanes(per) / per; }
  int row_of(int lane) const { return lane % block_lanes(per) % per; }
  bool is_row(int lane) const { return lane % block_lanes(per) < in_block * per && head_of(lane) < w.heads; }
  // The one that stands for it.
  int row_or_last(int r) const { return kGroups && row0 + r >= w.rows ? w.rows - 1 : row0 + r; }

  // Keys that a row does not see count as -inf.
  __attribute__((noinline)) void mask(float* s, int64_t key, int n) const {
    float lo[W] = {}, hi[W] = {};
    for (int i = 0; i < W; ++i) {
      const int row = row_or_last(row_of(i));
      const int64_t a = w.st.lo[row] - key, b = w.st.hi[row] - key;
      lo[i] = static_cast<float>(a < 0 ? 0 : a < n ? a : n);
      hi[i] = static_cast<float>(b < 0 ? 0 : b < n ? b : n);
    }
    for (int j = 0; j < n; ++j) {
      float* x = s + static_cast<int64_t>(j) * lanes;
      const vf at = vset(static_cast<float>(j)), none = vset(kNegInf);
      vstore(x, vselect_gt(vload(lo), at, none, vselect_gt(vload(hi), at, vload(x), none)));
    }
  }
  // The largest of n scores of each lane of a vector.
  vf largest(const float* s, int n) const {
    vf top = vload(s), other = top;
    int j = 1;
    for (; j + 1 < n; j += 2) {
      top = vmax(top, vload(s + static_cast<int64_t>(j) * lanes));
      other = vmax(other, vload(s + static_cast<int64_t>(j + 1) * lanes));
    }
    if (j < n) top = vmax(top, vload(s + static_cast<int64_t>(j) * lanes));
    return vmax(top, other);
  }

  // What is added to c times a score of vector g before it is raised to the power of two, once `top` was seen.
  vf offset(int g, vf top, float c) {
    const vf rise = vmul(vsub(top, vload(m + g * W)), vset(c));
    if (vsum(vkeep_ge(vset(1.0f), rise, kRescaleLog2)) != 0.0f) rescale(g, top, c);
    const vf max = vload(m + g * W);
    return vmul(vselect_gt(max, vset(kNegInf), max, vzero()), vset(-c));
  }

  // Rows whose maximum has grown too far beyond the one in use.
  __attribute__((noinline)) void rescale(int g, vf top, float c) {
    float tile_max[W];
    vstore(tile_max, top);
    for (int i = 0; i < W; ++i) {
      const int lane = g * W + i;
      float& old = m[lane];
      if (tile_max[i] <= old || (tile_max[i] - old) * c <= kRescaleLog2) continue;
      if (old != kNegInf && is_row(lane)) {
        const vf alpha = vexp2<6>(vset((old - tile_max[i]) * c));
        parts(head_of(lane), row_of(lane), [&](float* o, int, int width) {
          for (int d = 0; d < width; d += W) vstore(o + d, vmul(alpha, vload(o + d)));
        });
        l[lane] *= lane0(alpha);
        if (rest)
          for (int k = 0; k < rests; ++k) rest[k * lanes + lane] *= lane0(alpha);
      }
      old = tile_max[i];
    }
  }

  // The accumulator: for each head [parts][rows held][width], parts of `part` columns, then of W.
  template <class F>
  void parts(int h, int r, F&& f) const {
    float* first = o + static_cast<int64_t>(h) * held * w.VP;
    for (int d = 0, width; d < columns; d += width) {
      width = d + part <= columns ? part : W;
      f(first + static_cast<int64_t>(d) * held + r * width, d, width);
    }
  }
  float* gathered(int h, int r) const {
    float* to = w.k;  // Packed's room
    parts(h, r, [&](float* from, int at, int width) {
      for (int d = 0; d < width; d += W) vstore(to + at + d, vload(from + d));
    });
    return to;
  }

#if defined(FASTOPS_HAS_VNNI)
  // Numbers of two keys as pairs of bf16.
  static FASTOPS_INLINE vi paired(vf a, vf b) {
    const __m512i even = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i order = _mm512_or_si512(even, _mm512_slli_epi32(_mm512_add_epi32(even, _mm512_set1_epi32(16)), 16));
    return _mm512_permutexvar_epi16(order, vnarrow_bf16(a, b));
  }
#endif
};

template <class T>
struct Lanes : LaneRows<Direct<T>, sizeof(T) == 2, true> {  // two keys at once load less, but cost more for long rows
  using Rows = LaneRows<Direct<T>, sizeof(T) == 2, true>;
  using Rows::asks, Rows::block_lanes, Rows::group, Rows::groups, Rows::lane_of, Rows::lanes, Rows::part, Rows::per,
      Rows::w;
  static constexpr int kUnit = kDot16<T> ? 2 * W : W;  // elements of a row that a vector of q holds
  static constexpr int kKeysPerWeight = kDot16<T> ? 2 : 1;

  // Vectors of a part of o, for so many rows.
  static constexpr int part_vectors(int rows) {
    return W == 16 ? (rows <= 6 ? 4 : 2) : rows <= 2 ? 4 : rows <= 4 ? 2 : 1;
  }

  Lanes(Work<T>& work, const AttentionParams& p) : Rows(work, p) {
    this->columns = w.Dv;
    part = part_vectors(per) * W;
    this->q_floats = q_steps() * W;
    this->block = this->keys(12 << 10, 2, kDirectKeys);
    this->lead = this->keys(16 << 10, 1, kDirectKeys);
    if (this->lead < this->block) this->lead = this->block;
    this->plan_tile(lanes);
    std::memset(w.q, 0, sizeof(float) * static_cast<size_t>(this->rows_held() / per * lanes * q_steps() * W));
  }
  int q_steps() const { return (w.D + kUnit - 1) / kUnit; }

  // q as [vectors of rows][steps along D][W lanes][units].
  void load_q(const AttentionParams& p, const AttentionItem& it, const Sequence& seq, int h) {
    const T* base = reinterpret_cast<const T*>(p.q) + it.b * p.q_sb + seq.q0 * p.q_ss + (it.hkv + h) * p.G * p.q_sh;
    const int steps = q_steps();
    for (int r = 0; r < this->rows_held(); ++r) {
      if (r % per == 0) this->take(r);
      const int64_t at = it.row0 + this->row_or_last(r % per);
      const T* src = base + at / p.G * p.q_ss + at % p.G * p.q_sh;
      float* dst = this->q + (static_cast<int64_t>(h / group) * steps * W + lane_of(h, r % per) % W) * W;
      for (int d = 0; d < w.D; d += kUnit, dst += W * W) {
        const int left = w.D - d;
#if defined(FASTOPS_HAS_BF16_DOT)
        if constexpr (kDot16<T>) {
          vistore(dst, _mm512_maskz_loadu_epi16(left >= kUnit ? 0xffffffffu : (1u << left) - 1u, src + d));
          continue;
        }
#endif
        vstore(dst, left >= W ? vload(src + d) : vloadn(src + d, left));
      }
    }
  }

  // The first keys of an item, whose rows nobody has asked for yet.
  void begin(int n) const {
    RowStream first(w.kr + w.tile, n < this->lead ? n : this->lead, this->k_bytes, nullptr, 0, 0);
    first.step(1 << 10);
  }

  // [JB keys][block of lanes] = q k^T, of JB keys and the heads of a block. kDim: the size of heads that lie side by
  // side and fill the block (every address is then the row's and a constant), or 0.
  template <int RB, int kDim>
  static FASTOPS_INLINE vf dots(RowStream& stream, const T* const* rows, const int64_t* at, int dim, const float* q) {
    constexpr int kBlock = block_lanes(RB), JB = W / kBlock, HB = kBlock / RB;
    constexpr int kLine = 64 / static_cast<int>(sizeof(T)), kLines = JB * HB;
    vf acc[W];
    FASTOPS_UNROLL
    for (int i = 0; i < W; ++i) acc[i] = vzero();
    constexpr int kSpan = kLine > kUnit ? kLine : kUnit;
    if constexpr (kDim > 0) {
      const T* k[JB];
      FASTOPS_UNROLL
      for (int j = 0; j < JB; ++j) k[j] = rows[j] + at[0];
      FASTOPS_UNROLL
      for (int d = 0; d < kDim; d += kSpan) {
        const RowStream::Lines lines = stream.take<kLines>();
        FASTOPS_UNROLL
        for (int u = 0; u < kSpan; u += kUnit, q += W * W) {
          step<RB, true>(
              acc, [&](int h, int j) FASTOPS_LAMBDA { return k[j] + h * kDim + d + u; }, kUnit, q,
              [&](int i) FASTOPS_LAMBDA { lines.ask<kLines, true>(u / kUnit * HB * RB + i, kSpan / kUnit * HB * RB); });
        }
      }
      return vreduce(acc);
    }
    const T* k[JB * HB];
    FASTOPS_UNROLL
    for (int h = 0; h < HB; ++h) {
      FASTOPS_UNROLL
      for (int j = 0; j < JB; ++j) k[h * JB + j] = rows[j] + at[h];
    }
    int d = 0;
    for (; d + kSpan <= dim; d += kSpan) {
      const RowStream::Lines lines = stream.take<kLines>();
      FASTOPS_UNROLL
      for (int u = 0; u < kSpan; u += kUnit, q += W * W) {
        step<RB, true>(
            acc, [&](int h, int j) FASTOPS_LAMBDA { return k[h * JB + j] + d + u; }, kUnit, q,
            [&](int i) FASTOPS_LAMBDA { lines.ask<kLines>(u / kUnit * HB * RB + i, kSpan / kUnit * HB * RB); });
      }
    }
    if (d < dim) stream.step(kLines);
    for (; d < dim; d += kUnit, q += W * W)
      step<RB, false>(
          acc, [&](int h, int j) FASTOPS_LAMBDA { return k[h * JB + j] + d; }, dim - d < kUnit ? dim - d : kUnit, q,
          [](int) FASTOPS_LAMBDA {});
    return vreduce(acc);
  }
  // One vector of each row. `ask` is called with the number of every lane.
  template <int RB, bool kWhole, class Key, class Ask>
  static FASTOPS_INLINE void step(vf (&acc)[W], Key&& key, int n, const float* q, Ask&& ask) {
    constexpr int kBlock = block_lanes(RB), JB = W / kBlock, HB = kBlock / RB;
    FASTOPS_UNROLL
    for (int h = 0; h < HB; ++h) {
#if defined(FASTOPS_HAS_BF16_DOT)
      if constexpr (kDot16<T>) {
        __m512i x[JB];
        FASTOPS_UNROLL
        for (int j = 0; j < JB; ++j) {
          const T* from = key(h, j);
          x[j] = kWhole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((1u << n) - 1u, from);
        }
        FASTOPS_UNROLL
        for (int i = h * RB; i < (h + 1) * RB; ++i) {
          const __m512i y = _mm512_loadu_si512(q + i * W);
          FASTOPS_UNROLL
          for (int j = 0; j < JB; ++j) acc[j * kBlock + i] = vdot_bf16(acc[j * kBlock + i], x[j], y);
          ask(i);
        }
        continue;
      }
#endif
      vf x[JB];
      FASTOPS_UNROLL
      for (int j = 0; j < JB; ++j) x[j] = kWhole ? vload(key(h, j)) : vloadn(key(h, j), n);
      FASTOPS_UNROLL
      for (int i = h * RB; i < (h + 1) * RB; ++i) {
        const vf y = vload(q + i * W);
        FASTOPS_UNROLL
        for (int j = 0; j < JB; ++j) acc[j * kBlock + i] = vfma(y, x[j], acc[j * kBlock + i]);
        ask(i);
      }
    }
  }

  // Scores as [keys][lanes].
  void scores(int, int, int n) {
    using Of = void (Lanes::*)(int);
    static constexpr Of kOf[] = {&Lanes::scores_of<1>, &Lanes::scores_of<2>, &Lanes::scores_of<3>,
                                 &Lanes::scores_of<4>, &Lanes::scores_of<5>, &Lanes::scores_of<6>,
                                 &Lanes::scores_of<7>, &Lanes::scores_of<8>};
    (this->*kOf[per - 1])(n);
  }
  template <int RB>
  void scores_of(int n) {
    if constexpr (RB <= 2)  // many heads, many addresses
      if (w.heads % (block_lanes(RB) / RB) == 0 && w.k_step == w.D) {
        if (w.D == 64) return scores_in<RB, 64>(n);
        if (w.D == 128) return scores_in<RB, 128>(n);
      }
    scores_in<RB, 0>(n);
  }
  template <int RB, int kDim>
  void scores_in(int n) {
    constexpr int kBlock = block_lanes(RB), JB = W / kBlock, HB = kBlock / RB;
    const int now = this->lead < n ? this->lead : n, dim = w.D, vectors = groups, heads = w.heads;
    RowStream stream =
        asks ? RowStream(w.kr + now, n - now, this->k_bytes, w.vr, now, this->v_bytes, now, n) : RowStream();
    const T* const* rows = w.kr;
    const int64_t q_step = static_cast<int64_t>(q_steps()) * W * W, pitch = lanes;
    float* s = w.s;
    for (int j = 0; j < n; j += JB, s += JB * pitch) {  // the key behind an odd last one is that one again
      const float* q = this->q;
      const int64_t* at = this->k_at;
      for (int g = 0; g < vectors; ++g, at += JB * HB, q += q_step) {
        const vf a = dots<RB, kDim>(stream, rows + j, at, dim, q);
        if constexpr (JB == 1) {
          vstore(s + g * W, a);
        } else {
          const vf b = g * group + HB < heads ? dots<RB, kDim>(stream, rows + j, at + HB, dim, q + kBlock * W) : a;
          vstore(s + g * W, vjoin_low(a, b));
          vstore(s + pitch + g * W, vjoin_high(a, b));
        }
      }
    }
  }

  // Scores into probabilities, as softmax_rows has it (attention_softmax.inl.h): [keys][lanes] where they stand, or
  // [pairs of keys][lanes] of two bf16.
  void softmax(const AttentionParams& p, int64_t key, int n, bool masked) {
    const float c = p.scale * kLog2e;
    for (int g = 0; g < groups; ++g) {
      float* s = w.s + g * W;
      if (masked) this->mask(s, key, n);
      const vf mc = this->offset(g, this->largest(s, n), c), cv = vset(c);
      vf sum = vzero();
      int j = 0;
#if defined(FASTOPS_HAS_BF16_DOT)
      if constexpr (kDot16<T>) {
        float* to = w.p16 + g * W;
        for (; j < n; j += 2, to += lanes) {
          const float* x = s + static_cast<int64_t>(j) * lanes;
          const vf a = vexp2<kExpDegree<T>>(vfma(vload(x), cv, mc));
          const vf b = j + 1 < n ? vexp2<kExpDegree<T>>(vfma(vload(x + lanes), cv, mc)) : vzero();
          sum = vadd(sum, vadd(a, b));
          vistore(to, Rows::paired(a, b));
        }
      } else
#endif
      {
        for (; j < n; ++j) {
          float* x = s + static_cast<int64_t>(j) * lanes;
          const vf e = vexp2<kExpDegree<T>>(vfma(vload(x), cv, mc));
          sum = vadd(sum, e);
          vstore(x, e);
        }
      }
      vstore(this->l + g * W, vadd(vload(this->l + g * W), sum));
    }
  }

  // o[RB rows][NV vectors] += probabilities times values of the keys [j0, j1), at column `at` of their rows. n < W: the
  // last, partial vector (then NV is 1).
  template <int RB, int NV>
  static FASTOPS_INLINE void weigh(RowStream& stream, const T* const* rows, int64_t at, const float* weights,
                                   int64_t lanes, float* o, int j0, int j1, int n) {
    constexpr int kLines = kKeysPerWeight * (NV * W * static_cast<int>(sizeof(T)) / 64);
    vf acc[RB][NV];
    FASTOPS_UNROLL
    for (int r = 0; r < RB; ++r) {
      FASTOPS_UNROLL
      for (int c = 0; c < NV; ++c) acc[r][c] = vload(o + (r * NV + c) * W);
    }
#if defined(FASTOPS_HAS_BF16_DOT)
    if constexpr (kDot16<T>) {
      const __m512i low = _mm512_or_si512(
          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
          _mm512_slli_epi32(_mm512_setr_epi32(32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47), 16));
      const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
      for (int j = j0; j < j1; j += 2, weights += lanes) {
        if (kLines == 0 && at * static_cast<int64_t>(sizeof(T)) % 64 == 0) stream.step(kKeysPerWeight);
        const RowStream::Lines lines = kLines > 0 ? stream.take<kLines>() : RowStream::Lines();
        const T *a = rows[j] + at, *b = rows[j + 1] + at;
        __m512i x[NV];
        if constexpr (NV == 1) {
          const __mmask16 m = vfirst(n);
          x[0] = _mm512_permutex2var_epi16(_mm512_maskz_loadu_epi16(m, a), low, _mm512_maskz_loadu_epi16(m, b));
        } else {
          FASTOPS_UNROLL
          for (int c = 0; c < NV; c += 2) {
            const __m512i va = _mm512_loadu_si512(a + c * W), vb = _mm512_loadu_si512(b + c * W);
            x[c] = _mm512_permutex2var_epi16(va, low, vb);
            x[c + 1] = _mm512_permutex2var_epi16(va, high, vb);
          }
        }
        FASTOPS_UNROLL
        for (int r = 0; r < RB; ++r) {
          const __m512i pj = _mm512_castps_si512(vset(weights[r]));
          FASTOPS_UNROLL
          for (int c = 0; c < NV; ++c) acc[r][c] = vdot_bf16(acc[r][c], x[c], pj);
          lines.ask<kLines>(r, RB);
        }
      }
    } else
#endif
    {
      for (int j = j0; j < j1; ++j, weights += lanes) {
        if (kLines == 0 && at * static_cast<int64_t>(sizeof(T)) % 64 == 0) stream.step(kKeysPerWeight);
        const RowStream::Lines lines = kLines > 0 ? stream.take<kLines>() : RowStream::Lines();
        const T* v = rows[j] + at;
        vf x[NV];
        FASTOPS_UNROLL
        for (int c = 0; c < NV; ++c) x[c] = NV > 1 || n >= W ? vload(v + c * W) : vloadn(v, n);
        FASTOPS_UNROLL
        for (int r = 0; r < RB; ++r) {
          const vf pj = vset(weights[r]);
          FASTOPS_UNROLL
          for (int c = 0; c < NV; ++c) acc[r][c] = vfma(pj, x[c], acc[r][c]);
          lines.ask<kLines>(r, RB);
        }
      }
    }
    FASTOPS_UNROLL
    for (int r = 0; r < RB; ++r) {
      FASTOPS_UNROLL
      for (int c = 0; c < NV; ++c) vstore(o + (r * NV + c) * W, acc[r][c]);
    }
  }

  const float* weights() const { return kDot16<T> ? w.p16 : w.s; }

  void accumulate(int, int, int n) {
    using Of = void (Lanes::*)(int);
    static constexpr Of kOf[] = {&Lanes::accumulate_of<1>, &Lanes::accumulate_of<2>, &Lanes::accumulate_of<3>,
                                 &Lanes::accumulate_of<4>, &Lanes::accumulate_of<5>, &Lanes::accumulate_of<6>,
                                 &Lanes::accumulate_of<7>, &Lanes::accumulate_of<8>};
    (this->*kOf[per - 1])(n);
  }
  template <int RB>
  void accumulate_of(int n) {
    constexpr int kBlock = block_lanes(RB), HB = kBlock / RB, NV = part_vectors(RB);
    const T* const behind = w.vr[n];
    if (n % 2 == 1) w.vr[n] = w.vr[n - 1];  // stands beside a probability of 0
    const int now = this->lead < n ? this->lead : n, dim = w.Dv;
    RowStream stream =
        asks ? RowStream(w.vr + now, n - now, this->v_bytes, w.kr + w.tile,
                         this->lead < this->next ? this->lead : this->next, this->k_bytes, now, this->next)
             : RowStream();
    const int64_t head_o = static_cast<int64_t>(RB) * w.VP, v_step = w.v_step, pitch = lanes;
    const T* const* v = w.vr;
    for (int j = 0; j < n; j += this->block) {
      const int end = j + this->block < n ? j + this->block : n;
      const float* x = weights() + j / kKeysPerWeight * pitch;
      float* o = this->o;
      for (int h = 0; h < w.heads; ++h, o += head_o) {
        const float* mine = x + h / HB * kBlock + h % HB * RB;
        int d = 0;
        for (; d + NV * W <= dim; d += NV * W)
          weigh<RB, NV>(stream, v, h * v_step + d, mine, pitch, o + d * RB, j, end, W);
        for (; d < dim; d += W) weigh<RB, 1>(stream, v, h * v_step + d, mine, pitch, o + d * RB, j, end, dim - d);
      }
    }
    w.vr[n] = behind;  // which another group of rows may see
  }

  // accumulate() key by key, without those of probability 0 (attention_modes.inl.h, accumulate_seen).
  __attribute__((noinline)) void accumulate_seen(int n) {
    for (int h = 0; h < w.heads; ++h)
      for (int r = 0; r < per; ++r)
        for (int j = 0; j < n; ++j) {
          const float* x = weights() + static_cast<int64_t>(j / kKeysPerWeight) * lanes + lane_of(h, r);
          const float pj = kDot16<T> ? to_f32(reinterpret_cast<const bf16*>(x)[j % 2]) : *x;
          if (pj == 0.0f) continue;
          const T* v = w.vr[j] + h * w.v_step;
          this->parts(h, r, [&](float* o, int at, int width) {
            for (int d = 0; d < width; d += W) {
              const int left = w.Dv - at - d;
              vstore(o + d, vfma(vset(pj), left >= W ? vload(v + at + d) : vloadn(v + at + d, left), vload(o + d)));
            }
          });
        }
  }

  Row row(int h, int r) {
    this->take(r / per * per);
    const int lane = lane_of(h, r % per);
    return {this->gathered(h, r % per), this->m[lane], this->l[lane]};
  }
};

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
