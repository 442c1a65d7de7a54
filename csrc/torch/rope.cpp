// apply_rope, qk_norm_rope: tensors to descriptors, nothing else.
#include "torch/register.h"

namespace fastops::binding {
namespace {

constexpr Function<fastops_rope_desc> kRope{&fastops_rope, nullptr, kCudaRope};

struct Call {
  Place at;
  fastops_rope_desc d{};
  Call(const Tensor& q, const OptTensor& k, const Tensor& cos, const Tensor& sin, const OptTensor& positions,
       bool interleaved)
      : at(q) {
    d.struct_size = sizeof d;
    d.interleaved = interleaved;
    d.q = at.view(q, "q");
    d.k = at.view(k, "k");
    d.cos = at.view(cos, "cos");
    d.sin = at.view(sin, "sin");
    d.positions = at.view(positions, "positions");
  }
  Call& norm(const OptTensor& q_weight, const OptTensor& k_weight, double eps, double weight_offset) {
    d.q_weight = at.view(q_weight, "q_weight");
    d.k_weight = at.view(k_weight, "k_weight");
    d.eps = static_cast<float>(eps);
    d.weight_offset = static_cast<float>(weight_offset);
    return *this;
  }
  void run(const Tensor& q_out, const OptTensor& k_out) {
    d.q_out = at.view(q_out, "q_out");
    d.k_out = at.view(k_out, "k_out");
    at.call(kRope, d);
  }
  // Without k its result is an empty tensor.
  std::tuple<Tensor, Tensor> run(const Tensor& q) {
    Tensor q_out = at.empty(d.q.size, static_cast<size_t>(d.q.ndim), scalar_type(q));
    if (d.k.ndim == 0) {
      run(q_out, std::nullopt);
      return {q_out, at.empty({0}, scalar_type(q))};
    }
    Tensor k_out = at.empty(d.k.size, static_cast<size_t>(d.k.ndim), scalar_type(q));
    run(q_out, k_out);
    return {q_out, k_out};
  }
};

std::tuple<Tensor, Tensor> apply_rope(Tensor q, OptTensor k, Tensor cos, Tensor sin, OptTensor positions,
                                      bool interleaved, bool inverse) {
  Call c(q, k, cos, sin, positions, interleaved);
  c.d.inverse = inverse;
  return c.run(q);
}

void apply_rope_out(Tensor q, OptTensor k, Tensor cos, Tensor sin, OptTensor positions, bool interleaved, bool inverse,
                    Tensor q_out, OptTensor k_out) {
  Call c(q, k, cos, sin, positions, interleaved);
  c.d.inverse = inverse;
  c.run(q_out, k_out);
}

std::tuple<Tensor, Tensor> qk_norm_rope(Tensor q, OptTensor k, OptTensor q_weight, OptTensor k_weight, Tensor cos,
                                        Tensor sin, double eps, double weight_offset, OptTensor positions,
                                        bool interleaved) {
  return Call(q, k, cos, sin, positions, interleaved).norm(q_weight, k_weight, eps, weight_offset).run(q);
}

void qk_norm_rope_out(Tensor q, OptTensor k, OptTensor q_weight, OptTensor k_weight, Tensor cos, Tensor sin, double eps,
                      double weight_offset, OptTensor positions, bool interleaved, OptTensor v, OptTensor slots,
                      Tensor q_out, OptTensor k_out, OptTensor k_cache, OptTensor v_cache) {
  Call c(q, k, cos, sin, positions, interleaved);
  c.norm(q_weight, k_weight, eps, weight_offset);
  c.d.v = c.at.view(v, "v");
  c.d.slots = c.at.view(slots, "slots");
  c.d.k_cache = c.at.view(k_cache, "k_cache");
  c.d.v_cache = c.at.view(v_cache, "v_cache");
  c.run(q_out, k_out);
}

}  // namespace

#define FASTOPS_OPS(X) X(apply_rope) X(apply_rope_out) X(qk_norm_rope) X(qk_norm_rope_out)
FASTOPS_REGISTER(FASTOPS_OPS)

}  // namespace fastops::binding
