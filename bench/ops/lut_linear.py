"""lut_linear at a layer of Llama 3 8B, 0.45 % sparse, against our own 4-bit product and torch's dense one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import fastops

from ..case import DTYPES, Case
from ..shapes import Shape

SPARSE = 0.0045


def cases(shapes: list[Shape], dtypes: list[str]) -> list[Case]:
    n, k, rows = (64, 128, [1, 8]) if shapes and shapes[0].d == 16 else (4096, 4096, [1, 4, 64])
    return [_case(n, k, m, name) for m in rows for name in dtypes]


def _case(n: int, k: int, m: int, name: str) -> Case:
    dtype = DTYPES[name]
    size = torch.empty(0, dtype=dtype).element_size()
    count = int(n * k * SPARSE)

    def make() -> Any:
        # What the codes are does not matter here; where the outliers lie does: a few in each row.
        w = torch.randn(n, k) / k**0.5
        columns = torch.randint(0, k, (count,)).int()
        starts = (torch.arange(n + 1) * count // n).int()
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
        weight = fastops.LutWeight(codes, torch.randn(n, 16), starts, columns, torch.randn(count))
        int4 = fastops.int4.quantize(w, 128 if k % 128 == 0 else -1)
        for each in (weight, int4):
            each.packed()
        return torch.randn(m, k).to(dtype), weight, int4, w.to(dtype)

    run = {
        "fastops": lambda x: fastops.lut_linear(x[0], x[1]),
        "int4": lambda x: fastops.int4_linear(x[0], x[2]),
        "dense": lambda x: F.linear(x[0], x[3]),
    }
    bytes_ = n * k / 2 + n * 64 + count * 8.0 + size * m * (n + k)
    kind = "memory" if m == 1 else "compute"
    return Case("lut_linear", f"M{m} N{n} K{k}", name, kind, 2.0 * m * n * k, bytes_, make, run, frozenset({"lut"}))
