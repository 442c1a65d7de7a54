"""merge_states: joins attention results over disjoint key sets.

    lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) out_i

The identity behind split-KV decoding, shared prefixes and ring attention (Flash-Decoding; FlashInfer, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastops import _cuda, _ops
from fastops.dispatch.record import Call, Implementation
from fastops.dispatch.select import Operator
from fastops.ops import _common as common


def validate(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    op = "merge_states"
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(f"{op}: got {len(outs)} outs and {len(lses)} lses; need as many of each, at least one")
    first = outs[0]
    for i, (o, l) in enumerate(zip(outs, lses, strict=True)):
        common.require_tensor(op, f"outs[{i}]", o)
        common.require_tensor(op, f"lses[{i}]", l)
        if o.dtype not in common.FLOATS:
            raise TypeError(f"{op}: outs[{i}] is {common.name_of(o.dtype)}, must be floating point")
        if o.dim() not in (3, 4):
            raise ValueError(f"{op}: outs[{i}] must be [B,S,H,D] or [T,H,D], got shape {list(o.shape)}")
        if o.shape != first.shape:
            raise ValueError(f"{op}: outs[{i}] has shape {list(o.shape)}, outs[0] {list(first.shape)}")
        if o.dtype != first.dtype:
            raise TypeError(f"{op}: outs[{i}] is {common.name_of(o.dtype)}, outs[0] {common.name_of(first.dtype)}")
        if o.device != first.device or l.device != first.device:
            raise TypeError(f"{op}: state {i} is not on {first.device} like outs[0]")
        want = [*o.shape[:-3], o.shape[-2], o.shape[-3]]
        if list(l.shape) != want:
            raise ValueError(f"{op}: lses[{i}] has shape {list(l.shape)}, must be {want} (heads before positions)")
        if l.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: lses[{i}] is {common.name_of(l.dtype)}, must be float32")


def describe(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> Call:
    grad = "an input" if common.any_grad(*outs, *lses) else ""
    o = outs[0]
    return Call(o.device.type, o.dtype, 0, o.shape[-1], needs_reference_grad=grad)


def reference(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Plain torch, differentiable."""
    wide = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    sums = torch.stack([l.to(wide) for l in lses])
    top = sums.amax(0)
    top = torch.where(top == float("-inf"), torch.zeros_like(top), top).detach()
    weights = torch.exp(sums - top)
    total = weights.sum(0)
    empty = total == 0
    safe = torch.where(empty, torch.ones_like(total), total)
    share = (weights / safe).transpose(-1, -2)[..., None]
    values = torch.stack([o.to(wide) for o in outs])
    out = torch.where(share == 0, torch.zeros_like(values), share * values).sum(0).to(outs[0].dtype)
    lse = torch.where(empty, torch.full_like(total, float("-inf")), top + torch.log(safe))
    return out, lse.to(wide)


def run_cpp(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return _ops.ops.merge_states(outs, lses)


_direct = _ops.direct("merge_states")

operator = Operator(
    "merge_states",
    [
        Implementation("cpp", run_cpp, common.cpp_why_not, 10, source="csrc/cpu/attention/merge.h"),
        *_cuda.rows(run_cpp),
        Implementation("reference", reference, common.always, 0, source="fastops/ops/merge_states.py"),
    ],
    validate,
    describe,
)


def merge_states(outs: Any, lses: Any) -> tuple[Tensor, Tensor]:
    """Merges n attention states.

    Args:
        outs: a sequence of n >= 1 tensors [B, S, H, D] or [T, H, D], or one tensor with n leading.
        lses: as many, [B, H, S] or [H, T], fp32, natural log (FlashInfer's are base 2: multiply those by ln 2).

    Returns:
        (out, lse) of those shapes. A state whose LSE is -inf counts for nothing, whatever its values; where all are,
        out is 0 and lse -inf.

    Raises:
        ValueError, TypeError: naming the state that does not fit.

    Example:
        >>> import torch, fastops
        >>> q = torch.randn(1, 3, 2, 64); k = torch.randn(1, 10, 2, 64)
        >>> a, la = fastops.attention(q, k[:, :4], k[:, :4], return_lse=True)
        >>> b, lb = fastops.attention(q, k[:, 4:], k[:, 4:], return_lse=True)
        >>> out, lse = fastops.merge_states([a, b], [la, lb])
        >>> torch.allclose(out, fastops.attention(q, k, k), atol=1e-6)
        True
    """
    outs = list(outs)
    lses = list(lses)
    y = None if is_compiling() else _direct(outs, lses)
    if y is not None:
        return y  # type: ignore[no-any-return]
    if not outs:
        validate(outs, lses)
    key = (outs[0].dtype, outs[0].device.type, outs[0].shape[-1] if outs[0].dim() else 0, common.any_grad(*outs, *lses))
    return operator(key, outs, lses)


@torch.library.register_fake("fastops::merge_states")
def _fake(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape, dtype=torch.float32)


_ops.implement_elsewhere("merge_states", reference)
