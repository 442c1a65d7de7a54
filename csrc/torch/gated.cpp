// silu_and_mul, gelu_and_mul, swiglu, geglu: tensors to descriptors, nothing else.
#include "torch/halves.h"
#include "torch/register.h"

namespace fastops::binding {
namespace {

constexpr Function<fastops_gated_desc> kGated{&fastops_gated, nullptr, kCudaGated};

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

void halves(const Place& at, const Tensor& x, const char* name, fastops_tensor* first, fastops_tensor* second) {
  *first = at.view(x, name);
  if (!halve(first, second)) raise(FASTOPS_ERR_VALUE, "gated: the last dimension of x must be even: two halves");
}

Tensor halved(const Tensor& x, int64_t activation) {
  const Place at(x);
  fastops_gated_desc d = blank(activation);
  halves(at, x, "x", &d.gate, &d.up);
  Tensor out = at.empty(d.gate.size, static_cast<size_t>(d.gate.ndim), scalar_type(x));
  d.out = at.view(out, "out");
  at.call(kGated, d);
  return out;
}

void halved_into(const Tensor& x, int64_t activation, const Tensor& out) {
  const Place at(x);
  fastops_gated_desc d = blank(activation);
  halves(at, x, "x", &d.gate, &d.up);
  d.out = at.view(out, "out");
  at.call(kGated, d);
}

void gated_into(const Tensor& gate, const Tensor& up, int64_t activation, const Tensor& out) {
  const Place at(gate);
  fastops_gated_desc d = blank(activation);
  d.gate = at.view(gate, "gate");
  d.up = at.view(up, "up");
  d.out = at.view(out, "out");
  at.call(kGated, d);
}

Tensor gated(const Tensor& gate, const Tensor& up, int64_t activation) {
  const Place at(gate);
  const fastops_tensor like = at.view(gate, "gate");
  Tensor out = at.empty(like.size, static_cast<size_t>(like.ndim), scalar_type(gate));
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
  const Place at(gate);
  fastops_gated_desc d = blank(activation);
  d.gate = at.view(gate, "gate");
  d.up = at.view(up, "up");
  d.dout = at.view(dout, "dout");
  Tensor dgate = at.empty(d.gate.size, static_cast<size_t>(d.gate.ndim), scalar_type(gate));
  Tensor dup = at.empty(d.gate.size, static_cast<size_t>(d.gate.ndim), scalar_type(gate));
  d.dgate = at.view(dgate, "dgate");
  d.dup = at.view(dup, "dup");
  at.call(kGated, d);
  return {dgate, dup};
}

Tensor and_mul_backward(Tensor dout, Tensor x, int64_t activation) {
  const Place at(x);
  fastops_gated_desc d = blank(activation);
  halves(at, x, "x", &d.gate, &d.up);
  d.dout = at.view(dout, "dout");
  const fastops_tensor like = at.view(x, "x");
  Tensor dx = at.empty(like.size, static_cast<size_t>(like.ndim), scalar_type(x));
  halves(at, dx, "dx", &d.dgate, &d.dup);
  at.call(kGated, d);
  return dx;
}

}  // namespace

#define FASTOPS_OPS(X) \
  X(silu_and_mul)      \
  X(silu_and_mul_out)  \
  X(gelu_and_mul)      \
  X(gelu_and_mul_out) X(swiglu) X(swiglu_out) X(geglu) X(geglu_out) X(gated_backward) X(and_mul_backward)
FASTOPS_REGISTER(FASTOPS_OPS)

}  // namespace fastops::binding
