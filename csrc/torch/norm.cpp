// rms_norm, fused_add_rms_norm, layer_norm: tensors to descriptors, nothing else.
#include "torch/register.h"

namespace fastops::binding {
namespace {

constexpr Function<fastops_norm_desc> kForward{&fastops_norm, &fastops_norm_workspace, kCudaNorm};
constexpr Function<fastops_norm_bwd_desc> kBackward{&fastops_norm_bwd, &fastops_norm_bwd_workspace, kCudaNormBwd};

fastops_norm_desc describe(const Place& at, const Tensor& x, const OptTensor& weight, const OptTensor& bias, double eps,
                           double weight_offset, bool layer) {
  fastops_norm_desc d{};
  d.struct_size = sizeof d;
  d.layer = layer;
  d.x = at.view(x, "x");
  d.weight = at.view(weight, "weight");
  d.bias = at.view(bias, "bias");
  d.eps = static_cast<float>(eps);
  d.weight_offset = static_cast<float>(weight_offset);
  return d;
}

Tensor like(const Place& at, const fastops_tensor& t, ScalarType dtype) {
  return at.empty(t.size, static_cast<size_t>(t.ndim), dtype);
}
Tensor per_row(const Place& at, const fastops_tensor& t) {
  return at.empty(t.size, static_cast<size_t>(t.ndim > 0 ? t.ndim - 1 : 0), ScalarType::Float);
}
Tensor nothing(const Place& at, ScalarType dtype) { return at.empty({0}, dtype); }

void fused_add_rms_norm(Tensor x, Tensor residual, OptTensor weight, double eps, double weight_offset) {
  const Place at(x);
  fastops_norm_desc d = describe(at, x, weight, std::nullopt, eps, weight_offset, false);
  d.out = d.x;
  d.residual = d.sum = at.view(residual, "residual");
  at.call(kForward, d);
}

Tensor rms_norm(Tensor x, OptTensor weight, double eps, double weight_offset) {
  const Place at(x);
  fastops_norm_desc d = describe(at, x, weight, std::nullopt, eps, weight_offset, false);
  Tensor out = like(at, d.x, scalar_type(x));
  d.out = at.view(out, "out");
  at.call(kForward, d);
  return out;
}

void rms_norm_out(Tensor x, OptTensor weight, double eps, double weight_offset, Tensor out) {
  const Place at(x);
  fastops_norm_desc d = describe(at, x, weight, std::nullopt, eps, weight_offset, false);
  d.out = at.view(out, "out");
  at.call(kForward, d);
}

Tensor layer_norm(Tensor x, OptTensor weight, OptTensor bias, double eps) {
  const Place at(x);
  fastops_norm_desc d = describe(at, x, weight, bias, eps, 0.0, true);
  Tensor out = like(at, d.x, scalar_type(x));
  d.out = at.view(out, "out");
  at.call(kForward, d);
  return out;
}

void layer_norm_out(Tensor x, OptTensor weight, OptTensor bias, double eps, Tensor out) {
  const Place at(x);
  fastops_norm_desc d = describe(at, x, weight, bias, eps, 0.0, true);
  d.out = at.view(out, "out");
  at.call(kForward, d);
}

// quant: 0 none, 1 int8, 2 e4m3. Absent results are empty tensors.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm(Tensor x, OptTensor residual, OptTensor weight, OptTensor bias,
                                                        double eps, double weight_offset, bool layer, int64_t quant,
                                                        bool stats) {
  const Place at(x);
  fastops_norm_desc d = describe(at, x, weight, bias, eps, weight_offset, layer);
  const ScalarType dtype = scalar_type(x);
  const ScalarType kind = quant == 0 ? dtype : quant == 1 ? ScalarType::Char : ScalarType::Float8_e4m3fn;
  Tensor out = like(at, d.x, kind);
  Tensor sum = residual ? like(at, d.x, dtype) : nothing(at, dtype);
  Tensor scales = quant != 0 ? per_row(at, d.x) : nothing(at, ScalarType::Float);
  Tensor mean = stats && layer ? per_row(at, d.x) : nothing(at, ScalarType::Float);
  Tensor rstd = stats ? per_row(at, d.x) : nothing(at, ScalarType::Float);
  d.out = at.view(out, "out");
  if (residual) {
    d.residual = at.view(residual, "residual");
    d.sum = at.view(sum, "sum");
  }
  if (quant != 0) d.scales = at.view(scales, "scales");
  if (stats && layer) d.mean = at.view(mean, "mean");
  if (stats) d.rstd = at.view(rstd, "rstd");
  at.call(kForward, d);
  return {out, sum, scales, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(Tensor dout, OptTensor dsum, Tensor s, OptTensor weight, Tensor mean,
                                                 Tensor rstd, double weight_offset, bool layer, bool dweight,
                                                 bool dbias) {
  const Place at(s);
  fastops_norm_bwd_desc d{};
  d.struct_size = sizeof d;
  d.layer = layer;
  d.dout = at.view(dout, "dout");
  d.dsum = at.view(dsum, "dsum");
  d.s = at.view(s, "s");
  d.weight = at.view(weight, "weight");
  if (layer) d.mean = at.view(mean, "mean");
  d.rstd = at.view(rstd, "rstd");
  d.weight_offset = static_cast<float>(weight_offset);
  const int64_t n = d.s.ndim > 0 ? d.s.size[d.s.ndim - 1] : 0;
  Tensor ds = like(at, d.s, scalar_type(s));
  Tensor dw = at.empty({dweight ? n : 0}, ScalarType::Float), db = at.empty({dbias ? n : 0}, ScalarType::Float);
  d.ds = at.view(ds, "ds");
  if (dweight) d.dweight = at.view(dw, "dweight");
  if (dbias) d.dbias = at.view(db, "dbias");
  at.call(kBackward, d);
  return {ds, dw, db};
}

}  // namespace

#define FASTOPS_OPS(X) \
  X(rms_norm) X(rms_norm_out) X(fused_add_rms_norm) X(layer_norm) X(layer_norm_out) X(norm) X(norm_backward)
FASTOPS_REGISTER(FASTOPS_OPS)

}  // namespace fastops::binding
