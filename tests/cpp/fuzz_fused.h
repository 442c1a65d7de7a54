// The fused operators' part of fuzz.cpp, inside its namespace.
#pragma once

struct Field {
  fastops_tensor* t;
  int slot;
  bool index;  // read by check()
};

// Spoils a few fields, checks, and runs what is accepted and really there.
template <class Desc, class Check, class Run, class Need>
void try_call(Random& r, Desc& d, std::vector<Field> fields, Check check, Run call, Need need,
              std::initializer_list<int> outs, bool compare) {
  for (int64_t n = r.pick({0, 1, 1, 2}); n > 0; --n) {
    const int64_t which = r.below(static_cast<int64_t>(fields.size()) + 1);
    if (which < static_cast<int64_t>(fields.size()))
      spoil_tensor(r, fields[static_cast<size_t>(which)].t, fields[static_cast<size_t>(which)].index);
    else
      d.struct_size = static_cast<uint32_t>(r.pick({0, sizeof d + 8}));
  }
  char message[FASTOPS_MESSAGE_SIZE] = "";
  const fastops_status status = check(&d, message);
  sane(status, message);
  ++(status == FASTOPS_OK ? g_count.accepted : g_count.refused);
  if (status != FASTOPS_OK) return;
  for (const Field& f : fields) {
    if (!in_memory(f.slot, *f.t)) return;
    for (int slot : outs)
      if (f.slot == slot && overlaps_itself(*f.t)) compare = false;
  }
  run([&](fastops_env* env) { return call(&d, env); }, need, outs, compare);
}

int32_t any_float(Random& r) { return static_cast<int32_t>(r.pick({FASTOPS_F32, FASTOPS_F16, FASTOPS_BF16})); }

void fuzz_norm(Random& r) {
  const int32_t dtype = any_float(r);
  const int64_t a = r.below(5), b = r.below(9), n = 1 + r.below(150);
  fastops_norm_desc d{};
  d.struct_size = sizeof d;
  d.layer = r.one_in(3);
  d.eps = 1e-5f;
  d.weight_offset = r.one_in(2) ? 1.0f : 0.0f;
  d.x = dense(Q, dtype, {a, b, n});
  d.out = dense(OUT, static_cast<int32_t>(r.pick({dtype, dtype, FASTOPS_F32, FASTOPS_I8, FASTOPS_F8_E4M3})), {a, b, n});
  bool compare = true;
  if (r.one_in(2)) {
    d.residual = dense(K, dtype, {a, b, n});
    d.sum = dense(V, dtype, {a, b, n});
    if (r.one_in(3)) d.sum = d.residual, compare = false;
  }
  if (d.out.dtype == dtype && r.one_in(4)) d.out = d.x, compare = false;
  if (r.one_in(2)) d.weight = dense(BIAS, r.one_in(2) ? dtype : FASTOPS_F32, {n});
  if (d.layer && r.one_in(2)) d.bias = dense(SINKS, r.one_in(2) ? dtype : FASTOPS_F32, {n});
  if (d.out.dtype == FASTOPS_I8 || d.out.dtype == FASTOPS_F8_E4M3) d.scales = dense(LSE, FASTOPS_F32, {a, b});
  if (r.one_in(2)) d.rstd = dense(TABLE, FASTOPS_F32, {a, b});
  if (r.one_in(2)) d.mean = dense(CU_K, FASTOPS_F32, {a, b});
  try_call(
      r, d,
      {{&d.x, Q, false},
       {&d.out, d.out.data == d.x.data ? Q : OUT, false},
       {&d.residual, K, false},
       {&d.sum, d.sum.data == d.residual.data ? K : V, false},
       {&d.weight, BIAS, false},
       {&d.bias, SINKS, false},
       {&d.scales, LSE, false},
       {&d.rstd, TABLE, false},
       {&d.mean, CU_K, false}},
      fastops_norm_check, fastops_norm,
      [&](fastops_env* env, size_t* bytes) { return fastops_norm_workspace(&d, env, bytes); },
      {OUT, V, LSE, TABLE, CU_K}, compare);
}

