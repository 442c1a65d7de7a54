// lut_linear: tensors to descriptors, nothing else.
#include "torch/tensor.h"

namespace fastops::binding {
namespace {

constexpr Function<fastops_lut_linear_desc> kLut{&fastops_lut_linear, &fastops_lut_linear_workspace};

void run(const Place& at, const Tensor& x, const Tensor& codes, const Tensor& table, const OptTensor& row_starts,
         const OptTensor& columns, const OptTensor& values, const OptTensor& bias, const Tensor& out) {
  fastops_lut_linear_desc d{};
  d.struct_size = sizeof d;
  d.x = at.view(x, "x");
  d.out = at.view(out, "out");
  d.codes = at.view(codes, "codes");
  d.table = at.view(table, "table");
  d.row_starts = at.view(row_starts, "row_starts");
  d.columns = at.view(columns, "columns");
  d.values = at.view(values, "values");
  d.bias = at.view(bias, "bias");
  at.call(kLut, d);
}

Tensor lut_linear(Tensor x, Tensor codes, Tensor table, OptTensor row_starts, OptTensor columns, OptTensor values,
                  OptTensor bias) {
  const Place at(x);
  const int64_t size[2] = {x.dim() > 0 ? x.size(0) : 0, codes.dim() > 0 ? codes.size(0) : 0};
  Tensor out = at.empty(size, 2, scalar_type(x));
  run(at, x, codes, table, row_starts, columns, values, bias, out);
  return out;
}

void lut_linear_out(Tensor x, Tensor codes, Tensor table, OptTensor row_starts, OptTensor columns, OptTensor values,
                    OptTensor bias, Tensor out) {
  const Place at(x);
  run(at, x, codes, table, row_starts, columns, values, bias, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastops, CPU, m) {
  m.impl("lut_linear", TORCH_BOX(&lut_linear));
  m.impl("lut_linear_out", TORCH_BOX(&lut_linear_out));
}

}  // namespace fastops::binding
