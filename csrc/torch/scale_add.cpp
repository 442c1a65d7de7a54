// scale_add: tensors to descriptors, nothing else.
#include "torch/tensor.h"

namespace fastops::binding {
namespace {

void run(const Tensor& x, const Tensor& y, double alpha, const Tensor& out) {
  fastops_scale_add_desc d{};
  d.struct_size = sizeof d;
  d.alpha = static_cast<float>(alpha);
  d.x = view(x, "x");
  d.y = view(y, "y");
  d.out = view(out, "out");
  call([&](fastops_env* env) { return fastops_scale_add(&d, env); },
       [](fastops_env*, size_t*) { return FASTOPS_ERR_INTERNAL; });
}

Tensor scale_add(Tensor x, Tensor y, double alpha) {
  const fastops_tensor like = view(x, "x");
  Tensor out = empty(like.size, like.ndim, scalar_type(x));
  run(x, y, alpha, out);
  return out;
}

void scale_add_out(Tensor x, Tensor y, double alpha, Tensor out) { run(x, y, alpha, out); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastops, CPU, m) {
  m.impl("scale_add", TORCH_BOX(&scale_add));
  m.impl("scale_add_out", TORCH_BOX(&scale_add_out));
}

}  // namespace fastops::binding
