#include "core/isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/status.h"
#include "fastops/fastops.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastops {
namespace {

constexpr int kCount = static_cast<int>(Isa::count);
const char* const kNames[kCount] = {"scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_emu", "amx"};
const char* const kBestFirst[kCount + 1] = {"amx",  "avx512_bf16", "avx512_vnni", "avx512",
                                            "avx2", "scalar",      "amx_emu",     nullptr};

const char kKnown[] = "known: auto, amx, avx512_bf16, avx512_vnni, avx512, avx2, scalar";

struct Features {
  bool has[kCount] = {true};  // scalar
  bool permutes_bytes = false;
  bool intel = false;
};

#if defined(__x86_64__)
uint64_t read_xcr0() {
  uint32_t lo = 0, hi = 0;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

// Linux gives a process the tile registers only when it asks (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool request_tiles() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kXtileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
#else
  return false;
#endif
}

Features detect() {
  Features f;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c & (1u << 27), fma = c & (1u << 12), f16c = c & (1u << 29);
  if (!osxsave) return f;
  const uint64_t xcr0 = read_xcr0();
  const bool os_ymm = (xcr0 & 0x6) == 0x6, os_zmm = (xcr0 & 0xe6) == 0xe6, os_tiles = (xcr0 & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  const uint32_t leaf7_max = a;
  f.permutes_bytes = c & (1u << 1);  // VBMI
  const bool avx2 = b & (1u << 5), vnni = c & (1u << 11);
  const uint32_t avx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  const uint32_t amx = (1u << 22) | (1u << 24) | (1u << 25);                  // bf16, tiles, int8
  const bool tiles = (d & amx) == amx;
  const bool zmm = os_zmm && (b & avx512) == avx512;
  bool bf16 = false;
  if (leaf7_max >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) bf16 = a & (1u << 5);
  const auto set = [&](Isa isa, bool has) { f.has[static_cast<int>(isa)] = has; };
  bool all = os_ymm && avx2 && fma && f16c;
  set(Isa::avx2, all);
  set(Isa::avx512, all = all && zmm);
  set(Isa::avx512_vnni, all = all && vnni);
  set(Isa::avx512_bf16, all = all && bf16);  // no processor has it without VNNI
  set(Isa::amx_emu, all);
  set(Isa::amx, all && tiles && os_tiles && request_tiles());
  char vendor[12];
  if (__get_cpuid(0, &a, &b, &c, &d)) {
    std::memcpy(vendor, &b, 4), std::memcpy(vendor + 4, &d, 4), std::memcpy(vendor + 8, &c, 4);
    f.intel = std::memcmp(vendor, "GenuineIntel", sizeof vendor) == 0;
  }
  return f;
}
#else
Features detect() { return {}; }
#endif

const Features& features() {
  static const Features found = detect();
  return found;
}

int find(const char* name) {
  for (int i = 0; i < kCount; ++i)
    if (std::strcmp(kNames[i], name) == 0) return i;
  return -1;
}

// Intel's processors have AVX512_BF16 for the sake of AMX: where the system hides the tiles, fp32 is 1.5 times as fast
// (docs/design/002-isa.md).
bool is_worthwhile(Isa isa) {
  if (isa == Isa::avx512_bf16) return !features().intel;
  return isa != Isa::amx_emu;
}

Isa best() {
  for (int i = kCount - 1; i > 0; --i)
    if (is_worthwhile(static_cast<Isa>(i)) && isa_compiled(static_cast<Isa>(i)) && isa_supported(static_cast<Isa>(i)))
      return static_cast<Isa>(i);
  return Isa::scalar;
}

std::atomic<int> g_active{-1};
std::atomic<bool> g_chosen{false};  // by isa_set

struct FromEnvironment {
  Isa isa = Isa::scalar;
  char refusal[FASTOPS_MESSAGE_SIZE] = "";
  FromEnvironment() {
    isa = best();
    const char* name = std::getenv("FASTOPS_ISA");
    if (name == nullptr || *name == '\0' || std::strcmp(name, "auto") == 0) return;
    const int i = find(name);
    if (i < 0) {
      std::snprintf(refusal, sizeof refusal, "FASTOPS_ISA is '%.64s', %s", name, kKnown);
    } else if (!isa_compiled(static_cast<Isa>(i)) || !isa_supported(static_cast<Isa>(i))) {
      std::snprintf(refusal, sizeof refusal, "FASTOPS_ISA is '%s', which this %s lacks", name,
                    isa_compiled(static_cast<Isa>(i)) ? "machine" : "build");
    } else {
      isa = static_cast<Isa>(i);
    }
  }
};
const FromEnvironment& environment() {
  static const FromEnvironment once;
  return once;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_compiled(Isa isa) {
#if defined(__x86_64__)
  return isa < Isa::count;
#else
  return isa == Isa::scalar;
#endif
}

bool isa_supported(Isa isa) { return features().has[static_cast<int>(isa)]; }
bool isa_permutes_bytes() { return features().permutes_bytes; }
bool isa_reads_through_l2() { return features().intel; }

Isa active_isa() {
  int i = g_active.load(std::memory_order_relaxed);
  if (i < 0) {
    i = static_cast<int>(environment().isa);
    g_active.store(i, std::memory_order_relaxed);
  }
  return static_cast<Isa>(i);
}

const char* isa_refusal() {
  return environment().refusal[0] && !g_chosen.load(std::memory_order_relaxed) ? environment().refusal : nullptr;
}

}  // namespace fastops

using namespace fastops;

extern "C" {

#define FASTOPS_STR2(x) #x
#define FASTOPS_STR(x) FASTOPS_STR2(x)
const char* fastops_version(void) {
  return FASTOPS_STR(FASTOPS_VERSION_MAJOR) "." FASTOPS_STR(FASTOPS_VERSION_MINOR) "." FASTOPS_STR(
      FASTOPS_VERSION_PATCH);
}

const char* const* fastops_isa_names(void) { return kBestFirst; }

int fastops_isa_compiled(const char* name) {
  const int i = find(name);
  return i >= 0 && isa_compiled(static_cast<Isa>(i));
}

int fastops_isa_supported(const char* name) {
  const int i = find(name);
  return i >= 0 && isa_supported(static_cast<Isa>(i));
}

const char* fastops_isa_refusal(void) { return isa_refusal(); }

const char* fastops_isa_active(void) { return isa_name(active_isa()); }

fastops_status fastops_isa_set(const char* name, char* message) {
  if (name == nullptr || std::strcmp(name, "auto") == 0) {
    g_active.store(-1, std::memory_order_relaxed);
    g_chosen.store(false, std::memory_order_relaxed);
    return FASTOPS_OK;
  }
  const int i = find(name);
  if (i < 0) {
    set_message(message, "isa_set: '%.64s' is unknown, %s", name, kKnown);
    return FASTOPS_ERR_VALUE;
  }
  const Isa isa = static_cast<Isa>(i);
  if (!isa_compiled(isa) || !isa_supported(isa)) {
    set_message(message, "isa_set: this %s lacks %s", isa_compiled(isa) ? "machine" : "build", name);
    return FASTOPS_ERR_UNSUPPORTED;
  }
  g_active.store(i, std::memory_order_relaxed);
  g_chosen.store(true, std::memory_order_relaxed);
  return FASTOPS_OK;
}
}
