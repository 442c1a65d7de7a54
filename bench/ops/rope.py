"""apply_rope and qk_norm_rope over the heads of a model (32 of q, 8 of k, 128 wide), against the same in torch's
operators, as transformers writes it, and torch.compile of that."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import fastops

from ..case import DTYPES, Case, fused_tags
from ..shapes import Shape, rows_of

HQ, HKV, D = 32, 8, 128


def cases(shapes: list[Shape], dtypes: list[str]) -> list[Case]:
    tokens = [m for m, _ in rows_of(shapes)]
    return [case(m, name, norm) for m in tokens for name in dtypes for norm in (False, True)]


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]


def rope(x: Any) -> Any:
    return x[7][0].copy_(turned(x[0], x[5], x[6])), x[7][1].copy_(turned(x[1], x[5], x[6]))


def norm_rope(x: Any) -> Any:
    q, k = F.rms_norm(x[0], (D,), x[2], 1e-6), F.rms_norm(x[1], (D,), x[2], 1e-6)
    return x[7][0].copy_(turned(q, x[5], x[6])), x[7][1].copy_(turned(k, x[5], x[6]))


def case(m: int, name: str, norm: bool) -> Case:
    dtype = DTYPES[name]
    size = m * (HQ + HKV) * D * torch.empty(0, dtype=dtype).element_size()

    def make() -> Any:
        q, k = torch.randn(m, HQ, D).to(dtype), torch.randn(m, HKV, D).to(dtype)
        angle = torch.arange(m)[:, None] * 10000.0 ** -(torch.arange(D // 2) / (D // 2))
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        out = torch.empty_like(q), torch.empty_like(k)
        return q, k, torch.ones(D).to(dtype), cos, sin, cos.repeat(1, 2), sin.repeat(1, 2), out

    plain = norm_rope if norm else rope

    def ours(x: Any) -> Any:
        if norm:
            return fastops.qk_norm_rope(x[0], x[1], x[2], x[2], x[3], x[4], out=x[7])
        return fastops.apply_rope(x[0], x[1], x[3], x[4], out=x[7])

    run = {
        "fastops": ours,
        "torch": plain,
        "torch-compile": torch.compile(plain, dynamic=False),
        "copy": lambda x: (x[7][0].copy_(x[0]), x[7][1].copy_(x[1])),
    }
    op = "qk_norm_rope" if norm else "apply_rope"
    tags = fused_tags(2.0 * size) if norm else frozenset()
    return Case(op, f"{m} tokens H{HQ}/{HKV} D{D}", name, "copy", 8.0 * m * (HQ + HKV) * D, 2.0 * size, make, run, tags)
