// int4_linear: tensors to descriptors, nothing else.
#include "torch/memory.h"
#include "torch/register.h"

namespace fastops::binding {
namespace {

Tensor int4_pack(Tensor codes) {
  const Place at(codes);
  const fastops_tensor from = at.view(codes, "codes");
  const int64_t n = from.ndim == 2 ? from.size[0] : 0, words = from.ndim == 2 ? from.size[1] / 4 : 0;
  const int64_t size[4] = {(n + 15) / 16, words, 16, 4};
  Tensor packed = at.empty(size, 4, scalar_type(codes));
  const fastops_tensor to = at.view(packed, "packed");
  prefer_large_pages(to.data, static_cast<size_t>(to.size[0] * to.stride[0]));
  char message[FASTOPS_MESSAGE_SIZE] = "";
  const fastops_status status = fastops_int4_pack(&from, &to, message);
  if (status != FASTOPS_OK) raise(status, message);
  return packed;
}

Tensor int4_pack24(Tensor codes, Tensor kept) {
  const Place at(codes);
  const fastops_tensor from = at.view(codes, "codes"), places = at.view(kept, "kept");
  const int64_t n = from.ndim == 2 ? from.size[0] : 0, words = from.ndim == 2 ? from.size[1] / 2 : 0;
  const int64_t size[4] = {(n + 15) / 16, words, 16, 3};
  Tensor packed = at.empty(size, 4, scalar_type(codes));
  const fastops_tensor to = at.view(packed, "packed");
  prefer_large_pages(to.data, static_cast<size_t>(to.size[0] * to.stride[0]));
  char message[FASTOPS_MESSAGE_SIZE] = "";
  const fastops_status status = fastops_int4_pack24(&from, &places, &to, message);
  if (status != FASTOPS_OK) raise(status, message);
  return packed;
}

constexpr Function<fastops_int4_linear_desc> kProduct{&fastops_int4_linear, &fastops_int4_linear_workspace,
                                                      kCudaInt4Linear};

// The kernels for GPUs take the columns of x in order.
Tensor columns_of(const Tensor& x, const OptTensor& perm) {
  return call_operator<Tensor>("aten::index_select", x, int64_t{1}, *perm);
}

void run(const Place& at, Tensor x, const Tensor& codes, const Tensor& scales, const OptTensor& zeros,
         const OptTensor& mins, const OptTensor& perm, const OptTensor& bias, const OptTensor& column_scales,
         const OptTensor& column_zeros, int64_t activations, bool eight, const Tensor& out) {
  const bool gather = perm && at.cuda();
  if (gather) x = columns_of(x, perm);
  fastops_int4_linear_desc d{};
  d.struct_size = sizeof d;
  d.activations = static_cast<int32_t>(activations);
  d.eight = eight;
  d.x = at.view(x, "x");
  d.out = at.view(out, "out");
  d.codes = at.view(codes, "codes");
  d.scales = at.view(scales, "scales");
  d.zeros = at.view(zeros, "zeros");
  d.mins = at.view(mins, "mins");
  if (!gather) d.perm = at.view(perm, "perm");
  d.bias = at.view(bias, "bias");
  d.column_scales = at.view(column_scales, "column_scales");
  d.column_zeros = at.view(column_zeros, "column_zeros");
  at.call(kProduct, d);
}

Tensor int4_linear(Tensor x, Tensor codes, Tensor scales, int64_t n, OptTensor zeros, OptTensor mins, OptTensor perm,
                   OptTensor bias, OptTensor column_scales, OptTensor column_zeros, int64_t activations, bool eight) {
  const Place at(x);
  const int64_t size[2] = {x.dim() > 0 ? x.size(0) : 0, n};
  if (n < 0) raise(FASTOPS_ERR_VALUE, "int4_linear: n is negative");
  Tensor out = at.empty(size, 2, scalar_type(x));
  run(at, x, codes, scales, zeros, mins, perm, bias, column_scales, column_zeros, activations, eight, out);
  return out;
}

void int4_linear_out(Tensor x, Tensor codes, Tensor scales, OptTensor zeros, OptTensor mins, OptTensor perm,
                     OptTensor bias, OptTensor column_scales, OptTensor column_zeros, int64_t activations, bool eight,
                     Tensor out) {
  const Place at(x);
  run(at, x, codes, scales, zeros, mins, perm, bias, column_scales, column_zeros, activations, eight, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastops, CPU, m) {
  m.impl("int4_pack", TORCH_BOX(&int4_pack));
  m.impl("int4_pack24", TORCH_BOX(&int4_pack24));
}

#define FASTOPS_OPS(X) X(int4_linear) X(int4_linear_out)
FASTOPS_REGISTER(FASTOPS_OPS)

}  // namespace fastops::binding
