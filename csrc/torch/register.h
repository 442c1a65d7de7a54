// The operators of a file on CPU tensors, and those with CUDA kernels on CUDA tensors.
#pragma once
#include <algorithm>
#include <tuple>

#include "torch/tensor.h"

namespace fastops::binding {

template <class R>
struct Results {
  static constexpr size_t kCount = 1;
  static R take(StableIValue* stack) { return torch::stable::detail::to<R>(stack[0]); }
};
template <>
struct Results<void> {
  static constexpr size_t kCount = 0;
  static void take(StableIValue*) {}
};
template <class... R>
struct Results<std::tuple<R...>> {
  static constexpr size_t kCount = sizeof...(R);
  static std::tuple<R...> take(StableIValue* stack) { return torch::stable::detail::unbox_to_tuple<R...>(stack); }
};

// Another operator, by its full name.
template <class R, class... A>
R call_operator(const char* name, const A&... args) {
  StableIValue stack[std::max(sizeof...(A), Results<R>::kCount)] = {torch::stable::detail::from(args)...};
  check_shim(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
  return Results<R>::take(stack);
}

// FASTOPS_STRICT: nothing falls through.
inline bool strict() {
  static const bool set = [] {
    const char* text = std::getenv("FASTOPS_STRICT");
    return text != nullptr && *text != '\0' && std::string(text) != "0";
  }();
  return set;
}

// An operator whose refusals go to plain torch, which fastops/_cuda.py defines under Name::text.
template <class Name, class F, F function>
struct OrPlain;
template <class Name, class R, class... A, R (*function)(A...)>
struct OrPlain<Name, R (*)(A...), function> {
  static R run(A... args) {
    try {
      return function(args...);
    } catch (const Refusal& refusal) {
      if ((mode() & kOrRefuse) != 0 || strict()) throw;
      remember_refusal(refusal.what());
    }
    return call_operator<R>(Name::text, args...);
  }
};

}  // namespace fastops::binding

#define FASTOPS_ON_CPU(op) m.impl(#op, TORCH_BOX(&op));
#define FASTOPS_PLAIN(op)                                      \
  struct plain_##op {                                          \
    static constexpr const char* text = "fastops_plain::" #op; \
  };
#define FASTOPS_ON_CUDA(op) m.impl(#op, TORCH_BOX((&OrPlain<plain_##op, decltype(&op), &op>::run)));
// OPS(X): X(name) for each, the name of a function here.
#define FASTOPS_REGISTER(OPS)                                                        \
  STABLE_TORCH_LIBRARY_IMPL(fastops, CPU, m){OPS(FASTOPS_ON_CPU)} OPS(FASTOPS_PLAIN) \
      STABLE_TORCH_LIBRARY_IMPL(fastops, CUDA, m) {                                  \
    OPS(FASTOPS_ON_CUDA)                                                             \
  }
