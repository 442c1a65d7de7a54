"""The fused operators and merge_states on CUDA: torch ops on CUDA tensors, and emulated rows (fastops/_cuda.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastops import _cuda
from fastops._cuda import Library, library
from fastops.dispatch.record import Implementation
from fastops.ops import _common as common

QUANT = {None: 0, "int8": 1, "fp8": 2}
ACTIVATIONS = {"tanh": 1, "none": 2}


# ---- torch.ops.fastops.* by a library -------------------------------------------------------------------------------


def _rms_norm(lib: Library, x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, **options: Any) -> Tensor:
    return lib.norm(x, None, weight, None, eps, **options)[0]


def _layer_norm(
    lib: Library, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, **options: Any
) -> Tensor:
    return lib.norm(x, None, weight, bias, eps, layer=True, **options)[0]


def _fused_add(
    lib: Library, x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, **options: Any
) -> None:
    lib.norm(x, residual, weight, None, eps, out=x, total=residual, **options)


def _halves(activation: int | None) -> Callable[..., Tensor]:
    def op(lib: Library, x: Tensor, *, approximate: str = "tanh", out: Tensor | None = None) -> Tensor:
        gate, up = x.chunk(2, -1)
        return lib.gated(gate, up, ACTIVATIONS[approximate] if activation is None else activation, out)

    return op


def _two(activation: int | None) -> Callable[..., Tensor]:
    def op(lib: Library, gate: Tensor, up: Tensor, *, approximate: str = "tanh", out: Tensor | None = None) -> Tensor:
        return lib.gated(gate, up, ACTIVATIONS[approximate] if activation is None else activation, out)

    return op


def _and_mul_backward(lib: Library, dout: Tensor, x: Tensor, activation: int) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.cat(lib.gated_backward(dout, gate, up, activation), -1)


def _qk_norm_rope(
    lib: Library,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    return lib.rope(q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, **options)


_WITH_OUT: dict[str, Callable[..., Tensor]] = {
    "rms_norm": _rms_norm, "layer_norm": _layer_norm, "silu_and_mul": _halves(0), "gelu_and_mul": _halves(None),
    "swiglu": _two(0), "geglu": _two(None),
}  # fmt: skip
_OTHERS: dict[str, Callable[..., Any]] = {
    "norm": Library.norm, "norm_backward": Library.norm_backward, "fused_add_rms_norm": _fused_add,
    "gated_backward": Library.gated_backward, "and_mul_backward": _and_mul_backward,
    "merge_states": Library.merge_states, "apply_rope": Library.rope, "qk_norm_rope": _qk_norm_rope,
}  # fmt: skip


for _name, _function in (_WITH_OUT | _OTHERS).items():
    _cuda.implement(_name, _function)
for _name in (*_WITH_OUT, "apply_rope", "qk_norm_rope"):
    _cuda.implement(f"{_name}_out", (_WITH_OUT | _OTHERS)[_name])


# ---- rows of the dispatch table --------------------------------------------------------------------------------------


def _one_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    quant: str | None,
    out: Tensor | None,
    **options: Any,
) -> Any:
    shape, x = x.shape, common.kernel_rows(x)
    weight, bias = common.kernel_vector(weight, x), common.kernel_vector(bias, x)
    y, _, scales, _, _ = library(True).norm(x, None, weight, bias, eps, quant=QUANT[quant], **options)
    if quant is not None:
        return y.view(shape), scales.view(shape[:-1])
    return y.view(shape) if out is None else out.copy_(y.view(shape))


def _emulated_rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0,
    quant: str | None = None, out: Tensor | None = None,
) -> Any:  # fmt: skip
    return _one_norm(x, weight, None, eps, quant, out, weight_offset=weight_offset)


def _emulated_layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    quant: str | None = None, out: Tensor | None = None,
) -> Any:  # fmt: skip
    return _one_norm(x, weight, bias, eps, quant, out, layer=True)


def _emulated_fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0,
    quant: str | None = None,
) -> Any:  # fmt: skip
    rows, more = common.kernel_rows(x), common.kernel_rows(residual)
    y, total, scales, _, _ = library(True).norm(
        rows, more, common.kernel_vector(weight, x), None, eps, weight_offset=weight_offset, quant=QUANT[quant]
    )
    residual.copy_(total.view(x.shape))
    return (x.copy_(y.view(x.shape)), residual) if quant is None else (y.view(x.shape), scales.view(x.shape[:-1]))


def _emulated_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    rows, more = common.kernel_rows(x), common.kernel_rows(residual)
    y, total, *_ = library(True).norm(
        rows, more, common.kernel_vector(weight, x), None, eps, weight_offset=weight_offset
    )
    return y.view(x.shape), total.view(x.shape)


def _emulated_rope(
    q: Tensor, k: Tensor | None, *rest: Any, out: tuple[Tensor, Tensor | None] | None = None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    *weights, cos, sin = rest
    for name, weight in zip(("q_weight", "k_weight"), weights, strict=False):
        options[name] = common.kernel_vector(weight, q)
    if options.get("v") is not None:
        options["v"] = common.dense_rows(options["v"])
    if out is not None:
        options["q_out"], options["k_out"] = out
    elif options.get("slots") is not None and k is not None:
        options["k_out"] = torch.empty_like(k)
    rows = None if k is None else common.dense_rows(k)
    q_new, k_new = library(True).rope(
        common.dense_rows(q), rows, common.dense_rows(cos), common.dense_rows(sin), **options
    )
    return q_new, None if k is None else k_new


_EMULATED: dict[str, Callable[..., Any]] = {
    "apply_rope": _emulated_rope,
    "qk_norm_rope": _emulated_rope,
    "rms_norm": _emulated_rms_norm,
    "layer_norm": _emulated_layer_norm,
    "fused_add_rms_norm": _emulated_fused_add_rms_norm,
    "add_rms_norm": _emulated_add_rms_norm,
    "merge_states": lambda outs, lses: library(True).merge_states(outs, lses),
}


def _emulated(op: str) -> Callable[..., Any]:
    if op in _EMULATED:
        return _EMULATED[op]
    return lambda *args, **options: _WITH_OUT[op](library(True), *map(common.kernel_rows, args), **options)


def rows(op: str, cpp: Callable[..., Any]) -> list[Implementation]:
    return _cuda.rows(op, cpp, _emulated(op))
