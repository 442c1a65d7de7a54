// kv_append: tensors to descriptors, nothing else.
#include "torch/tensor.h"

namespace fastops::binding {
namespace {

constexpr Function<fastops_kv_append_desc> kAppend{&fastops_kv_append};

Tensor kv_append(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens,
                 OptTensor cu_seqlens, OptTensor k_scale, OptTensor k_zero, OptTensor k_min, OptTensor v_scale,
                 OptTensor v_zero, OptTensor v_min, OptTensor k_recent, OptTensor v_recent, OptTensor packed_lens,
                 int64_t k_bits, int64_t v_bits) {
  const Place at(k);
  fastops_kv_quant kv{};
  kv.struct_size = sizeof kv;
  kv.k_bits = static_cast<int32_t>(k_bits);
  kv.v_bits = static_cast<int32_t>(v_bits);
  kv.k_scale = at.view(k_scale, "k_scale");
  kv.k_zero = at.view(k_zero, "k_zero");
  kv.k_min = at.view(k_min, "k_min");
  kv.v_scale = at.view(v_scale, "v_scale");
  kv.v_zero = at.view(v_zero, "v_zero");
  kv.v_min = at.view(v_min, "v_min");
  kv.k_recent = at.view(k_recent, "k_recent");
  kv.v_recent = at.view(v_recent, "v_recent");
  kv.packed_lens = at.view(packed_lens, "packed_lens");
  fastops_kv_append_desc d{};
  d.struct_size = sizeof d;
  d.k = at.view(k, "k");
  d.v = at.view(v, "v");
  d.k_cache = at.view(k_cache, "k_cache");
  d.v_cache = at.view(v_cache, "v_cache");
  d.block_table = at.view(block_table, "block_table");
  d.seq_lens = at.view(seq_lens, "seq_lens");
  d.cu_seqlens = at.view(cu_seqlens, "cu_seqlens");
  if (d.k_cache.dtype != d.k.dtype || d.v_cache.dtype != d.k.dtype || k_scale || v_scale || k_recent || v_recent ||
      packed_lens || k_bits != 0 || v_bits != 0)
    d.kv = &kv;
  Tensor lens = at.empty({seq_lens.dim() > 0 ? seq_lens.size(0) : 0}, ScalarType::Int);
  d.new_lens = at.view(lens, "new_lens");
  at.call(kAppend, d);
  return lens;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastops, CPU, m) { m.impl("kv_append", TORCH_BOX(&kv_append)); }

}  // namespace fastops::binding
