// Work items over the caller's threads.
#pragma once
#include <atomic>
#include <cstdint>

#include "fastops/fastops.h"

namespace fastops {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The cores that plans are made for (fastops_cores).
int32_t plan_cores();
// The sentence that refuses FASTOPS_CORES, or NULL.
const char* plan_refusal();

// Calls f(item, worker) once for each item in [0, n). Every worker (at most env.num_threads) has a run of neighbouring
// items of its own, the same in every call with as many items, so that what one call wrote is in the cache of the core
// whose next call reads it; a worker that is done takes items of the others. `worker` < env.num_threads picks the
// scratch. One worker runs inline.
//
// fixed: for work of some ten microseconds, where taking items of others costs more than it saves: each access to what
// another core has written is a trip to that core, and handing out needs several.
template <class F>
void parallel_items(const fastops_env& env, int64_t n, const F& f, bool fixed = false) {
  const int64_t workers = env.num_threads < n ? env.num_threads : n;
  if (workers <= 1 || env.parallel_for == nullptr) {
    for (int64_t i = 0; i < n; ++i) f(i, 0);
    return;
  }
  if (fixed) {
    struct Shared {
      int64_t items, workers;
      const F* f;
    } shared{n, workers, &f};
    env.parallel_for(
        env.parallel_ctx, workers, 1,
        [](void* arg, int64_t begin, int64_t end) {
          const Shared s = *static_cast<const Shared*>(arg);
          for (int64_t worker = begin; worker < end; ++worker)
            for (int64_t i = s.items * worker / s.workers; i < s.items * (worker + 1) / s.workers; ++i)
              (*s.f)(i, static_cast<int>(worker));
        },
        &shared);
    return;
  }
  constexpr int64_t kMostRuns = 64;
  struct alignas(64) Run {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Shared {
    Run runs[kMostRuns];
    int64_t count;
    const F* f;
  } shared;
  shared.count = workers < kMostRuns ? workers : kMostRuns;
  shared.f = &f;
  for (int64_t r = 0; r < shared.count; ++r) {
    shared.runs[r].next.store(n * r / shared.count, std::memory_order_relaxed);
    shared.runs[r].end = n * (r + 1) / shared.count;
  }
  env.parallel_for(
      env.parallel_ctx, workers, 1,
      [](void* arg, int64_t begin, int64_t end) {
        auto* s = static_cast<Shared*>(arg);
        for (int64_t worker = begin; worker < end; ++worker)
          for (int64_t k = 0; k < s->count; ++k) {
            Run& run = s->runs[(worker + k) % s->count];
            if (k > 0 && run.next.load(std::memory_order_relaxed) >= run.end) continue;  // leaves its line where it is
            for (int64_t i; (i = run.next.fetch_add(1, std::memory_order_relaxed)) < run.end;)
              (*s->f)(i, static_cast<int>(worker));
          }
      },
      &shared);
}

}  // namespace fastops
