"""The path without nvcc: which kernels the host code asks for, and that NVRTC compiles them, on a machine without a GPU."""

from contextlib import contextmanager

import pytest
import torch

import fastops
from fastops import _cuda, _nvrtc, int4
from tests.cuda import both
from tests.cuda.capi import op
from tests.ops.test_attention_kv import filled

needs_nvrtc = pytest.mark.skipif(_nvrtc.why_not() is not None, reason=_nvrtc.why_not() or "")


class Recorder(_nvrtc.Launcher):
    """Notes what would be started."""

    def __init__(self, arch):
        super().__init__()
        self.arch, self.started = arch, []

    def facts(self, device):
        return self.arch, 4

    def launch(self, kernel, grid, args, stream):
        assert args
        self.started.append((kernel, *grid))

    def names(self):
        return [kernel for kernel, *_ in self.started]


@contextmanager
def recording(arch=80):
    """The emulator's calls are planned and go to a recorder."""
    recorder = Recorder(arch)
    assert _cuda.load("fastops_emulated", False, recorder) is None
    both.paused = True
    try:
        yield recorder
    finally:
        both.paused = False
        assert _cuda.load("fastops_emulated", False) is None


def calls():
    """Every operator, in a few forms."""
    half, rows = torch.randn(1, 70, 2, 64).half(), torch.randn(3, 64).half()
    out, lse = op("attention", half, half, half, causal=True, return_lse=True)
    op("attention", half[:, :1], *(torch.randn(1, 3000, 2, 64).half() for _ in range(2)))
    wide = torch.randn(1, 9, 2, 128).bfloat16()
    op("attention", wide, wide, wide)
    cache, table, have = filled("kv4", [40], dtype=torch.float16)
    op("attention_paged", half[0, :1], cache.k, cache.v, table, have, k_scale=cache.quant.k_scale, k_zero=cache.quant.k_zero,
       v_scale=cache.quant.v_scale, v_zero=cache.quant.v_zero, k_bits=4, v_bits=4)  # fmt: skip
    op("attention_backward", half, None, out, lse, half, half, half, causal=True, sinks=torch.zeros(2))
    packed = int4.quantize(torch.randn(48, 64), 64).packed()
    op("int4_linear", rows, packed.codes, packed.scales, 48)
    op("int4_linear", rows, packed.codes, packed.scales, 48, activations=1)
    op("int4_linear", torch.randn(70, 64).half(), packed.codes, packed.scales, 48, packed.scales)
    op("rms_norm", rows, rows[0])
    op("norm_backward", rows, None, rows, rows[0], torch.ones(3), torch.ones(3))
    op("swiglu", rows, rows)
    op("gated_backward", rows, rows, rows, 0)
    op("apply_rope", half[0], half[0], torch.ones(70, 32), torch.ones(70, 32))
    op("merge_states", [half, half], [torch.zeros(1, 2, 70)] * 2)


def plain(name):
    return name.replace(" >", ">").replace("fastops::cuda::", "")


def test_the_host_code_names_every_kernel():
    with recording() as recorder:
        calls()
    names = recorder.names()
    for kernel in (
        "attention_sm80<fastops::f16, 64, DenseKeys<fastops::f16>>", "attention_merge<fastops::f16>",
        "attention_sm80<fastops::bf16, 128, DenseKeys<fastops::bf16>>", "attention_bwd_sinks", "norm_rows<fastops::f16, 8>",
    ):  # fmt: skip
        assert any(plain(n) == kernel for n in names), (kernel, names)
    for name in names:
        assert _nvrtc.source_of(name).startswith("cuda/")
    assert recorder.started[0][1:] == ((2, 2, 1), 1, 128, 64 * 64 * 2 * 3 + 16)


def test_errors_come_back():
    with recording() as recorder:
        recorder.launch = lambda *a: (_ for _ in ()).throw(RuntimeError("no such symbol"))
        with pytest.raises(fastops.NotSupportedError, match="did not start"):
            op("swiglu", torch.ones(2, 8), torch.ones(2, 8))
        assert str(recorder.error) == "no such symbol"
        with pytest.raises(fastops.NotSupportedError, match="float32"):
            op("attention", *(torch.ones(1, 2, 2, 64),) * 3)


@needs_nvrtc
@pytest.mark.parametrize("arch", [80, 90])
def test_nvrtc_compiles_what_the_host_code_asks_for(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTOPS_CUDA_CACHE", str(tmp_path))
    with recording(arch) as recorder:
        calls()
    names = sorted(set(recorder.names()))
    assert any("attention_sm90" in n for n in names) == (arch == 90)
    if arch == 90:  # without a driver there is no tensor map, and the other kernel is asked for
        names.append("fastops::cuda::int4_gemm_sm90<fastops::f16, true, 2>")
    for kernel in names:
        code, symbol = _nvrtc.compile_kernel(kernel, "90a" if arch == 90 else str(arch))
        assert code[:4] == b"\x7fELF"
        assert symbol.encode() in code
    assert len(list(tmp_path.iterdir())) == len(names)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    again, symbol_again = _nvrtc.compile_kernel(names[-1], "90a" if arch == 90 else str(arch))
    assert (again, symbol_again) == (code, symbol)
    assert {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()} == before  # read, not made again


@needs_nvrtc
def test_broken_files_of_the_cache_are_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTOPS_CUDA_CACHE", str(tmp_path))
    kernel = "fastops::cuda::attention_tail<fastops::f16>"
    _, symbol = _nvrtc.compile_kernel(kernel, "80")
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"")
    code, again = _nvrtc.compile_kernel(kernel, "80")  # NVRTC does not always give the same bytes
    assert again == symbol
    assert code[:4] == b"\x7fELF"
    assert file.read_bytes() == symbol.encode() + b"\0" + code
    with pytest.raises(RuntimeError, match="no source defines"):
        _nvrtc.compile_kernel("fastops::cuda::nothing<int>", "80")
    with pytest.raises(RuntimeError, match="NVRTC does not compile"):
        _nvrtc.compile_kernel("fastops::cuda::attention_tail<int>", "80")
