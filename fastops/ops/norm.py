"""rms_norm, fused_add_rms_norm, add_rms_norm, layer_norm: over the last dimension, with the residual's sum, and with
int8 or fp8 results, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastops import _cuda, _ops
from fastops.dispatch.record import Call, Implementation
from fastops.dispatch.select import Operator
from fastops.ops import _common as common

QUANT = {None: 0, "int8": 1, "fp8": 2}
_LARGEST = {1: 127.0, 2: 448.0}


# ---- the semantics --------------------------------------------------------------------------------------------------


def reference_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    layer: bool = False,
    quant: int = 0,
    stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, x + residual, scales, mean, rstd), empty where not asked for; plain torch, fp32 (fp64) inside."""
    wide = common.wide_of(x.dtype)
    s = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    none = x.new_empty(0, dtype=wide)
    mean = s.mean(-1) if layer else none
    centred = s - mean[..., None] if layer else s
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rstd[..., None]
    if weight is not None:
        y = y * (weight.to(wide) + weight_offset)
    if bias is not None:
        y = y + bias.to(wide)
    total = none.to(x.dtype) if residual is None else s.to(x.dtype)
    out, scales = (y.to(x.dtype), none) if quant == 0 else quantise_rows(y, quant)
    return out, total, scales, mean if stats else none, rstd if stats else none


def quantise_rows(y: Tensor, quant: int) -> tuple[Tensor, Tensor]:
    """(codes, scales): each row divided by absmax / 127 (int8) or / 448 (fp8), 1 for a row of zeros, and rounded."""
    most = y.abs().amax(-1)
    scales = torch.where(most == 0, torch.ones_like(most), most / _LARGEST[quant])
    divided = y / scales[..., None]
    if quant == 1:
        return torch.round(divided).nan_to_num().to(torch.int8), scales
    return divided.clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scales


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    quant: str | None,
    out: Tensor | None = None,
) -> None:
    common.require_float(op, "x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, needs a last dimension of at least 1")
    if residual is not None:
        common.require_like(op, "residual", residual, x)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        common.require_float(op, name, t)
        if t.device != x.device:
            raise TypeError(f"{op}: {name} is on {t.device}, x on {x.device}")
        if t.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {name} has shape {list(t.shape)}, must be {[x.shape[-1]]}")
    if not eps >= 0.0:
        raise ValueError(f"{op}: eps is {eps}, must not be negative")
    _quant(op, quant, out)
    if out is not None:
        common.require_like(op, "out", out, x)


def _quant(op: str, quant: str | None, out: Tensor | None = None) -> int:
    if quant not in QUANT:
        raise ValueError(f"{op}: quant is {quant!r}, allowed: None, 'int8', 'fp8'")
    if quant is not None and out is not None:
        raise ValueError(f"{op}: out cannot be combined with quant (two tensors are returned)")
    return QUANT[quant]


# ---- kernels --------------------------------------------------------------------------------------------------------


