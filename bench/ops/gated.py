"""silu_and_mul over rows of a model, against torch's operators and torch.compile of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import fastops

from ..case import DTYPES, Case, fused_tags
from ..shapes import Shape, rows_of


def cases(shapes: list[Shape], dtypes: list[str]) -> list[Case]:
    return [case(m, n, name) for m, n in rows_of(shapes) for name in dtypes]


def plain(x: Any) -> torch.Tensor:
    gate, up = x[0].chunk(2, -1)
    return x[1].copy_(F.silu(gate) * up)  # a fresh result of this size would be paid for in page faults


def case(m: int, n: int, name: str) -> Case:
    dtype = DTYPES[name]
    size = m * n * torch.empty(0, dtype=dtype).element_size()

    def make() -> Any:
        x = torch.randn(m, 2 * n).to(dtype)
        copied = x.view(-1)[: m * n * 3 // 2]  # reads and writes as much as the operator
        return x, torch.empty(m, n, dtype=dtype), copied, torch.empty_like(copied)

    run = {
        "fastops": lambda x: fastops.silu_and_mul(x[0], out=x[1]),
        "torch": plain,
        "torch-compile": torch.compile(plain, dynamic=False),
        "copy": lambda x: x[3].copy_(x[2]),
    }
    return Case("silu_and_mul", f"{m}x{n}", name, "copy", 20.0 * m * n, 3.0 * size, make, run, fused_tags(3.0 * size))
