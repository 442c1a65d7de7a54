"""The two ceilings every share is taken of, measured on this machine in this run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class Ceilings:
    """Best square fp32 matmul (flop/s) and best large read (bytes/s) seen so far; measured again between cases."""

    flops: float = 0.0
    bandwidth: float = 0.0
    history: list[tuple[float, float]] = field(default_factory=list)
    _block: torch.Tensor | None = None
    _at: int = 0

    def measure(self, quick: bool = False) -> None:
        """One more round of both; keeps the best."""
        flops = max(_matmul(n) for n in ((1024,) if quick else (1024, 2048, 4096)))
        if self._block is None:
            self._block = torch.ones((64 if quick else 512) * (1 << 20) // 4)
        bandwidth = max(_read(self._block, torch.Tensor.sum), _read(self._block, torch.Tensor.max))
        self.history.append((flops, bandwidth))
        self.flops, self.bandwidth = max(self.flops, flops), max(self.bandwidth, bandwidth)

    def reader(self) -> tuple[Callable[[Any], object], int]:
        """A large read as one more candidate of a memory-bound case, and its bytes: other tenants use the memory, too,
        so the ceiling of a case is what the reads between its own samples reach. Walks through the whole block, by the
        faster of torch's reductions."""
        assert self._block is not None
        parts = self._block.chunk(8)
        by_max = _read(parts[0], torch.Tensor.max) > _read(parts[0], torch.Tensor.sum)

        def read(_: Any) -> object:
            self._at = (self._at + 1) % len(parts)
            part = parts[self._at]
            return part.max() if by_max else part.sum()

        return read, _size(parts[0])

    def copier(self) -> tuple[Callable[[Any], object], int]:
        """A large copy, as `reader`; its bytes are those read and those written."""
        assert self._block is not None
        parts = self._block.chunk(8)
        room = torch.empty_like(parts[0])

        def copy(_: Any) -> object:
            self._at = (self._at + 1) % len(parts)
            return room.copy_(parts[self._at])

        return copy, 2 * _size(room)


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


def _size(block: torch.Tensor) -> int:
    return block.numel() * block.element_size()


def _read(block: torch.Tensor, reduce: Callable[[torch.Tensor], object]) -> float:
    return _size(block) / _best(lambda: reduce(block), 3)