def _kernel(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    layer: bool,
    quant: int = 0,
    stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = common.kernel_rows(x)
    more = None if residual is None else common.kernel_rows(residual)
    out, total, scales, mean, rstd = _ops.ops.norm(
        rows, more, common.kernel_vector(weight, x), common.kernel_vector(bias, x), eps,
        weight_offset=weight_offset, layer=layer, quant=quant, stats=stats,
    )  # fmt: skip
    if quant:
        scales = scales.view(x.shape[:-1])
    return out.view(x.shape), total if residual is None else total.view(x.shape), scales, mean, rstd


class Norm(torch.autograd.Function):
    """(out, x + residual) and their gradients by the kernels."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        weight_offset: float,
        layer: bool,
    ) -> Any:
        out, total, _, mean, rstd = _kernel(x, residual, weight, bias, eps, weight_offset, layer, stats=True)
        return Norm.keep(
            ctx, out, x if residual is None else total, weight, bias, mean, rstd, weight_offset, layer, residual
        )

    @staticmethod
    def keep(
        ctx: Any,
        out: Tensor,
        s: Tensor,
        weight: Any,
        bias: Any,
        mean: Any,
        rstd: Any,
        offset: float,
        layer: bool,
        residual: Any,
    ) -> Any:
        ctx.save_for_backward(s, weight, bias, mean, rstd)
        ctx.options = (offset, layer, residual is not None)
        return (out, s) if residual is not None else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dsum: Tensor | None = None) -> Any:  # type: ignore[override]
        s, weight, bias, mean, rstd = ctx.saved_tensors
        offset, layer, added = ctx.options
        rows = common.kernel_rows(s)
        ds, dw, db = _ops.ops.norm_backward(
            common.kernel_rows(dout.to(s.dtype)).reshape(rows.shape),
            None if dsum is None else common.kernel_rows(dsum).reshape(rows.shape),
            rows, common.kernel_vector(weight, s), mean, rstd, weight_offset=offset, layer=layer,
            dweight=weight is not None and ctx.needs_input_grad[2], dbias=bias is not None and ctx.needs_input_grad[3],
        )  # fmt: skip
        ds = ds.view(s.shape)
        dw = dw.to(weight.dtype) if weight is not None and ctx.needs_input_grad[2] else None
        db = db.to(bias.dtype) if bias is not None and ctx.needs_input_grad[3] else None
        return ds, ds if added else None, dw, db, None, None, None


class FusedAddNorm(torch.autograd.Function):
    """fused_add_rms_norm under autograd: the sum is kept apart, for the residual will be written to again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float
    ) -> Any:
        out, total, _, mean, rstd = _kernel(x, residual, weight, None, eps, weight_offset, False, stats=True)
        Norm.keep(ctx, out, total, weight, None, mean, rstd, weight_offset, False, residual)
        x.copy_(out)
        residual.copy_(total)
        ctx.mark_dirty(x, residual)
        return x, residual

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dsum: Tensor) -> Any:  # type: ignore[override]
        ds, dr, dw, *_ = Norm.backward(ctx, dout, dsum)
        return ds, dr, dw, None, None


def _describe(x: Tensor, *args: Any, **kwargs: Any) -> Call:
    return Call(x.device.type, x.dtype)


def _operator(op: str, cpp: Any, reference: Any, validate: Any) -> Operator:
    rows = [
        Implementation("cpp", cpp, common.cpp_why_not, 10, source="csrc/cpu/norm"),
        *_cuda.rows(cpp),
        Implementation("reference", reference, common.always, 0, source="fastops/ops/norm.py"),
    ]
    return Operator(op, rows, validate, _describe)


# ---- rms_norm -------------------------------------------------------------------------------------------------------


def _rms_validate(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0,
    quant: str | None = None, out: Tensor | None = None,
) -> None:  # fmt: skip
    _check("rms_norm", x, None, weight, None, eps, quant, out)


def _rms_reference(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0,
    quant: str | None = None, out: Tensor | None = None,
) -> Any:  # fmt: skip
    y, _, scales, _, _ = reference_norm(x, None, weight, None, eps, weight_offset=weight_offset, quant=QUANT[quant])
    if quant is not None:
        return y, scales
    return y if out is None else out.copy_(y)


def _run(
    op: str,
    x: Tensor,
    affine: tuple[Tensor | None, ...],
    options: dict[str, float],
    quant: str | None,
    out: Tensor | None,
) -> Any:
    """rms_norm (affine: the weight) and layer_norm (weight and bias) by the kernels."""
    weight, bias = (*affine, None)[:2]
    eps, offset, layer = options["eps"], options.get("weight_offset", 0.0), op == "layer_norm"
    if quant is not None:
        y, _, scales, _, _ = _kernel(x, None, weight, bias, eps, offset, layer, _quant(op, quant, out))
        return y, scales
    if common.any_grad(x, weight, bias):
        y = Norm.apply(x, None, weight, bias, eps, offset, layer)
        return y if out is None else out.copy_(y)
    rows, vectors = common.kernel_rows(x), [common.kernel_vector(t, x) for t in affine]
    if out is not None and rows.dim() == out.dim() and common.dense_rows(out) is out:
        getattr(_ops.ops, f"{op}_out").default(rows, *vectors, **options, out=out)
        return out
    y = getattr(_ops.ops, op).default(rows, *vectors, **options).view(x.shape)
    return y if out is None else out.copy_(y)


