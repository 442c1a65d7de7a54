"""Error compensation with calibration data: Frantar et al., GPTQ, arXiv:2210.17323, section 3 and Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 128  # columns whose updates are gathered before the others get them (section 3.3, step 2)
DAMPING = 0.01  # of the mean of the Hessian's diagonal (section 3.3, step 3)
BUDGET = 2 << 30  # bytes of Hessians held at once


def compensate(
    groups: Tensor, hessian: Tensor, grid: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns rounded from left to right, each one's error spread over those still to come.

    Args:
        groups: [N, G, size], the weight. hessian: [K, K], the sum over inputs of x x^T.
        grid: (scales, zeros) [N, 1] of one group [N, 1, size], chosen when the group is reached.

    Returns:
        codes [N, G, size] (0 to 15), scales [N, G], zeros [N, G].
    """
    n, count, size = groups.shape
    k = count * size
    w = groups.reshape(n, k).clone()
    h = hessian.to(w.dtype).clone()
    dead = h.diagonal() == 0  # inputs that were always 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h.double()))
    upper = torch.linalg.cholesky(inverse, upper=True).to(w.dtype)
    codes = torch.empty_like(w)
    all_scales, all_zeros = [], []
    scale = zero = torch.empty(0)
    for a in range(0, k, BLOCK):
        b = min(a + BLOCK, k)
        block, errors = w[:, a:b].clone(), torch.empty(n, b - a)
        for i in range(a, b):
            if i % size == 0:
                # Columns of the group behind this block still lack the block's own updates: give them those first.
                group = w[:, i : i + size].clone()
                inside = min(i + size, b)
                group[:, : inside - i] = block[:, i - a : inside - a]
                if inside < i + size and i > a:
                    group[:, inside - i :] -= errors[:, : i - a] @ upper[a:i, inside : i + size]
                scales, zeros = grid(group[:, None])
                all_scales.append(scales)
                all_zeros.append(zeros)
                scale, zero = scales[:, 0].float(), zeros[:, 0].float()
            column = block[:, i - a]
            code = (column / scale + zero).round().clamp_(0, 15)
            codes[:, i] = code
            errors[:, i - a] = (column - (code - zero) * scale) / upper[i, i]
            block[:, i - a + 1 :] -= errors[:, i - a, None] * upper[i, i + 1 : b]
        w[:, b:] -= errors @ upper[a:b, b:]
    return codes.view(n, count, size), torch.cat(all_scales, 1), torch.cat(all_zeros, 1)


def gram(x: Tensor) -> Tensor:
    """The sum of x x^T over rows [..., K], in fp32."""
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    return rows.T @ rows


def run_model(model: nn.Module, batch: Any) -> None:
    """One calibration batch: a tensor or tuple (positional arguments), or a dict (keyword arguments)."""
    if isinstance(batch, dict):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def in_turns(linears: list[tuple[str, nn.Linear]]) -> Iterable[list[tuple[str, nn.Linear]]]:
    """Layers in the model's order, as many at a time as their Hessians fit the budget."""
    turn: list[tuple[str, nn.Linear]] = []
    held = 0
    for name, linear in linears:
        need = 4 * linear.in_features**2
        if turn and held + need > BUDGET:
            yield turn
            turn, held = [], 0
        turn.append((name, linear))
        held += need
    if turn:
        yield turn


def collect(model: nn.Module, linears: list[tuple[str, nn.Linear]], calibration: list[Any]) -> dict[str, Tensor]:
    """The Hessian of each layer's inputs over the calibration batches."""
    found: dict[str, Tensor] = {}
    hooks = []
    for name, linear in linears:

        def take(module: nn.Module, args: Any, name: str = name) -> None:
            update = gram(args[0])
            found[name] = found[name].add_(update) if name in found else update

        hooks.append(linear.register_forward_pre_hook(take))
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            for batch in calibration:
                run_model(model, batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found
