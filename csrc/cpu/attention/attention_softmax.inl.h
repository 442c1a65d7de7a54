// The online softmax of one group of rows: masks, score modifiers, running maximum and sum.
//
// FlashAttention-2, algorithm 1, with FlashAttention-4's conditional rescaling (section 3.1 there): the maximum m in
// use may lag behind the true one by up to 2^8, so that the accumulator is rescaled a few times per row instead of once
// per tile. The final division by l makes the result exact all the same.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

constexpr float kRescaleLog2 = 8.0f;
constexpr float kNegInf = -__builtin_inff();

struct RowState {
  float* m;          // [rows] maximum in use, in the units of the scores
  float* l;          // [rows][kPad] partial sums, W lanes used
  int32_t *lo, *hi;  // [rows] visible keys [lo, hi)
  float* o;          // [rows][ldo] accumulator
  int64_t ldo;
};

// A tile of scores: rows x n keys starting at key `key`.
struct ScoreTile {
  float* s;
  int64_t lds;
  float* p16;         // probabilities go here as sums of bf16 (pairs in 32-bit units), or they overwrite s
  int64_t ldp, part;  // units between its rows, and between the parts of one
  int64_t key;
  int n;
  bool masked;  // some row of the group does not see all n keys
};

inline float lane0(vf x) { return x[0]; }

inline float bias_at(const char* base, int32_t dtype, int64_t i) {
  switch (dtype) {
    case 1:
      return reinterpret_cast<const float*>(base)[i];
    case 2:
      return to_f32(reinterpret_cast<const f16*>(base)[i]);
    case 3:
      return to_f32(reinterpret_cast<const bf16*>(base)[i]);
    default:
      return reinterpret_cast<const uint8_t*>(base)[i] ? 0.0f : kNegInf;
  }
}

inline int bias_size(int32_t dtype) { return dtype == 1 ? 4 : dtype == 6 ? 1 : 2; }

// scores (raw dot products) -> natural-log units with every modifier the call asks for.
inline void modify_row(const AttentionParams& p, int64_t b, int64_t hkv, const Sequence& seq, int64_t row, float* s,
                       int64_t key, int n) {
  const int64_t qi = row / p.G, head = hkv * p.G + row % p.G;
  const vf scale = vset(p.scale);
  if (p.softcap > 0.0f) {
    const vf inner = vset(p.scale / p.softcap), cap = vset(p.softcap);
    for (int j = 0; j < n; j += W) vstore(s + j, vmul(cap, vtanh(vmul(vload(s + j), inner))));
  } else {
    for (int j = 0; j < n; j += W) vstore(s + j, vmul(vload(s + j), scale));
  }
  if (p.alibi) {
    const vf slope = vset(-p.alibi[b * p.alibi_sb + head * p.alibi_sh]);
    const float first = static_cast<float>(key - (qi + seq.offset));
    for (int j = 0; j < n; j += W) {
      const vf distance = vabs(vadd(vset(first + static_cast<float>(j)), vlanes()));
      vstore(s + j, vfma(slope, distance, vload(s + j)));
    }
  }
  if (p.bias) {
    const int64_t at = b * p.bias_s[0] + head * p.bias_s[1] + qi * p.bias_s[2] + key * p.bias_s[3];
    const char* base = p.bias + at * bias_size(p.bias_dtype);
    if (p.bias_dtype == 6) {  // a mask selects: even a NaN score is gone where it says no
      const auto* keep = reinterpret_cast<const uint8_t*>(base);
      for (int j = 0; j < n; ++j) s[j] = keep[j * p.bias_s[3]] ? s[j] : kNegInf;
    } else if (p.bias_dtype == 1 && p.bias_s[3] == 1) {
      for (int j = 0; j < n; ++j) s[j] += reinterpret_cast<const float*>(base)[j];
    } else {
      for (int j = 0; j < n; ++j) s[j] += bias_at(base, p.bias_dtype, j * p.bias_s[3]);
    }
  }
}

#if defined(FASTOPS_HAS_BF16_DOT)
// Probabilities of keys [j, j + 2 W) of row i, as so many bf16.
template <int kParts>
FASTOPS_INLINE void store_parts(const ScoreTile& t, int i, int j, vf a, vf b) {
  auto* to = reinterpret_cast<bf16*>(t.p16 + i * t.ldp) + j;
  FASTOPS_UNROLL
  for (int part = 1; part < kParts; ++part, to += 2 * t.part) {
    const vf first = vround_bf16(a), second = vround_bf16(b);
    vistore(to, vupper(first, second));
    a = vsub(a, first);
    b = vsub(b, second);
  }
  vistore(to, (vi)_mm512_cvtne2ps_pbh(b, a));
}
#endif

// Keys this row does not see, and those behind the last one up to whole vectors, count as -inf.
inline void mask_row(const RowState& st, const ScoreTile& t, int64_t r, float* s, int nv) {
  int lo = 0, hi = t.n;
  if (t.masked) {
    lo = st.lo[r] > t.key ? static_cast<int>(st.lo[r] - t.key) : 0;
    hi = st.hi[r] - t.key < t.n ? static_cast<int>(st.hi[r] - t.key) : t.n;
  }
  for (int j = 0; j < lo && j < nv * W; j += W) vstore(s + j, vkeep(vload(s + j), lo - j, hi - j, kNegInf));
  for (int j = hi > 0 ? hi / W * W : 0; j < nv * W; j += W) vstore(s + j, vkeep(vload(s + j), lo - j, hi - j, kNegInf));
}

