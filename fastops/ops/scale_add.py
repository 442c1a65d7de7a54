"""scale_add: out = alpha * x + y. The skeleton that a new operator copies (docs/adding-an-op.md)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastops import _ops
from fastops.dispatch.record import Call, Implementation
from fastops.dispatch.select import Operator
from fastops.ops import _common as common

NAME = "scale_add"


def validate(x: Tensor, y: Tensor, *, alpha: float = 1.0, out: Tensor | None = None) -> None:
    given = [("x", x), ("y", y)] if out is None else [("x", x), ("y", y), ("out", out)]
    for name, t in given:
        common.require_float(NAME, name, t)
        common.require_like(NAME, name, t, x)


def describe(x: Tensor, y: Tensor, *, alpha: float = 1.0, out: Tensor | None = None) -> Call:
    return Call(x.device.type, x.dtype)


def reference(x: Tensor, y: Tensor, *, alpha: float = 1.0, out: Tensor | None = None) -> Tensor:
    """Plain torch, differentiable."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    result = (alpha * x.to(wide) + y.to(wide)).to(x.dtype)
    return result if out is None else out.copy_(result)


def run_cpp(x: Tensor, y: Tensor, *, alpha: float = 1.0, out: Tensor | None = None) -> Tensor:
    if common.any_grad(x, y):
        result = ScaleAdd.apply(x, y, alpha)
    elif x.dim() > common.MAX_DIMS:
        result = run_cpp(x.reshape(-1), y.reshape(-1), alpha=alpha).view(x.shape)
    elif out is not None and common.dense_rows(out) is out:
        _ops.ops.scale_add_out(common.dense_rows(x), common.dense_rows(y), alpha=alpha, out=out)
        return out
    else:
        result = _op(common.dense_rows(x), common.dense_rows(y), alpha=alpha)
    return result if out is None else out.copy_(result)


_op = _ops.ops.scale_add.default


class ScaleAdd(torch.autograd.Function):
    """d out / d x = alpha, d out / d y = 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, alpha: float) -> Tensor:  # type: ignore[override]
        ctx.alpha = alpha
        return run_cpp(x, y, alpha=alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return ctx.alpha * grad, grad, None


operator = Operator(
    NAME,
    [
        Implementation("cpp", run_cpp, common.cpp_why_not, 10, source="csrc/cpu/scale_add"),
        Implementation("reference", reference, common.always, 0, source="fastops/ops/scale_add.py"),
    ],
    validate,
    describe,
)


_direct = _ops.direct(NAME)


def scale_add(x: Tensor, y: Tensor, *, alpha: float = 1.0, out: Tensor | None = None) -> Tensor:
    """alpha * x + y, computed in fp32 and rounded once.

    Args:
        x: any shape, fp32, fp16 or bf16 (fp64: reference only), any strides; no copy is made where
            the last dimension is contiguous.
        y: like x in shape, dtype and device.
        alpha: the factor of x.
        out: like x; written instead of a new tensor. May be x or y.

    Returns:
        A new tensor like x (contiguous), or out.

    Raises:
        ValueError: shapes that differ. TypeError: dtypes or devices that differ.

    Numerics: for 16-bit inputs, one rounding where ``alpha * x + y`` in torch has two.
    Cost: 2 flops and 3 elements of memory traffic for each element.

    Example:
        >>> import torch, fastops
        >>> fastops.scale_add(torch.ones(3), torch.ones(3), alpha=2.0)
        tensor([3., 3., 3.])
    """
    if not is_compiling():
        result = _direct(x, y, alpha, out)
        if result is not None:
            return result  # type: ignore[no-any-return]
    common.require_tensor(NAME, "x", x)
    key = (x.dtype, x.device)
    return operator(key, x, y, alpha=alpha, out=out)


@torch.library.register_fake("fastops::scale_add")
def _fake(x: Tensor, y: Tensor, *, alpha: float = 1.0) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("fastops::scale_add_out")
def _fake_out(x: Tensor, y: Tensor, *, alpha: float = 1.0, out: Tensor) -> None:
    return None


def _elsewhere_out(x: Tensor, y: Tensor, *, alpha: float = 1.0, out: Tensor) -> None:
    reference(x, y, alpha=alpha, out=out)


_ops.implement_elsewhere("scale_add", reference)
_ops.implement_elsewhere("scale_add_out", _elsewhere_out)
