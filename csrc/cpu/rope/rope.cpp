// rope's C API on the CPU: check (positions and slots included), share the tokens out.
#include "cpu/rope/rope.h"

#include <cstring>

#include "core/dtype.h"
#include "core/op_checks.h"
#include "core/parallel.h"

namespace fastops::cpu {
namespace {

constexpr int64_t kMaxDim = kMaxRopeDim;
static_assert(kMaxDim <= 2 * kRopePairs);

char* slot_of(const fastops_tensor& cache, int64_t slot) {
  const int64_t page = cache.size[1], esize = size_of(cache.dtype);
  return static_cast<char*>(cache.data) + (slot / page * cache.stride[0] + slot % page * cache.stride[1]) * esize;
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
                        isa_reads_through_l2(),
                        d.q.dtype};
  const int64_t work = (heads_of(d.q) + heads_of(d.k)) * dim, threads = env->num_threads > 1 ? env->num_threads : 1;
  const bool brief = is_brief(tokens * work, *env);
  const int64_t per = brief ? (tokens + threads - 1) / threads : rows_per_item(tokens, work, *env);
  const auto slot_at = [&](int64_t t) { return given(d.slots) ? static_cast<const int64_t*>(d.slots.data)[t] : -1; };
  const auto place_q = [&](int64_t t) {
    return RopePlace{q.at(t), q_out.at(t), step_of(d.q), step_of(d.q_out), heads_of(d.q)};
  };
  const auto place_k = [&](int64_t t) {  // without k_out it goes to its slot only
    if (given(d.k_out)) return RopePlace{k.at(t), k_out.at(t), step_of(d.k), step_of(d.k_out), heads_of(d.k)};
    if (const int64_t slot = slot_at(t); slot >= 0)
      return RopePlace{k.at(t), slot_of(d.k_cache, slot), step_of(d.k), step_of(d.k_cache), heads_of(d.k)};
    return RopePlace{};
  };
  const auto run = [&](int64_t item, int) {
    alignas(64) float cosines[kMaxDim + 16], sines[kMaxDim + 16], q_weight[kMaxDim], k_weight[kMaxDim];
    const auto widened = [&](const fastops_tensor& t, float* to) {
      if (!given(t)) return static_cast<const float*>(nullptr);
      variant.table.weight(static_cast<const char*>(t.data), t.dtype, t.size[0], d.weight_offset, to);
      return static_cast<const float*>(to);
    };
    const float *of_q = widened(d.q_weight, q_weight), *of_k = widened(d.k_weight, k_weight);
    const int64_t begin = item * per, end = begin + per < tokens ? begin + per : tokens;
    int64_t ready = -1;                          // whose angles are there
    const int64_t known = brief ? end : tokens;  // what a thread reads next, mostly
    const auto turn = [&](int64_t from, int64_t to, const float* weight, const auto& place, const RopePlace(&then)[2]) {
      for (int64_t t = from; t < to; ++t) {
        const int64_t angle = given(d.positions)
                                  ? index_at(d.positions.dtype, positions.at(row_of(d.positions, 0, d.q, t)))
                                  : row_of(d.cos, 1, d.q, t);
        if (angle != ready)
          variant.table.angles({cos.at(angle), sin.at(angle), d.cos.dtype, d.inverse != 0}, shape, cosines, sines);
        ready = angle;
        const int64_t left = to - t - 1;
        variant.table.heads(
            {place(t), weight, {left > 0 ? place(t + 1) : then[0], left > 1 ? place(t + 2) : then[left > 0 ? 0 : 1]}},
            shape, cosines, sines);
      }
    };
    // All of q and then all of k, so that memory is read and written in one line each; past the caches token by token.
    const int64_t step = shape.stream ? 1 : end - begin;
    for (int64_t t = begin; t < end; t += step) {
      const int64_t next = t + step;
      const RopePlace none{}, q_next = next < known ? place_q(next) : none;
      if (!given(d.k)) {
        turn(t, next, of_q, place_q, {q_next, none});
        continue;
      }
      turn(t, next, of_q, place_q, {place_k(t), q_next});
      turn(t, next, of_k, place_k, {q_next, next < known ? place_k(next) : none});
    }
    if (!given(d.k)) return;
    if (!given(d.slots)) return;
    const auto copy = [&](const fastops_tensor& from, const Rows& rows, const fastops_tensor& cache) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t i = 0; slot_at(t) >= 0 && i < heads_of(from); ++i)
          std::memcpy(slot_of(cache, slot_at(t)) + i * step_of(cache), rows.at(t) + i * step_of(from),
                      static_cast<size_t>(last(from) * esize));
    };
    if (given(d.k_out)) copy(d.k_out, k_out, d.k_cache);
    if (given(d.v)) copy(d.v, v, d.v_cache);
  };
  parallel_items(*env, (tokens + per - 1) / per, run, brief);
  return FASTOPS_OK;
}