void fuzz_norm_bwd(Random& r) {
  const int32_t dtype = any_float(r);
  const int64_t a = r.below(5), b = r.below(30), n = 1 + r.below(100);
  fastops_norm_bwd_desc d{};
  d.struct_size = sizeof d;
  d.layer = r.one_in(2);
  d.dout = dense(Q, dtype, {a, b, n});
  d.s = dense(K, dtype, {a, b, n});
  d.ds = dense(OUT, dtype, {a, b, n});
  if (r.one_in(2)) d.dsum = dense(V, dtype, {a, b, n});
  if (r.one_in(2)) d.weight = dense(BIAS, r.one_in(2) ? dtype : FASTOPS_F32, {n});
  d.rstd = dense(TABLE, FASTOPS_F32, {a, b});
  if (d.layer) d.mean = dense(CU_K, FASTOPS_F32, {a, b});
  if (r.one_in(2)) d.dweight = dense(SINKS, FASTOPS_F32, {n});
  if (r.one_in(2)) d.dbias = dense(SLOPES, FASTOPS_F32, {n});
  try_call(
      r, d,
      {{&d.dout, Q, false},
       {&d.s, K, false},
       {&d.ds, OUT, false},
       {&d.dsum, V, false},
       {&d.weight, BIAS, false},
       {&d.rstd, TABLE, false},
       {&d.mean, CU_K, false},
       {&d.dweight, SINKS, false},
       {&d.dbias, SLOPES, false}},
      fastops_norm_bwd_check, fastops_norm_bwd,
      [&](fastops_env* env, size_t* bytes) { return fastops_norm_bwd_workspace(&d, env, bytes); }, {OUT, SINKS, SLOPES},
      true);
}

void fuzz_gated(Random& r) {
  const int32_t dtype = any_float(r);
  const int64_t a = r.below(5), b = r.below(9), n = r.below(300);
  fastops_gated_desc d{};
  d.struct_size = sizeof d;
  d.activation = static_cast<int32_t>(r.below(r.one_in(8) ? 5 : 3));
  d.gate = dense(Q, dtype, {a, b, n});
  d.up = dense(K, dtype, {a, b, n});
  if (r.one_in(2)) {
    d.out = dense(OUT, dtype, {a, b, n});
  } else {
    d.dout = dense(V, dtype, {a, b, n});
    d.dgate = dense(OUT, dtype, {a, b, n});
    d.dup = dense(LSE, dtype, {a, b, n});
  }
  try_call(r, d,
           {{&d.gate, Q, false},
            {&d.up, K, false},
            {&d.out, OUT, false},
            {&d.dout, V, false},
            {&d.dgate, OUT, false},
            {&d.dup, LSE, false}},
           fastops_gated_check, fastops_gated, no_workspace, {OUT, LSE}, true);
}

