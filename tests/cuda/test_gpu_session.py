"""What a session with a GPU will run, walked through without one."""

import os
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


def test_gpu_script_is_sound():
    subprocess.run(["bash", "-n", ROOT / "bench" / "gpu_session.sh"], check=True)
