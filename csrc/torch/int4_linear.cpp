// int4_linear: tensors to descriptors, nothing else.
#include "torch/tensor.h"

namespace fastops::binding {
namespace {

Tensor int4_pack(Tensor codes) {
  const fastops_tensor from = view(codes, "codes");
  const int64_t n = from.ndim == 2 ? from.size[0] : 0, words = from.ndim == 2 ? from.size[1] / 4 : 0;
  const int64_t size[4] = {(n + 15) / 16, words, 16, 4};
  Tensor packed = empty(size, 4, scalar_type(codes));
  const fastops_tensor to = view(packed, "packed");
  char message[FASTOPS_MESSAGE_SIZE] = "";
  const fastops_status status = fastops_int4_pack(&from, &to, message);
  if (status != FASTOPS_OK) raise(status, message);
  return packed;
}

Tensor int4_pack24(Tensor codes, Tensor kept) {
  const fastops_tensor from = view(codes, "codes"), places = view(kept, "kept");
  const int64_t n = from.ndim == 2 ? from.size[0] : 0, words = from.ndim == 2 ? from.size[1] / 2 : 0;
  const int64_t size[4] = {(n + 15) / 16, words, 16, 3};
  Tensor packed = empty(size, 4, scalar_type(codes));
  const fastops_tensor to = view(packed, "packed");
  char message[FASTOPS_MESSAGE_SIZE] = "";
  const fastops_status status = fastops_int4_pack24(&from, &places, &to, message);
  if (status != FASTOPS_OK) raise(status, message);
  return packed;
}

void run(const Tensor& x, const Tensor& codes, const Tensor& scales, const OptTensor& zeros, const OptTensor& mins,
         const OptTensor& perm, const OptTensor& bias, const OptTensor& column_scales, const OptTensor& column_zeros,
         bool int8, bool eight, const Tensor& out) {
  fastops_int4_linear_desc d{};
  d.struct_size = sizeof d;
  d.int8 = int8;
  d.eight = eight;
  d.x = view(x, "x");
  d.out = view(out, "out");
  d.codes = view(codes, "codes");
  d.scales = view(scales, "scales");
  d.zeros = view(zeros, "zeros");
  d.mins = view(mins, "mins");
  d.perm = view(perm, "perm");
  d.bias = view(bias, "bias");
  d.column_scales = view(column_scales, "column_scales");
  d.column_zeros = view(column_zeros, "column_zeros");
  call([&](fastops_env* env) { return fastops_int4_linear(&d, env); },
       [&](fastops_env* env, size_t* bytes) { return fastops_int4_linear_workspace(&d, env, bytes); });
}

Tensor int4_linear(Tensor x, Tensor codes, Tensor scales, int64_t n, OptTensor zeros, OptTensor mins, OptTensor perm,
                   OptTensor bias, OptTensor column_scales, OptTensor column_zeros, bool int8, bool eight) {
  const int64_t size[2] = {x.dim() > 0 ? x.size(0) : 0, n};
  if (n < 0) raise(FASTOPS_ERR_VALUE, "int4_linear: n is negative");
  Tensor out = empty(size, 2, scalar_type(x));
  run(x, codes, scales, zeros, mins, perm, bias, column_scales, column_zeros, int8, eight, out);
  return out;
}

void int4_linear_out(Tensor x, Tensor codes, Tensor scales, OptTensor zeros, OptTensor mins, OptTensor perm,
                     OptTensor bias, OptTensor column_scales, OptTensor column_zeros, bool int8, bool eight,
                     Tensor out) {
  run(x, codes, scales, zeros, mins, perm, bias, column_scales, column_zeros, int8, eight, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastops, CPU, m) {
  m.impl("int4_pack", TORCH_BOX(&int4_pack));
  m.impl("int4_pack24", TORCH_BOX(&int4_pack24));
  m.impl("int4_linear", TORCH_BOX(&int4_linear));
  m.impl("int4_linear_out", TORCH_BOX(&int4_linear_out));
}

}  // namespace fastops::binding
