// rope's C API on the CPU: check (positions and slots included), share the tokens out.
#include "cpu/rope/rope.h"

#include <cstring>

#include "core/dtype.h"
#include "core/op_checks.h"
#include "core/parallel.h"

namespace fastops::cpu {
namespace {

constexpr int64_t kMaxDim = kMaxRopeDim;

char* slot_of(const fastops_tensor& cache, int64_t slot) {
  const int64_t page = cache.size[1], esize = size_of(cache.dtype);
  return static_cast<char*>(cache.data) + (slot / page * cache.stride[0] + slot % page * cache.stride[1]) * esize;
}

void widen(const fastops_tensor& t, float offset, float* out) {
  for (int64_t i = 0; i < t.size[0]; ++i) {
    float x = 0.0f;
    if (t.dtype == FASTOPS_F32) x = static_cast<const float*>(t.data)[i];
    if (t.dtype == FASTOPS_F16) x = to_f32(static_cast<const f16*>(t.data)[i]);
    if (t.dtype == FASTOPS_BF16) x = to_f32(static_cast<const bf16*>(t.data)[i]);
    out[i] = x + offset;
  }
}

// Row `token` of cos, sin or positions, which may have rows for the places of one sequence only.
int64_t row_of(const fastops_tensor& t, int trailing, const fastops_tensor& q, int64_t token) {
  return t.ndim - trailing < q.ndim - 2 ? token % q.size[1] : token;
}

}  // namespace
}  // namespace fastops::cpu

using namespace fastops;
using namespace fastops::cpu;

extern "C" fastops_status fastops_rope_check(const fastops_rope_desc* desc, char* message) {
  Checks c("rope", message);
  check_rope(*desc, c);
  return c.status();
}

extern "C" fastops_status fastops_rope(const fastops_rope_desc* desc, fastops_env* env) {
  const fastops_rope_desc& d = *desc;
  Checks c("rope", env->message);
  if (!check_rope(d, c) || !c.can_run()) return c.status();
  const auto variant = FASTOPS_CHOOSE(RopeTable, rope_table);
  env->variant = variant.name;
  const int64_t dim = last(d.q), half = last(d.cos), esize = size_of(d.q.dtype);
  const Rows q(d.q, 2), q_out(d.q_out, 2), k(d.k, 2), k_out(d.k_out, 2), v(d.v, 2), cos(d.cos), sin(d.sin);
  const Rows positions(d.positions, 0);
  const int64_t tokens = q.count;
  if (tokens == 0) return FASTOPS_OK;
  const auto heads_of = [](const fastops_tensor& t) { return given(t) ? t.size[t.ndim - 2] : 0; };
  const auto step_of = [&](const fastops_tensor& t) { return given(t) ? t.stride[t.ndim - 2] * esize : 0; };
  const auto lines = [&](const fastops_tensor& t, const Rows& rows) {
    return !given(t) || (rows.aligned(64) && step_of(t) % 64 == 0);
  };
  const RopeShape shape{dim,
                        half,
                        d.eps,
                        d.interleaved != 0,
                        elements(d.q) * esize >= kStreamBytes && d.q_out.data != d.q.data && !given(d.slots) &&
                            lines(d.q_out, q_out) && lines(d.k_out, k_out),
                        d.q.dtype};
  const int64_t work = (heads_of(d.q) + heads_of(d.k)) * dim, threads = env->num_threads > 1 ? env->num_threads : 1;
  const bool brief = is_brief(tokens * work, *env);
  const int64_t per = brief ? (tokens + threads - 1) / threads : rows_per_item(tokens, work, *env);
  const auto run = [&](int64_t item, int) {
    alignas(64) float cosines[kMaxDim + 16], sines[kMaxDim + 16], q_weight[kMaxDim], k_weight[kMaxDim];
    if (given(d.q_weight)) widen(d.q_weight, d.weight_offset, q_weight);
    if (given(d.k_weight)) widen(d.k_weight, d.weight_offset, k_weight);
    const int64_t end = (item + 1) * per < tokens ? (item + 1) * per : tokens;
    for (int64_t t = item * per; t < end; ++t) {
      const int64_t angle = given(d.positions)
                                ? index_at(d.positions.dtype, positions.at(row_of(d.positions, 0, d.q, t)))
                                : row_of(d.cos, 1, d.q, t);
      variant.table.angles({cos.at(angle), sin.at(angle), d.cos.dtype, d.inverse != 0}, shape, cosines, sines);
      const bool more = t + 1 < tokens;
      const auto turn = [&](const fastops_tensor& from, const Rows& in, char* out, char* next_out, int64_t out_step,
                            const float* weight) {
        const RopeHeads h{in.at(t),
                          out,
                          step_of(from),
                          out_step,
                          heads_of(from),
                          weight,
                          more ? in.at(t + 1) : nullptr,
                          shape.stream ? nullptr : next_out};
        variant.table.heads(h, shape, cosines, sines);
      };
      turn(d.q, q, q_out.at(t), more ? q_out.at(t + 1) : nullptr, step_of(d.q_out),
           given(d.q_weight) ? q_weight : nullptr);
      if (!given(d.k)) continue;
      const int64_t slot = given(d.slots) ? static_cast<const int64_t*>(d.slots.data)[t] : -1;
      char* const cached = slot >= 0 ? slot_of(d.k_cache, slot) : nullptr;
      const int64_t cached_step = cached ? d.k_cache.stride[2] * esize : 0, rows = heads_of(d.k);
      const float* weight = given(d.k_weight) ? k_weight : nullptr;
      if (given(d.k_out)) {
        turn(d.k, k, k_out.at(t), more ? k_out.at(t + 1) : nullptr, step_of(d.k_out), weight);
        for (int64_t h = 0; cached && h < rows; ++h)
          std::memcpy(cached + h * cached_step, k_out.at(t) + h * step_of(d.k_out), static_cast<size_t>(dim * esize));
      } else if (cached) {
        turn(d.k, k, cached, nullptr, cached_step, weight);
      }
      if (cached && given(d.v))
        for (int64_t h = 0; h < rows; ++h)
          std::memcpy(slot_of(d.v_cache, slot) + h * d.v_cache.stride[2] * esize, v.at(t) + h * step_of(d.v),
                      static_cast<size_t>(last(d.v) * esize));
    }
  };
  parallel_items(*env, (tokens + per - 1) / per, run, brief);
  return FASTOPS_OK;
}
