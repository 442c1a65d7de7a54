// attention over quantised pages. Part of fuzz.cpp, inside its namespace.

// The header's promise: at most so many eighths of a MiB of workspace for each thread, and partial results of one for
// each core.
void bound(size_t bytes, const fastops_env& env, size_t eighths) {
  const size_t threads = static_cast<size_t>(env.num_threads), cores = static_cast<size_t>(fastops_cores());
  REQUIRE(bytes <= (threads * eighths + (cores < 3 ? 3 : cores)) << 17, "%zu bytes for %zu threads", bytes, threads);
  REQUIRE(threads < cores || bytes <= threads << 20, "%zu bytes for %zu threads", bytes, threads);
}

// The same bound of workspace for a quantised cache of a dense call's shape (no page is read: no sequence has a key).
void bound_kv_workspace(fastops_attention_desc d, fastops_env* env) {
  static int32_t zeros[128] = {};
  const int64_t B = d.q.size[0], T = B * d.q.size[1];
  const auto index = [&](int ndim) {
    fastops_tensor t{};
    t.data = zeros;
    t.dtype = FASTOPS_I32;
    t.ndim = ndim;
    t.size[0] = B;
    t.stride[0] = 1;
    if (ndim == 2) t.stride[1] = 1;
    return t;
  };
  const auto rows = [T](fastops_tensor t) {  // [B, S, H, D] -> [B * S, H, D]
    t.size[0] = T;
    t.size[1] = t.size[2];
    t.size[2] = t.size[3];
    t.stride[0] = t.stride[1];
    t.stride[1] = t.stride[2];
    t.stride[2] = 1;
    t.ndim = 3;
    return t;
  };
  if (B > 100) return;
  fastops_kv_quant kv{};
  kv.struct_size = sizeof kv;
  d.q = rows(d.q);
  d.out = rows(d.out);
  d.k.dtype = d.v.dtype = FASTOPS_I8;
  d.k.size[1] = d.v.size[1] = 16;
  d.seq_lens = index(1);
  d.block_table = index(2);
  d.kv = &kv;
  size_t bytes = 0;
  char message[FASTOPS_MESSAGE_SIZE] = "";
  env->message = message;
  REQUIRE(fastops_attention_workspace(&d, env, &bytes) == FASTOPS_OK, "%s", message);
  env->message = nullptr;
  bound(bytes, *env, 7);
}

// A random quantised cache: codes, and what scales them.
struct KvCache {
  Random& r;
  int32_t dtype, number;  // the model's, the scales'
  int32_t kivi;           // bits of the codes of a cache as KIVI has it, or 0
  int64_t pages, page, Hkv;
  fastops_kv_quant kv{};

  KvCache(Random& random, int32_t model)
      : r(random),
        dtype(model),
        number(static_cast<int32_t>(r.pick({FASTOPS_F32, FASTOPS_F16, FASTOPS_BF16}))),
        kivi(r.one_in(4) ? static_cast<int32_t>(r.pick({2, 4})) : 0),
        pages(1 + r.below(kivi ? 2 : 6)),
        page(kivi ? r.pick({32, 64}) : r.pick({1, 4, 16, 32})),
        Hkv(1 + r.below(kivi ? 8 : 4)) {
    kv.struct_size = sizeof kv;
    if (kivi) number = FASTOPS_F16;
  }
  int64_t dim() { return kivi ? 32 * (1 + r.below(4)) : 8 * (1 + r.below(20)); }
  fastops_tensor codes(int slot, int64_t dim, int32_t* bits) {
    int32_t kind =
        static_cast<int32_t>(r.pick({dtype, FASTOPS_I8, FASTOPS_F8_E4M3, FASTOPS_U8, FASTOPS_U8, FASTOPS_U8}));
    if (kivi) kind = FASTOPS_U8;
    *bits = kind == FASTOPS_U8 ? kivi ? kivi : static_cast<int32_t>(r.pick({8, 4, 4, 2})) : 0;
    return dense(slot, kind, {pages, page, Hkv, *bits ? dim * *bits / 8 : dim});
  }
  fastops_tensor numbers(int slot, int64_t dim) {
    switch (r.below(6)) {
      case 0:
        return dense(slot, number, {1});
      case 1:
        return dense(slot, number, {Hkv});
      case 2:
        return dense(slot, number, {pages, r.pick({1, page}), Hkv, dim});
      case 3:
        return dense(slot, number, {pages, page, Hkv, dim % 16 == 0 ? dim / 16 : 1});
      case 4: {  // tokens across, as PagedCache stores them
        fastops_tensor t = dense(slot, number, {pages, Hkv, page});
        std::swap(t.size[1], t.size[2]);
        std::swap(t.stride[1], t.stride[2]);
        return t;
      }
      default:
        return dense(slot, number, {pages, page, Hkv});
    }
  }
  void side(const fastops_tensor& c, bool keys, int64_t dim, fastops_tensor* scale, fastops_tensor* zero,
            fastops_tensor* min) {
    if (c.dtype == dtype || (c.dtype != FASTOPS_U8 && r.one_in(3))) return;
    *scale = !kivi  ? numbers(BIAS, dim)
             : keys ? dense(BIAS, number, {pages, page / 32, Hkv, dim})
                    : dense(BIAS, number, {pages, page, Hkv, dim / 32});
    if (!kivi && r.one_in(3)) return;
    fastops_tensor* shift = !kivi && r.one_in(2) ? zero : min;
    *shift = *scale;
    shift->data =
        region(SINKS).last(Region::kSize) + (static_cast<char*>(scale->data) - region(BIAS).last(Region::kSize));
  }
  void sides(const fastops_tensor& k, int64_t D, const fastops_tensor& v, int64_t Dv) {
    side(k, true, D, &kv.k_scale, &kv.k_zero, &kv.k_min);
    side(v, false, Dv, &kv.v_scale, &kv.v_zero, &kv.v_min);
  }
  void windows(int64_t B, int64_t R, int64_t D, int64_t Dv) {
    kv.k_recent = dense(SLOPES, dtype, {B, R, Hkv, D});
    kv.v_recent = dense(SLOPES, dtype, {B, R, Hkv, Dv});
    kv.packed_lens = dense(CU_K, FASTOPS_I32, {B});
  }
};

