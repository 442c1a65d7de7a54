"""attention against torch's scaled_dot_product_attention on the same numbers, each in its own native layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import fastops

from ..case import DTYPES, Case
from ..shapes import Shape


def visible_pairs(s: Shape) -> float:
    """(query, key) pairs a causal, bottom-right aligned call sees."""
    total = 0
    for i in range(s.sq):
        p = i + s.sk - s.sq
        left = 0 if s.window < 0 else max(0, p - s.window + 1)
        total += max(0, p + 1 - left)
    return float(total)


def work(s: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """flops and bytes of a call: two multiply-adds per pair and head-size element; q, k, v and out once."""
    size = torch.empty(0, dtype=dtype).element_size()
    flops = 4.0 * s.b * s.hq * s.d * visible_pairs(s)
    return flops, size * s.b * s.d * (2.0 * s.sk * s.hkv + 2.0 * s.sq * s.hq)


def tensors(s: Shape, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, v as [B, S, H, D], then the same numbers as torch holds them, contiguous [B, H, S, D]."""
    ours = [torch.randn(s.b, n, h, s.d).to(dtype) for n, h in ((s.sq, s.hq), (s.sk, s.hkv), (s.sk, s.hkv))]
    return (*ours, *(t.transpose(1, 2).contiguous() for t in ours))


def window(s: Shape) -> tuple[int, int]:
    return (-1, -1) if s.window < 0 else (s.window - 1, 0)


def torch_sdpa(s: Shape) -> Any:
    """torch's best for the shape: is_causal where that means the same, else (decode) no mask, else an explicit one."""
    if s.window < 0 and s.sq == s.sk:
        return lambda x: F.scaled_dot_product_attention(*x[3:6], is_causal=True, enable_gqa=True)
    if s.window < 0 and s.sq == 1:
        return lambda x: F.scaled_dot_product_attention(*x[3:6], enable_gqa=True)
    p = torch.arange(s.sq)[:, None] + s.sk - s.sq
    j = torch.arange(s.sk)[None]
    mask = (j <= p) & (j > p - (s.window if s.window >= 0 else s.sk + 1))
    return lambda x: F.scaled_dot_product_attention(*x[3:6], mask, enable_gqa=True)


KINDS = {"prefill": "compute", "mixed": "compute", "call": "latency"}


def cases(shapes: list[Shape], dtypes: list[str]) -> list[Case]:
    out = []
    for s in shapes:
        for name in ["fp32"] if s.phase == "call" else dtypes:
            dtype = DTYPES[name]
            flops, size = work(s, dtype)
            kind = KINDS.get(s.phase, "memory")
            sdpa = torch_sdpa(s)
            kw = {"causal": s.sq > 1, "window": window(s)}
            run = {
                "fastops": lambda x, kw=kw: fastops.attention(*x[:3], **kw),
                "torch": sdpa,
                "torch-compile": torch.compile(sdpa, dynamic=False),
            }
            out.append(
                Case("attention", s.name, name, kind, flops, size, lambda s=s, d=dtype: tensors(s, d), run,
                     frozenset({f"attention-{s.phase}"}))
            )  # fmt: skip
    return out
