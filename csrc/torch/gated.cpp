// silu_and_mul, gelu_and_mul, swiglu, geglu: tensors to descriptors, nothing else.
#include "torch/tensor.h"

namespace fastops::binding {
namespace {

void run(const fastops_gated_desc& d) {
  call([&](fastops_env* env) { return fastops_gated(&d, env); },
       [](fastops_env*, size_t*) { return FASTOPS_ERR_INTERNAL; });
}

int64_t gelu_kind(const std::string& approximate) {
  if (approximate == "tanh") return FASTOPS_GELU_TANH;
  if (approximate == "none") return FASTOPS_GELU;
  raise(FASTOPS_ERR_VALUE, ("gelu: approximate is '" + approximate + "', allowed: 'tanh', 'none'").c_str());
}

fastops_gated_desc blank(int64_t activation) {
  fastops_gated_desc d{};
  d.struct_size = sizeof d;
  d.activation = static_cast<int32_t>(activation);
  return d;
}

// The two halves of the last dimension.
void halves(const Tensor& x, const char* name, fastops_tensor* first, fastops_tensor* second) {
  *first = view(x, name);
  const int64_t n = first->ndim > 0 ? first->size[first->ndim - 1] : 1;
  if (n % 2 != 0) raise(FASTOPS_ERR_VALUE, "gated: the last dimension of x must be even: two halves");
  if (first->ndim > 0) first->size[first->ndim - 1] = n / 2;
  *second = *first;
  const int64_t esize = first->dtype == FASTOPS_F32 ? 4 : 2;
  if (first->data != nullptr) second->data = static_cast<char*>(first->data) + n / 2 * esize;
}

Tensor halved(const Tensor& x, int64_t activation) {
  fastops_gated_desc d = blank(activation);
  halves(x, "x", &d.gate, &d.up);
  Tensor out = empty(d.gate.size, static_cast<size_t>(d.gate.ndim), scalar_type(x));
  d.out = view(out, "out");
  run(d);
  return out;
}

void halved_into(const Tensor& x, int64_t activation, const Tensor& out) {
  fastops_gated_desc d = blank(activation);
  halves(x, "x", &d.gate, &d.up);
  d.out = view(out, "out");
  run(d);
}

void gated_into(const Tensor& gate, const Tensor& up, int64_t activation, const Tensor& out) {
  fastops_gated_desc d = blank(activation);
  d.gate = view(gate, "gate");
  d.up = view(up, "up");
  d.out = view(out, "out");
  run(d);
}

Tensor gated(const Tensor& gate, const Tensor& up, int64_t activation) {
  const fastops_tensor like = view(gate, "gate");
  Tensor out = empty(like.size, static_cast<size_t>(like.ndim), scalar_type(gate));
  gated_into(gate, up, activation, out);
  return out;
}

Tensor silu_and_mul(Tensor x) { return halved(x, FASTOPS_SILU); }
void silu_and_mul_out(Tensor x, Tensor out) { halved_into(x, FASTOPS_SILU, out); }
Tensor gelu_and_mul(Tensor x, std::string approximate) { return halved(x, gelu_kind(approximate)); }
void gelu_and_mul_out(Tensor x, std::string approximate, Tensor out) { halved_into(x, gelu_kind(approximate), out); }
Tensor swiglu(Tensor gate, Tensor up) { return gated(gate, up, FASTOPS_SILU); }
void swiglu_out(Tensor gate, Tensor up, Tensor out) { gated_into(gate, up, FASTOPS_SILU, out); }
Tensor geglu(Tensor gate, Tensor up, std::string approximate) { return gated(gate, up, gelu_kind(approximate)); }
void geglu_out(Tensor gate, Tensor up, std::string approximate, Tensor out) {
  gated_into(gate, up, gelu_kind(approximate), out);
}

std::tuple<Tensor, Tensor> gated_backward(Tensor dout, Tensor gate, Tensor up, int64_t activation) {
  fastops_gated_desc d = blank(activation);
  d.gate = view(gate, "gate");
  d.up = view(up, "up");
  d.dout = view(dout, "dout");
  Tensor dgate = empty(d.gate.size, static_cast<size_t>(d.gate.ndim), scalar_type(gate));
  Tensor dup = empty(d.gate.size, static_cast<size_t>(d.gate.ndim), scalar_type(gate));
  d.dgate = view(dgate, "dgate");
  d.dup = view(dup, "dup");
  run(d);
  return {dgate, dup};
}

Tensor and_mul_backward(Tensor dout, Tensor x, int64_t activation) {
  fastops_gated_desc d = blank(activation);
  halves(x, "x", &d.gate, &d.up);
  d.dout = view(dout, "dout");
  const fastops_tensor like = view(x, "x");
  Tensor dx = empty(like.size, static_cast<size_t>(like.ndim), scalar_type(x));
  halves(dx, "dx", &d.dgate, &d.dup);
  run(d);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastops, CPU, m) {
  m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul));
  m.impl("silu_and_mul_out", TORCH_BOX(&silu_and_mul_out));
  m.impl("gelu_and_mul", TORCH_BOX(&gelu_and_mul));
  m.impl("gelu_and_mul_out", TORCH_BOX(&gelu_and_mul_out));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_out", TORCH_BOX(&swiglu_out));
  m.impl("geglu", TORCH_BOX(&geglu));
  m.impl("geglu_out", TORCH_BOX(&geglu_out));
  m.impl("gated_backward", TORCH_BOX(&gated_backward));
  m.impl("and_mul_backward", TORCH_BOX(&and_mul_backward));
}

}  // namespace fastops::binding
