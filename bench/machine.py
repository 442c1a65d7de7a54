"""What a result must say about where it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import fastops
from fastops.info import cpu_name


def commit() -> str:
    """The source tree's commit, with "+" when it has local changes; "unknown" outside a checkout."""
    try:
        root = Path(__file__).resolve().parent.parent
        run = {"cwd": root, "capture_output": True, "text": True, "check": True}
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run).stdout.strip()  # type: ignore[call-overload]
        dirty = subprocess.run(["git", "status", "--porcelain"], **run).stdout.strip()  # type: ignore[call-overload]
        return head + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe() -> dict[str, Any]:
    """Machine, threads, versions, instruction set, commit, date."""
    c = fastops._ops.control
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": c.isa_active() if c else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastops": fastops.__version__,
        "build": dict(c.build_info()) if c else {},
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
