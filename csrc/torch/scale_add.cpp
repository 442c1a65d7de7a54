// scale_add: tensors to descriptors, nothing else.
#include "torch/tensor.h"

namespace fastops::binding {
namespace {

constexpr Function<fastops_scale_add_desc> kScaleAdd{&fastops_scale_add};

void run(const Place& at, const Tensor& x, const Tensor& y, double alpha, const Tensor& out) {
  fastops_scale_add_desc d{};
  d.struct_size = sizeof d;
  d.alpha = static_cast<float>(alpha);
  d.x = at.view(x, "x");
  d.y = at.view(y, "y");
  d.out = at.view(out, "out");
  at.call(kScaleAdd, d);
}

Tensor scale_add(Tensor x, Tensor y, double alpha) {
  const Place at(x);
  const fastops_tensor like = at.view(x, "x");
  Tensor out = at.empty(like.size, like.ndim, scalar_type(x));
  run(at, x, y, alpha, out);
  return out;
}

void scale_add_out(Tensor x, Tensor y, double alpha, Tensor out) { run(Place(x), x, y, alpha, out); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastops, CPU, m) {
  m.impl("scale_add", TORCH_BOX(&scale_add));
  m.impl("scale_add_out", TORCH_BOX(&scale_add_out));
}

}  // namespace fastops::binding
