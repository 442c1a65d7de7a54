"""scale_add (the skeleton operator) against torch.add, 64 MiB of each input."""

from __future__ import annotations

from typing import Any

import torch

import fastops

from ..case import DTYPES, Case
from ..shapes import Shape


def cases(shapes: list[Shape], dtypes: list[str]) -> list[Case]:
    out = []
    for name in dtypes:
        dtype = DTYPES[name]
        size = torch.empty(0, dtype=dtype).element_size()
        n = (1 << 12 if shapes and shapes[0].d == 16 else 64 << 20) // size

        def make(n: int = n, dtype: torch.dtype = dtype) -> Any:
            return torch.randn(n).to(dtype), torch.randn(n).to(dtype)

        run = {
            "fastops": lambda x: fastops.scale_add(*x, alpha=0.5),
            "torch": lambda x: torch.add(x[1], x[0], alpha=0.5),
        }
        out.append(Case("scale_add", f"{n} elements", name, "memory", 2.0 * n, 3.0 * n * size, make, run))
    return out
