"""The compiled library: loaded here, and named here only.

Without it (a source tree nobody built) the same operators are defined in Python over the reference, so that
``torch.ops.fastops.*`` always exists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_LIBRARY = Path(__file__).parent / "lib" / "libfastops_torch.so"

control: Any = None  # fastops._C, or None
missing: str | None = None  # why there is no compiled library

if _LIBRARY.exists():
    torch.ops.load_library(str(_LIBRARY))
    from fastops import _C as control  # type: ignore[no-redef]

    refusal = control.isa_refusal()
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
    f"Tensor? cu_seqlens_q=None, *, {_TAIL}"
)
_PAIR = ", bool return_lse=False) -> (Tensor, Tensor)"
_GRADIENTS = "Tensor dout, Tensor? dlse, Tensor out, Tensor lse, "
_FOUR = ") -> (Tensor, Tensor, Tensor, Tensor)"
_INT4 = "Tensor? zeros=None, Tensor? mins=None, Tensor? perm=None, Tensor? bias=None, *, bool int8=False"
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
    "merge_states": "Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)",
    "scaled_dot_product_attention": (
        "Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
        "bool is_causal=False, float? scale=None, bool enable_gqa=False) -> Tensor"
    ),
    "int4_pack": "Tensor codes) -> Tensor",
    "int4_linear": f"Tensor x, Tensor codes, Tensor scales, int n, {_INT4}) -> Tensor",
    "int4_linear_out": f"Tensor x, Tensor codes, Tensor scales, {_INT4}, Tensor(a!) out) -> ()",
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


def implement_elsewhere(name: str, function: Any) -> None:
    """Gives operator `name` a plain-torch kernel for every device without one of its own."""
    library.impl(name, function, "CompositeExplicitAutograd")
