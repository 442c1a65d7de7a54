// Work items over the caller's threads.
#pragma once
#include <atomic>
#include <cstdint>

#include "fastops/fastops.h"

namespace fastops {

// Calls f(item, worker) once for each item in [0, n). Workers (at most env.num_threads) take the next item when they
// are done with one, so uneven items balance; `worker` < env.num_threads picks the scratch. One worker runs inline.
template <class F>
void parallel_items(const fastops_env& env, int64_t n, F&& f) {
  const int64_t workers = env.num_threads < n ? env.num_threads : n;
  if (workers <= 1 || env.parallel_for == nullptr) {
    for (int64_t i = 0; i < n; ++i) f(i, 0);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next;
    int64_t n;
    F* f;
  } shared{{0}, n, &f};
  env.parallel_for(
      env.parallel_ctx, workers, 1,
      [](void* arg, int64_t begin, int64_t end) {
        auto* s = static_cast<Shared*>(arg);
        for (int64_t worker = begin; worker < end; ++worker)
          for (int64_t i; (i = s->next.fetch_add(1, std::memory_order_relaxed)) < s->n;)
            (*s->f)(i, static_cast<int>(worker));
      },
      &shared);
}

}  // namespace fastops
