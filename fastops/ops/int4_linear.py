"""int4_linear: activations times a weight of 4-bit codes.

    out[m, n] = sum_k x[m, perm[k]] w[n, k] + bias[n],   w[n, k] = (code - zero) scale   or   code scale - min

with one scale (and zero or min) for each group of input features, or of outputs of one input feature; 2:4 sparse, too.
Design: docs/design/004-int4-linear.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastops import _cuda, _ops
from fastops.dispatch.record import Call, Implementation
from fastops.dispatch.select import Operator
from fastops.int4 import BLOCK, Int4Weight, unpack24, unpack_codes
from fastops.ops import _common as common

NAME = "int4_linear"
MODES = {"float": 0, "int8": 1, "bfloat16": 2}  # fastops_activations


def validate(
    x: Tensor, weight: Int4Weight, bias: Tensor | None = None, *, activations: str = "float", out: Tensor | None = None
) -> None:
    if not isinstance(weight, Int4Weight):
        raise TypeError(f"{NAME}: weight must be an Int4Weight, got {type(weight).__name__}")
    if activations not in MODES:
        raise ValueError(f"{NAME}: activations is {activations!r}, allowed: {', '.join(MODES)}")
    common.check_linear(NAME, x, weight.shape, weight.device, bias, out)


def describe(x: Tensor, weight: Int4Weight, bias: Tensor | None = None, **options: Any) -> Call:
    grad = "bias" if common.any_grad(bias) else ""
    return Call(x.device.type, x.dtype, needs_reference_grad=grad)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 in x's wide dtype, and the scale [.., 1] of each row: absmax / 127."""
    top = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    most = torch.full_like(top, 127.0)
    inverse = most / top  # a real division: torch turns 127.0 / top into a product with the reciprocal
    return torch.where(top > 0, x * inverse, torch.zeros_like(x)).round().clamp(-127, 127), top / most


def reference(
    x: Tensor, weight: Int4Weight, bias: Tensor | None = None, *, activations: str = "float", out: Tensor | None = None
) -> Tensor:
    """Plain torch: the weight is dequantised to fp32 (fp64 for fp64 inputs)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.to(wide)
    if activations != "float" and weight.column_scales is not None:
        parts = _slices(rows, weight, wide)
        rounded = [(*_round_rows(each, activations), part) for each, part in parts]
        result = torch.cat([each @ part.T * factor for each, factor, part in rounded], -1)
    else:
        rows, factor = _round_rows(rows, activations)
        result = (rows @ weight.dequantize(wide).T) * factor
    if bias is not None:
        result = result + bias.to(wide)
    result = result.to(x.dtype if out is None else out.dtype)
    return result if out is None else out.copy_(result)


def _round_rows(x: Tensor, activations: str) -> tuple[Tensor, Tensor | float]:
    """The numbers the weight meets, in x's dtype, and the factor of each row."""
    if activations == "int8":
        return quantize_rows(x)
    return (x if activations == "float" else x.bfloat16().to(x.dtype)), 1.0