def _rms_cpp(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0,
    quant: str | None = None, out: Tensor | None = None,
) -> Any:  # fmt: skip
    return _run("rms_norm", x, (weight,), {"eps": eps, "weight_offset": weight_offset}, quant, out)


_rms = _operator("rms_norm", _rms_cpp, _rms_reference, _rms_validate)
_rms_direct = _ops.direct("rms_norm")
_DIRECT = {name: _ops.direct(name) for name in (
    "rms_norm_quantised", "fused_add_rms_norm_quantised", "layer_norm_quantised",
)}  # fmt: skip
_CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def _directly(name: str, quant: str, out: Tensor | None, *args: Any) -> Any:
    """A direct call (csrc/python/direct.h) for (codes, scales); None where it is not taken."""
    return _DIRECT[name](*args, _CODES[quant]) if out is None and quant in _CODES else None


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    quant: str | None = None,
    out: Tensor | None = None,
) -> Any:
    """x / sqrt(mean(x^2) + eps) * (weight + weight_offset), over the last dimension.

    Args:
        x: [..., N], fp32, fp16 or bf16 (fp64: reference only), any strides.
        weight: [N], any floating dtype, or None for ones.
        weight_offset: added to the weight; Gemma's norms store weight - 1: use 1.0.
        quant: None; "int8": codes = round(y / scale), scale = absmax of the row / 127; "fp8": float8_e4m3fn codes,
            scale = absmax / 448. A row of zeros has scale 1. Not differentiable then.
        out: like x; may be x. Not with quant.

    Returns:
        Like x (contiguous), or out; with quant (codes [..., N], scales fp32 [...]). Differentiable in x and weight.

    Raises:
        ValueError: shapes, eps, quant. TypeError: dtypes, devices.

    Numerics: fp32 inside, one rounding at the end (FlashInfer's convention; Hugging Face's Llama rounds before the
    weight, too).
    Cost: memory-bound, one read and one write of each element.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467, equation 4.

    Example:
        >>> import torch, fastops
        >>> fastops.rms_norm(torch.tensor([3.0, 4.0]), eps=0.0)
        tensor([0.8485, 1.1314])
    """
    if not is_compiling():
        if quant is None:
            y = _rms_direct(x, weight, eps, weight_offset, out)
        else:
            y = _directly("rms_norm_quantised", quant, out, x, weight, eps, weight_offset)
        if y is not None:
            return y
    common.require_tensor("rms_norm", "x", x)
    return _rms((x.dtype, x.device), x, weight, eps, weight_offset=weight_offset, quant=quant, out=out)


# ---- fused_add_rms_norm (in place) and add_rms_norm -----------------------------------------------------------------


def _fused_validate(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0,
    quant: str | None = None,
) -> None:  # fmt: skip
    common.require_tensor("fused_add_rms_norm", "residual", residual)
    _check("fused_add_rms_norm", x, residual, weight, None, eps, quant)


def _fused_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0,
    quant: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, total, scales, _, _ = reference_norm(
        x, residual, weight, None, eps, weight_offset=weight_offset, quant=QUANT[quant]
    )
    residual.copy_(total)
    return (x.copy_(y), residual) if quant is None else (y, scales)


