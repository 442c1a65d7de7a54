// Memory that lasts and is read whole, again and again: packed weights, KV caches.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastops::binding {

// Asks the system for large pages where the memory has whole ones; before it is written first. Streams that memory
// binds gain 3 to 7 % (docs/design/003-cpu-attention.md). No error where the system has none to give.
inline void prefer_large_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t at = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (at + kPage - 1) / kPage * kPage, end = (at + bytes) / kPage * kPage;
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace fastops::binding
