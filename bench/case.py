"""A benchmark case: one operator at one shape, with every way to run it on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Case:
    """``make()`` builds one set of inputs; ``run`` maps a candidate's name to a function of them.

    ``again(inputs)`` makes another set out of one, where that takes less than ``make()``.

    ``kind`` says which ceiling binds: "compute" (flops against the best fp32 matmul), "memory" (bytes against the best
    large read; inputs rotate so that none is in cache) or "latency" (microseconds per call, hot).
    """

    op: str
    name: str
    dtype: str
    kind: str
    flops: float
    bytes: float
    make: Callable[[], Any]
    run: dict[str, Callable[[Any], Any]]
    tags: frozenset[str] = field(default_factory=frozenset)
    again: Callable[[Any], Any] | None = None

    @property
    def label(self) -> str:
        return f"{self.op} {self.name} {self.dtype}"


BRIEF = 4 << 20  # bytes that take less than a large copy's steady speed lets see


def fused_tags(bytes_: float) -> frozenset[str]:
    """Of an operator that does little more than copy. At 32 rows no call reaches the speed of a large copy, not even a
    copy's: those are held against a copy of as many bytes (the rival "copy")."""
    return frozenset({"fused-brief" if bytes_ < BRIEF else "fused"})