def _fused_cpp(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0,
    quant: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if quant is not None:
        y, total, scales, _, _ = _kernel(
            x, residual, weight, None, eps, weight_offset, False, _quant("fused_add_rms_norm", quant)
        )
        residual.copy_(total)
        return y, scales
    if common.any_grad(x, residual, weight):
        return FusedAddNorm.apply(x, residual, weight, eps, weight_offset)
    if x.dim() <= common.MAX_DIMS and common.dense_rows(x) is x and common.dense_rows(residual) is residual:
        _ops.ops.fused_add_rms_norm.default(
            x, residual, common.kernel_vector(weight, x), eps, weight_offset=weight_offset
        )
        return x, residual
    y, total, _, _, _ = _kernel(x, residual, weight, None, eps, weight_offset, False)
    return x.copy_(y), residual.copy_(total)


_fused = _operator("fused_add_rms_norm", _fused_cpp, _fused_reference, _fused_validate)
_fused_direct = _ops.direct("fused_add_rms_norm")


def fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    quant: str | None = None,
) -> tuple[Tensor, Tensor]:
    """In place: residual += x, then x = rms_norm(residual), in one pass (vLLM's and FlashInfer's operator).

    Args:
        x, residual: [..., N], one dtype; both are overwritten.
        weight, eps, weight_offset: as in `rms_norm`.
        quant: "int8" or "fp8": x is left alone, and (codes, scales) are returned.

    Returns:
        (x, residual), or with quant (codes, scales). Differentiable as any in-place operator is: inputs that are
        leaves cannot be overwritten; `add_rms_norm` serves those.

    Raises:
        ValueError, TypeError: as `rms_norm`.

    Numerics: the sum is normalised in fp32, before it is rounded for `residual` (FlashInfer's way; vLLM rounds first).
    Cost: memory-bound, two reads and two writes of each element.
    """
    if not is_compiling():
        if quant is None:
            if _fused_direct(x, residual, weight, eps, weight_offset):
                return x, residual
        elif y := _directly("fused_add_rms_norm_quantised", quant, None, x, residual, weight, eps, weight_offset):
            return y  # type: ignore[no-any-return]
    common.require_tensor("fused_add_rms_norm", "x", x)
    return _fused((x.dtype, x.device), x, residual, weight, eps, weight_offset=weight_offset, quant=quant)


def _add_validate(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0
) -> None:
    common.require_tensor("add_rms_norm", "residual", residual)
    _check("add_rms_norm", x, residual, weight, None, eps, None)


def _add_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    return reference_norm(x, residual, weight, None, eps, weight_offset=weight_offset)[:2]


def _add_cpp(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    if common.any_grad(x, residual, weight):
        return Norm.apply(x, residual, weight, None, eps, weight_offset, False)
    return _kernel(x, residual, weight, None, eps, weight_offset, False)[:2]


_add = _operator("add_rms_norm", _add_cpp, _add_reference, _add_validate)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) as new tensors: `fused_add_rms_norm` for training (Liger's form)."""
    common.require_tensor("add_rms_norm", "x", x)
    return _add((x.dtype, x.device), x, residual, weight, eps, weight_offset=weight_offset)


# ---- layer_norm -----------------------------------------------------------------------------------------------------


def _layer_validate(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    quant: str | None = None, out: Tensor | None = None,
) -> None:  # fmt: skip
    _check("layer_norm", x, None, weight, bias, eps, quant, out)


def _layer_reference(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    quant: str | None = None, out: Tensor | None = None,
) -> Any:  # fmt: skip
    y, _, scales, _, _ = reference_norm(x, None, weight, bias, eps, layer=True, quant=QUANT[quant])
    if quant is not None:
        return y, scales
    return y if out is None else out.copy_(y)


def _layer_cpp(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    quant: str | None = None, out: Tensor | None = None,
) -> Any:  # fmt: skip
    return _run("layer_norm", x, (weight, bias), {"eps": eps}, quant, out)


_layer_direct = _ops.direct("layer_norm")
_layer = _operator("layer_norm", _layer_cpp, _layer_reference, _layer_validate)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    quant: str | None = None,
    out: Tensor | None = None,
) -> Any:
    """(x - mean) / sqrt(var + eps) * weight + bias, over the last dimension; arguments, results, errors and numerics as
    `rms_norm`. The variance is the mean squared distance (no Bessel correction), taken in a second pass over the row.

    Source: Ba, Kiros and Hinton, Layer Normalization, arXiv:1607.06450, equation 4.
    """
    if not is_compiling():
        if quant is None:
            y = _layer_direct(x, weight, bias, eps, out)
        else:
            y = _directly("layer_norm_quantised", quant, out, x, weight, bias, eps)
        if y is not None:
            return y
    common.require_tensor("layer_norm", "x", x)
    return _layer((x.dtype, x.device), x, weight, bias, eps, quant=quant, out=out)


