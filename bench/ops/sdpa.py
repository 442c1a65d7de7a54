"""scaled_dot_product_attention against torch's, on the same tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import fastops

from ..case import DTYPES, Case
from ..shapes import Shape
from .attention import work


def cases(shapes: list[Shape], dtypes: list[str]) -> list[Case]:
    out = []
    for s in shapes:
        if s.sq not in (1, s.sk) or s.phase == "call":
            continue
        for name in dtypes:
            flops, size = work(Shape(s.b, s.sq, s.sk, s.hq, s.hkv, s.d, s.phase), DTYPES[name])

            def make(s: Shape = s, dtype: torch.dtype = DTYPES[name]) -> Any:
                heads = ((s.sq, s.hq), (s.sk, s.hkv), (s.sk, s.hkv))
                return tuple(torch.randn(s.b, h, n, s.d).to(dtype) for n, h in heads)

            causal = s.sq > 1
            run = {
                "fastops": lambda x, c=causal: fastops.scaled_dot_product_attention(*x, is_causal=c, enable_gqa=True),
                "torch": lambda x, c=causal: F.scaled_dot_product_attention(*x, is_causal=c, enable_gqa=True),
            }
            kind = "memory" if s.phase == "decode" else "compute"
            out.append(Case("scaled_dot_product_attention", s.name, name, kind, flops, size, make, run))
    return out
