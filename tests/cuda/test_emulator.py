"""The emulator that runs CUDA kernels on the CPU: instructions against the PTX ISA, wrong programs caught."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
NAMES = (
    "cluster", "columns64", "cp_async", "fence", "ldmatrix", "mma", "mma_bytes", "named", "polynomial", "races", "shuffle", "stmatrix", "swizzle", "tma", "wgmma", "wrong",
)  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    out = tmp_path_factory.mktemp("emulator") / "emulator_test"
    csrc = ROOT / "csrc"
    sources = [
        Path(__file__).with_name("emulator_test.cpp"), csrc / "cuda/emulator/block.cpp",
        csrc / "cuda/emulator/async.cpp", csrc / "cuda/emulator/fiber.cpp", csrc / "core/status.cpp",
    ]  # fmt: skip
    command = [CXX, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi", f"-I{csrc}",
               f"-I{csrc}/include", "-x", "c++", *map(str, sources), str(csrc / "cuda/tensor_map.cu"), "-o", str(out)]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return out


@pytest.mark.parametrize("name", NAMES)
def test_emulator(program, name):
    ran = subprocess.run([program, name], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


def test_every_test_is_run(program):
    assert sorted(subprocess.run([program], capture_output=True, text=True).stdout.split()) == sorted(NAMES)
