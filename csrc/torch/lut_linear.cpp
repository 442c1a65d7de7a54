// lut_linear: tensors to descriptors, nothing else.
#include "torch/tensor.h"

namespace fastops::binding {
namespace {

void run(const Tensor& x, const Tensor& codes, const Tensor& table, const OptTensor& row_starts,
         const OptTensor& columns, const OptTensor& values, const OptTensor& bias, const Tensor& out) {
  fastops_lut_linear_desc d{};
  d.struct_size = sizeof d;
  d.x = view(x, "x");
  d.out = view(out, "out");
  d.codes = view(codes, "codes");
  d.table = view(table, "table");
  d.row_starts = view(row_starts, "row_starts");
  d.columns = view(columns, "columns");
  d.values = view(values, "values");
  d.bias = view(bias, "bias");
  call([&](fastops_env* env) { return fastops_lut_linear(&d, env); },
       [&](fastops_env* env, size_t* bytes) { return fastops_lut_linear_workspace(&d, env, bytes); });
}

Tensor lut_linear(Tensor x, Tensor codes, Tensor table, OptTensor row_starts, OptTensor columns, OptTensor values,
                  OptTensor bias) {
  const int64_t size[2] = {x.dim() > 0 ? x.size(0) : 0, codes.dim() > 0 ? codes.size(0) : 0};
  Tensor out = empty(size, 2, scalar_type(x));
  run(x, codes, table, row_starts, columns, values, bias, out);
  return out;
}

void lut_linear_out(Tensor x, Tensor codes, Tensor table, OptTensor row_starts, OptTensor columns, OptTensor values,
                    OptTensor bias, Tensor out) {
  run(x, codes, table, row_starts, columns, values, bias, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastops, CPU, m) {
  m.impl("lut_linear", TORCH_BOX(&lut_linear));
  m.impl("lut_linear_out", TORCH_BOX(&lut_linear_out));
}

}  // namespace fastops::binding
