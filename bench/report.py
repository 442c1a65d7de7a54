"""Results for people (a table, a progress line) and for programs (JSON)."""

from __future__ import annotations

import statistics
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ceilings import Ceilings
    from .run import Result


class progress:
    """One line on stderr: which case, how far. Silent when stderr is no terminal."""

    def __init__(self, total: int) -> None:
        self.total, self.at, self.label = total, 0, ""
        self.shown = sys.stderr.isatty()

    def __enter__(self) -> progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def start(self, label: str) -> None:
        self.label = label
        self.share(0.0)

    def share(self, done: float) -> None:
        if self.shown:
            width = 24
            filled = round(width * (self.at + done) / max(self.total, 1))
            bar = "#" * filled + "." * (width - filled)
            print(f"\r\x1b[K[{bar}] {self.at + 1}/{self.total} {self.label}", end="", file=sys.stderr, flush=True)

    def done(self) -> None:
        self.at += 1


HEAD = ("case", "who", "time", "+-", "GFLOP/s", "GB/s", "ceiling", "against")


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def rows(results: list[Result]) -> list[tuple[str, ...]]:
    out: list[tuple[str, ...]] = []
    for r in results:
        ratios = r.ratios()
        for name, t in r.timings.items():
            share = r.share(name)
            against = (
                "; ".join(f"{v.median:.2f}x {n} ({v.verdict})" for n, v in ratios.items()) if name == r.ours else ""
            )
            out.append((
                r.case.label if name == r.ours else "", name, duration(t.median), f"{t.spread:.0%}",
                f"{r.case.flops / t.median / 1e9:.0f}", f"{r.case.bytes / t.median / 1e9:.1f}",
                "" if share is None else f"{share:.0%}", against,
            ))  # fmt: skip
    return out


def table(results: list[Result], ceilings: Ceilings) -> None:
    """Prints the results; with rich when it is installed."""
    body = rows(results)
    note = (
        f"ceilings measured in this run: {ceilings.flops / 1e9:.0f} GFLOP/s (best square fp32 matmul), "
        f"{ceilings.bandwidth / 1e9:.1f} GB/s (best large read; "
        "a memory case is held against reads between its own samples)"
    )
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(str(r[i])) for r in [HEAD, *body]) for i in range(len(HEAD))]
        for r in [HEAD, *body]:
            print("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip())
    else:
        t = Table(*HEAD, box=None, header_style="bold")
        for r in body:
            t.add_row(*r)
        console = Console(width=None if sys.stdout.isatty() else 200)
        console.print(t)
    print(note)


def as_json(results: list[Result], ceilings: Ceilings, machine: dict[str, Any]) -> dict[str, Any]:
    """The results with everything needed to judge them later."""
    return {
        "machine": machine,
        "ceilings": {"flops": ceilings.flops, "bandwidth": ceilings.bandwidth, "history": ceilings.history},
        "results": [
            {
                "op": r.case.op, "case": r.case.name, "dtype": r.case.dtype, "kind": r.case.kind,
                "flops": r.case.flops, "bytes": r.case.bytes,
                "ceiling": statistics.median(r.ceiling) if r.ceiling else None,
                "candidates": {
                    n: {
                        "median_s": t.median, "p20_s": t.quantile(0.2), "p80_s": t.quantile(0.8),
                        "rounds": len(t.samples), "share": r.share(n),
                    }
                    for n, t in r.timings.items()
                },
                "ratios": {
                    n: {"median": v.median, "low": v.low, "high": v.high, "verdict": v.verdict}
                    for n, v in r.ratios().items()
                },
            }
            for r in results
        ],
    }  # fmt: skip
