"""Makes the project's environment: `python3 tools/environment.py EXTRA` (Makefile calls it).

Creates .venv with the tools that build fastops, a torch, fastops itself (editable) and the optional dependencies EXTRA
(demo, test, bench, dev or none). What is up to date is left alone, so a second run takes a second.

Environment variables:
    FASTOPS_TORCH   requirement of the torch to install, default torch==2.13.0. Not used where the interpreter that runs
                    this already has torch >= 2.11: that one is shared instead of downloaded again.
    FASTOPS_VENV    where the environment lives, default .venv beside this repository's setup.py.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import urllib.request
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / os.environ.get("FASTOPS_VENV", ".venv")
PYTHON = VENV / "bin" / "python"
TORCH = os.environ.get("FASTOPS_TORCH", "")
DEFAULT_TORCH = "torch==2.13.0"
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def say(text: str) -> None:
    print(f"-- {text}", flush=True)


def run(*command: str | Path) -> None:
    if subprocess.run([str(c) for c in command], cwd=ROOT).returncode != 0:
        sys.exit(f"failed: {' '.join(str(c) for c in command)}")


def need_compiler() -> None:
    if not any(shutil.which(c) for c in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        sys.exit("fastops needs a C++ compiler to build: install g++ >= 12 (Debian: apt install g++) or set CXX")


def torch_here() -> Path | None:
    """The folder of the running interpreter's torch, if it is new enough and FASTOPS_TORCH asks for no other."""
    if TORCH:
        return None
    try:
        torch = metadata.distribution("torch")
    except metadata.PackageNotFoundError:
        return None
    major, minor = (int(part) for part in torch.version.split(".")[:2])
    return Path(str(torch.locate_file(""))).resolve() if (major, minor) >= (2, 11) else None


def torch_arguments() -> list[str]:
    """Without an NVIDIA GPU, prefer torch's CPU build: PyPI's Linux x86-64 wheel pulls gigabytes of CUDA libraries."""
    arguments = [TORCH or DEFAULT_TORCH]
    gpu = shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists()
    if not gpu and sys.platform == "linux" and platform.machine() == "x86_64":
        try:
            urllib.request.urlopen(CPU_TORCH_INDEX + "/torch/", timeout=5).close()
            arguments += ["--extra-index-url", CPU_TORCH_INDEX]
        except OSError:
            say(f"{CPU_TORCH_INDEX} is out of reach: taking torch from pip's own index")
    return arguments


def create() -> None:
    say(f"creating {VENV}")
    run(sys.executable, "-m", "venv", "--clear", VENV)
    shared = torch_here()
    if shared is None:
        say(f"installing {TORCH or DEFAULT_TORCH}")
        run(PYTHON, "-m", "pip", "install", "-q", *torch_arguments())
    else:
        # Not --system-site-packages: that would reach past an activated environment to the interpreter behind it.
        # A plain path line comes after the environment's own packages, which therefore win.
        say(f"sharing torch {metadata.version('torch')} from {shared}")
        for site in VENV.glob("lib*/python*/site-packages"):
            (site / "shared-torch.pth").write_text(f"{shared}\n")


def build_tools() -> list[str]:
    import tomllib  # not at the top: Python 3.10 lacks it, and must reach the message in main()

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]


def main(extra: str) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - a plain message instead of a SyntaxError further on
        sys.exit(f"fastops needs Python 3.11 or later, this is {platform.python_version()}: make PYTHON=python3.11 ...")
    need_compiler()
    stamps = VENV / "stamps"
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "setup.py", "tools/environment.py"):
        digest.update((ROOT / name).read_bytes())
    stamp = stamps / f"{extra or 'base'}-{digest.hexdigest()[:16]}"
    if not PYTHON.exists() or not stamps.exists():
        create()
    if not stamp.exists():
        say(f"installing fastops[{extra}]: compiles the kernels, takes minutes the first time")
        run(PYTHON, "-m", "pip", "install", "-q", *build_tools())
        target = f".[{extra}]" if extra else "."
        run(PYTHON, "-m", "pip", "install", "-q", "--no-build-isolation", "-e", target)
        stamps.mkdir(exist_ok=True)
        stamp.touch()
    else:  # the Python side is editable; only the compiled libraries can be out of date
        run(PYTHON, "setup.py", "-q", "build_ext", "--inplace")


if __name__ == "__main__":
    if len(sys.argv) > 2 or (len(sys.argv) == 2 and sys.argv[1].startswith("-")):
        sys.exit(__doc__)
    main(sys.argv[1] if len(sys.argv) == 2 else "")
