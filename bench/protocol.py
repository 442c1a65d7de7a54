"""Timing: all candidates of a case in one interleaved run, and an honest word for the difference.

A sample repeats a call until it lasts about a millisecond; a short one follows an untimed call, so that nobody pays for
what the candidate before left in the caches. Rounds visit the candidates in a rotating order, so drift and neighbours
hit all alike; a ratio is taken per round and judged by an interval of its median (order statistics, about 95 %).
Memory-bound cases rotate over copies of the inputs that together exceed the last-level cache four times.
"""

from __future__ import annotations

import ctypes
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 1e-3
BOUND_BY_MEMORY = ("memory", "copy")
NOISE_FLOOR = 0.03  # ratios closer to 1 than this are never called a difference


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call over the rounds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantile(self, q: float) -> float:
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, max(0, round(q * (len(ordered) - 1))))]

    @property
    def spread(self) -> float:
        """Half the p20..p80 range, as a share of the median."""
        return (self.quantile(0.8) - self.quantile(0.2)) / (2 * self.median)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster the first candidate is than the second, round by round."""

    median: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low > 1 + NOISE_FLOOR:
            return "faster"
        if self.high < 1 - NOISE_FLOOR:
            return "slower"
        return "within noise"


def ratio(ours: Timing, theirs: Timing) -> Ratio:
    """Of paired samples: theirs / ours, with the order-statistic interval of the median."""
    pairs = sorted(t / o for o, t in zip(ours.samples, theirs.samples, strict=False))
    n = len(pairs)
    # Binomial(n, 1/2): ranks n/2 -+ 0.98 sqrt(n) bracket the median with about 95 %; few rounds give the whole range.
    reach = 0.98 * math.sqrt(n)
    low = max(0, math.floor(n / 2 - reach))
    high = min(n - 1, math.ceil(n / 2 + reach) - 1)
    return Ratio(statistics.median(pairs), pairs[low], pairs[high])


def last_level_cache() -> int:
    """Bytes of the largest cache this machine names, or 32 MiB."""
    best = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        best = max(best, int(text.rstrip("KM")) * unit)
    return best or 32 << 20


def copies_for(case_bytes: float, kind: str) -> int:
    """Input sets to rotate over: one when hot, else four caches' worth (at most 2 GiB and 512 sets)."""
    if kind not in BOUND_BY_MEMORY:
        return 1
    want = math.ceil(4 * last_level_cache() / max(case_bytes, 1)) + 1
    return max(2, min(want, 512, int((2 << 30) / max(case_bytes, 1)) or 1))


def memory_left() -> int:
    """Bytes this machine can still give away; where it does not say, more than any case takes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 1 << 50


def input_sets(
    make: Callable[[], Any], case_bytes: float, kind: str, again: Callable[[Any], Any] | None = None
) -> list[Any]:
    """As many input sets as copies_for says, or as half of the memory holds: a set has its rivals' inputs, too, and the
    last-level cache of a server (which a virtual machine may not have to itself) can be half a GiB."""
    least, sets = memory_left() // 2, [make()]
    while len(sets) < copies_for(case_bytes, kind) and (len(sets) < 2 or memory_left() > least):
        sets.append(again(sets[0]) if again else make())
    return sets


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@contextmanager
def results_kept(kind: str) -> Iterator[None]:
    """While what arithmetic binds is timed, glibc keeps the memory that results leave behind. Else it gives up to
    32 MiB of it back and takes it anew with every call, or does not, as the end of the heap happens to lie: for 16 MiB
    that is 4000 page faults, an eighth of the time of attention over 1024 tokens."""
    mallopt = None if kind in BOUND_BY_MEMORY else getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, 32 << 20)  # where glibc's own adaption ends
    mallopt(M_TRIM_THRESHOLD, 1 << 30)
    try:
        yield
    finally:
        mallopt(M_TRIM_THRESHOLD, 64 << 20)
        ctypes.CDLL(None).malloc_trim(0)


def measure(
    candidates: dict[str, Callable[[Any], Any]],
    inputs: list[Any],
    seconds: float,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Timing]:
    """Times every candidate on the same rotating inputs for about `seconds` in all."""
    repeats: dict[str, int] = {}
    once: dict[str, float] = {}
    for name, fn in candidates.items():
        for x in inputs:
            fn(x)  # compiles, allocates, packs
        start = time.perf_counter()
        fn(inputs[-1])
        once[name] = max(time.perf_counter() - start, 1e-7)
        repeats[name] = max(1, min(10_000, round(SAMPLE_SECONDS / once[name])))
    names = list(candidates)
    samples: dict[str, list[float]] = {n: [] for n in names}
    begin, rounds, at = time.perf_counter(), 0, 0
    while True:
        shift = rounds % len(names)
        for name in names[shift:] + names[:shift]:
            fn, count = candidates[name], repeats[name]
            chosen = [inputs[(at + i) % len(inputs)] for i in range(count + 1)]
            at += count + 1
            first = chosen.pop()
            if once[name] < 2 * SAMPLE_SECONDS:
                fn(first)
            start = time.perf_counter()
            for x in chosen:
                fn(x)
            samples[name].append((time.perf_counter() - start) / count)
        rounds += 1
        spent = time.perf_counter() - begin
        progress(min(1.0, spent / seconds))
        if (spent >= seconds and rounds >= 5) or (spent >= 4 * seconds and rounds >= 3):
            return {n: Timing(tuple(s)) for n, s in samples.items()}


def threads_label(threads: int) -> str:
    return f"{threads} of {os.cpu_count()} cpus"
