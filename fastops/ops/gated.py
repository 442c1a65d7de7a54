"""silu_and_mul, gelu_and_mul, swiglu, geglu: activation(gate) * up in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from fastops import _cuda, _ops
from fastops.dispatch.record import Call, Implementation
from fastops.dispatch.select import Operator
from fastops.ops import _common as common

SILU, GELU_TANH, GELU = 0, 1, 2  # fastops_activation
_GELU = {"tanh": GELU_TANH, "none": GELU}
_APPROXIMATE = {kind: name for name, kind in _GELU.items()}


def activate(x: Tensor, activation: int) -> Tensor:
    """The activation of x in x's own precision."""
    return F.silu(x) if activation == SILU else F.gelu(x, approximate=_APPROXIMATE[activation])


def reference(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    """Plain torch, fp32 (fp64) inside, differentiable."""
    wide = common.wide_of(gate.dtype)
    return (activate(gate.to(wide), activation) * up.to(wide)).to(gate.dtype)


def reference_backward(dout: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    """(dgate, dup) by autograd over the reference, one rounding each."""
    wide = common.wide_of(gate.dtype)
    with torch.enable_grad():
        g = gate.detach().to(wide).requires_grad_()
        act = activate(g, activation)
        dgate = torch.autograd.grad(act, g, dout.to(wide) * up.to(wide))[0]
    return dgate.to(gate.dtype), (dout.to(wide) * act.detach()).to(gate.dtype)


def _gelu_kind(op: str, approximate: str) -> int:
    if approximate not in _GELU:
        raise ValueError(f"{op}: approximate is {approximate!r}, allowed: 'tanh', 'none'")
    return _GELU[approximate]


class AndMul(torch.autograd.Function):
    """activation(x[..., :d]) * x[..., d:]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.activation = activation
        return _and_mul(x, activation)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        rows = common.kernel_rows(x)
        d = common.kernel_rows(dout).reshape(*rows.shape[:-1], -1)
        return _ops.ops.and_mul_backward(d, rows, ctx.activation).view(x.shape), None


class Gated(torch.autograd.Function):
    """activation(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _gated(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        g, u, d = (common.kernel_rows(t if t.dim() else t[None]) for t in (gate, up, dout))
        dgate, dup = _ops.ops.gated_backward(d, g, u, ctx.activation)
        return dgate.view(gate.shape), dup.view(gate.shape), None


def _kernel(
    silu: str, gelu: str, inputs: list[Tensor], shape: tuple[int, ...], activation: int, out: Tensor | None
) -> Tensor:
    """The operator `silu` or `gelu`, by the activation: straight into out where the kernel can write there."""
    op, options = (silu, {}) if activation == SILU else (gelu, {"approximate": _APPROXIMATE[activation]})
    if out is not None and out.dim() == inputs[0].dim() and common.dense_rows(out) is out:
        getattr(_ops.ops, f"{op}_out").default(*inputs, **options, out=out)
        return out
    y: Tensor = getattr(_ops.ops, op).default(*inputs, **options).view(shape)
    return y if out is None else out.copy_(y)


def _and_mul(x: Tensor, activation: int, out: Tensor | None = None) -> Tensor:
    rows = common.kernel_rows(x)
    return _kernel("silu_and_mul", "gelu_and_mul", [rows], (*x.shape[:-1], x.shape[-1] // 2), activation, out)


def _gated(gate: Tensor, up: Tensor, activation: int, out: Tensor | None = None) -> Tensor:
    if gate.dim() == 0 and up.dim() == 0:
        y = _gated(gate[None], up[None], activation)[0]
        return y if out is None else out.copy_(y)
    rows = [common.kernel_rows(gate), common.kernel_rows(up)]
    return _kernel("swiglu", "geglu", rows, gate.shape, activation, out)


# ---- one tensor: silu_and_mul, gelu_and_mul -------------------------------------------------------------------------


def _check_halves(op: str, x: Any, approximate: str, out: Tensor | None) -> None:
    common.require_float(op, "x", x)
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, its last dimension must be even (gate, then up)")
    _gelu_kind(op, approximate)
    if out is not None:
        common.require_float(op, "out", out, x)
        want = [*x.shape[:-1], x.shape[-1] // 2]
        if list(out.shape) != want:
            raise ValueError(f"{op}: out has shape {list(out.shape)}, must be {want}")


def _halves_operator(op: str) -> Operator:
    def kind(approximate: str) -> int:
        return SILU if op == "silu_and_mul" else _gelu_kind(op, approximate)

    def validate(x: Tensor, *, approximate: str = "tanh", out: Tensor | None = None) -> None:
        _check_halves(op, x, approximate, out)

    def plain(x: Tensor, *, approximate: str = "tanh", out: Tensor | None = None) -> Tensor:
        gate, up = x.chunk(2, -1)
        y = reference(gate, up, kind(approximate))
        return y if out is None else out.copy_(y)

    def cpp(x: Tensor, *, approximate: str = "tanh", out: Tensor | None = None) -> Tensor:
        if common.any_grad(x):
            y = AndMul.apply(x, kind(approximate))
            return y if out is None else out.copy_(y)
        return _and_mul(x, kind(approximate), out)

    return _operator(op, cpp, plain, validate)


def _operator(op: str, cpp: Any, plain: Any, validate: Any) -> Operator:
    def describe(first: Tensor, *args: Any, **kwargs: Any) -> Call:
        return Call(first.device.type, first.dtype)

    rows = [
        Implementation("cpp", cpp, common.cpp_why_not, 10, source="csrc/cpu/gated"),
        *_cuda.rows(cpp),
        Implementation("reference", plain, common.always, 0, source="fastops/ops/gated.py"),
    ]
    return Operator(op, rows, validate, describe)


_silu_and_mul, _gelu_and_mul = _halves_operator("silu_and_mul"), _halves_operator("gelu_and_mul")
_DIRECT = {name: _ops.direct(name) for name in (
    "silu_and_mul", "gelu_and_mul_tanh", "gelu_and_mul_none", "swiglu", "geglu_tanh", "geglu_none")}  # fmt: skip


def _directly(name: str, *args: Tensor | None) -> Tensor | None:
    """A direct call (csrc/python/direct.h); None where it is not taken."""
    if is_compiling() or name not in _DIRECT:
        return None
    return _DIRECT[name](*args)  # type: ignore[no-any-return]


def silu_and_mul(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(x[..., :d]) * x[..., d:], for the output of a joined gate-and-up projection.

    Args:
        x: [..., 2 d], fp32, fp16 or bf16 (fp64: reference only), any strides.
        out: [..., d], x's dtype.

    Returns:
        [..., d] (contiguous), or out. Differentiable.

    Raises:
        ValueError: an odd last dimension, a wrong out. TypeError: dtypes, devices.

    Numerics: fp32 inside, one rounding (vLLM rounds the activation, too).
    Cost: memory-bound, 3 d elements of traffic for each row.
    Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202, equation 6.

    Example:
        >>> import torch, fastops
        >>> fastops.silu_and_mul(torch.tensor([1.0, 2.0]))
        tensor([1.4621])
    """
    y = _directly("silu_and_mul", x, out)
    if y is not None:
        return y
    common.require_tensor("silu_and_mul", "x", x)
    return _silu_and_mul((x.dtype, x.device), x, out=out)


def gelu_and_mul(x: Tensor, *, approximate: str = "tanh", out: Tensor | None = None) -> Tensor:
    """gelu(x[..., :d]) * x[..., d:]; as `silu_and_mul`.

    Args:
        approximate: "tanh" (Gemma) or "none" (the error function), as in torch's gelu.
    """
    y = _directly(f"gelu_and_mul_{approximate}", x, out)
    if y is not None:
        return y
    common.require_tensor("gelu_and_mul", "x", x)
    return _gelu_and_mul((x.dtype, x.device), x, approximate=approximate, out=out)


# ---- two tensors: swiglu, geglu -------------------------------------------------------------------------------------


def _pair_operator(op: str) -> Operator:
    def kind(approximate: str) -> int:
        return SILU if op == "swiglu" else _gelu_kind(op, approximate)

    def validate(gate: Tensor, up: Tensor, *, approximate: str = "tanh", out: Tensor | None = None) -> None:
        common.require_float(op, "gate", gate)
        common.require_like(op, "up", up, gate, "gate")
        _gelu_kind(op, approximate)
        if out is not None:
            common.require_like(op, "out", out, gate, "gate")

    def plain(gate: Tensor, up: Tensor, *, approximate: str = "tanh", out: Tensor | None = None) -> Tensor:
        y = reference(gate, up, kind(approximate))
        return y if out is None else out.copy_(y)

    def cpp(gate: Tensor, up: Tensor, *, approximate: str = "tanh", out: Tensor | None = None) -> Tensor:
        if common.any_grad(gate, up):
            y = Gated.apply(gate, up, kind(approximate))
            return y if out is None else out.copy_(y)
        return _gated(gate, up, kind(approximate), out)

    return _operator(op, cpp, plain, validate)


_swiglu, _geglu = _pair_operator("swiglu"), _pair_operator("geglu")


def swiglu(gate: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up: `silu_and_mul` for two tensors of one shape. out may be gate or up."""
    y = _directly("swiglu", gate, up, out)
    if y is not None:
        return y
    common.require_tensor("swiglu", "gate", gate)
    return _swiglu((gate.dtype, gate.device), gate, up, out=out)


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh", out: Tensor | None = None) -> Tensor:
    """gelu(gate) * up: `gelu_and_mul` for two tensors of one shape. out may be gate or up."""
    y = _directly(f"geglu_{approximate}", gate, up, out)
    if y is not None:
        return y
    common.require_tensor("geglu", "gate", gate)
    return _geglu((gate.dtype, gate.device), gate, up, approximate=approximate, out=out)


# ---- torch.ops: fake kernels, and the reference for other devices ---------------------------------------------------


def _register(op: str, pair: bool) -> None:
    gelu = op.startswith("ge")

    def kind(approximate: str) -> int:
        return _gelu_kind(op, approximate) if gelu else SILU

    def split(args: tuple[Tensor, ...]) -> Any:
        return args if pair else args[0].chunk(2, -1)

    def fake(*args: Tensor, approximate: str = "tanh") -> Tensor:
        return args[0].new_empty(split(args)[0].shape)

    def fake_out(*args: Tensor, approximate: str = "tanh", out: Tensor) -> None:
        return None

    def elsewhere(*args: Tensor, approximate: str = "tanh") -> Tensor:
        gate, up = split(args)
        return reference(gate, up, kind(approximate))

    def elsewhere_out(*args: Tensor, approximate: str = "tanh", out: Tensor) -> None:
        out.copy_(elsewhere(*args, approximate=approximate))

    torch.library.register_fake(f"fastops::{op}", fake)
    torch.library.register_fake(f"fastops::{op}_out", fake_out)
    _ops.implement_elsewhere(op, elsewhere)
    _ops.implement_elsewhere(f"{op}_out", elsewhere_out)


for _name in ("silu_and_mul", "gelu_and_mul", "swiglu", "geglu"):
    _register(_name, _name in ("swiglu", "geglu"))


@torch.library.register_fake("fastops::gated_backward")
def _fake_gated_backward(dout: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


@torch.library.register_fake("fastops::and_mul_backward")
def _fake_and_mul_backward(dout: Tensor, x: Tensor, activation: int) -> Tensor:
    return x.new_empty(x.shape)


def _elsewhere_and_mul_backward(dout: Tensor, x: Tensor, activation: int) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.cat(reference_backward(dout, gate, up, activation), -1)


_ops.implement_elsewhere("gated_backward", reference_backward)
_ops.implement_elsewhere("and_mul_backward", _elsewhere_and_mul_backward)
