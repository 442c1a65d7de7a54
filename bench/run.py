"""``fastops bench``: choose cases, time them, print, save, check."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastops

from . import ops, report
from .bars import BARS
from .case import DTYPES, Case
from .ceilings import Ceilings
from .machine import describe
from .protocol import BOUND_BY_MEMORY, NOISE_FLOOR, Ratio, Timing, input_sets, measure, ratio, results_kept
from .shapes import named

ALWAYS = {"attention_paged": ("dense", "bf16")}  # rivals that are measured unasked; "copy" everywhere
MEMORY = "ceiling"  # the candidate that measures the ceiling of a memory-bound case


@dataclass(frozen=True, slots=True)
class Result:
    """What one case measured: timings per candidate, the first one being ours, and the ceiling of its moment."""

    case: Case
    timings: dict[str, Timing]
    ceiling: tuple[float, ...]  # flop/s or bytes/s that bind, one for all rounds or one for each; () for latency cases
    matmul: float = 0.0  # flop/s: a memory-bound case may turn out to be bound by arithmetic while memory is fast

    @property
    def ours(self) -> str:
        return next(iter(self.timings))

    def share(self, name: str) -> float | None:
        """Of the binding ceiling."""
        if self.case.kind == "latency" or not self.ceiling:
            return None
        samples = self.timings[name].samples
        ceiling = self.ceiling if len(self.ceiling) > 1 else self.ceiling * len(samples)
        if self.case.kind == "compute":
            return statistics.median(self.case.flops / t / c for t, c in zip(samples, ceiling, strict=True))
        arithmetic = self.case.flops / self.matmul if self.matmul else 0.0  # seconds at the matmul ceiling
        return statistics.median(
            max(self.case.bytes / c, arithmetic) / t for t, c in zip(samples, ceiling, strict=True)
        )

    def ratios(self) -> dict[str, Ratio]:
        ours = self.timings[self.ours]
        return {n: ratio(ours, t) for n, t in self.timings.items() if n != self.ours}


def candidates(case: Case, impls: list[str], isas: list[str], rivals: list[str]) -> dict[str, Any]:
    """Our implementations first (under their override and instruction set), then the rivals this case has."""
    out: dict[str, Any] = {}
    run = case.run["fastops"]
    for impl in impls or ["auto"]:
        for isa in isas or ["auto"]:
            name = "fastops" if impl == "auto" and isa == "auto" else "/".join(x for x in (impl, isa) if x != "auto")
            out[name] = _forced(run, case.op, impl, isa)
    for rival in rivals:
        if rival in case.run:
            out[rival] = case.run[rival]
    return out


def leave_out_broken(ways: dict[str, Any], rivals: list[str], x: Any) -> None:
    """A rival that cannot run a case (torch.compile fails on some) is named and left out of it."""
    for name in [r for r in rivals if r in ways]:
        try:
            ways[name](x)
        except Exception as error:  # whatever it is, it is theirs
            print(f"\r\x1b[K{name} left out: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            del ways[name]


def _forced(run: Any, op: str, impl: str, isa: str) -> Any:
    if impl == "auto" and isa == "auto":
        return run

    def call(x: Any) -> Any:
        if isa != "auto":
            fastops.set_isa(isa)
        try:
            if impl == "auto":
                return run(x)
            with fastops.override(**{op: impl}):
                return run(x)
        finally:
            if isa != "auto":
                fastops.set_isa(None)

    return call


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="fastops bench",
        description="Times fastops' operators against rivals in one interleaved run, beside measured ceilings.",
        epilog="examples:\n  fastops bench attention --shapes bars --compare torch --check\n"
        "  fastops bench attention --shapes llama3-8b:decode --isa avx2,avx512 --json out.json --plot out.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("op", nargs="*", help=f"operators (default: all of {', '.join(ops.NAMES)})")
    p.add_argument("--shapes", default="quick", help="bars, quick, tiny, a model, or MODEL:phase; commas join")
    p.add_argument("--dtype", default="fp32,bf16,fp16", help="of fp32, bf16, fp16 (default: all)")
    p.add_argument("--only", default="", help='parts of case names, e.g. "M1 ,int8": cases that hold one of them')
    p.add_argument("--impl", default="", help="implementations to force, e.g. cpp,reference (default: automatic)")
    p.add_argument("--isa", default="", help="instruction sets to force, e.g. avx2,avx512 (default: the best)")
    p.add_argument("--compare", default="torch", help="rivals: torch, torch-compile, dense, onnxruntime")
    p.add_argument("--threads", type=int, help="threads for torch and fastops (default: torch's)")
    p.add_argument("--time", type=float, default=3.0, help="seconds per case (default 3)")
    p.add_argument("--json", type=Path, help="write the results here")
    p.add_argument("--plot", type=Path, help="write a PNG: roofline and bars (needs matplotlib)")
    p.add_argument("--check", action="store_true", help="fail when a result falls under its recorded bar")
    p.add_argument("--list", action="store_true", help="print the cases and stop")
    return p


def split(text: str) -> list[str]:
    return [x.strip() for x in text.split(",") if x.strip()]


def choose(args: argparse.Namespace) -> list[Case]:
    for name in args.op:
        if name not in ops.NAMES:
            raise ValueError(f"bench: unknown operator {name!r}; known: {', '.join(ops.NAMES)}")
    dtypes = split(args.dtype)
    for d in dtypes:
        if d not in DTYPES:
            raise ValueError(f"--dtype: unknown {d!r}; known: {', '.join(DTYPES)}")
    known_isas = fastops._ops.control.isa_names() if fastops._ops.control else []
    for isa in split(args.isa):
        if isa not in known_isas:
            raise ValueError(f"--isa: unknown {isa!r}; known: {', '.join(known_isas)}")
    shapes = named(args.shapes)
    cases = [c for name in (args.op or ops.NAMES) for c in ops.cases(name, shapes, dtypes)]
    parts = [part for part in args.only.split(",") if part]
    chosen = [c for c in cases if not parts or any(part in c.label for part in parts)]
    if not chosen:
        raise ValueError(f"--only: no case holds {args.only!r}; --list shows them")
    return chosen


def run_cases(cases: list[Case], args: argparse.Namespace, ceilings: Ceilings) -> list[Result]:
    results = []
    quick = args.shapes == "tiny"
    ceilings.measure(quick)
    with report.progress(len(cases)) as bar:
        for case in cases:
            bar.start(case.label)
            rivals = [r for r in split(args.compare) if r in case.run]
            rivals += [r for r in ALWAYS.get(case.op, ("copy",)) if r in case.run and r not in rivals]
            torch.manual_seed(0)
            inputs = input_sets(case.make, case.bytes, case.kind, case.again)
            ways = candidates(case, split(args.impl), split(args.isa), rivals)
            leave_out_broken(ways, rivals, inputs[0])
            if case.kind in BOUND_BY_MEMORY:
                ways[MEMORY], size = ceilings.reader() if case.kind == "memory" else ceilings.copier()
            with results_kept(case.kind):
                timings = measure(ways, inputs, args.time, bar.share)
            del inputs
            ceilings.measure(quick)
            ceiling: tuple[float, ...] = (ceilings.flops,) if case.kind == "compute" else ()
            if case.kind in BOUND_BY_MEMORY:
                ceiling = tuple(size / t for t in timings.pop(MEMORY).samples)
            results.append(Result(case, timings, ceiling, ceilings.flops))
            bar.done()
    return results


def check(results: list[Result]) -> list[str]:
    """The bars that were missed, as sentences. A miss inside the noise is no miss."""
    misses = []
    twins = {(r.case.op, r.case.name): r for r in results if r.case.dtype == "fp32"}
    for r in results:
        for bar in BARS:
            if bar.tag not in r.case.tags:
                continue
            if bar.measure == "share":
                got = r.share(r.ours) or 0.0
                if got * (1 + r.timings[r.ours].spread) < bar.least:
                    misses.append(f"{r.case.label}: {got:.0%} of the ceiling, the bar is {bar.least:.0%}")
            elif bar.measure == "vs-fp32":
                wide = twins.get((r.case.op, r.case.name))
                if r.case.dtype != "fp32" and wide is not None:
                    found = ratio(r.timings[r.ours], wide.timings[wide.ours])
                    if found.high < bar.least * (1 - NOISE_FLOOR):
                        misses.append(f"{r.case.label}: {found.median:.2f}x of fp32, the bar is {bar.least:g}x")
            elif bar.measure == "microseconds":
                got = r.timings[r.ours].median * 1e6
                if r.timings[r.ours].quantile(0.2) * 1e6 > bar.least:
                    misses.append(f"{r.case.label}: {got:.1f} us a call, the bar is {bar.least:g} us")
            else:
                found = r.ratios().get(bar.measure.removeprefix("vs:"))
                if found is not None and found.high < bar.least:
                    misses.append(
                        f"{r.case.label}: {found.median:.2f}x of {bar.measure[3:]}, the bar is {bar.least:g}x"
                    )
    return misses


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        cases = choose(args)
    except ValueError as error:
        print(f"fastops bench: {error}", file=sys.stderr)
        return 2
    if args.list:
        for c in cases:
            print(f"{c.label}   [{c.kind}]   rivals: {', '.join(n for n in c.run if n != 'fastops')}")
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    ceilings = Ceilings()
    with torch.inference_mode():
        results = run_cases(cases, args, ceilings)
    report.table(results, ceilings)
    if args.json:
        args.json.write_text(json.dumps(report.as_json(results, ceilings, describe()), indent=1) + "\n")
        print(f"results: {args.json}")
    if args.plot:
        from .plot import draw

        draw(results, ceilings, args.plot)
        print(f"plot: {args.plot}")
    if args.check:
        misses = check(results)
        for m in misses:
            print(f"UNDER THE BAR  {m}")
        print("check: " + ("every bar holds" if not misses else f"{len(misses)} missed"))
        return 1 if misses else 0
    return 0
