// Where K/V tiles come from. A source fills the row pointers of a run of keys; the tile loop never asks how they lie in
// memory. A new source is one more struct with the same `rows` method, or, where the rows have to be made first, with
// `decode` (attention_quant.inl.h).
namespace fastops::cpu::FASTOPS_ISA {
namespace {

template <class T>
struct DenseSource {
  using Elem = T;
  static constexpr bool kDecodes = false;
  const T *k, *v;
  int64_t ks, vs;
  DenseSource(const AttentionParams& p, const AttentionItem& it, const Sequence& s)
      : k(reinterpret_cast<const T*>(p.k) + it.b * p.k_sb + s.k0 * p.k_ss + it.hkv * p.k_sh),
        v(reinterpret_cast<const T*>(p.v) + it.b * p.v_sb + s.k0 * p.v_ss + it.hkv * p.v_sh),
        ks(p.k_ss),
        vs(p.v_ss) {}
  void rows(int64_t key, int n, const T** kr, const T** vr) const {
    const T *kp = k + key * ks, *vp = v + key * vs;
    for (int j = 0; j < n; ++j, kp += ks, vp += vs) {
      kr[j] = kp;
      vr[j] = vp;
    }
  }
};

template <class T>
struct PagedSource {
  using Elem = T;
  static constexpr bool kDecodes = false;
  const T *k, *v;
  const int32_t* table;
  int64_t table_sp, kb, ks, vb, vs;
  int shift, mask;
  PagedSource(const AttentionParams& p, const AttentionItem& it, const Sequence&)
      : k(reinterpret_cast<const T*>(p.k) + it.hkv * p.k_sh),
        v(reinterpret_cast<const T*>(p.v) + it.hkv * p.v_sh),
        table(p.table + it.b * p.table_sb),
        table_sp(p.table_sp),
        kb(p.k_sb),
        ks(p.k_ss),
        vb(p.v_sb),
        vs(p.v_ss),
        shift(p.page_shift),
        mask(p.page_mask) {}
  void rows(int64_t key, int n, const T** kr, const T** vr) const {
    for (int j = 0; j < n;) {
      const int64_t page = table[((key + j) >> shift) * table_sp];
      int slot = static_cast<int>((key + j) & mask);
      const T *kp = k + page * kb + slot * ks, *vp = v + page * vb + slot * vs;
      for (; slot <= mask && j < n; ++slot, ++j, kp += ks, vp += vs) {
        kr[j] = kp;
        vr[j] = vp;
      }
    }
  }
};

// The window of recent tokens of a quantised cache, in q's type.
template <class T>
struct RecentSource {
  using Elem = T;
  static constexpr bool kDecodes = false;
  const AttentionParams& p;
  const T *k, *v;
  RecentSource(const AttentionParams& params, const AttentionItem& it, const Sequence&)
      : p(params), k(of(p.kq, it)), v(of(p.vq, it)) {}
  static const T* of(const KvSide& q, const AttentionItem& it) {
    return reinterpret_cast<const T*>(q.recent) + it.b * q.recent_s[0] + it.hkv * q.recent_s[2];
  }
  void rows(int64_t key, int n, const T** kr, const T** vr) const {
    for (int j = 0; j < n; ++j) {
      const int64_t slot = (key + j) % p.recent;
      kr[j] = k + slot * p.kq.recent_s[1];
      vr[j] = v + slot * p.vq.recent_s[1];
    }
  }
};

}  // namespace
}  // namespace fastops::cpu::FASTOPS_ISA