def _slices(rows: Tensor, weight: Int4Weight, wide: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """(the rows times the columns' scales, the rest of the weight), slice by slice."""
    assert weight.column_scales is not None
    columns, k = weight.column_scales.to(wide), weight.shape[1]
    at = torch.arange(columns.shape[1], device=rows.device) % k if weight.perm is None else weight.perm.long()
    rest = weight.columns(wide).chunk(columns.shape[0])
    for scales, part in zip(columns, rest, strict=True):
        yield rows[..., at] * scales, part


def run_cpp(
    x: Tensor, weight: Int4Weight, bias: Tensor | None = None, *, activations: str = "float", out: Tensor | None = None
) -> Tensor:
    if common.any_grad(x):
        result = Int4Linear.apply(x, weight, bias, activations)
        return result if out is None else out.copy_(result)
    n, k = weight.shape
    packed = weight.packed()
    rows = x if x.dim() == 2 else x.reshape(-1, k)
    if rows.stride(-1) != 1 and rows.shape[0]:
        rows = rows.contiguous()
    bias, mode = common.to_f32(bias), MODES[activations]
    if out is not None and out.dim() == 2 and (out.stride(1) == 1 or n == 1):
        _into(rows, packed.codes, packed.scales, bias=bias, activations=mode, **packed.rest, out=out)
        return out
    result = _op(rows, packed.codes, packed.scales, n, bias=bias, activations=mode, **packed.rest)
    result = result if x.dim() == 2 else result.view(*x.shape[:-1], n)
    return result if out is None else out.copy_(result)


_op, _into = _ops.ops.int4_linear.default, _ops.ops.int4_linear_out.default
_direct = _ops.direct("int4_linear")


class Int4Linear(torch.autograd.Function):
    """The gradient of x is grad @ w, with w dequantised (as if the activations had not been rounded)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int4Weight, bias: Tensor | None, activations: str) -> Tensor:  # type: ignore[override]
        ctx.weight, ctx.dtype = weight, x.dtype
        return run_cpp(x, weight, bias, activations=activations)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return (grad.float() @ ctx.weight.dequantize()).to(ctx.dtype), None, None, None


operator = Operator(
    NAME,
    [
        Implementation("cpp", run_cpp, common.cpp_why_not, 10, source="docs/design/004-int4-linear.md"),
        *_cuda.rows(run_cpp),
        Implementation("reference", reference, common.always, 0, source="fastops/ops/int4_linear.py"),
    ],
    validate,
    describe,
)


def int4_linear(
    x: Tensor, weight: Int4Weight, bias: Tensor | None = None, *, activations: str = "float", out: Tensor | None = None
) -> Tensor:
    """x @ weight.T + bias for a weight of 4-bit codes.

    Args:
        x: [..., K], fp32, fp16 or bf16 (fp64: reference only).
        weight: an `fastops.Int4Weight` [N, K], from `fastops.int4.quantize` or an importer.
        bias: [N], any floating dtype, added in fp32.
        activations: "float" keeps x as it is (sums in fp32); "int8" rounds each row of x to int8 (absmax / 127) and
            multiplies integers, faster where the processor has integer dot products; "bfloat16" rounds each number of
            an fp32 or fp16 x to bf16, faster where the processor multiplies those (AVX512_BF16, AMX).
        out: [..., N], written instead of a new tensor (x's dtype, or fp32).

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.

    Cost: up to 4 rows read the codes once, K N / 2 bytes; more rows expand each code once for 256 rows.

    Example:
        >>> import torch, fastops
        >>> weight = fastops.int4.quantize(torch.randn(64, 128), group_size=32)
        >>> fastops.int4_linear(torch.randn(3, 128), weight).shape
        torch.Size([3, 64])
    """
    if type(weight) is Int4Weight and type(x) is Tensor and activations in MODES and not is_compiling():
        y = _direct(x, *weight.packed().arguments, bias, MODES[activations], out)
        if y is not None:
            return y  # type: ignore[no-any-return]
    common.require_tensor(NAME, "x", x)
    if (
        not isinstance(weight, Int4Weight)
        or activations not in MODES
        or weight.device != x.device
        or x.shape[-1:] != weight.shape[1:]  # the kernel would take other numbers of planes
    ):
        validate(x, weight, bias, activations=activations, out=out)
    if out is not None:
        common.check_out(NAME, out, (*x.shape[:-1], weight.shape[0]), x)
    key = (x.dtype, x.device, common.any_grad(bias))
    return operator(key, x, weight, bias, activations=activations, out=out)


@torch.library.register_fake("fastops::int4_pack")
def _fake_pack(codes: Tensor) -> Tensor:
    return codes.new_empty(((codes.shape[0] + BLOCK - 1) // BLOCK, codes.shape[1] // 4, BLOCK, 4))


@torch.library.register_fake("fastops::int4_pack24")
def _fake_pack24(codes: Tensor, kept: Tensor) -> Tensor:
    return codes.new_empty(((codes.shape[0] + BLOCK - 1) // BLOCK, kept.shape[1], BLOCK, 3))


@torch.library.register_fake("fastops::int4_linear")
def _fake(x: Tensor, codes: Tensor, scales: Tensor, n: int, *rest: Any, **options: Any) -> Tensor:
    return x.new_empty((x.shape[0], n))


@torch.library.register_fake("fastops::int4_linear_out")
def _fake_out(*args: Any, **options: Any) -> None:
    return None


def _elsewhere(
    x: Tensor, codes: Tensor, scales: Tensor, n: int, zeros: Tensor | None = None, mins: Tensor | None = None,
    perm: Tensor | None = None, bias: Tensor | None = None, column_scales: Tensor | None = None,
    column_zeros: Tensor | None = None, *, activations: int = 0, eight: bool = False,
) -> Tensor:  # fmt: skip
    def rows(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.transpose(1, 2).flatten(0, 1)[:n]

    plain = rows(scales)
    assert plain is not None
    count = codes.shape[1] * 8 // x.shape[1]
    planes = torch.arange(count, dtype=torch.int32, device=x.device) if count > 1 else None
    canonical, kept = (unpack_codes(codes, n), None) if codes.shape[3] == 4 else unpack24(codes, n)
    weight = Int4Weight(
        canonical, plain, zeros=rows(zeros), mins=rows(mins), perm=perm, planes=planes, kept=kept,
        column_scales=column_scales, column_zeros=column_zeros,
    )  # fmt: skip
    return reference(x, weight, bias, activations=list(MODES)[activations])


def _elsewhere_out(
    x: Tensor, codes: Tensor, scales: Tensor, *rest: Any, out: Tensor, **options: Any
) -> None:  # fmt: skip
    out.copy_(_elsewhere(x, codes, scales, out.shape[1], *rest, **options))


def _pack_elsewhere(codes: Tensor) -> Tensor:
    n, half = codes.shape
    pad = -n % BLOCK
    codes = torch.cat((codes, codes.new_full((pad, half), 0x88)))
    four = codes.view(-1, BLOCK, half // 4, 4)
    nibbles = torch.stack((four & 15, four >> 4), -1).flatten(-2)  # eight features in order
    return (nibbles[..., :4] | nibbles[..., 4:] << 4).transpose(1, 2).contiguous()


def _pack24_elsewhere(codes: Tensor, kept: Tensor) -> Tensor:
    n, words = kept.shape
    pad = -n % BLOCK
    codes = torch.cat((codes ^ 0x88, codes.new_zeros((pad, 2 * words))))
    kept = torch.cat((kept, kept.new_full((pad, words), 0x44)))
    both = [t.view(-1, BLOCK, words, t.shape[1] // words).transpose(1, 2).flatten(2) for t in (codes, kept)]
    return torch.cat(both, 2).view(-1, words, BLOCK, 3)


_ops.implement_elsewhere("int4_pack", _pack_elsewhere)
_ops.implement_elsewhere("int4_pack24", _pack24_elsewhere)
_ops.implement_elsewhere("int4_linear", _elsewhere)
_ops.implement_elsewhere("int4_linear_out", _elsewhere_out)
