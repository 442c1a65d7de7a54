"""attention_paged decode against fastops' own dense decode, and torch after gathering the pages.

Pages in order, as a fresh cache hands them out, and shuffled, as they end up after hours of serving: a plain read of
16 KiB pieces in random order is a third slower than a linear one on some machines (docs/design/003-cpu-attention.md).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

import fastops
from fastops import _ops, kv

from ..case import DTYPES, Case
from ..shapes import BARS, Shape
from .attention import work

PAGE = 16
FORMATS = ("int8", "fp8", "kv4", "kivi2")


def cases(shapes: list[Shape], dtypes: list[str]) -> list[Case]:
    some = [s for s in shapes if s.phase == "decode" and s.sk % PAGE == 0]
    plain = [_case(s, n, shuffled) for s in some for n in dtypes for shuffled in (False, True)]
    long = [replace(s, sk=8192) if s in BARS and s.d == 128 else s for s in some]
    return plain + [_quantised(s, name) for s in long if "bf16" in dtypes and s.d % 32 == 0 for name in FORMATS]


def _case(s: Shape, name: str, shuffled: bool) -> Case:
    dtype = DTYPES[name]
    flops, size = work(s, dtype)
    pages = s.sk // PAGE
    lens = torch.full((s.b,), s.sk, dtype=torch.int32)

    def make() -> Any:
        q = torch.randn(s.b, s.hq, s.d).to(dtype)
        dense = [torch.randn(s.b, s.sk, s.hkv, s.d).to(dtype) for _ in range(2)]
        order = torch.randperm(s.b * pages) if shuffled else torch.arange(s.b * pages)
        table = order.int().view(s.b, pages)
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
    label = f"{s.name} page {PAGE}" + (" shuffled" if shuffled else "")
    tag = "paged-decode-shuffled" if shuffled else "paged-decode"
    return Case("attention_paged", label, name, "memory", flops, size, make, run, frozenset({tag}))


def _quantised(s: Shape, name: str) -> Case:
    """A quantised cache against our own decode of the same keys in bf16, in memory of the same kind (large pages)."""
    page = 32  # KIVI's groups
    pages = s.sk // page
    flops, size = work(s, torch.bfloat16)
    lens = torch.full((s.b,), s.sk, dtype=torch.int32)
    table = torch.arange(s.b * pages, dtype=torch.int32).view(s.b, pages)

    def make() -> Any:
        q = torch.randn(s.b, s.hq, s.d).bfloat16()
        empty = [torch.empty(s.b * pages, page, s.hkv, s.d, dtype=torch.bfloat16) for _ in range(2)]
        plain = [_ops.lasting(t).copy_(torch.randn(t.shape)) for t in empty]
        cache = kv.PagedCache(name, s.b * pages, page, s.hkv, s.d, batch=s.b, recent=32)
        fresh = torch.zeros(s.b, dtype=torch.int32)
        kv.append(cache, *(t.view(s.b * s.sk, s.hkv, s.d) for t in plain), table, fresh)
        return q, *plain, cache

    def quantised(x: Any) -> Any:
        return fastops.attention_paged(x[0], x[3].k, x[3].v, table, lens, quant=x[3].quant)

    run = {"fastops": quantised, "bf16": lambda x: fastops.attention_paged(*x[:3], table, lens)}
    sides = (kv.FORMATS[name].k, kv.FORMATS[name].v)
    share = sum(side.bits for side in sides) / 32  # of the bf16 cache's bytes; the scales add some
    label = f"{replace(s, phase='decode').name} {name}"
    tags = frozenset({f"kv-{name}"}) if s.sk >= 8192 else frozenset()  # what the bar is for
    return Case("attention_paged", label, "bf16", "memory", flops, size * share, make, run, tags)
