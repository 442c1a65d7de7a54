"""Compiles every CUDA source for every architecture and looks at what came out, on a machine without a GPU.

python tools/cuda_matrix.py [--archs 80,90a | all] [--json FILE]

Fails when a kernel spills registers, or lacks an instruction that its source promises (PROMISES). Prints, and with
--json keeps, registers, shared memory, spills and seconds of each.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ALL = ("80", "86", "89", "90a", "100", "120")
# pattern of an architecture and a kernel's symbol -> instructions that must stand in its SASS
PROMISES = {
    "attention_sm80": ("HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128", "MUFU.EX2"),
    "90a.*attention_sm90": (
        "HGMMA.64x128x16.F32",
        "UTMALDG.4D",
        "SYNCS.PHASECHK",
        "USETMAXREG",
        "LDGSTS.E.BYPASS.128",
        "MUFU.EX2",
    ),
    "attention_bwd_(keys|rows)": ("HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128"),
    "90a.*int4_gemm_sm90.*ELi2E": (  # two blocks share their tile of x
        "HGMMA.64x128x16.F32",
        "UTMALDG.4D.MULTICAST",
        "UCGABAR_ARV",
        "SYNCS.PHASECHK",
        "LDGSTS.E.BYPASS.128",
        "PRMT",
        "STSM.16.MT88.4",
    ),
    "90a.*int4_gemm_sm90": (
        "HGMMA.64x128x16.F32",
        "UTMALDG.4D",
        "SYNCS.PHASECHK",
        "LDGSTS.E.BYPASS.128",
        "PRMT",
        "STSM.16.MT88.4",
    ),
    "int4_gemm_int8": ("IMMA.16832.S8.U8", "LDGSTS.E.BYPASS.128", "LOP3.LUT"),
    "int4_gemmI": ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LOP3.LUT", "PRMT"),
    "norm_(bwd_)?rows.*ELi[48]E": ("LDG.E.NA.128", "STG.E.128"),  # the kernels for aligned rows
    "gated_rows.*ELi[48]E": ("LDG.E.NA.128", "STG.E.128"),
    "rope_pieces": ("LDG.E.NA.128", "STG.E.128"),
}


def tool(name: str) -> str | None:
    """nvcc, cuobjdump: from the path, the toolkit's folder, or Triton's package."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found:
        return found
    spec = find_spec("triton")
    if spec is not None and spec.origin is not None:
        inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        if inside.exists():
            return str(inside)
    return None


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))


def promised(arch: str, symbol: str) -> tuple[str, ...]:
    return next((p for pattern, p in PROMISES.items() if re.search(pattern, f"{arch} {symbol}")), ())


def compile_one(source: Path, arch: str, folder: Path) -> dict[str, Any]:
    """Figures of each kernel of a source. Raises RuntimeError with the compiler's words."""
    cubin = folder / f"{source.stem}_{arch}.cubin"
    begin = time.perf_counter()
    nvcc = tool("nvcc")
    assert nvcc is not None
    ran = subprocess.run(
        [nvcc, "-std=c++17", "-O3", "-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{ROOT}/csrc",
         f"-I{ROOT}/csrc/include", "-Xptxas", "-v", "-Werror", "all-warnings", str(source), "-o", str(cubin)],
        capture_output=True, text=True,
    )  # fmt: skip
    if ran.returncode:
        raise RuntimeError(f"{source.name} for sm_{arch}: {ran.stderr[-2000:]}")
    seconds = time.perf_counter() - begin
    serial = re.search(r"\(C75\d\d\).*", ran.stderr)  # products of warp groups that would wait for one another
    if serial:
        raise RuntimeError(f"{source.name} for sm_{arch}: {serial[0]}")
    kernels = []
    for part in ran.stderr.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        symbol = part.split("'")[0]
        kernels.append(
            {
                "kernel": symbol,
                "registers": int(registers[1]) if registers else 0,
                "stack": int(spills[1]) if spills else 0,
                "spill_stores": int(spills[2]) if spills else 0,
                "spill_loads": int(spills[3]) if spills else 0,
            }
        )
    found = {"source": source.name, "arch": arch, "seconds": round(seconds, 1), "kernels": kernels}
    disassemble = tool("cuobjdump")
    if kernels and disassemble:
        sass = subprocess.run([disassemble, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        bodies = {b.split("\n", 1)[0].strip(): b for b in sass.split("Function : ")[1:]}
        for kernel in kernels:
            body = bodies.get(kernel["kernel"], "")
            kernel["missing"] = [i for i in promised(arch, kernel["kernel"]) if i not in body]
    return found


def problems(results: list[dict[str, Any]]) -> list[str]:
    """Spills and broken promises, as sentences."""
    out = []
    for r in results:
        for k in r["kernels"]:
            where = f"{r['source']} sm_{r['arch']} {k['kernel']}"
            if k["spill_stores"] or k["spill_loads"]:
                out.append(f"{where} spills {k['spill_stores']} bytes ({k['registers']} registers)")
            if k.get("missing"):
                out.append(f"{where} has no {', '.join(k['missing'])}")
    return out


def matrix(archs: list[str], only: list[Path] | None = None) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [(s, a) for s in only or sources() for a in archs]
        return list(pool.map(lambda job: compile_one(*job, Path(folder)), jobs))


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--archs", default="80,90a", help="comma-separated, or all (default: %(default)s)")
    p.add_argument("--json", help="keep the figures in this file")
    args = p.parse_args()
    if tool("nvcc") is None:
        sys.exit("no nvcc on this machine")
    results = matrix(list(ALL) if args.archs == "all" else args.archs.split(","))
    for r in results:
        if r["kernels"]:
            most = max(k["registers"] for k in r["kernels"])
            print(
                f"{r['source']:20} sm_{r['arch']:4} {r['seconds']:6.1f} s  {len(r['kernels']):3} kernels, "
                f"up to {most} registers"
            )
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    found = problems(results)
    print("\n".join(found) or "no spills, every promised instruction is there")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
