"""What the emulator says each instruction gives, against the committed table and against a GPU.

python tools/instructions.py [--write | --gpu FILE]

Without options: builds tests/cuda/instructions.cu for the emulator and compares with tests/cuda/instructions.json.
--write: writes that table. --gpu FILE: builds it with nvcc too, runs it on the GPU, compares word by word and keeps the
GPU's words and the differences in FILE.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TABLE = ROOT / "tests/cuda/instructions.cu", ROOT / "tests/cuda/instructions.json"
CSRC = ROOT / "csrc"
SHARED = [CSRC / "cuda/tensor_map.cu", CSRC / "core/status.cpp"]
EMULATOR = [CSRC / "cuda/emulator" / name for name in ("block.cpp", "async.cpp", "fiber.cpp")]
SUM = 2.0**-10  # of the sum of magnitudes' order (64 terms below 1): tensor cores cut terms off at their own width
ULP = 2.0**-21  # relative, of ex2.approx (PTX ISA: 2^-22 and the rounding of the emulator's)

Results = dict[str, tuple[str, list[int]]]  # name -> (kind, words)


def run(program: Path, arch: int = 90) -> Results:
    ran = subprocess.run([program, str(arch)], capture_output=True, text=True, timeout=300)
    if ran.returncode != 0:
        raise RuntimeError(f"{program.name} ended with {ran.returncode}: {ran.stderr}")
    rows = [line.split() for line in ran.stdout.splitlines()]
    return {row[0]: (row[1], [int(w, 16) for w in row[2:]]) for row in rows}


def build_emulated(folder: Path) -> Path:
    program = folder / "instructions_emulated"
    cxx = os.environ.get("CXX") or shutil.which("g++") or "c++"
    subprocess.run(
        [cxx, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi", f"-I{CSRC}",
         f"-I{CSRC}/include", "-x", "c++", SOURCE, *SHARED, *EMULATOR, "-o", program, "-ldl"],
        check=True,
    )  # fmt: skip
    return program


def build_gpu(folder: Path, arch: str, nvcc: str, link: bool = True) -> Path:
    program = folder / f"instructions_{arch}"
    target = [f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{CSRC}", f"-I{CSRC}/include"]
    what = ["-o", program, *map(str, SHARED)] if link else ["-cubin", "-o", program]
    subprocess.run([nvcc, "-std=c++17", "-O3", *target, SOURCE, *what], check=True)
    return program


def table(results: Results) -> dict[str, Any]:
    """A digest of each instruction's words, and the first of them."""
    out = {}
    for name, (kind, words) in results.items():
        digest = hashlib.sha256(struct.pack(f"<{len(words)}I", *words)).hexdigest()
        out[name] = {"kind": kind, "words": len(words), "sha256": digest, "first": [f"{w:08x}" for w in words[:4]]}
    return out


def number(word: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<I", word))[0]
    return value


def differences(ours: Results, theirs: Results) -> dict[str, dict[str, Any]]:
    """For each instruction that both ran: words that differ, the largest difference, and whether it is in bounds."""
    out = {}
    for name, (kind, words) in theirs.items():
        if name not in ours:
            continue
        mine = ours[name][1]
        differ = [i for i, (a, b) in enumerate(zip(mine, words, strict=True)) if a != b]
        largest = 0.0
        if kind != "bits":
            scale = 64.0 if kind == "sum" else 0.0
            largest = max(
                (abs(number(mine[i]) - number(words[i])) / max(scale, abs(number(words[i]))) for i in differ),
                default=0.0,
            )
        good = not differ if kind == "bits" else largest <= (SUM if kind == "sum" else ULP)
        out[name] = {
            "kind": kind,
            "differ": len(differ),
            "of": len(words),
            "largest": largest,
            "good": good,
            "first": differ[:8],
        }
    return out


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--write", action="store_true", help="write the table")
    p.add_argument("--gpu", type=Path, help="run on this machine's GPU, keep the results in this file")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours = run(build_emulated(Path(folder)))
        if args.write:
            TABLE.write_text(json.dumps(table(ours), indent=1) + "\n")
            return 0
        if args.gpu is None:
            good = table(ours) == json.loads(TABLE.read_text())
            print(
                "the emulator gives what the table says" if good else "the emulator gives something else than the table"
            )
            return 0 if good else 1
        import torch

        major, minor = torch.cuda.get_device_capability()
        from cuda_matrix import tool

        nvcc = tool("nvcc")
        assert nvcc is not None, "no nvcc on this machine"
        gpu = build_gpu(Path(folder), f"{major}{minor}" + ("a" if major == 9 else ""), nvcc)
        theirs = run(gpu, 10 * major + minor)
    found = differences(ours, theirs)
    words = {name: " ".join(f"{w:x}" for w in row[1]) for name, row in theirs.items()}
    args.gpu.write_text(
        json.dumps({"gpu": torch.cuda.get_device_name(), "differences": found, "words": words}, indent=1) + "\n"
    )
    for name, d in found.items():
        verdict = "" if d["good"] else "  WRONG"
        print(f"{name:20} {d['kind']:5} {d['differ']:5} of {d['of']} words differ, by {d['largest']:.1e}{verdict}")
    return 0 if all(d["good"] for d in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
