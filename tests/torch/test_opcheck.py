"""Schemas, fake kernels and dynamic shapes of every operator, by torch's own checker."""

import pytest
import torch

import fastops  # noqa: F401
from fastops import _ops

O = torch.ops.fastops
X = torch.randn(2, 5, 4, 64)
K = torch.randn(2, 9, 2, 64)
T, TK = torch.randn(6, 4, 64), torch.randn(9, 2, 64)
CU_Q, CU_K = torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
CACHE = torch.randn(5, 4, 2, 64)
TABLE, LENS = torch.tensor([[0, 3], [4, 1]], dtype=torch.int32), torch.tensor([5, 8], dtype=torch.int32)

CODES = torch.randint(0, 256, (24, 32), dtype=torch.uint8)
SPARSE = (torch.arange(25).int(), torch.arange(24).int(), torch.randn(24))
INT4 = (O.int4_pack(CODES), torch.rand(2, 4, 16))

Q, KV, COS = torch.randn(6, 4, 16), torch.randn(6, 2, 16), torch.randn(6, 8)
WEIGHT, RSTD = torch.randn(64), torch.rand(2, 5, 4)
POOL, SLOTS = torch.randn(2, 4, 2, 16), torch.arange(6)

CASES = {
    "attention": (O.attention.default, (X, K, K), {"causal": True, "return_lse": True}),
    "attention_mask": (O.attention.default, (X, K, K), {"attn_mask": torch.rand(5, 9) < 0.5, "sinks": torch.randn(4)}),
    "attention_out": (O.attention_out.default, (X, K, K), {"out": torch.empty_like(X), "lse": torch.empty(2, 4, 5)}),
    "attention_varlen": (O.attention_varlen.default, (T, TK, TK, CU_Q, CU_K), {"causal": True, "return_lse": True}),
    "attention_varlen_out": (O.attention_varlen_out.default, (T, TK, TK, CU_Q, CU_K), {"out": torch.empty_like(T)}),
    "attention_paged": (O.attention_paged.default, (T, CACHE, CACHE, TABLE, LENS, CU_Q), {"causal": True, "return_lse": True}),
    "attention_paged_out": (O.attention_paged_out.default, (T, CACHE, CACHE, TABLE, LENS, CU_Q), {"out": torch.empty_like(T)}),
    "attention_backward": (O.attention_backward.default, (X, None, X, torch.randn(2, 4, 5), X, K, K), {"sinks": torch.randn(4)}),
    "attention_varlen_backward": (O.attention_varlen_backward.default, (T, None, T, torch.randn(4, 6), T, TK, TK, CU_Q, CU_K), {"causal": True}),
    "int4_pack": (O.int4_pack.default, (CODES,), {}),
    "int4_pack24": (O.int4_pack24.default, (CODES, CODES[:, :16] | 0x44), {}),
    "int4_linear_24": (O.int4_linear.default, (torch.randn(5, 128), O.int4_pack24(CODES, CODES[:, :16] | 0x44), INT4[1], 24), {}),
    "int4_linear_columns": (O.int4_linear.default, (torch.randn(5, 64), *INT4, 24), {"column_scales": torch.rand(1, 64), "column_zeros": torch.rand(1, 64)}),
    "int4_linear": (O.int4_linear.default, (torch.randn(5, 64), *INT4, 24), {"zeros": INT4[1], "bias": torch.randn(24)}),
    "int4_linear_int8": (O.int4_linear.default, (torch.randn(2, 64), *INT4, 24), {"mins": INT4[1], "activations": 1}),
    "int4_linear_eight": (O.int4_linear.default, (torch.randn(5, 32), *INT4, 24), {"activations": 1, "eight": True}),
    "int4_linear_out": (O.int4_linear_out.default, (torch.randn(5, 64), *INT4), {"out": torch.empty(5, 24)}),
    "lut_linear": (O.lut_linear.default, (torch.randn(5, 64), CODES.view(24, 2, 16), torch.randn(24, 16)), {"bias": torch.randn(24)}),
    "lut_linear_out": (
        O.lut_linear_out.default, (torch.randn(5, 64), CODES.view(24, 2, 16), torch.randn(24, 16), *SPARSE), {"out": torch.empty(5, 24)}
    ),
    "kv_append": (O.kv_append.default, (T[:2, :2], T[2:4, :2], CACHE.clone(), CACHE.clone(), TABLE, LENS - 2), {}),
    "kv_append_codes": (
        O.kv_append.default, (T[:2, :2], T[2:4, :2], CACHE.char(), CACHE.char(), TABLE, LENS - 2),
        {"k_scale": torch.ones(CACHE.shape[:3]), "v_scale": torch.ones(2)},
    ),
    "merge_states": (O.merge_states.default, ([X, X], [torch.randn(2, 4, 5)] * 2), {}),
    "rms_norm": (O.rms_norm.default, (X, WEIGHT), {"weight_offset": 1.0}),
    "rms_norm_out": (O.rms_norm_out.default, (X, WEIGHT), {"out": torch.empty_like(X)}),
    "fused_add_rms_norm": (O.fused_add_rms_norm.default, (X.clone(), X.flip(0), WEIGHT), {}),
    "layer_norm": (O.layer_norm.default, (X, WEIGHT, WEIGHT), {}),
    "layer_norm_out": (O.layer_norm_out.default, (X, None, None), {"out": torch.empty_like(X)}),
    "norm": (O.norm.default, (X, X.flip(0), WEIGHT, None), {"stats": True}),
    "norm_int8": (O.norm.default, (X, None, WEIGHT, WEIGHT), {"layer": True, "quant": 1}),
    "norm_fp8": (O.norm.default, (X, None, None, None), {"quant": 2}),
    "norm_backward": (O.norm_backward.default, (X, X, X.flip(0), WEIGHT, RSTD, RSTD), {"layer": True, "dbias": True}),
    "silu_and_mul": (O.silu_and_mul.default, (X,), {}),
    "silu_and_mul_out": (O.silu_and_mul_out.default, (X,), {"out": torch.empty(2, 5, 4, 32)}),
    "gelu_and_mul": (O.gelu_and_mul.default, (X,), {"approximate": "none"}),
    "gelu_and_mul_out": (O.gelu_and_mul_out.default, (X,), {"out": torch.empty(2, 5, 4, 32)}),
    "swiglu": (O.swiglu.default, (X, X.flip(0)), {}),
    "swiglu_out": (O.swiglu_out.default, (X, X.flip(0)), {"out": torch.empty_like(X)}),
    "geglu": (O.geglu.default, (X, X.flip(0)), {}),
    "geglu_out": (O.geglu_out.default, (X, X.flip(0)), {"out": torch.empty_like(X)}),
    "gated_backward": (O.gated_backward.default, (X, X.flip(0), X.flip(1), 1), {}),
    "and_mul_backward": (O.and_mul_backward.default, (X[..., :32].contiguous(), X, 2), {}),
    "apply_rope": (O.apply_rope.default, (Q, KV, COS, COS), {"interleaved": True}),
    "apply_rope_q": (O.apply_rope.default, (Q, None, COS, COS), {"positions": torch.arange(6)}),
    "apply_rope_out": (O.apply_rope_out.default, (Q, KV, COS, COS), {"q_out": torch.empty_like(Q), "k_out": torch.empty_like(KV)}),
    "qk_norm_rope": (O.qk_norm_rope.default, (Q, KV, WEIGHT[:16], WEIGHT[:16], COS, COS), {}),
    "qk_norm_rope_out": (O.qk_norm_rope_out.default, (Q, KV, None, None, COS, COS), {"v": KV.flip(0), "slots": SLOTS, "q_out": torch.empty_like(Q), "k_cache": POOL.clone(), "v_cache": POOL.flip(0)}),
    "linear_cross_entropy": (O.linear_cross_entropy.default, (Q[:, 0], COS[:, :16].repeat(1, 2), SLOTS), {"softcap": 2.0}),
    "linear_cross_entropy_backward": (O.linear_cross_entropy_backward.default, (COS[:, 0], COS[:, 1], Q[:, 0], COS.repeat(1, 2), SLOTS), {}),
    "scale_add": (O.scale_add.default, (X, X.flip(0)), {"alpha": 0.5}),
    "scale_add_out": (O.scale_add_out.default, (X, X.flip(0)), {"out": torch.empty_like(X)}),
    "sdpa": (O.scaled_dot_product_attention.default, (X, X, X), {"is_causal": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    op, args, kwargs = CASES[name]
    torch.library.opcheck(op, args, kwargs)


def test_every_op_is_checked_and_schemas_agree():
    """The Python schemas (used when the library is not built) are the C++ ones."""
    checked = {op._schema.name.removeprefix("fastops::") for op, _, _ in CASES.values()}
    assert checked == set(_ops.SCHEMAS)
    for name, text in _ops.SCHEMAS.items():
        schema = str(getattr(O, name).default._schema).removeprefix("fastops::")
        parsed = str(torch._C.parse_schema(f"{name}({text}")).removeprefix("fastops::")
        assert schema == parsed


def test_reference_serves_other_devices():
    """The operators exist wherever torch does; `meta` stands in for a device without kernels of ours."""
    out, lse = O.attention(X.to("meta"), K.to("meta"), K.to("meta"), return_lse=True)
    assert out.device.type == "meta"
    assert out.shape == X.shape
    assert lse.shape == (2, 4, 5)
