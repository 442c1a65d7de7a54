"""lut_linear: activations times a weight that is looked up in tables, dense and sparse.

    out[m, n] = sum_k x[m, k] table[n, code[n, k]] + sum over i in row n of x[m, columns[i]] values[i] + bias[n]

SqueezeLLM's arithmetic (Kim et al., arXiv:2306.07629, section 4.2). Design: docs/design/004-int4-linear.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastops import _ops
from fastops.dispatch.record import Call, Implementation
from fastops.dispatch.select import Operator
from fastops.int4.weight import pack_pairs
from fastops.lut import LutWeight
from fastops.ops import _common as common

NAME = "lut_linear"


def validate(x: Tensor, weight: LutWeight, bias: Tensor | None = None, *, out: Tensor | None = None) -> None:
    if not isinstance(weight, LutWeight):
        raise TypeError(f"{NAME}: weight must be a LutWeight, got {type(weight).__name__}")
    common.check_linear(NAME, x, weight.shape, weight.device, bias, out)


def describe(x: Tensor, weight: LutWeight, bias: Tensor | None = None, **options: Any) -> Call:
    return Call(x.device.type, x.dtype, needs_reference_grad="bias" if common.any_grad(bias) else "")


def reference(x: Tensor, weight: LutWeight, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Plain torch: the weight is dequantised to fp32 (fp64 for fp64 inputs)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    result = x.to(wide) @ weight.dequantize(wide).T
    if bias is not None:
        result = result + bias.to(wide)
    result = result.to(x.dtype if out is None else out.dtype)
    return result if out is None else out.copy_(result)


def run_cpp(x: Tensor, weight: LutWeight, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    if common.any_grad(x):
        result = LutLinear.apply(x, weight, bias)
        return result if out is None else out.copy_(result)
    n, k = weight.shape
    packed, bias = weight.packed(), common.to_f32(bias)
    rows = common.dense_rows(x.reshape(-1, k))
    if out is not None and out.dim() == 2 and (out.stride(1) == 1 or n == 1):
        _ops.ops.lut_linear_out(rows, packed.codes, packed.table, bias=bias, **packed.rest, out=out)
        return out
    result = _op(rows, packed.codes, packed.table, bias=bias, **packed.rest).view(*x.shape[:-1], n)
    return result if out is None else out.copy_(result)


_op, _direct = _ops.ops.lut_linear.default, _ops.direct(NAME)


class LutLinear(torch.autograd.Function):
    """The gradient of x is grad @ w, with w dequantised."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: LutWeight, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.weight, ctx.dtype = weight, x.dtype
        return run_cpp(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return (grad.float() @ ctx.weight.dequantize()).to(ctx.dtype), None, None


operator = Operator(
    NAME,
    [
        Implementation("cpp", run_cpp, common.cpp_why_not, 10, source="csrc/cpu/lut_linear"),
        Implementation("reference", reference, common.always, 0, source="fastops/ops/lut_linear.py"),
    ],
    validate,
    describe,
)


def lut_linear(x: Tensor, weight: LutWeight, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for a weight looked up in a table of each output feature, plus sparse outliers.

    Args:
        x: [..., K], fp32, fp16 or bf16 (fp64: reference only).
        weight: a `fastops.LutWeight` [N, K], from `fastops.lut.quantize` or `fastops.lut.from_squeezellm`.
        bias: [N], any floating dtype, added in fp32.
        out: [..., N], written instead of a new tensor (x's dtype, or fp32).

    Returns:
        [..., N] in x's dtype. Sums in fp32.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.

    Cost: up to 4 rows read the codes once, K N / 2 bytes; more rows expand each code once for 256 rows.

    Example:
        >>> import torch, fastops
        >>> weight = fastops.lut.quantize(torch.randn(64, 128))
        >>> fastops.lut_linear(torch.randn(3, 128), weight).shape
        torch.Size([3, 64])
    """
    if type(weight) is LutWeight and type(x) is Tensor and not is_compiling():
        y = _direct(x, *weight.packed().arguments, bias, out)
        if y is not None:
            return y  # type: ignore[no-any-return]
    common.require_tensor(NAME, "x", x)
    if not isinstance(weight, LutWeight) or weight.device != x.device:
        validate(x, weight, bias, out=out)
    if out is not None:
        common.check_out(NAME, out, (*x.shape[:-1], weight.shape[0]), x)
    return operator((x.dtype, x.device, common.any_grad(bias)), x, weight, bias, out=out)


@torch.library.register_fake("fastops::lut_linear")
def _fake(x: Tensor, codes: Tensor, *rest: Any, **options: Any) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


@torch.library.register_fake("fastops::lut_linear_out")
def _fake_out(*args: Any, **options: Any) -> None:
    return None


def _elsewhere(
    x: Tensor, codes: Tensor, table: Tensor, row_starts: Tensor | None = None, columns: Tensor | None = None,
    values: Tensor | None = None, bias: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    canonical = torch.stack((codes & 15, codes >> 4), 2).flatten(1)[:, : x.shape[1]]
    return reference(x, LutWeight(pack_pairs(canonical), table, row_starts, columns, values), bias, out=out)


def _elsewhere_out(*args: Any, **options: Any) -> None:
    _elsewhere(*args, **options)


_ops.implement_elsewhere("lut_linear", _elsewhere)
_ops.implement_elsewhere("lut_linear_out", _elsewhere_out)
