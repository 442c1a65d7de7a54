"""Quantising a weight to 4 bits: round to nearest, scales searched for the least squared error, or errors compensated
with calibration data."""

from __future__ import annotations

import torch
from torch import Tensor

from fastops.int4.gptq import compensate
from fastops.int4.weight import BLOCK, FLOATS, Int4Weight, gather24, pack_pairs

METHODS = ("rtn", "mse", "gptq")
DIMS = ("output", "input", "adaptive")
_SHRINK = [1.0 - 0.025 * i for i in range(20)]  # of the full range: 1 .. 0.525


def quantize(
    w: Tensor,
    group_size: int = 128,
    symmetric: bool = True,
    method: str = "rtn",
    scale_dtype: torch.dtype | None = None,
    bits: int = 4,
    hessian: Tensor | None = None,
    dim: str = "output",
    sparsity: str | None = None,
) -> Int4Weight:
    """A weight [N, K] in 4 bits, or in 8.

    Args:
        w: [N, K], floating point; K a multiple of 8.
        group_size: input features that share a scale: -1 (all) or a multiple of 8 that divides K.
        symmetric: codes stand for -8 .. 7 times the scale (scale = 2 absmax / 15, as GPTQ's); else for min .. max with
            a whole zero point.
        method: "rtn" rounds to nearest; "mse" tries 20 smaller ranges for each group and keeps the least squared error;
            "gptq" rounds column by column and makes up for each error in the columns to come, so that the layer's
            output on the calibration data changes least (GPTQ, arXiv:2210.17323). Needs hessian.
        scale_dtype: of the scales; default w's dtype (fp32 for fp64).
        bits: 4, or 8: two planes of 4 bits, 16 high + low, whole numbers from -136 to 119 times the scale. For layers
            that 4 bits would hurt, an output layer say; "rtn" and symmetric only.
        hessian: [K, K], the sum of x x^T over the layer's inputs x (`quantize_model` gathers it); for "gptq" and for
            dim "adaptive".
        dim: "output": a group is group_size inputs of one output feature. "input": group_size outputs of one input
            feature, so that an input with outliers keeps its error to itself (per-IC quantisation, Heo et al.,
            arXiv:2309.15531, section 3.1); group_size is then -1 or a multiple of 16 that divides N. "adaptive":
            whichever changes the layer's output least (AdaDim, section 3.2), measured with hessian or, without one, as
            if inputs were independent and of one size. "rtn" and "mse".
        sparsity: None, or "2:4": of each four neighbouring columns the two largest are kept, the others become 0, and
            the ranges are those of what is kept. 3 bits a weight instead of 4. Symmetric, "output", "rtn" and "mse".

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.

    Example:
        >>> import torch, fastops
        >>> fastops.int4.quantize(torch.randn(16, 64), group_size=32)
        Int4Weight([16, 64], group_size=32, symmetric, float32 scales)
    """
    if not isinstance(w, Tensor) or not w.is_floating_point():
        raise TypeError(f"quantize: w must be a floating-point tensor, got {getattr(w, 'dtype', type(w).__name__)}")
    if w.dim() != 2 or w.shape[1] == 0 or w.shape[1] % 8:
        raise ValueError(f"quantize: w has shape {list(w.shape)}, must be [N, K] with K a multiple of 8")
    n, k = w.shape
    size = k if group_size == -1 else group_size
    if dim != "input" and (size < 8 or size % 8 or k % size):
        raise ValueError(f"quantize: group_size is {group_size}, must be -1 or a multiple of 8 that divides K = {k}")
    if method not in METHODS:
        raise ValueError(f"quantize: method is {method!r}, allowed: {', '.join(METHODS)}")
    if bits not in (4, 8):
        raise ValueError(f"quantize: bits is {bits}, allowed: 4, 8")
    if bits == 8 and not (symmetric and method == "rtn"):
        raise ValueError(f"quantize: 8 bits are symmetric and rounded to nearest, got {symmetric=}, {method=}")
    if dim not in DIMS:
        raise ValueError(f"quantize: dim is {dim!r}, allowed: {', '.join(DIMS)}")
    if sparsity not in (None, "2:4"):
        raise ValueError(f"quantize: sparsity is {sparsity!r}, allowed: None, '2:4'")
    if dim != "output" and (bits == 8 or method == "gptq" or sparsity):
        raise ValueError(f"quantize: dim {dim!r} takes 4 bits, 'rtn' or 'mse' and no sparsity")
    if sparsity and (bits == 8 or method == "gptq" or not symmetric):
        raise ValueError("quantize: 2:4 sparse weights are symmetric, of 4 bits, 'rtn' or 'mse'")
    if method == "gptq" and hessian is None:
        raise ValueError("quantize: method 'gptq' needs a hessian")
    if hessian is not None and method != "gptq" and dim != "adaptive":
        raise ValueError(f"quantize: a hessian is for method 'gptq' and dim 'adaptive', got method {method!r}")
    if hessian is not None and list(hessian.shape) != [k, k]:
        raise ValueError(f"quantize: hessian has shape {list(hessian.shape)}, must be [{k}, {k}]")
    dtype = scale_dtype or (w.dtype if w.dtype in FLOATS else torch.float32)
    if dtype not in FLOATS:
        raise TypeError(f"quantize: scale_dtype is {dtype}, must be float32, float16 or bfloat16")
    if not bool(torch.isfinite(w).all()):
        raise ValueError("quantize: w holds an infinity or a NaN")
    if hessian is not None and not bool(torch.isfinite(hessian).all()):
        raise ValueError("quantize: hessian holds an infinity or a NaN")
    if dim == "input":
        return _by_input(w, group_size, symmetric, method, dtype)
    if dim == "adaptive":
        both = [quantize(w, group_size, symmetric, method, dtype), _by_input(w, group_size, symmetric, method, dtype)]
        return min(both, key=lambda each: _output_error(each.dequantize() - w.float(), hessian))
    dense = w.detach().float()
    places = None
    if sparsity:
        places = dense.abs().view(n, k // 4, 4).topk(2, -1).indices.sort(-1).values
        dense = torch.zeros_like(dense).view(n, k // 4, 4).scatter(
            2, places, dense.view(n, k // 4, 4).gather(2, places)
        ).view(n, k)  # fmt: skip
    groups = dense.view(n, k // size, size)
    if bits == 8:
        return _eight(groups, dtype)
    if hessian is not None:
        codes, scales, zeros = compensate(groups, hessian, lambda group: _range(group, 1.0, symmetric, dtype))
        packed = pack_pairs(codes.view(n, k).to(torch.uint8))
        return Int4Weight(packed, scales.contiguous(), zeros=None if symmetric else zeros.contiguous())
    codes, scales, zeros = _round(groups, symmetric, method, dtype)
    codes = codes.view(n, k).to(torch.uint8)
    if places is not None:
        held, kept = gather24(codes, places)
        return Int4Weight(pack_pairs(held), scales, kept=kept)
    return Int4Weight(pack_pairs(codes), scales, zeros=None if symmetric else zeros)


def _round(groups: Tensor, symmetric: bool, method: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, zeros) of groups [.., G, size] rounded to nearest."""
    best, error = None, torch.full(groups.shape[:2], torch.inf, device=groups.device)
    for share in _SHRINK if method == "mse" else _SHRINK[:1]:
        scales, zeros = _range(groups, share, symmetric, dtype)
        s, z = scales.float()[..., None], zeros.float()[..., None]
        codes = (groups / s + z).round().clamp(0, 15)
        squared = ((codes - z) * s - groups).square().sum(-1)
        if best is None:
            best = [codes, scales, zeros]
            error = squared
            continue
        better = squared < error
        error = torch.where(better, squared, error)
        for old, new in zip(best, (codes, scales, zeros), strict=True):
            old[better] = new[better]
    assert best is not None
    return best[0], best[1], best[2]


def _by_input(w: Tensor, group_size: int, symmetric: bool, method: str, dtype: torch.dtype) -> Int4Weight:
    """Groups of outputs: those of the transposed weight, whose scales and zeros go to the columns."""
    n, k = w.shape
    size = n if group_size == -1 else group_size
    if size < 1 or n % size or (size != n and size % BLOCK):
        raise ValueError(
            f"quantize: group_size is {group_size}, must be -1 or a multiple of {BLOCK} that divides N = {n} "
            "for groups of outputs"
        )
    codes, scales, zeros = _round(w.detach().float().T.reshape(k, n // size, size), symmetric, method, dtype)
    codes = codes.view(k, n).T.contiguous().to(torch.uint8)
    return Int4Weight(
        pack_pairs(codes), torch.ones((n, 1), dtype=dtype, device=w.device), column_scales=scales.T.contiguous(),
        column_zeros=None if symmetric else zeros.T.contiguous(),
    )  # fmt: skip


def _output_error(error: Tensor, hessian: Tensor | None) -> float:
    """sum over inputs x of |error x|^2."""
    weighed = error if hessian is None else error @ hessian.to(error.dtype)
    return float((weighed * error).sum())


def _eight(groups: Tensor, dtype: torch.dtype) -> Int4Weight:
    """q = 16 high + low with both from -8 to 7, in two planes whose scales differ by 16."""
    n, count, size = groups.shape
    scales = torch.maximum(groups.amax(-1) / 119.0, groups.amin(-1) / -136.0).to(dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    q = (groups / scales.float()[..., None]).round().clamp(-136, 119)
    high = torch.div(q + 8.0, 16.0, rounding_mode="floor")
    codes = torch.cat((high + 8.0, q - 16.0 * high + 8.0), 1).view(n, 2 * count * size).to(torch.uint8)
    both = torch.cat((scales * 16.0, scales), 1)
    return Int4Weight(pack_pairs(codes), both, planes=torch.arange(2, dtype=torch.int32, device=groups.device))


def _range(groups: Tensor, share: float, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group for `share` of its range. The scale is rounded to its dtype first, so that the
    codes fit what is stored; a scale that would vanish becomes 1."""
    if symmetric:
        scales = (2.0 / 15.0) * share * groups.abs().amax(-1)
        zeros = torch.full_like(scales, 8.0)
    else:
        low = share * groups.amin(-1).clamp(max=0.0)
        high = share * groups.amax(-1).clamp(min=0.0)
        scales = (high - low) / 15.0
        zeros = torch.zeros_like(scales)
    scales = scales.to(dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    if not symmetric:
        zeros = (-low / scales.float()).round().clamp(0, 15)
    return scales, zeros.to(dtype)
