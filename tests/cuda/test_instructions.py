"""The table of what each instruction gives: the emulator still agrees with it, and the program that compares it with a
GPU compiles, and would notice."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("instructions", ROOT / "tools" / "instructions.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
NVCC = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tool.run(tool.build_emulated(tmp_path_factory.mktemp("instructions")))


def test_the_emulator_agrees_with_the_table(results):
    assert tool.table(results) == json.loads(tool.TABLE.read_text())
    assert {"mma_f16", "mma_s8u8", "cp_async_ldmatrix", "tma", "wgmma_bf16", "ex2"} <= results.keys()


def test_differences_are_noticed(results):
    assert all(d["good"] and d["differ"] == 0 for d in tool.differences(results, results).values())
    for name, (kind, words) in results.items():
        for flip, good in ((1, kind != "bits"), (1 << 20, False)):
            other = {name: (kind, [words[0], words[1] ^ flip, *words[2:]])}
            (d,) = tool.differences(results, other).values()
            assert d["differ"] == 1
            assert d["first"] == [1]
            if kind != "sum" or flip == 1:  # of a small sum that bit is little
                assert d["good"] == good


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_compiles_for_a_gpu(arch, tmp_path):
    assert tool.build_gpu(tmp_path, arch, NVCC).exists()


def test_agrees_with_a_gpu(results, tmp_path):
    import torch

    if not torch.cuda.is_available() or NVCC is None:
        pytest.skip("no GPU")
    major, minor = torch.cuda.get_device_capability()
    program = tool.build_gpu(tmp_path, f"{major}{minor}" + ("a" if major == 9 else ""), NVCC)
    found = tool.differences(results, tool.run(program, 10 * major + minor))
    assert all(d["good"] for d in found.values()), {n: d for n, d in found.items() if not d["good"]}
