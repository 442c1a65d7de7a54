// merge_states: tensors to descriptors.
#include <tuple>
#include <vector>

#include "torch/register.h"

namespace fastops::binding {
namespace {

constexpr Function<fastops_merge_states_desc> kMerge{&fastops_merge_states, nullptr, kCudaMergeStates};

std::tuple<Tensor, Tensor> merge_states(std::vector<Tensor> outs, std::vector<Tensor> lses) {
  if (outs.empty() || outs.size() != lses.size())
    raise(FASTOPS_ERR_VALUE, "merge_states: outs and lses must be equally many, at least one each");
  const Place at(outs[0]);
  std::vector<fastops_tensor> o, l;
  for (const Tensor& t : outs) o.push_back(at.view(t, "outs"));
  for (const Tensor& t : lses) l.push_back(at.view(t, "lses"));
  const int n = o[0].ndim;
  if (n != 3 && n != 4) raise(FASTOPS_ERR_VALUE, "merge_states: outs must have 3 or 4 dimensions");
  const int64_t* s = o[0].size;
  const ScalarType dtype = scalar_type(outs[0]);
  Tensor out = n == 4 ? at.empty({s[0], s[1], s[2], s[3]}, dtype) : at.empty({s[0], s[1], s[2]}, dtype);
  Tensor lse = n == 4 ? at.empty({s[0], s[2], s[1]}, ScalarType::Float) : at.empty({s[1], s[0]}, ScalarType::Float);
  fastops_merge_states_desc d{};
  d.struct_size = sizeof d;
  d.count = static_cast<int32_t>(o.size());
  d.outs = o.data();
  d.lses = l.data();
  d.out = at.view(out, "out");
  d.lse = at.view(lse, "lse");
  at.call(kMerge, d);
  return {out, lse};
}

}  // namespace

#define FASTOPS_OPS(X) X(merge_states)
FASTOPS_REGISTER(FASTOPS_OPS)

}  // namespace fastops::binding
