"""What a session with a GPU will run, walked through without one."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_gpu_benchmark_dry_run():
    ran = subprocess.run([sys.executable, ROOT / "bench" / "gpu.py", "--dry-run"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "int4_linear M20" in ran.stdout


def test_gpu_script_is_sound():
    subprocess.run(["bash", "-n", ROOT / "bench" / "gpu_session.sh"], check=True)
