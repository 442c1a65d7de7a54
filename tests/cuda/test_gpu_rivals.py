"""bench/gpu_rivals.py against stand-ins with the libraries' own signatures: what it asks of them is what we compute."""

import sys
import types
from pathlib import Path

import pytest
import torch

import fastops

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import gpu_rivals


class Here(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


class Prefill:
    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        assert kv_layout == "NHD"

    def plan(
        self,
        qo_indptr,
        kv_indptr,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        head_dim_vo=None,
        causal=False,
        q_data_type=None,
    ):
        self.starts, self.causal = (qo_indptr, kv_indptr), causal
        self.heads = (num_qo_heads, num_kv_heads)

    def run(self, q, k, v):
        assert (q.shape[1], k.shape[1]) == self.heads
        return fastops.attention_varlen(q, k, v, *self.starts, causal=self.causal)


class Decode:
    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_tensor_cores=False):
        assert use_tensor_cores

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type="float16"
    ):
        self.lens = (indptr.diff() - 1) * page_size + last_page_len
        self.table = indices.view(len(self.lens), -1)

    def run(self, q, paged_kv_cache):
        return fastops.attention_paged(q, *paged_kv_cache, self.table.int(), self.lens.int())


@pytest.fixture
def libraries(monkeypatch):
    flash = types.ModuleType("flashinfer")
    flash.BatchPrefillWithRaggedKVCacheWrapper, flash.BatchDecodeWithPagedKVCacheWrapper = Prefill, Decode
    flash.norm = types.SimpleNamespace(
        rmsnorm=lambda input, weight, eps=1e-6, out=None: fastops.rms_norm(input, weight, eps, out=out),
        fused_add_rmsnorm=lambda input, residual, weight, eps=1e-6: fastops.fused_add_rms_norm(input, residual, weight),
    )
    flash.activation = types.SimpleNamespace(silu_and_mul=lambda input, out=None: fastops.silu_and_mul(input, out=out))
    liger = types.ModuleType("liger_kernel.transformers.functional")
    liger.liger_rms_norm = lambda X, W, eps, offset=0.0, casting_mode="llama", in_place=True: fastops.rms_norm(
        X, W, eps
    )
    liger.liger_fused_add_rms_norm = lambda X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True: (
        fastops.add_rms_norm(X, R, W, eps)
    )
    liger.liger_swiglu = fastops.swiglu
    monkeypatch.setitem(sys.modules, "flashinfer", flash)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", liger)
    gpu_rivals.library.cache_clear()
    yield
    gpu_rivals.library.cache_clear()


def here(*shape):
    return torch.randn(*shape).as_subclass(Here)


def plain(x):
    return x.as_subclass(torch.Tensor)


def test_attention(libraries):
    q, k, v = here(2, 9, 4, 16), here(2, 9, 2, 16), here(2, 9, 2, 16)
    want = fastops.attention(*map(plain, (q, k, v)), causal=True)
    ways = gpu_rivals.prefill(q, k, v)
    torch.testing.assert_close(plain(ways["flashinfer"]()).view(want.shape), want)
    q, k, v = here(2, 8, 16), here(6, 4, 2, 16), here(6, 4, 2, 16)
    table, lens = torch.arange(6, dtype=torch.int32).view(2, 3), torch.tensor([12, 11], dtype=torch.int32)
    want = fastops.attention_paged(*map(plain, (q, k, v)), table, lens)
    torch.testing.assert_close(plain(gpu_rivals.decode(q, k, v, table, lens)["flashinfer"]()), want)


def test_fused(libraries):
    x, r, w = here(3, 32), here(3, 32), here(32)
    want = fastops.rms_norm(plain(x), plain(w))
    ways = gpu_rivals.rms_norm(x, w, torch.empty(3, 32))
    assert set(ways) == {"flashinfer", "liger"}
    for run in ways.values():
        torch.testing.assert_close(plain(run()), want)
    normed, total = fastops.add_rms_norm(*map(plain, (x, r, w)))
    for name in ("liger", "flashinfer"):  # the second works in place
        got = gpu_rivals.fused_add_rms_norm(x, r, w)[name]()
        torch.testing.assert_close(plain(got[0]), normed)
        torch.testing.assert_close(plain(got[1]), total)
    want = fastops.silu_and_mul(plain(x))
    for run in gpu_rivals.silu_and_mul(x, torch.empty(3, 16)).values():
        torch.testing.assert_close(plain(run()), want)


def test_a_library_that_does_not_load_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    gpu_rivals.library.cache_clear()
    assert gpu_rivals.prefill(*(here(1, 4, 2, 16),) * 3) == {}
    assert gpu_rivals.rms_norm(torch.randn(2, 4), torch.ones(4), torch.empty(2, 4)) == {}
    assert "flashinfer is left out: ModuleNotFoundError" in capsys.readouterr().out
    gpu_rivals.library.cache_clear()