// The largest of each of W rows of W numbers.
inline void largest_of_rows(const float* rows, int count, float* largest) {
  if (count < 4) {
    for (int i = 0; i < count; ++i) largest[i] = vhmax(vload(rows + i * W));
    return;
  }
  vf x[W];
  FASTOPS_UNROLL
  for (int i = 0; i < W; ++i) x[i] = vload(rows + i * W);
  vtranspose(x);
  FASTOPS_UNROLL
  for (int half = W / 2; half > 0; half /= 2) FASTOPS_UNROLL
  for (int i = 0; i < half; ++i) x[i] = vmax(x[i], x[i + half]);
  vstore(largest, x[0]);
}

// The maximum of row r is now `top`: what it has summed up counts less.
inline void rescale_row(RowState& st, int64_t r, float top, float c) {
  const float m = st.m[r];
  st.m[r] = top;
  if (m == kNegInf) return;
  const vf alpha = vexp2<6>(vset((m - top) * c));
  for (int64_t d = 0; d < st.ldo; d += W) vstore(st.o + r * st.ldo + d, vmul(alpha, vload(st.o + r * st.ldo + d)));
  vstore(st.l + r * kPad, vmul(alpha, vload(st.l + r * kPad)));
}

// Turns the scores of rows [r0, r0 + rows) into probabilities 2^(c (s - m)), updating m, l and (rarely) o; W rows at a
// time, so that their maxima do not wait for each other. kParts: of bf16 that a probability becomes, 0 where it stays
// fp32. kGeneral: scores get modifiers first, and subtract before scaling so that huge negative biases stay finite.
template <bool kGeneral, int kExpDegree, int kParts>
void softmax_rows(const AttentionParams& p, const AttentionItem& it, int64_t hkv, const Sequence& seq, RowState& st,
                  int64_t r0, int rows, ScoreTile& t) {
  const float c = kGeneral ? kLog2e : p.scale * kLog2e;  // > 0: other scales take the general way
  const vf cv = vset(c);
  int nv = (t.n + W - 1) / W;
  if (kParts > 0 && (nv + 1) * W <= t.lds) nv += nv % 2;  // pairs of vectors are stored together
  alignas(64) float tops[W * W], largest[W];
  for (int i0 = 0; i0 < rows; i0 += W) {
    const int count = rows - i0 < W ? rows - i0 : W;
    for (int i = 0; i < count; ++i) {
      const int64_t r = r0 + i0 + i;
      float* s = t.s + (i0 + i) * t.lds;
      if constexpr (kGeneral) modify_row(p, it.b, hkv, seq, it.row0 + r, s, t.key, t.n);
      if (t.masked || t.n < nv * W) mask_row(st, t, r, s, nv);
      vf top = vload(s);
      for (int j = 1; j < nv; ++j) top = vmax(top, vload(s + j * W));
      vstore(tops + i * W, top);
    }
    largest_of_rows(tops, count, largest);
    for (int i = 0; i < count; ++i) {
      const int64_t r = r0 + i0 + i;
      const float m = st.m[r], x = largest[i];
      if (!(x <= m) & !((x - m) * c <= kRescaleLog2)) rescale_row(st, r, x, c);  // larger by far, or NaN
    }
    for (int i = 0; i < count; ++i) {
      const int64_t r = r0 + i0 + i;
      float* s = t.s + (i0 + i) * t.lds;
      const float m = st.m[r] == kNegInf ? 0.0f : st.m[r];  // nothing seen yet: all scores are -inf
      const vf mv = vset(m), mc = vset(-m * c);
      vf sum = vload(st.l + r * kPad);
      const auto probability = [&](int j) FASTOPS_LAMBDA {
        const vf x = vload(s + j * W);
        return vexp2<kExpDegree>(kGeneral ? vmul(vsub(x, mv), cv) : vfma(x, cv, mc));
      };
      int j = 0;
#if defined(FASTOPS_HAS_BF16_DOT)
      if constexpr (kParts > 0) {
        for (; j + 2 <= nv; j += 2) {
          const vf a = probability(j), b = probability(j + 1);
          sum = vadd(sum, vadd(a, b));
          store_parts<kParts>(t, i0 + i, j * W, a, b);
        }
        if (j < nv) {
          const vf e = probability(j++);
          sum = vadd(sum, e);
          _mm256_storeu_si256(
              reinterpret_cast<__m256i*>(reinterpret_cast<bf16*>(t.p16 + (i0 + i) * t.ldp) + nv * W - W),
              (__m256i)_mm512_cvtneps_pbh(e));
        }
      }
#endif
      for (; j < nv; ++j) {
        const vf e = probability(j);
        sum = vadd(sum, e);
        vstore(s + j * W, e);
      }
      vstore(st.l + r * kPad, sum);
    }
  }
}

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