# ---- torch.ops: fake kernels, and the reference for other devices ---------------------------------------------------


@torch.library.register_fake("fastops::rms_norm")
def _fake_rms(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("fastops::layer_norm")
def _fake_layer(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("fastops::norm")
def _fake_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6, *,
    weight_offset: float = 0.0, layer: bool = False, quant: int = 0, stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kind = {0: x.dtype, 1: torch.int8, 2: torch.float8_e4m3fn}[quant]
    rows = x.shape[:-1]
    return (
        x.new_empty(x.shape, dtype=kind),
        x.new_empty(x.shape if residual is not None else (0,)),
        x.new_empty(rows if quant else (0,), dtype=torch.float32),
        x.new_empty(rows if stats and layer else (0,), dtype=torch.float32),
        x.new_empty(rows if stats else (0,), dtype=torch.float32),
    )


@torch.library.register_fake("fastops::norm_backward")
def _fake_backward(
    dout: Tensor, dsum: Tensor | None, s: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, *,
    weight_offset: float = 0.0, layer: bool = False, dweight: bool = True, dbias: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n = s.shape[-1]
    f32 = torch.float32
    return s.new_empty(s.shape), s.new_empty(n if dweight else 0, dtype=f32), s.new_empty(n if dbias else 0, dtype=f32)


@torch.library.register_fake("fastops::rms_norm_out")
@torch.library.register_fake("fastops::layer_norm_out")
@torch.library.register_fake("fastops::fused_add_rms_norm")
def _fake_nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _elsewhere_rms_out(*args: Any, **kwargs: Any) -> None:
    _rms_reference(*args, **kwargs)


def _elsewhere_layer_out(*args: Any, **kwargs: Any) -> None:
    _layer_reference(*args, **kwargs)


def _elsewhere_fused(*args: Any, **kwargs: Any) -> None:
    _fused_reference(*args, **kwargs)


def reference_backward(
    dout: Tensor, dsum: Tensor | None, s: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, *,
    weight_offset: float = 0.0, layer: bool = False, dweight: bool = True, dbias: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """With h = (s - mean) rstd, m = dout weight: ds = rstd (m - mean(m) [layer] - h mean(m h)) + dsum."""
    wide = common.wide_of(s.dtype)
    h = ((s.to(wide) - mean[..., None]) if layer else s.to(wide)) * rstd[..., None]
    g = dout.to(wide)
    m = g if weight is None else g * (weight.to(wide) + weight_offset)
    ds = (m - h * (m * h).mean(-1, keepdim=True) - (m.mean(-1, keepdim=True) if layer else 0.0)) * rstd[..., None]
    if dsum is not None:
        ds = ds + dsum.to(wide)
    none, n = s.new_empty(0, dtype=torch.float32), s.shape[-1]
    dw = (g * h).reshape(-1, n).sum(0).float() if dweight else none
    return ds.to(s.dtype), dw, g.reshape(-1, n).sum(0).float() if dbias else none


_ops.implement_elsewhere("rms_norm", _rms_reference)
_ops.implement_elsewhere("rms_norm_out", _elsewhere_rms_out)
_ops.implement_elsewhere("layer_norm", _layer_reference)
_ops.implement_elsewhere("layer_norm_out", _elsewhere_layer_out)
_ops.implement_elsewhere("fused_add_rms_norm", _elsewhere_fused)
_ops.implement_elsewhere("norm", reference_norm)
_ops.implement_elsewhere("norm_backward", reference_backward)
