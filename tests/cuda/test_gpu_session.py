"""What a session with a GPU will run, walked through without one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("arch", ["80", "90"])
def test_gpu_benchmark_dry_run(arch):
    ran = subprocess.run(
        [sys.executable, ROOT / "bench" / "gpu.py", "--dry-run"], capture_output=True, text=True,
        env={**os.environ, "FASTOPS_EMULATOR_ARCH": arch},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "int4_linear M20" in ran.stdout
    assert "forward and backward" in ran.stdout


STUB = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in
  *get_device_capability*) echo 90a ;;
  *get_device_name*) echo nvidia-h200 ;;
  *$FAILS*) exit 3 ;;
esac
"""


@pytest.mark.parametrize("fails", ["no step", "pytest tests/cuda", "--tool racecheck"])
def test_gpu_script(tmp_path, fails):
    """The script with every program it starts replaced by one that notes the call: all steps run, whatever fails."""
    for name in ("python", "pip", "compute-sanitizer"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    ran = subprocess.run(
        ["bash", ROOT / "bench" / "gpu_session.sh", tmp_path / "out"], capture_output=True, text=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "FAILS": fails},
    )  # fmt: skip
    lines = calls.read_text().splitlines()
    steps = [
        "pip install --no-build-isolation", "python -m fastops info", "python tools/instructions.py --gpu",
        "python -m pytest tests/cuda", "compute-sanitizer --tool memcheck", "compute-sanitizer --tool racecheck",
        "python bench/gpu.py --json",
    ]  # fmt: skip
    at = [next(i for i, line in enumerate(lines) if line.startswith(step)) for step in steps]
    assert at == sorted(at)
    assert lines[at[-1]].endswith("-nvidia-h200.json")
    wrong = fails != "no step"
    assert ran.returncode == (1 if wrong else 0), ran.stdout + ran.stderr
    assert ("failed: " in ran.stdout) == wrong


def test_the_steps_fit_into_ten_minutes():
    script = (ROOT / "bench" / "gpu_session.sh").read_text()
    limits = [int(n) for n in re.findall(r"^ *step \S+ (\d+) ", script, re.MULTILINE)]
    assert len(limits) == 4
    assert (
        sum(limits) + limits[2] <= 590
    )  # the sanitizer runs twice, and the build takes what is left; step() sees to it
