"""A PNG of the results: a roofline, and the speed of every candidate side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ceilings import Ceilings
    from .run import Result


def draw(results: list[Result], ceilings: Ceilings, path: Path) -> None:
    """Writes the picture.

    Raises:
        SystemExit: matplotlib is missing; says how to install it.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit('--plot needs matplotlib:  pip install "fastops[bench]"') from None
    shown = [r for r in results if r.case.kind != "latency"]
    names = list(dict.fromkeys(n for r in shown for n in r.timings))
    colours = dict(zip(names, plt.rcParams["axes.prop_cycle"].by_key()["color"] * 3, strict=False))
    height = max(5.0, 0.28 * sum(len(r.timings) for r in shown))
    figure, (roof, bars) = plt.subplots(1, 2, figsize=(16, height), width_ratios=(1, 1.3))
    intensity = [r.case.flops / r.case.bytes for r in shown] or [1.0]
    x = [min(intensity) / 4, ceilings.flops / ceilings.bandwidth, max(*intensity, 1.0) * 4]
    roof.loglog(x, [min(ceilings.flops, i * ceilings.bandwidth) / 1e9 for i in x], color="black", lw=1)
    for r in shown:
        for n, t in r.timings.items():
            roof.plot(r.case.flops / r.case.bytes, r.case.flops / t.median / 1e9, "o", ms=5, color=colours[n])
    roof.set_xlabel("flops per byte")
    roof.set_ylabel("GFLOP/s")
    roof.set_title("roofline (best fp32 matmul, best read)")
    at, ticks, labels = 0.0, [], []
    for r in shown:
        for n, t in r.timings.items():
            bars.barh(at, r.share(n) or 0.0, color=colours[n], height=0.9)
            bars.text((r.share(n) or 0.0) + 0.01, at, f"{t.median * 1e3:.2f} ms", va="center", fontsize=7)
            ticks.append(at)
            labels.append(r.case.label if n == r.ours else "")
            at += 1
        at += 0.6
    bars.axvline(1.0, color="black", lw=0.8)
    bars.set_yticks(ticks, labels, fontsize=7)
    bars.invert_yaxis()
    bars.set_xlabel("share of the binding ceiling")
    bars.legend(handles=[plt.Rectangle((0, 0), 1, 1, color=colours[n]) for n in names], labels=names, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