void fuzz_kv(Random& r) {
  const int32_t dtype = static_cast<int32_t>(r.pick({FASTOPS_F32, FASTOPS_F16, FASTOPS_BF16}));
  KvCache cache(r, dtype);
  fastops_kv_quant& kv = cache.kv;
  const int64_t B = 1 + r.below(3), page = cache.page, pages = cache.pages, Hkv = cache.Hkv;
  const int64_t G = 1 + r.below(5), D = cache.dim(), Dv = r.one_in(2) ? D : cache.dim();
  fastops_attention_desc d{};
  d.struct_size = sizeof d;
  d.kv = &kv;
  d.scale = 0.1f;
  d.window_left = r.one_in(3) ? r.below(30) : -1;
  d.window_right = r.one_in(2) ? 0 : -1;
  const int64_t queries = r.one_in(2) ? 1 : 1 + r.below(12), T = B * queries;
  d.q = dense(Q, dtype, {T, Hkv * G, D});
  d.out = dense(OUT, r.one_in(4) ? FASTOPS_F32 : dtype, {T, Hkv * G, Dv});
  if (r.one_in(2)) d.lse = dense(LSE, FASTOPS_F32, {Hkv * G, T});
  d.k = cache.codes(K, D, &kv.k_bits);
  d.v = cache.codes(V, Dv, &kv.v_bits);
  cache.sides(d.k, D, d.v, Dv);
  const int64_t room = r.below(5), R = r.below(20);
  d.block_table = dense(TABLE, FASTOPS_I32, {B, room});
  d.seq_lens = dense(LENS, FASTOPS_I32, {B});
  for (int64_t i = 0; i < B * room; ++i)
    static_cast<int32_t*>(d.block_table.data)[i] = static_cast<int32_t>(r.below(pages));
  const bool window = r.one_in(3);
  if (window) cache.windows(B, R, D, Dv);
  for (int64_t i = 0; i < B; ++i) {
    const int64_t packed = r.below(room * page + 1);
    static_cast<int32_t*>(d.seq_lens.data)[i] = static_cast<int32_t>(packed + (window ? r.below(R + 1) : 0));
    if (window) static_cast<int32_t*>(kv.packed_lens.data)[i] = static_cast<int32_t>(packed);
  }
  if (r.one_in(6))
    static_cast<int32_t*>(d.seq_lens.data)[r.below(B)] = static_cast<int32_t>(r.pick({-1, 999, INT32_MAX}));
  if (window && r.one_in(6))
    static_cast<int32_t*>(kv.packed_lens.data)[r.below(B)] = static_cast<int32_t>(r.pick({-1, 999, INT32_MAX}));
  fastops_tensor* tensors[] = {&d.q,        &d.k,         &d.v,         &d.out,         &d.lse,      &d.block_table,
                               &d.seq_lens, &kv.k_scale,  &kv.k_zero,   &kv.k_min,      &kv.v_scale, &kv.v_zero,
                               &kv.v_min,   &kv.k_recent, &kv.v_recent, &kv.packed_lens};
  const int slots[] = {Q, K, V, OUT, LSE, TABLE, LENS, BIAS, SINKS, SINKS, BIAS, SINKS, SINKS, SLOPES, SLOPES, CU_K};
  constexpr int kTensors = 16;
  for (int64_t n = r.pick({0, 0, 1, 1, 2}); n > 0; --n) {
    const int64_t which = r.below(kTensors + 3);
    if (which < kTensors)
      spoil_tensor(r, tensors[which], which == 5 || which == 6 || which == 15);
    else if (which == kTensors)
      kv.struct_size = static_cast<uint32_t>(r.pick({0, sizeof kv + 8}));
    else
      (which == kTensors + 1 ? kv.k_bits : kv.v_bits) = static_cast<int32_t>(r.pick({-1, 0, 1, 2, 4, 8, INT32_MAX}));
  }
  char message[FASTOPS_MESSAGE_SIZE] = "";
  const fastops_status status = fastops_attention_check(&d, message);
  sane(status, message);
  ++(status == FASTOPS_OK ? g_count.accepted : g_count.refused);
  if (status != FASTOPS_OK) return;
  for (int i = 0; i < kTensors; ++i)
    if (!in_memory(slots[i], *tensors[i])) return;
  if (work(d) == INT64_MAX) return;
  run([&](fastops_env* env) { return fastops_attention_fwd(&d, env); },
      [&](fastops_env* env, size_t* bytes) { return fastops_attention_workspace(&d, env, bytes); }, {OUT, LSE},
      !overlaps_itself(d.out) && !overlaps_itself(d.lse));
}

