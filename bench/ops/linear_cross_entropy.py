"""linear_cross_entropy, forward and backward, against torch's product and cross entropy with all logits in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import fastops

from ..case import DTYPES, Case
from ..shapes import Shape, rows_of


def cases(shapes: list[Shape], dtypes: list[str]) -> list[Case]:
    layers = [(8, 16, 50)] if rows_of(shapes)[0][1] < 4096 else [(512, 640, 32768)]
    return [case(t, k, n, name) for t, k, n in layers for name in dtypes if name != "fp16"]


def both(loss: Any, x: Any) -> Any:
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [t.detach().clone().requires_grad_() for t in x[:2]]
        return torch.autograd.grad(loss(*leaves, x[2]), leaves)


def dense(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((x @ w.T).float(), target)


def case(t: int, k: int, n: int, name: str) -> Case:
    dtype = DTYPES[name]

    def make() -> Any:
        with torch.inference_mode(False):
            return torch.randn(t, k).to(dtype), torch.randn(n, k).to(dtype) / k**0.5, torch.randint(0, n, (t,))

    run = {
        "fastops": lambda x: both(fastops.linear_cross_entropy, x),
        "torch": lambda x: both(dense, x),
    }
    size = torch.empty(0, dtype=dtype).element_size()
    # The operation is three products; ours takes the first twice. The share counts the useful three.
    return Case(
        "linear_cross_entropy", f"T{t} K{k} N{n}", name, "compute", 6.0 * t * k * n, size * 3.0 * n * k, make, run
    )
