"""The two ceilings every share is taken of, measured on this machine in this run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Ceilings:
    """Best square fp32 matmul (flop/s) and best large read (bytes/s) seen so far; measured again between cases."""

    flops: float = 0.0
    bandwidth: float = 0.0
    history: list[tuple[float, float]] = field(default_factory=list)
    _block: torch.Tensor | None = None

    def measure(self, quick: bool = False) -> None:
        """One more round of both; keeps the best."""
        flops = max(_matmul(n) for n in ((1024,) if quick else (1024, 2048, 4096)))
        if self._block is None:
            self._block = torch.ones((64 if quick else 512) * (1 << 20) // 4)
        bandwidth = _read(self._block)
        self.history.append((flops, bandwidth))
        self.flops, self.bandwidth = max(self.flops, flops), max(self.bandwidth, bandwidth)

    @property
    def recent_bandwidth(self) -> float:
        """The mean of the reads before and after the latest case: other tenants use the memory, too."""
        recent = [b for _, b in self.history[-2:]]
        return sum(recent) / len(recent)


def _best(fn: Callable[[], object], times: int) -> float:
    fn()
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        fn()
        best = min(best, time.perf_counter() - start)
    return best


def _matmul(n: int) -> float:
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    return 2 * n**3 / _best(lambda: torch.mm(a, b, out=out), 5 if n < 4096 else 2)


def _read(block: torch.Tensor) -> float:
    size = block.numel() * block.element_size()
    return max(size / _best(block.sum, 3), size / _best(block.max, 3))
