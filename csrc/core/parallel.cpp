#include "core/parallel.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/status.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#else
#include <thread>
#endif

namespace fastops {
namespace {

constexpr int32_t kMostCores = 65536;

// Not what this process may use: a plan must not change with an affinity mask or a limit on threads.
int32_t machine_cores() {
#if defined(_SC_NPROCESSORS_ONLN)
  const long n = sysconf(_SC_NPROCESSORS_ONLN);
#else
  const long n = static_cast<long>(std::thread::hardware_concurrency());
#endif
  return n < 1 ? 4 : n > kMostCores ? kMostCores : static_cast<int32_t>(n);
}

struct FromEnvironment {
  int32_t cores = machine_cores();
  char refusal[FASTOPS_MESSAGE_SIZE] = "";
  FromEnvironment() {
    const char* text = std::getenv("FASTOPS_CORES");
    if (text == nullptr || *text == '\0' || std::strcmp(text, "auto") == 0) return;
    char* end = nullptr;
    const long n = std::strtol(text, &end, 10);
    if (*end == '\0' && n >= 1 && n <= kMostCores) {
      cores = static_cast<int32_t>(n);
    } else {
      std::snprintf(refusal, sizeof refusal, "FASTOPS_CORES is '%.64s', can be auto or 1 to %d", text, kMostCores);
    }
  }
};
const FromEnvironment& environment() {
  static const FromEnvironment once;
  return once;
}

std::atomic<int32_t> g_cores{0};  // 0: the environment's

}  // namespace

int32_t plan_cores() {
  const int32_t n = g_cores.load(std::memory_order_relaxed);
  return n > 0 ? n : environment().cores;
}

const char* plan_refusal() {
  return environment().refusal[0] && g_cores.load(std::memory_order_relaxed) == 0 ? environment().refusal : nullptr;
}

}  // namespace fastops

extern "C" {

int32_t fastops_cores(void) { return fastops::plan_cores(); }

const char* fastops_cores_refusal(void) { return fastops::plan_refusal(); }

fastops_status fastops_cores_set(int32_t n, char* message) {
  if (n < 0 || n > fastops::kMostCores) {
    fastops::set_message(message, "cores_set: %d cores, can be 1 to %d, or 0 for the machine's", n,
                         fastops::kMostCores);
    return FASTOPS_ERR_VALUE;
  }
  fastops::g_cores.store(n, std::memory_order_relaxed);
  return FASTOPS_OK;
}

}  // extern "C"