void fuzz_rope(Random& r) {
  const int32_t dtype = any_float(r), angle = any_float(r);
  const bool ragged = r.one_in(2);
  const int64_t B = ragged ? 1 : r.below(4), S = r.below(9), D = 1 + r.below(90), H = r.below(4), Hk = r.below(3);
  const int64_t half = r.below(D / 2 + 1), places = 1 + r.below(20), page = 1 + r.below(4), pages = 1 + r.below(12);
  const auto heads = [&](int slot, int64_t h, int64_t width) {
    return ragged ? dense(slot, dtype, {S, h, width}) : dense(slot, dtype, {B, S, h, width});
  };
  fastops_rope_desc d{};
  d.struct_size = sizeof d;
  d.interleaved = r.one_in(2);
  d.inverse = r.one_in(3);
  d.eps = 1e-6f;
  d.q = heads(Q, H, D);
  d.q_out = heads(OUT, H, D);
  if (r.one_in(2)) {
    d.positions = dense(CU_Q, r.one_in(2) ? FASTOPS_I32 : FASTOPS_I64, {S});
    for (int64_t i = 0; i < S; ++i) {
      const int64_t p = r.one_in(60) ? r.pick({-1, places, INT32_MAX}) : r.below(places);
      if (d.positions.dtype == FASTOPS_I32)
        static_cast<int32_t*>(d.positions.data)[i] = static_cast<int32_t>(p);
      else
        static_cast<int64_t*>(d.positions.data)[i] = p;
    }
    d.cos = dense(BIAS, angle, {places, half});
    d.sin = dense(SINKS, angle, {places, half});
  } else {
    d.cos = dense(BIAS, angle, {S, half});
    d.sin = dense(SINKS, angle, {S, half});
  }
  if (r.one_in(2)) d.q_weight = dense(SLOPES, r.one_in(2) ? dtype : FASTOPS_F32, {D});
  if (r.one_in(3)) d.k_weight = dense(LENS, FASTOPS_F32, {D});
  if (!r.one_in(3)) {
    d.k = heads(K, Hk, D);
    if (r.one_in(2)) d.k_out = heads(LSE, Hk, D);
    if (d.k_out.ndim == 0 || r.one_in(2)) {
      const int64_t tokens = B * S, room = page * pages;
      d.k_cache = dense(TABLE, dtype, {pages, page, Hk, D});
      d.slots = dense(SCRATCH, FASTOPS_I64, {tokens});
      const int64_t start = r.below(room);
      for (int64_t i = 0; i < tokens; ++i)  // no slot twice: the order of writes is nobody's business
        static_cast<int64_t*>(d.slots.data)[i] = i < room && !r.one_in(9) ? (start + i) % room
                                                 : r.one_in(40)           ? r.pick({room, INT64_MAX})
                                                                          : -1 - r.below(3);
      if (r.one_in(2)) {
        d.v = heads(V, Hk, 8);
        d.v_cache = dense(CU_K, dtype, {pages, page, Hk, 8});
      }
    }
  }
  try_call(r, d,
           {{&d.q, Q, false},
            {&d.q_out, OUT, false},
            {&d.k, K, false},
            {&d.k_out, LSE, false},
            {&d.cos, BIAS, false},
            {&d.sin, SINKS, false},
            {&d.positions, CU_Q, true},
            {&d.q_weight, SLOPES, false},
            {&d.k_weight, LENS, false},
            {&d.v, V, false},
            {&d.k_cache, TABLE, false},
            {&d.v_cache, CU_K, false},
            {&d.slots, SCRATCH, true}},
           fastops_rope_check, fastops_rope, no_workspace, {OUT, LSE, TABLE, CU_K}, true);
}

void fuzz_lut_linear(Random& r) {
  const int32_t dtype = any_float(r);
  const int64_t M = r.below(12), N = r.below(150), features = 1 + r.below(200), count = r.below(80);
  fastops_lut_linear_desc d{};
  d.struct_size = sizeof d;
  d.x = dense(Q, dtype, {M, features});
  d.out = dense(OUT, r.one_in(3) ? FASTOPS_F32 : dtype, {M, N});
  d.codes = dense(K, FASTOPS_U8, {N, (features + 31) / 32, 16});
  d.table = dense(V, FASTOPS_F32, {N, 16});
  if (r.one_in(2)) {
    d.row_starts = dense(CU_Q, FASTOPS_I32, {N + 1});
    d.columns = dense(CU_K, FASTOPS_I32, {count});
    d.values = dense(SINKS, FASTOPS_F32, {count});
    auto *starts = static_cast<int32_t*>(d.row_starts.data), *columns = static_cast<int32_t*>(d.columns.data);
    for (int64_t n = 0; n <= N; ++n) starts[n] = static_cast<int32_t>(n == 0 ? 0 : count * n / N);
    for (int64_t i = 0; i < count; ++i) columns[i] = static_cast<int32_t>(r.below(features));
    if (r.one_in(4)) starts[r.below(N + 1)] = static_cast<int32_t>(r.pick({-1, count + 1, INT32_MAX, INT32_MIN}));
    if (count > 0 && r.one_in(4)) columns[r.below(count)] = static_cast<int32_t>(r.pick({-1, features, INT32_MAX}));
  }
  if (r.one_in(2)) d.bias = dense(BIAS, FASTOPS_F32, {N});
  try_call(
      r, d,
      {{&d.x, Q, false},
       {&d.out, OUT, false},
       {&d.codes, K, false},
       {&d.table, V, false},
       {&d.row_starts, CU_Q, true},
       {&d.columns, CU_K, true},
       {&d.values, SINKS, false},
       {&d.bias, BIAS, false}},
      &fastops_lut_linear_check, &fastops_lut_linear,
      [&](fastops_env* env, size_t* bytes) { return fastops_lut_linear_workspace(&d, env, bytes); }, {OUT}, true);
}
