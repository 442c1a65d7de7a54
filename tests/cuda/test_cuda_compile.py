"""Every CUDA kernel compiles without spills and with the instructions it promises; the library loads without a GPU."""

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("cuda_matrix", ROOT / "tools" / "cuda_matrix.py")
cuda_matrix = importlib.util.module_from_spec(spec)
sys.modules["cuda_matrix"] = cuda_matrix
spec.loader.exec_module(cuda_matrix)

# "all", or a list: the full matrix takes minutes and is run by hand (docs/design/007-cuda.md).
ARCHS = os.environ.get("FASTOPS_CUDA_MATRIX", "80,90a")
ARCHS = list(cuda_matrix.ALL) if ARCHS == "all" else ARCHS.split(",")
needs_nvcc = pytest.mark.skipif(cuda_matrix.tool("nvcc") is None, reason="no nvcc on this machine")


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", cuda_matrix.sources(), ids=lambda s: s.stem)
def test_compiles_without_spills(source, arch, tmp_path):
    result = cuda_matrix.compile_one(source, arch, tmp_path)
    assert not cuda_matrix.problems([result])
    if any(cuda_matrix.promised(arch, k["kernel"]) for k in result["kernels"]):
        if cuda_matrix.tool("cuobjdump") is None:
            pytest.skip("no cuobjdump (Triton's package has one): instructions not looked at")
        assert all("missing" in k for k in result["kernels"])


@needs_nvcc
def test_a_broken_promise_is_seen(tmp_path, monkeypatch):
    if cuda_matrix.tool("cuobjdump") is None:
        pytest.skip("no cuobjdump")
    source = next(s for s in cuda_matrix.sources() if s.stem == "attention")
    monkeypatch.setitem(cuda_matrix.PROMISES, "attention_sm80", ("HGMMA",))
    assert "has no HGMMA" in cuda_matrix.problems([cuda_matrix.compile_one(source, "80", tmp_path)])[0]


@needs_nvcc
def test_the_library_needs_no_gpu_to_load(tmp_path):
    """Built for one architecture; it loads beside a torch without CUDA, and says that there is no device."""
    configure = ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DFASTOPS_TORCH=OFF", "-DFASTOPS_CUDA_ARCHS=80",
                 f"-DCMAKE_CUDA_COMPILER={cuda_matrix.tool('nvcc')}"]  # fmt: skip
    subprocess.run(list(map(str, configure)), check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path, "--target", "fastops_cuda"], check=True, capture_output=True)
    lib = ctypes.CDLL(str(tmp_path / "libfastops_cuda.so"))
    lib.fastops_cuda_archs.restype = ctypes.c_char_p
    assert lib.fastops_cuda_archs() == b"80"
    assert lib.fastops_cuda_emulated() == 0
    needed = subprocess.run(["ldd", tmp_path / "libfastops_cuda.so"], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in needed
    assert "libtorch" not in needed
    import torch

    if torch.cuda.is_available():
        return
    from tests.cuda.capi import Attention, Env

    message = ctypes.create_string_buffer(512)
    env = Env(struct_size=ctypes.sizeof(Env), message=ctypes.cast(message, ctypes.c_char_p))
    desc = Attention(struct_size=ctypes.sizeof(Attention))
    assert lib.fastops_cuda_attention_fwd(ctypes.byref(desc), ctypes.byref(env)) == 3  # FASTOPS_ERR_UNSUPPORTED
    assert b"no CUDA device" in message.value
