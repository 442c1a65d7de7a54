"""rms_norm and fused_add_rms_norm over rows of a model, against torch's operators and torch.compile of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import fastops

from ..case import DTYPES, Case, fused_tags
from ..shapes import Shape, rows_of

EPS = 1e-6


def cases(shapes: list[Shape], dtypes: list[str]) -> list[Case]:
    return [case(m, n, name, fused) for m, n in rows_of(shapes) for name in dtypes for fused in (False, True)]


def norm(x: Any) -> torch.Tensor:
    """Into the tensor ours writes to: a fresh result of this size would be paid for in page faults."""
    y: torch.Tensor = F.rms_norm(x[0], x[0].shape[-1:], x[1], EPS)
    return x[2].copy_(y)


def add_norm(x: Any) -> Any:
    x[3].add_(x[0])
    return x[0].copy_(F.rms_norm(x[3], x[3].shape[-1:], x[1], EPS)), x[3]


def add_norm_anew(x: Any) -> Any:
    """For torch.compile (2.13), which fails on the form in place: new tensors, page faults included."""
    total = x[3] + x[0]
    return F.rms_norm(total, total.shape[-1:], x[1], EPS), total


def case(m: int, n: int, name: str, fused: bool) -> Case:
    dtype = DTYPES[name]
    size = m * n * torch.empty(0, dtype=dtype).element_size()

    def make() -> Any:
        x = torch.randn(m, n).to(dtype)
        return x, torch.rand(n).to(dtype) * 0.01, torch.empty_like(x), torch.zeros_like(x), torch.empty_like(x)

    if fused:
        run = {
            "fastops": lambda x: fastops.fused_add_rms_norm(x[0], x[3], x[1], EPS),
            "torch": add_norm,
            "torch-compile": torch.compile(add_norm_anew, dynamic=False),
            "copy": lambda x: (x[2].copy_(x[0]), x[4].copy_(x[3])),
        }
    else:
        run = {
            "fastops": lambda x: fastops.rms_norm(x[0], x[1], EPS, out=x[2]),
            "torch": norm,
            "torch-compile": torch.compile(norm, dynamic=False),
            "copy": lambda x: x[2].copy_(x[0]),
        }
    op = "fused_add_rms_norm" if fused else "rms_norm"
    bytes_ = (4.0 if fused else 2.0) * size
    return Case(op, f"{m}x{n}", name, "copy", 4.0 * m * n, bytes_, make, run, fused_tags(bytes_))
