"""lut_linear at a layer of Llama 3 8B, 0.45 % sparse, against our own 4-bit product (one group a row) and torch's dense
one."""

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
        # The same weight in both forms: evenly spaced tables, and outliers of 0 (they cost what others do).
        int4 = fastops.int4.quantize(torch.randn(n, k) / k**0.5, -1)
        starts, columns = (torch.arange(n + 1) * count // n).int(), torch.randint(0, k, (count,)).int()
        table = int4.scales * (torch.arange(16) - 8.0)
        weight = fastops.LutWeight(int4.codes, table, starts, columns, torch.zeros(count))
        for each in (weight, int4):
            each.packed()
        return torch.randn(m, k).to(dtype), weight, int4, weight.dequantize(dtype)

    run = {
        "fastops": lambda x: fastops.lut_linear(x[0], x[1]),
        "int4": lambda x: fastops.int4_linear(x[0], x[2]),
        "dense": lambda x: F.linear(x[0], x[3]),
    }
    bytes_ = n * k / 2 + n * 64 + count * 8.0 + size * m * (n + k)
    kind = "memory" if m == 1 else "compute"
    return Case("lut_linear", f"M{m} N{n} K{k}", name, kind, 2.0 * m * n * k, bytes_, make, run, frozenset({"lut"}))