void fuzz_kv_append(Random& r) {
  const int32_t dtype = static_cast<int32_t>(r.pick({FASTOPS_F32, FASTOPS_F16, FASTOPS_BF16}));
  KvCache cache(r, dtype);
  fastops_kv_quant& kv = cache.kv;
  const int64_t B = r.below(4), D = cache.dim(), Dv = r.one_in(2) ? D : cache.dim();
  const int64_t room = r.below(5), R = 32 + r.below(20), most = 1 + r.below(r.one_in(3) ? 60 : 4);
  bool windowed = false;
  fastops_kv_append_desc d{};
  d.struct_size = sizeof d;
  if (r.one_in(4)) {
    d.k_cache = dense(K, dtype, {cache.pages, cache.page, cache.Hkv, D});
    d.v_cache = dense(V, dtype, {cache.pages, cache.page, cache.Hkv, Dv});
  } else {
    d.kv = &kv;
    d.k_cache = cache.codes(K, D, &kv.k_bits);
    d.v_cache = cache.codes(V, Dv, &kv.v_bits);
    cache.sides(d.k_cache, D, d.v_cache, Dv);
    windowed = r.one_in(2);
    if (windowed) cache.windows(B, R, D, Dv);
  }
  d.block_table = dense(TABLE, FASTOPS_I32, {B, room});
  d.seq_lens = dense(LENS, FASTOPS_I32, {B});
  d.new_lens = r.one_in(4) ? d.seq_lens : dense(LSE, FASTOPS_I32, {B});
  int64_t T = B * most;
  if (r.one_in(2)) {
    d.cu_seqlens = dense(CU_Q, FASTOPS_I32, {B + 1});
    T = 0;
    for (int64_t b = 0; b <= B; ++b) {
      static_cast<int32_t*>(d.cu_seqlens.data)[b] = static_cast<int32_t>(T);
      T += b < B ? r.below(most + 1) : 0;
    }
    if (r.one_in(6))
      static_cast<int32_t*>(d.cu_seqlens.data)[r.below(B + 1)] = static_cast<int32_t>(r.pick({-1, 7, 999}));
  }
  d.k = dense(Q, dtype, {T, cache.Hkv, D});
  d.v = dense(OUT, dtype, {T, cache.Hkv, Dv});
  std::vector<int32_t> packed, lens;
  for (int64_t i = 0; i < B * room; ++i)
    static_cast<int32_t*>(d.block_table.data)[i] = static_cast<int32_t>(r.one_in(50) ? 999 : r.below(cache.pages));
  for (int64_t i = 0; i < B; ++i) {
    packed.push_back(static_cast<int32_t>(32 * r.below(room * cache.page / 32 + 1)));
    lens.push_back(static_cast<int32_t>(packed.back() + (windowed ? r.below(R + 1) : r.below(20))));
    if (r.one_in(20)) (r.one_in(2) ? packed : lens).back() = static_cast<int32_t>(r.pick({-1, 999, INT32_MAX}));
  }
  const auto restore = [&](fastops_env*, size_t* bytes) {  // a call changes both
    *bytes = 0;
    for (int64_t i = 0; i < B; ++i) {
      reinterpret_cast<int32_t*>(region(LENS).last(4 * B))[i] = lens[static_cast<size_t>(i)];
      if (windowed) reinterpret_cast<int32_t*>(region(CU_K).last(4 * B))[i] = packed[static_cast<size_t>(i)];
    }
    return FASTOPS_OK;
  };
  size_t none = 0;
  restore(nullptr, &none);
  try_call(r, d,
           {{&d.k, Q, false},
            {&d.v, OUT, false},
            {&d.k_cache, K, false},
            {&d.v_cache, V, false},
            {&d.block_table, TABLE, true},
            {&d.seq_lens, LENS, true},
            {&d.cu_seqlens, CU_Q, true},
            {&d.new_lens, d.new_lens.data == d.seq_lens.data ? LENS : LSE, false},
            {&kv.k_scale, BIAS, false},
            {&kv.k_zero, SINKS, false},
            {&kv.k_min, SINKS, false},
            {&kv.v_scale, BIAS, false},
            {&kv.v_zero, SINKS, false},
            {&kv.v_min, SINKS, false},
            {&kv.k_recent, SLOPES, false},
            {&kv.v_recent, SLOPES, false},
            {&kv.packed_lens, CU_K, true}},
           fastops_kv_append_check, fastops_kv_append, restore, {}, false);
}
