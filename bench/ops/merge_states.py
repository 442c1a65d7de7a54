"""merge_states of eight partial results, against the same formula in torch."""

from __future__ import annotations

from typing import Any

import torch

import fastops
from fastops.ops.merge_states import reference

from ..case import DTYPES, Case
from ..shapes import Shape

STATES = 8


def cases(shapes: list[Shape], dtypes: list[str]) -> list[Case]:
    out = []
    for s in shapes:
        if s.phase != "prefill":
            continue
        for name in dtypes:
            dtype = DTYPES[name]

            def make(s: Shape = s, dtype: torch.dtype = dtype) -> Any:
                outs = [torch.randn(s.b, s.sq, s.hq, s.d).to(dtype) for _ in range(STATES)]
                return outs, [torch.randn(s.b, s.hq, s.sq) for _ in range(STATES)]

            rows = s.b * s.sq * s.hq
            size = torch.empty(0, dtype=dtype).element_size() * rows * s.d * (STATES + 1.0) + 4.0 * rows * (STATES + 1)
            run = {"fastops": lambda x: fastops.merge_states(*x), "torch": lambda x: reference(*x)}
            label = f"{STATES} states S{s.sq} H{s.hq} D{s.d}"
            out.append(Case("merge_states", label, name, "memory", 2.0 * rows * s.d * STATES, size, make, run))
    return out
