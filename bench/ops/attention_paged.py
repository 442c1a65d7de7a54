"""attention_paged decode: shuffled pages against fastops' own dense decode, and torch after gathering the pages."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import fastops

from ..case import DTYPES, Case
from ..shapes import Shape
from .attention import work

PAGE = 16


def cases(shapes: list[Shape], dtypes: list[str]) -> list[Case]:
    return [_case(s, n) for s in shapes if s.phase == "decode" and s.sk % PAGE == 0 for n in dtypes]


def _case(s: Shape, name: str) -> Case:
    dtype = DTYPES[name]
    flops, size = work(s, dtype)
    pages = s.sk // PAGE
    lens = torch.full((s.b,), s.sk, dtype=torch.int32)

    def make() -> Any:
        q = torch.randn(s.b, s.hq, s.d).to(dtype)
        dense = [torch.randn(s.b, s.sk, s.hkv, s.d).to(dtype) for _ in range(2)]
        table = torch.randperm(s.b * pages).int().view(s.b, pages)
        caches = []
        for t in dense:
            cache = torch.empty(s.b * pages, PAGE, s.hkv, s.d, dtype=dtype)
            cache[table.flatten().long()] = t.view(-1, PAGE, s.hkv, s.d)
            caches.append(cache)
        return q, *caches, table, *dense

    def gathered(x: Any) -> Any:
        q, k, v, table = x[:4]
        index = table.flatten().long()
        k, v = (t[index].view(s.b, s.sk, s.hkv, s.d).transpose(1, 2) for t in (k, v))
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

    run = {
        "fastops": lambda x: fastops.attention_paged(*x[:4], lens),
        "dense": lambda x: fastops.attention(x[0][:, None], x[4], x[5]),
        "torch": gathered,
    }
    return Case(
        "attention_paged", f"{s.name} page {PAGE}", name, "memory", flops, size, make, run, frozenset({"paged-decode"})
    )
