// merge_states: tensors to descriptors.
#include <tuple>
#include <vector>

#include "torch/tensor.h"

namespace fastops::binding {
namespace {

std::tuple<Tensor, Tensor> merge_states(std::vector<Tensor> outs, std::vector<Tensor> lses) {
  if (outs.empty() || outs.size() != lses.size())
    raise(FASTOPS_ERR_VALUE, "merge_states: outs and lses must be equally many, at least one each");
  std::vector<fastops_tensor> o, l;
  for (const Tensor& t : outs) o.push_back(view(t, "outs"));
  for (const Tensor& t : lses) l.push_back(view(t, "lses"));
  const int n = o[0].ndim;
  if (n != 3 && n != 4) raise(FASTOPS_ERR_VALUE, "merge_states: outs must have 3 or 4 dimensions");
  const int64_t* s = o[0].size;
  const ScalarType dtype = scalar_type(outs[0]);
  Tensor out = n == 4 ? empty({s[0], s[1], s[2], s[3]}, dtype) : empty({s[0], s[1], s[2]}, dtype);
  Tensor lse = n == 4 ? empty({s[0], s[2], s[1]}, ScalarType::Float) : empty({s[1], s[0]}, ScalarType::Float);
  fastops_merge_states_desc d{};
  d.struct_size = sizeof d;
  d.count = static_cast<int32_t>(o.size());
  d.outs = o.data();
  d.lses = l.data();
  d.out = view(out, "out");
  d.lse = view(lse, "lse");
  call([&](fastops_env* env) { return fastops_merge_states(&d, env); },
       [](fastops_env*, size_t*) { return FASTOPS_ERR_INTERNAL; });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastops, CPU, m) { m.impl("merge_states", TORCH_BOX(&merge_states)); }

}  // namespace fastops::binding
