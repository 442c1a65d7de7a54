#include "torch/libraries.h"

#include <dlfcn.h>

#include <cstdlib>
#include <string>
#include <utility>

namespace fastops::binding {
namespace {

constexpr struct {
  const char *run, *workspace;
} kNames[kCudaFunctions] = {
    {"fastops_cuda_attention_fwd", "fastops_cuda_attention_workspace"},
    {"fastops_cuda_attention_bwd", "fastops_cuda_attention_bwd_workspace"},
    {"fastops_cuda_merge_states", nullptr},
    {"fastops_cuda_int4_linear", "fastops_cuda_int4_linear_workspace"},
    {"fastops_cuda_norm", nullptr},
    {"fastops_cuda_norm_bwd", "fastops_cuda_norm_bwd_workspace"},
    {"fastops_cuda_rope", nullptr},
    {"fastops_cuda_gated", nullptr},
};

struct Loaded {
  Library library{};
  bool there = false;
  decltype(fastops_cuda_env::start) start = nullptr;
  fastops_torch_facts facts = nullptr;
};
Loaded g_loaded[2];  // the emulator, for GPUs

int32_t (*g_current_stream)(int32_t device, void** stream) = nullptr;

thread_local int t_mode = 0;
thread_local std::string t_refusal;

template <class F>
bool find(void* handle, const char* name, F** to) {
  *to = reinterpret_cast<F*>(dlsym(handle, name));
  return *to != nullptr;
}

uint64_t number_of(const char* variable, uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text != nullptr && *text != '\0' ? std::strtoull(text, nullptr, 10) : otherwise;
}

std::string load(const char* path, bool gpu, Loaded* into) {
  void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return dlerror();
  if (!find(handle, "fastops_cuda_archs", &into->library.archs)) return std::string(path) + " is not ours";
  for (int i = 0; i < kCudaFunctions; ++i) {
    if (!find(handle, kNames[i].run, &into->library.run[i])) return std::string(path) + " has no " + kNames[i].run;
    if (kNames[i].workspace != nullptr && !find(handle, kNames[i].workspace, &into->library.workspace[i]))
      return std::string(path) + " has no " + kNames[i].workspace;
  }
  if (gpu) {  // in the process already where torch has CUDA
    void* torch = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    if (torch == nullptr || !find(torch, "aoti_torch_get_current_cuda_stream", &g_current_stream))
      return "this torch has no CUDA (the library has code for sm_" + std::string(into->library.archs()) + ")";
  }
  into->there = true;
  return "";
}

}  // namespace

const Library* library_for(bool gpu) { return g_loaded[gpu].there ? &g_loaded[gpu].library : nullptr; }

void prepare(fastops_cuda_env* env, bool gpu, int32_t device) {
  const Loaded& from = g_loaded[gpu];
  env->start = from.start;
  if (from.facts != nullptr) from.facts(device, &env->arch, &env->sm_count);
  if (gpu) {
    g_current_stream(device, &env->stream);
  } else if (from.facts == nullptr) {
    env->seed = number_of("FASTOPS_EMULATOR_SEED", 0);
    env->arch = static_cast<int32_t>(number_of("FASTOPS_EMULATOR_ARCH", 80));
  }
}

int mode() { return t_mode; }
void remember_refusal(const char* text) { t_refusal = text; }

}  // namespace fastops::binding

using namespace fastops::binding;

extern "C" const char* fastops_torch_load(const char* path, int for_gpus, void* start, fastops_torch_facts facts) {
  static thread_local std::string problem;
  Loaded loaded;
  loaded.start = reinterpret_cast<decltype(loaded.start)>(start);
  loaded.facts = facts;
  problem = load(path, for_gpus != 0, &loaded);
  if (!problem.empty()) return problem.c_str();
  g_loaded[for_gpus != 0] = loaded;
  return nullptr;
}

extern "C" const char* fastops_torch_archs(int for_gpus) {
  const Library* library = library_for(for_gpus != 0);
  return library == nullptr ? "" : library->archs();
}

extern "C" int fastops_torch_set_mode(int mode) { return std::exchange(t_mode, mode); }

extern "C" const char* fastops_torch_last_refusal(void) { return t_refusal.c_str(); }
