"""linear_cross_entropy: the loss of a language model's last layer without its logits, block by block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastops import _ops
from fastops.dispatch.record import Call, Implementation
from fastops.dispatch.select import Operator
from fastops.ops import _common as common

NAME = "linear_cross_entropy"
ROWS, CLASSES = 1024, 4096  # of a block of logits: 16 MiB of fp32
REDUCTIONS = ("mean", "sum", "none")


def reference(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    label_smoothing: float = 0.0, softcap: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Plain torch with all logits at once, fp32 (fp64) inside, differentiable."""
    wide = common.wide_of(x.dtype)
    logits = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).flatten(0, -2)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    flat = target.reshape(-1).long()
    losses = F.cross_entropy(logits, flat, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    return _reduce(losses, flat, target.shape, ignore_index, reduction)


def _reduce(losses: Tensor, target: Tensor, shape: torch.Size, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return losses.view(shape)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (target != ignore_index).sum()


# ---- blocks --------------------------------------------------------------------------------------------------------


def _logits(x: Tensor, w: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    out = x @ w.T if bias is None else torch.addmm(bias, x, w.T)
    return out if softcap <= 0 else out.div_(softcap).tanh_().mul_(softcap)


def _kept(x: Tensor, target: Tensor, ignore_index: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(indices of the rows that count, those rows of x in fp32, their targets)."""
    keep = (target != ignore_index).nonzero().squeeze(-1)
    chosen = target[keep].long()
    if chosen.numel() and (int(chosen.min()) < 0 or int(chosen.max()) >= classes):
        raise ValueError(
            f"{NAME}: target has values from {int(chosen.min())} to {int(chosen.max())}, "
            f"allowed: 0 to {classes - 1}, and ignore_index {ignore_index}"
        )
    return keep, x[keep].float(), chosen


def blocked_forward(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    label_smoothing: float = 0.0, softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(losses [T], LSE of each row's logits [T]), fp32, 0 where ignored: an online log-sum-exp over blocks of classes
    (Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, arXiv:2411.09009, section 4.1)."""
    n = weight.shape[0]
    keep, rows, chosen = _kept(x, target, ignore_index, n)
    count = rows.shape[0]
    f32: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    top, total = torch.full((count,), -torch.inf, **f32), torch.zeros(count, **f32)
    picked, summed = torch.zeros(count, **f32), torch.zeros(count, **f32)
    for a in range(0, n, CLASSES):
        w = weight[a : a + CLASSES].float()
        b = None if bias is None else bias[a : a + CLASSES].float()
        for i in range(0, count, ROWS):
            part = slice(i, i + ROWS)
            logits = _logits(rows[part], w, b, softcap)
            here = chosen[part] - a
            inside = (here >= 0) & (here < w.shape[0])
            found = logits.gather(1, here.clamp(0, w.shape[0] - 1)[:, None]).squeeze(1)
            picked[part] = torch.where(inside, found, picked[part])
            if label_smoothing:
                summed[part] += logits.sum(1)
            new = torch.maximum(top[part], logits.amax(1))
            total[part] = total[part] * torch.exp(top[part] - new) + torch.exp_(logits.sub_(new[:, None])).sum(1)
            top[part] = new
    lse = top + torch.log(total)
    losses = lse - (1.0 - label_smoothing) * picked - label_smoothing / n * summed
    out, all_lse = torch.zeros(x.shape[0], **f32), torch.zeros(x.shape[0], **f32)
    out[keep], all_lse[keep] = losses, lse
    return out, all_lse


def blocked_backward(
    grad: Tensor, lse: Tensor, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
    ignore_index: int = -100, label_smoothing: float = 0.0, softcap: float = 0.0, dx: bool = True,
    dweight: bool = True, dbias: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dweight, dbias): each block of logits is computed again and its softmax from the kept LSE (section 4.2
    there, without the filter that drops small gradients)."""
    n = weight.shape[0]
    keep, rows, chosen = _kept(x, target, ignore_index, n)
    g, kept_lse = grad[keep].float(), lse[keep]
    f32: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    into = torch.zeros_like(rows) if dx else None
    to_weight = torch.zeros_like(weight) if dweight else weight.new_empty(0)
    to_bias = torch.zeros(n, **f32) if dbias else torch.empty(0, **f32)
    for a in range(0, n, CLASSES):
        w = weight[a : a + CLASSES].float()
        b = None if bias is None else bias[a : a + CLASSES].float()
        part_w = torch.zeros_like(w) if dweight else None
        for i in range(0, rows.shape[0], ROWS):
            part = slice(i, i + ROWS)
            logits = _logits(rows[part], w, b, softcap)
            slope = 1.0 - (logits / softcap).square() if softcap > 0 else None
            d = torch.exp_(logits.sub_(kept_lse[part, None]))
            if label_smoothing:
                d.sub_(label_smoothing / n)
            here = chosen[part] - a
            at = ((here >= 0) & (here < w.shape[0])).nonzero().squeeze(-1)
            d[at, here[at]] -= 1.0 - label_smoothing
            d.mul_(g[part, None])
            if slope is not None:
                d.mul_(slope)
            if into is not None:
                into[part].addmm_(d, w)
            if part_w is not None:
                part_w.addmm_(d.T, rows[part])
            if dbias:
                to_bias[a : a + CLASSES] += d.sum(0)
        if part_w is not None:
            to_weight[a : a + CLASSES] = part_w.to(weight.dtype)
    out = torch.zeros_like(x) if dx else x.new_empty(0)
    if into is not None:
        out[keep] = into.to(x.dtype)
    return out, to_weight, to_bias


class LinearCrossEntropy(torch.autograd.Function):
    """Losses by row; the backward computes the logits once more."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        losses, lse = _ops.ops.linear_cross_entropy(x, weight, target, bias, **options)
        ctx.save_for_backward(lse, x, weight, target, bias)
        ctx.options = options
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        lse, x, weight, target, bias = ctx.saved_tensors
        wx, ww, _, wb, _ = ctx.needs_input_grad
        dx, dw, db = _ops.ops.linear_cross_entropy_backward(
            grad, lse, x, weight, target, bias, dx=wx, dweight=ww, dbias=wb and bias is not None, **ctx.options
        )
        return (
            dx if wx else None,
            dw if ww else None,
            None,
            db.to(bias.dtype) if wb and bias is not None else None,
            None,
        )


def _blocked(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    label_smoothing: float = 0.0, softcap: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    _check(x, weight, target, bias, label_smoothing, softcap, reduction)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "softcap": softcap}
    flat = target.reshape(-1)
    losses = LinearCrossEntropy.apply(x.reshape(-1, x.shape[-1]), weight, flat, bias, options)
    return _reduce(losses, flat, target.shape, ignore_index, reduction)


def _check(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    softcap: float,
    reduction: str,
) -> None:
    """All that can be said without looking at the targets."""
    common.require_float(NAME, "x", x)
    common.require_float(NAME, "weight", weight, x)
    if x.dim() < 2:
        raise ValueError(f"{NAME}: x has shape {list(x.shape)}, must be [..., T, K]")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"{NAME}: weight has shape {list(weight.shape)}, must be [N, {x.shape[-1]}]")
    common.require_tensor(NAME, "target", target)
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{NAME}: target must be int64 or int32, got {common.name_of(target.dtype)}")
    if target.device != x.device:
        raise TypeError(f"{NAME}: target is on {target.device}, x on {x.device}")
    if target.shape != x.shape[:-1]:
        raise ValueError(f"{NAME}: target has shape {list(target.shape)}, must be {list(x.shape[:-1])}")
    if bias is not None:
        common.require_float(NAME, "bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{NAME}: bias has shape {list(bias.shape)}, must be {[weight.shape[0]]}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{NAME}: label_smoothing is {label_smoothing}, allowed: 0 to 1")
    if not softcap >= 0.0:
        raise ValueError(f"{NAME}: softcap is {softcap}, must be 0 (off) or positive")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{NAME}: reduction is {reduction!r}, allowed: 'mean', 'sum', 'none'")


def _validate(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    label_smoothing: float = 0.0, softcap: float = 0.0, reduction: str = "mean",
) -> None:  # fmt: skip
    _check(x, weight, target, bias, label_smoothing, softcap, reduction)
    if target.device.type != "meta":
        _kept(x.detach().reshape(-1, x.shape[-1])[:, :0], target.reshape(-1), ignore_index, weight.shape[0])


def _describe(x: Tensor, *args: Any, **kwargs: Any) -> Call:
    return Call(x.device.type, x.dtype)


def _torch_why_not(call: Call) -> str | None:
    if call.dtype == torch.float64:
        return "dtype is float64 (takes float32, float16, bfloat16)"
    return None


operator = Operator(
    NAME,
    [
        Implementation("torch", _blocked, _torch_why_not, 10, source="fastops/ops/linear_cross_entropy.py"),
        Implementation("reference", reference, common.always, 0, source="fastops/ops/linear_cross_entropy.py"),
    ],
    _validate,
    _describe,
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy(x @ weight.T + bias, target) without the logits in memory: for large vocabularies.

    Args:
        x: [..., T, K], fp32, fp16 or bf16 (fp64: reference only). weight: [N, K], x's dtype. bias: [N] or None.
        target: int64 or int32 [..., T], each from 0 to N - 1, or ignore_index for rows that do not count.
        label_smoothing, reduction: as in torch.nn.functional.cross_entropy. "mean" divides by the rows that count.
        softcap: > 0: logits become softcap * tanh(logits / softcap) (Gemma 2).

    Returns:
        fp32: a scalar, or [..., T] with reduction="none". Differentiable in x, weight and bias.

    Raises:
        ValueError: shapes, a target outside the classes, options. TypeError: dtypes, devices.

    Numerics: products and sums in fp32 whatever the dtype; gradients are rounded once.
    Cost: the forward's one matrix product, 16 MiB of logits at a time; the backward computes them again, so it costs
    three products where materialised logits cost two. Any device: blocks of torch's own matrix products.
    Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, arXiv:2411.09009, sections 4.1 and 4.2.

    Example:
        >>> import torch, fastops
        >>> fastops.linear_cross_entropy(torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([1, 2]))
        tensor(2.0794)
    """
    common.require_tensor(NAME, "x", x)
    return operator(
        (x.dtype, x.device), x, weight, target, bias, ignore_index=ignore_index, label_smoothing=label_smoothing,
        softcap=softcap, reduction=reduction,
    )  # fmt: skip


@torch.library.register_fake("fastops::linear_cross_entropy")
def _fake(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    label_smoothing: float = 0.0, softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape[:1], dtype=torch.float32), x.new_empty(x.shape[:1], dtype=torch.float32)


@torch.library.register_fake("fastops::linear_cross_entropy_backward")
def _fake_backward(
    grad: Tensor, lse: Tensor, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
    ignore_index: int = -100, label_smoothing: float = 0.0, softcap: float = 0.0, dx: bool = True,
    dweight: bool = True, dbias: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape if dx else (0,)),
        weight.new_empty(weight.shape if dweight else (0,)),
        weight.new_empty(weight.shape[:1] if dbias else (0,), dtype=torch.float32),
    )


_ops.implement_elsewhere("linear_cross_entropy", blocked_forward)
_ops.implement_elsewhere("linear_cross_entropy_backward", blocked_backward)
