"""Makes the project's environment: `python3 tools/environment.py EXTRA` (Makefile calls it).

Creates .venv with the tools that build fastops, a torch, fastops itself (editable) and the
optional dependencies EXTRA (demo, test, bench, dev or none). What is up to date is left alone, so a
second run takes a second.

Environment variables:
    FASTOPS_TORCH   the torch to install, default torch==2.13.0. Unless this is set, an interpreter
                    that already has torch >= 2.11 shares it with the environment instead.
    FASTOPS_VENV    where the environment lives, default .venv beside this repository's setup.py.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.request
from contextlib import suppress
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / os.environ.get("FASTOPS_VENV", ".venv")
PYTHON = VENV / "bin" / "python"
TORCH = os.environ.get("FASTOPS_TORCH", "")
DEFAULT_TORCH = "torch==2.13.0"
STAMPS = VENV / "stamps"  # exists once torch is there; one file for each extra that is installed
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def say(text: str) -> None:
    print(f"-- {text}", flush=True)


def run(*command: str | Path) -> None:
    if subprocess.run([str(c) for c in command], cwd=ROOT).returncode != 0:
        sys.exit(f"failed: {' '.join(str(c) for c in command)}")


def need_compiler() -> None:
    if not any(shutil.which(c) for c in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        sys.exit("fastops needs a C++ compiler: install g++ >= 12 (Debian: apt install g++) or set CXX")


def torch_here() -> metadata.Distribution | None:
    """The running interpreter's torch, if it is new enough and FASTOPS_TORCH asks for no other."""
    if TORCH:
        return None
    try:
        torch = metadata.distribution("torch")
    except metadata.PackageNotFoundError:
        return None
    major, minor = (int(part) for part in torch.version.split(".")[:2])
    return torch if (major, minor) >= (2, 11) else None


def share(torch: metadata.Distribution) -> None:
    """Links torch and what it requires into the environment: nothing else of its interpreter."""
    folder = VENV / "shared"
    folder.mkdir()
    waiting, seen = [torch], set()
    while waiting:
        package = waiting.pop()
        if package.name in seen:
            continue
        seen.add(package.name)
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(package.locate_file(top))).resolve())
        for requirement in package.requires or []:
            if "extra ==" in requirement:
                continue
            name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
            with suppress(metadata.PackageNotFoundError):  # one for another platform
                waiting.append(metadata.distribution(name))
    # A path line comes after the environment's own packages, which therefore win.
    for site in VENV.glob("lib/python*/site-packages"):
        (site / "shared.pth").write_text(f"{folder}\n")


def torch_arguments() -> list[str]:
    """Without an NVIDIA GPU prefers the CPU build: PyPI's for Linux brings gigabytes of CUDA."""
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
        say(f"sharing torch {shared.version} of {sys.executable}")
        share(shared)
    STAMPS.mkdir()


def build_tools() -> list[str]:
    import tomllib  # not at the top: Python 3.10 lacks it, and must reach the message in main()

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]


def main(extra: str) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - checked at run time: this is what a newcomer meets first
        sys.exit(f"fastops needs Python 3.11 or later, this is {sys.version.split()[0]}: make PYTHON=...")
    need_compiler()
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "setup.py", "tools/environment.py"):
        digest.update((ROOT / name).read_bytes())
    stamp = STAMPS / f"{extra or 'base'}-{digest.hexdigest()[:16]}"
    if not PYTHON.exists() or not STAMPS.exists():
        create()
    if not stamp.exists():
        say(f"installing fastops[{extra}]: compiles the kernels, takes minutes the first time")
        run(PYTHON, "-m", "pip", "install", "-q", *build_tools())
        target = f".[{extra}]" if extra else "."
        run(PYTHON, "-m", "pip", "install", "-q", "--no-build-isolation", "-e", target)
        stamp.touch()
    else:  # the Python side is editable; only the compiled libraries can be out of date
        run(PYTHON, "setup.py", "-q", "build_ext", "--inplace")


if __name__ == "__main__":
    if len(sys.argv) > 2 or (len(sys.argv) == 2 and sys.argv[1].startswith("-")):
        sys.exit(__doc__)
    main(sys.argv[1] if len(sys.argv) == 2 else "")
