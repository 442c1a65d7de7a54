"""The compiled library: loaded here, and named here only.

Without it (a source tree nobody built) the same operators are defined in Python over the reference, so that
``torch.ops.fastops.*`` always exists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "lib"  # of the compiled libraries
_LIBRARY = FOLDER / "libfastops_torch.so"

# By fastops_dtype of the C API.
DTYPES = (
    None, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool, torch.float64,
    torch.uint8, torch.int8, torch.float8_e4m3fn,
)  # fmt: skip

control: Any = None  # fastops._C, or None
missing: str | None = None  # why there is no compiled library

if _LIBRARY.exists():
    torch.ops.load_library(str(_LIBRARY))
    from fastops import _C as control  # type: ignore[no-redef]

    refusal = control.isa_refusal() or control.cores_refusal()
    if refusal is not None:
        raise ValueError(refusal)
else:
    missing = f"the compiled library is not built ({_LIBRARY} is missing)"

_TAIL = (
    "bool causal=False, float? scale=None, int window_left=-1, int window_right=-1, "
    "float softcap=0.0, Tensor? sinks=None, Tensor? alibi_slopes=None"
)
_DENSE = f"Tensor q, Tensor k, Tensor v, *, {_TAIL}, Tensor? attn_mask=None, bool top_left=False"
_VARLEN = f"Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, *, {_TAIL}"
_PAGED = (
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, "
    f"Tensor? cu_seqlens_q=None, *, {_TAIL}, Tensor? k_scale=None, Tensor? k_zero=None, Tensor? k_min=None, "
    "Tensor? v_scale=None, Tensor? v_zero=None, Tensor? v_min=None, Tensor? k_recent=None, Tensor? v_recent=None, "
    "Tensor? packed_lens=None, int k_bits=0, int v_bits=0"
)
_PAIR = ", bool return_lse=False) -> (Tensor, Tensor)"
_GRADIENTS = "Tensor dout, Tensor? dlse, Tensor out, Tensor lse, "
_FOUR = ") -> (Tensor, Tensor, Tensor, Tensor)"
_INT4 = (
    "Tensor? zeros=None, Tensor? mins=None, Tensor? perm=None, Tensor? bias=None, Tensor? column_scales=None, "
    "Tensor? column_zeros=None, *, int activations=0, bool eight=False"
)
_LUT = (
    "Tensor x, Tensor codes, Tensor table, Tensor? row_starts=None, Tensor? columns=None, Tensor? values=None, "
    "Tensor? bias=None"
)
_AFFINE = "float eps=1e-6, *, float weight_offset=0.0"
_ROPE = (
    "Tensor q, Tensor? k, Tensor cos, Tensor sin, *, Tensor? positions=None, bool interleaved=False, bool inverse=False"
)
_QK_NORM = (
    "Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, *, float eps=1e-6, "
    "float weight_offset=0.0, Tensor? positions=None, bool interleaved=False"
)
_LOSS = (
    "Tensor x, Tensor weight, Tensor target, Tensor? bias=None, *, int ignore_index=-100, float label_smoothing=0.0, "
    "float softcap=0.0"
)
_INTO = ", Tensor(a!) out, Tensor(b!)? lse=None) -> ()"

# Only read when the C++ library (csrc/torch/schemas.cpp) is absent; a test holds the two together.
SCHEMAS = {
    "attention": _DENSE + _PAIR,
    "attention_out": _DENSE + _INTO,
    "attention_varlen": _VARLEN + _PAIR,
    "attention_varlen_out": _VARLEN + _INTO,
    "attention_paged": _PAGED + _PAIR,
    "attention_paged_out": _PAGED + _INTO,
    "attention_backward": _GRADIENTS + _DENSE + _FOUR,
    "attention_varlen_backward": _GRADIENTS + _VARLEN + _FOUR,
    "kv_append": (
        "Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_table, Tensor seq_lens, "
        "Tensor? cu_seqlens=None, *, Tensor(c!)? k_scale=None, Tensor(d!)? k_zero=None, Tensor(e!)? k_min=None, "
        "Tensor(f!)? v_scale=None, Tensor(g!)? v_zero=None, Tensor(h!)? v_min=None, Tensor(i!)? k_recent=None, "
        "Tensor(j!)? v_recent=None, Tensor(k!)? packed_lens=None, int k_bits=0, int v_bits=0) -> Tensor"
    ),
    "merge_states": "Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)",
    "scaled_dot_product_attention": (
        "Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
        "bool is_causal=False, float? scale=None, bool enable_gqa=False) -> Tensor"
    ),
    "int4_pack": "Tensor codes) -> Tensor",
    "int4_pack24": "Tensor codes, Tensor kept) -> Tensor",
    "int4_linear": f"Tensor x, Tensor codes, Tensor scales, int n, {_INT4}) -> Tensor",
    "int4_linear_out": f"Tensor x, Tensor codes, Tensor scales, {_INT4}, Tensor(a!) out) -> ()",
    "lut_linear": f"{_LUT}) -> Tensor",
    "lut_linear_out": f"{_LUT}, *, Tensor(a!) out) -> ()",
    "rms_norm": f"Tensor x, Tensor? weight=None, {_AFFINE}) -> Tensor",
    "rms_norm_out": f"Tensor x, Tensor? weight=None, {_AFFINE}, Tensor(a!) out) -> ()",
    "fused_add_rms_norm": f"Tensor(a!) x, Tensor(b!) residual, Tensor? weight=None, {_AFFINE}) -> ()",
    "layer_norm": "Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-5) -> Tensor",
    "layer_norm_out": "Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-5, *, Tensor(a!) out) -> ()",
    "norm": (
        f"Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, {_AFFINE}, bool layer=False, int quant=0, "
        "bool stats=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "norm_backward": (
        "Tensor dout, Tensor? dsum, Tensor s, Tensor? weight, Tensor mean, Tensor rstd, *, float weight_offset=0.0, "
        "bool layer=False, bool dweight=True, bool dbias=False) -> (Tensor, Tensor, Tensor)"
    ),
    "silu_and_mul": "Tensor x) -> Tensor",
    "silu_and_mul_out": "Tensor x, *, Tensor(a!) out) -> ()",
    "gelu_and_mul": "Tensor x, *, str approximate='tanh') -> Tensor",
    "gelu_and_mul_out": "Tensor x, *, str approximate='tanh', Tensor(a!) out) -> ()",
    "swiglu": "Tensor gate, Tensor up) -> Tensor",
    "swiglu_out": "Tensor gate, Tensor up, *, Tensor(a!) out) -> ()",
    "geglu": "Tensor gate, Tensor up, *, str approximate='tanh') -> Tensor",
    "geglu_out": "Tensor gate, Tensor up, *, str approximate='tanh', Tensor(a!) out) -> ()",
    "gated_backward": "Tensor dout, Tensor gate, Tensor up, int activation) -> (Tensor, Tensor)",
    "and_mul_backward": "Tensor dout, Tensor x, int activation) -> Tensor",
    "apply_rope": f"{_ROPE}) -> (Tensor, Tensor)",
    "apply_rope_out": f"{_ROPE}, Tensor(a!) q_out, Tensor(b!)? k_out=None) -> ()",
    "qk_norm_rope": f"{_QK_NORM}) -> (Tensor, Tensor)",
    "qk_norm_rope_out": (
        f"{_QK_NORM}, Tensor? v=None, Tensor? slots=None, Tensor(a!) q_out, Tensor(b!)? k_out=None, "
        "Tensor(c!)? k_cache=None, Tensor(d!)? v_cache=None) -> ()"
    ),
    "linear_cross_entropy": f"{_LOSS}) -> (Tensor, Tensor)",
    "linear_cross_entropy_backward": (
        f"Tensor grad, Tensor lse, {_LOSS}, bool dx=True, bool dweight=True, bool dbias=False) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "scale_add": "Tensor x, Tensor y, *, float alpha=1.0) -> Tensor",
    "scale_add_out": "Tensor x, Tensor y, *, float alpha=1.0, Tensor(a!) out) -> ()",
}

if missing is None:
    library = torch.library.Library("fastops", "FRAGMENT")
else:
    library = torch.library.Library("fastops", "DEF")
    for _name, _schema in SCHEMAS.items():
        library.define(f"{_name}({_schema}")

ops = torch.ops.fastops


def direct(name: str) -> Any:
    """Operator `name` of csrc/python/direct.cpp: gives its results, or None where it does not take a call."""
    return getattr(control, f"direct_{name}", None) or (lambda *args: None)


def begin_direct(forced: Any) -> None:
    """Lets direct calls begin, which watch what is forced and whatever of torch a call must not pass by."""
    names = ("_len_torch_dispatch_stack", "_len_torch_function_stack", "_is_tracing", "_increment_version")
    *guards, step = (getattr(torch._C, name, None) for name in names)
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if control is None or None in (capsule, *guards, step):
        return  # then no call is direct
    control.direct_begin(
        torch.Tensor, torch.nn.Parameter, capsule, forced, vars(torch.autograd.profiler),
        vars(torch.autograd.forward_ad), tuple(guards), step, torch.empty_strided, DTYPES,
    )  # fmt: skip


def lasting(t: torch.Tensor) -> torch.Tensor:
    """A new tensor that is kept and read again and again, such as a KV cache: in large pages where the system has them.
    Before it is written first."""
    if control is not None and t.device.type == "cpu":
        control.prefer_large_pages(t.data_ptr(), t.nbytes)
    return t


plain: dict[str, Any] = {}  # operator -> its plain-torch kernel


def implement_elsewhere(name: str, function: Any) -> None:
    """Gives operator `name` a plain-torch kernel for every device without one of its own."""
    plain[name] = function
    library.impl(name, function, "CompositeExplicitAutograd")
