"""What this installation is and what this machine can run: ``fastops.info()``, ``fastops info``."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from fastops import _ops
from fastops.errors import NotSupportedError


@dataclass(frozen=True, slots=True)
class Info:
    """Version, build, instruction sets, devices and providers; prints as a table."""

    version: str
    torch: str
    threads: int
    machine: str
    cores: int  # that plans are made for: the machine's, or FASTOPS_CORES's
    build: dict[str, str]
    isas: dict[str, str]  # variant -> "active", "available", "not on this machine" or "not in this build"
    gpus: list[str] = field(default_factory=list)
    providers: dict[str, list[str]] = field(default_factory=dict)
    missing: str | None = None
    cuda: dict[str, str] = field(default_factory=dict)  # the CUDA library and its emulator -> what they hold

    def __str__(self) -> str:
        lines = [f"fastops {self.version}, torch {self.torch}, {self.threads} threads, {self.machine}"]
        if self.cores and self.cores != os.cpu_count():
            lines.append(f"  plans are made for {self.cores} cores")
        if self.missing:
            lines.append(f"  compiled library: {self.missing}")
        lines += [f"  build {k}: {v}" for k, v in self.build.items()]
        lines += [f"  isa {name:<12}{state}" for name, state in self.isas.items()]
        lines.append("  gpus: " + (", ".join(self.gpus) or "none"))
        lines += [f"  {name}: {state}" for name, state in self.cuda.items()]
        lines += [f"  {op}: {', '.join(rows)}" for op, rows in self.providers.items()]
        return "\n".join(lines)

    __repr__ = __str__


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def isas() -> list[str]:
    """The instruction-set variants this build holds and this machine runs, best first (the test twin last)."""
    c = _ops.control
    return [] if c is None else [n for n in c.isa_names() if c.isa_compiled(n) and c.isa_supported(n)]


def info() -> Info:
    """Describes the installation and the machine."""
    from fastops import __version__, _cuda
    from fastops.dispatch.select import operators

    c = _ops.control
    states: dict[str, str] = {}
    for name in c.isa_names() if c else []:
        if not c.isa_compiled(name):
            states[name] = "not in this build"
        elif not c.isa_supported(name):
            states[name] = "not on this machine"
        else:
            states[name] = "active" if name == c.isa_active() else "available"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Info(
        version=__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        machine=f"{cpu_name()} ({os.cpu_count()} cpus)",
        cores=c.cores() if c else 0,
        build=dict(c.build_info()) if c else {},
        isas=states,
        gpus=gpus,
        providers={name: [r.name for r in op.rows] for name, op in operators.items()},
        missing=_ops.missing,
        cuda=_cuda.describe(),
    )


def set_isa(name: str | None) -> None:
    """Forces an instruction-set variant for the whole process; None lifts that.

    Raises:
        ValueError: unknown name. NotSupportedError: this build or machine lacks it, or there is no compiled library.
    """
    if _ops.control is None:
        raise NotSupportedError(f"set_isa: {_ops.missing}")
    try:
        _ops.control.isa_set(name or "auto")
    except NotImplementedError as error:
        raise NotSupportedError(str(error)) from None


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """``with use_isa("avx2"):`` forces a variant inside the block (for the whole process: for tests and timing)."""
    before = _ops.control.isa_active() if _ops.control else None
    set_isa(name)
    try:
        yield
    finally:
        set_isa(before)
