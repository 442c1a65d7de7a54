// rms_norm, fused_add_rms_norm, layer_norm: tensors to descriptors, nothing else.
#include "torch/tensor.h"

namespace fastops::binding {
namespace {

void run(const fastops_norm_desc& d) {
  call([&](fastops_env* env) { return fastops_norm(&d, env); },
       [&](fastops_env* env, size_t* bytes) { return fastops_norm_workspace(&d, env, bytes); });
}

fastops_norm_desc describe(const Tensor& x, const OptTensor& weight, const OptTensor& bias, double eps,
                           double weight_offset, bool layer) {
  fastops_norm_desc d{};
  d.struct_size = sizeof d;
  d.layer = layer;
  d.x = view(x, "x");
  d.weight = view(weight, "weight");
  d.bias = view(bias, "bias");
  d.eps = static_cast<float>(eps);
  d.weight_offset = static_cast<float>(weight_offset);
  return d;
}

Tensor like(const fastops_tensor& t, ScalarType dtype) { return empty(t.size, static_cast<size_t>(t.ndim), dtype); }
Tensor per_row(const fastops_tensor& t) {
  return empty(t.size, static_cast<size_t>(t.ndim > 0 ? t.ndim - 1 : 0), ScalarType::Float);
}
Tensor nothing(ScalarType dtype) { return empty({0}, dtype); }

void fused_add_rms_norm(Tensor x, Tensor residual, OptTensor weight, double eps, double weight_offset) {
  fastops_norm_desc d = describe(x, weight, std::nullopt, eps, weight_offset, false);
  d.out = d.x;
  d.residual = d.sum = view(residual, "residual");
  run(d);
}

Tensor rms_norm(Tensor x, OptTensor weight, double eps, double weight_offset) {
  fastops_norm_desc d = describe(x, weight, std::nullopt, eps, weight_offset, false);
  Tensor out = like(d.x, scalar_type(x));
  d.out = view(out, "out");
  run(d);
  return out;
}

void rms_norm_out(Tensor x, OptTensor weight, double eps, double weight_offset, Tensor out) {
  fastops_norm_desc d = describe(x, weight, std::nullopt, eps, weight_offset, false);
  d.out = view(out, "out");
  run(d);
}

Tensor layer_norm(Tensor x, OptTensor weight, OptTensor bias, double eps) {
  fastops_norm_desc d = describe(x, weight, bias, eps, 0.0, true);
  Tensor out = like(d.x, scalar_type(x));
  d.out = view(out, "out");
  run(d);
  return out;
}

void layer_norm_out(Tensor x, OptTensor weight, OptTensor bias, double eps, Tensor out) {
  fastops_norm_desc d = describe(x, weight, bias, eps, 0.0, true);
  d.out = view(out, "out");
  run(d);
}

// quant: 0 none, 1 int8, 2 e4m3. Absent results are empty tensors.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm(Tensor x, OptTensor residual, OptTensor weight, OptTensor bias,
                                                        double eps, double weight_offset, bool layer, int64_t quant,
                                                        bool stats) {
  fastops_norm_desc d = describe(x, weight, bias, eps, weight_offset, layer);
  const ScalarType dtype = scalar_type(x);
  const ScalarType kind = quant == 0 ? dtype : quant == 1 ? ScalarType::Char : ScalarType::Float8_e4m3fn;
  Tensor out = like(d.x, kind);
  Tensor sum = residual ? like(d.x, dtype) : nothing(dtype);
  Tensor scales = quant != 0 ? per_row(d.x) : nothing(ScalarType::Float);
  Tensor mean = stats && layer ? per_row(d.x) : nothing(ScalarType::Float);
  Tensor rstd = stats ? per_row(d.x) : nothing(ScalarType::Float);
  d.out = view(out, "out");
  if (residual) {
    d.residual = view(residual, "residual");
    d.sum = view(sum, "sum");
  }
  if (quant != 0) d.scales = view(scales, "scales");
  if (stats && layer) d.mean = view(mean, "mean");
  if (stats) d.rstd = view(rstd, "rstd");
  run(d);
  return {out, sum, scales, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(Tensor dout, OptTensor dsum, Tensor s, OptTensor weight, Tensor mean,
                                                 Tensor rstd, double weight_offset, bool layer, bool dweight,
                                                 bool dbias) {
  fastops_norm_bwd_desc d{};
  d.struct_size = sizeof d;
  d.layer = layer;
  d.dout = view(dout, "dout");
  d.dsum = view(dsum, "dsum");
  d.s = view(s, "s");
  d.weight = view(weight, "weight");
  if (layer) d.mean = view(mean, "mean");
  d.rstd = view(rstd, "rstd");
  d.weight_offset = static_cast<float>(weight_offset);
  const int64_t n = d.s.ndim > 0 ? d.s.size[d.s.ndim - 1] : 0;
  Tensor ds = like(d.s, scalar_type(s));
  Tensor dw = empty({dweight ? n : 0}, ScalarType::Float), db = empty({dbias ? n : 0}, ScalarType::Float);
  d.ds = view(ds, "ds");
  if (dweight) d.dweight = view(dw, "dweight");
  if (dbias) d.dbias = view(db, "dbias");
  call([&](fastops_env* env) { return fastops_norm_bwd(&d, env); },
       [&](fastops_env* env, size_t* bytes) { return fastops_norm_bwd_workspace(&d, env, bytes); });
  return {ds, dw, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastops, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_out", TORCH_BOX(&rms_norm_out));
  m.impl("fused_add_rms_norm", TORCH_BOX(&fused_add_rms_norm));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_out", TORCH_BOX(&layer_norm_out));
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
}

}  // namespace fastops::binding
