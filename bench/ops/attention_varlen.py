"""attention_varlen: a ragged batch, against the padded batch torch would run."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import fastops

from ..case import DTYPES, Case
from ..shapes import Shape


def cases(shapes: list[Shape], dtypes: list[str]) -> list[Case]:
    return [_case(s, n) for s in shapes if s.phase == "prefill" for n in dtypes]


def _case(s: Shape, name: str) -> Case:
    dtype = DTYPES[name]
    lens = [s.sq, s.sq // 2, s.sq // 4, max(1, s.sq // 8)]
    total, pad = sum(lens), s.sq
    cu = torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    mask = torch.arange(pad)[None, :] < torch.tensor(lens)[:, None]
    full = (mask[:, None, None, :] & torch.ones(pad, pad, dtype=torch.bool).tril()).contiguous()

    def make() -> Any:
        ours = [torch.randn(total, h, s.d).to(dtype) for h in (s.hq, s.hkv, s.hkv)]
        padded = [torch.zeros(4, pad, h, s.d, dtype=dtype) for h in (s.hq, s.hkv, s.hkv)]
        for p, t in zip(padded, ours, strict=True):
            p[mask] = t
        return (*ours, *(p.transpose(1, 2).contiguous() for p in padded))

    run = {
        "fastops": lambda x: fastops.attention_varlen(*x[:3], cu, cu, causal=True),
        "torch": lambda x: F.scaled_dot_product_attention(*x[3:], full, enable_gqa=True),
    }
    flops = 4.0 * s.hq * s.d * sum(n * (n + 1) / 2 for n in lens)
    size = torch.empty(0, dtype=dtype).element_size() * total * s.d * (2.0 * s.hq + 2.0 * s.hkv)
    return Case("attention_varlen", f"4 sequences of {s.name}", name, "compute", flops, size, make, run)
