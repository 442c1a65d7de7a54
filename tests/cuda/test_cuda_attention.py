"""The CUDA attention kernels, emulated on CPU tensors (and on a GPU where there is one) against the reference."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import fastops
from fastops.ops._common import attend
from fastops.ops.attention_paged import attend as attend_paged
from fastops.ops.attention_varlen import attend as attend_varlen
from fastops.testing import assert_matches, guarded
from tests.cuda import both, capi
from tests.cuda.capi import variant

DTYPES = [torch.float16, torch.bfloat16]
PROVIDERS = [
    "cuda-emulated",
    pytest.param("cuda", marks=pytest.mark.skipif(not both.GPU, reason="no GPU, or no CUDA build")),
]


@pytest.fixture(params=PROVIDERS)
def run(request):
    """Calls an operator with a provider; CPU tensors in and out either way."""
    device = "cuda" if request.param == "cuda" else "cpu"

    def call(name, *args, **options):
        def there(x):
            return x.to(device) if isinstance(x, torch.Tensor) else x

        with torch.no_grad(), fastops.override(**{name: request.param}):
            got = getattr(fastops, name)(*map(there, args), **{n: there(x) for n, x in options.items()})
        return tuple(t.cpu() for t in got) if isinstance(got, tuple) else got.cpu()

    return call


@contextmanager
def seed(n):
    os.environ["FASTOPS_EMULATOR_SEED"] = str(n)
    try:
        yield
    finally:
        del os.environ["FASTOPS_EMULATOR_SEED"]


def close(got, exact, same, what):
    for g, e, s, name in zip(got, exact, same, ("out", "lse"), strict=True):
        assert_matches(g, e, s, factor=4, what=f"{name} {what}")


OPTIONS = [
    {},
    {"causal": True},
    {"causal": True, "window": (20, -1)},
    {"window": (7, 9), "softcap": 5.0},
    {"causal": True, "sinks": torch.linspace(-2, 3, 6), "alibi_slopes": torch.linspace(0.1, 0.6, 6)},
    {"scale": -0.3},
    {"scale": 0.0},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sq", "sk", "hkv", "d", "dv"),
    [
        (1, 37, 2, 64, 64),
        (70, 130, 3, 64, 40),
        (33, 33, 1, 8, 16),
        (20, 90, 2, 128, 128),
        (9, 70, 3, 72, 104),
        (5, 40, 1, 256, 200),
    ],
)
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_dense(run, dtype, sq, sk, hkv, d, dv, options):
    q, k, v = (torch.randn(2, s, h, n).to(dtype) for s, h, n in ((sq, 6, d), (sk, hkv, d), (sk, hkv, dv)))
    got = run("attention", q, k, v, return_lse=True, **options)
    close(got, attend(q.double(), k.double(), v.double(), **options), attend(q, k, v, **options), str(options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page", [1, 16, 64])
@pytest.mark.parametrize(("lens", "queries"), [([1, 300, 33], [1, 1, 1]), ([50, 120, 9, 0], [50, 1, 4, 0])])
def test_paged(run, dtype, page, lens, queries):
    need = [-(-n // page) for n in lens]
    order = torch.randperm(sum(need) + 2)
    table = torch.full((len(lens), max(need)), -5, dtype=torch.int32)  # places nobody may follow
    for i, n in enumerate(need):
        table[i, :n] = order[sum(need[:i]) : sum(need[:i]) + n].int()
    k, v = (torch.randn(sum(need) + 2, page, 2, 64).to(dtype) for _ in range(2))
    q = torch.randn(sum(queries), 4, 64).to(dtype)
    cu = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    index = (table, torch.tensor(lens, dtype=torch.int32), cu)
    for options in ({"causal": True}, {"causal": True, "window": (40, -1), "sinks": torch.randn(4)}):
        got = run("attention_paged", q, k, v, *index, return_lse=True, **options)
        exact = attend_paged(q.double(), k.double(), v.double(), *index, **options)
        close(got, exact, attend_paged(q, k, v, *index, **options), str(options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_varlen(run, dtype):
    q, k, v = (torch.randn(n, h, 64).to(dtype) for n, h in ((80, 4), (150, 2), (150, 2)))
    cu_q = torch.tensor([0, 3, 3, 70], dtype=torch.int32)  # ten rows belong to no one
    cu_k = torch.tensor([0, 90, 100, 150], dtype=torch.int32)
    got = run("attention_varlen", q, k, v, cu_q, cu_k, causal=True, return_lse=True)
    exact = attend_varlen(q.double(), k.double(), v.double(), cu_q, cu_k, causal=True)
    close(got, exact, attend_varlen(q, k, v, cu_q, cu_k, causal=True), "varlen")


def test_split_decode(run):
    """One long sequence is split over the keys and merged; out may be fp32."""
    q, k, v = (torch.randn(1, s, h, 64).half() for s, h in ((1, 4), (2000, 2), (2000, 2)))
    sinks = torch.randn(4)
    exact = attend(q.double(), k.double(), v.double(), sinks=sinks)
    same = attend(q, k, v, sinks=sinks)
    close(run("attention", q, k, v, sinks=sinks, return_lse=True), exact, same, "split")
    with fastops.override(attention="cuda-emulated"), torch.no_grad():
        wide = fastops.attention(q, k, v, sinks=sinks, out=torch.empty(1, 1, 4, 64))
    assert_matches(wide, exact[0], same[0], what="fp32 out")


def test_more_rows_than_the_kernels_count():
    many = torch.zeros(1, 1, 8, 8).half().expand(1, 1 << 28, 8, 8)
    k = torch.zeros(1, 4, 1, 8).half()
    with pytest.raises(AssertionError, match="more than 2000000000 rows of queries"):
        capi.run("attention_fwd", capi.attention(many), True, q=many, k=k, v=k, out=many)


@contextmanager
def hopper():
    """The emulator as a device of compute capability 9.0."""
    os.environ["FASTOPS_EMULATOR_ARCH"] = "90"
    try:
        yield
        assert variant() == "sm90a"
    finally:
        del os.environ["FASTOPS_EMULATOR_ARCH"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sq", "sk", "hkv", "d", "dv"),
    [(200, 400, 6, 64, 64), (65, 129, 3, 128, 128), (40, 300, 2, 72, 104), (130, 1, 6, 8, 128)],
)
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_dense_on_hopper(dtype, sq, sk, hkv, d, dv, options):
    q, k, v = (torch.randn(2, s, h, n).to(dtype) for s, h, n in ((sq, 6, d), (sk, hkv, d), (sk, hkv, dv)))
    with hopper(), torch.no_grad(), fastops.override(attention="cuda-emulated"):
        got = fastops.attention(q, k, v, return_lse=True, **options)
    close(got, attend(q.double(), k.double(), v.double(), **options), attend(q, k, v, **options), str(options))


@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("d", [64, 128])
def test_maxima_that_grow_for_single_rows(arch, d, monkeypatch):
    """What stands in o is brought to a new maximum as soon as one row of a warp has one; other rows grow by less."""
    q, k, v = torch.zeros(1, 130, 1, d), torch.zeros(1, 700, 1, d), torch.randn(1, 700, 1, d)
    k[0, :, 0, 0] = torch.linspace(0, 60, 700)  # a row's scores rise tile by tile, as steeply as its q says
    q[0, :, 0, 0] = torch.linspace(0, 0.5, 130)
    q[0, [3, 77, 129], 0, 0] = torch.tensor([3.0, 20.0, -8.0])
    q, k, v = q.half(), k.half(), v.half()
    monkeypatch.setenv("FASTOPS_EMULATOR_ARCH", arch)
    with torch.no_grad(), fastops.override(attention="cuda-emulated"):
        got = fastops.attention(q, k, v, scale=1.0, return_lse=True)
    assert variant() == ("sm90a" if arch == "90" else "sm80")
    close(got, attend(q.double(), k.double(), v.double(), scale=1.0), attend(q, k, v, scale=1.0), "growing")


@pytest.mark.parametrize("dtype", DTYPES)
def test_varlen_and_paged_on_hopper(dtype):
    q, k, v = (torch.randn(n, h, 64).to(dtype) for n, h in ((200, 4), (500, 2), (500, 2)))
    cu_q = torch.tensor([0, 3, 3, 150, 190], dtype=torch.int32)  # ten rows belong to no one
    cu_k = torch.tensor([0, 90, 100, 400, 500], dtype=torch.int32)
    k[400:], v[400:] = torch.nan, torch.nan  # the last sequence must not show in the others' tails
    with hopper(), torch.no_grad(), fastops.override(attention_varlen="cuda-emulated"):
        got = fastops.attention_varlen(q, k, v, cu_q, cu_k, causal=True, return_lse=True)
    exact = attend_varlen(q.double(), k.double(), v.double(), cu_q, cu_k, causal=True)
    same = attend_varlen(q, k, v, cu_q, cu_k, causal=True)
    assert bool(torch.isnan(got[0][150:190]).all())
    rest = [i for i in range(200) if not 150 <= i < 190]
    close(*((out[rest], lse[:, rest]) for out, lse in (got, exact, same)), "varlen")

    lens, queries, page = [300, 120, 0, 131], [100, 1, 0, 40], 16
    need = [-(-n // page) for n in lens]
    table = torch.full((len(lens), max(need)), -5, dtype=torch.int32)
    order = torch.randperm(sum(need))
    for i, n in enumerate(need):
        table[i, :n] = order[sum(need[:i]) : sum(need[:i]) + n].int()
    k, v = (torch.randn(sum(need), page, 2, 128).to(dtype) for _ in range(2))
    q = torch.randn(sum(queries), 4, 128).to(dtype)
    cu = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    index = (table, torch.tensor(lens, dtype=torch.int32), cu)
    with hopper(), torch.no_grad(), fastops.override(attention_paged="cuda-emulated"):
        got = fastops.attention_paged(q, k, v, *index, causal=True, return_lse=True)
        exact = attend_paged(q.double(), k.double(), v.double(), *index, causal=True)
        close(got, exact, attend_paged(q, k, v, *index, causal=True), "paged")
        table[0, 3] = 9999
        broken = fastops.attention_paged(q, k, v, *index, causal=True)
    assert bool(torch.isnan(broken[:100]).all())
    assert torch.equal(broken[100:], got[0][100:])


def test_hopper_orders_splits_and_guard_pages():
    """Any order of warps and of landings gives the same bits; keys are split; nothing outside the tensors is touched."""
    q, k, v = (torch.randn(1, s, 2, 64).half() for s in (70, 1500, 1500))
    results = []
    for n in range(6):
        with hopper(), seed(n), torch.no_grad(), fastops.override(attention="cuda-emulated"):
            results.append(fastops.attention(q, k, v, causal=True, return_lse=True))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
    exact = attend(q.double(), k.double(), v.double(), causal=True)
    close(results[0], exact, attend(q, k, v, causal=True), "split")
    for end in (True, False):
        for d in (8, 72, 128):
            q, k, v = (guarded(torch.randn(1, s, 2, d).half(), end) for s in (80, 133, 133))
            with hopper(), torch.no_grad(), fastops.override(attention="cuda-emulated"):
                fastops.attention(q, k, v, causal=True, out=guarded(torch.empty_like(q), end))
            cu_q, cu_k = torch.tensor([0, 80]).int(), torch.tensor([0, 133]).int()
            with hopper(), torch.no_grad(), fastops.override(attention_varlen="cuda-emulated"):
                fastops.attention_varlen(q[0], k[0], v[0], cu_q, cu_k, out=guarded(torch.empty_like(q[0]), end))


def test_nothing_seen(run):
    q, k = torch.randn(1, 5, 2, 64).half(), torch.randn(1, 3, 2, 64).half()
    out, lse = run("attention", q, k, k, causal=True, return_lse=True)  # the first two rows see no key
    assert bool((out[:, :2] == 0).all())
    assert bool((lse[:, :, :2] == -torch.inf).all())
    out, lse = run("attention", q, k[:, :0], k[:, :0], return_lse=True)
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())


def test_every_order_of_warps_gives_the_same_bits():
    q, k, v = (torch.randn(1, s, 2, 64).half() for s in (70, 200, 200))
    results = []
    for n in range(6):
        with seed(n), torch.no_grad(), fastops.override(attention="cuda-emulated"):
            results.append(fastops.attention(q, k, v, causal=True, return_lse=True))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("d", [8, 72, 128])
def test_guard_pages(end, d):
    """Tensors between unreadable pages: a copy or store outside one kills the process."""
    with torch.no_grad(), fastops.override(attention="cuda-emulated", attention_paged="cuda-emulated"):
        for sq, sk in ((1, 37), (70, 65)):
            q, k, v = (guarded(torch.randn(1, s, 2, d).half(), end) for s in (sq, sk, sk))
            fastops.attention(q, k, v, causal=True, out=guarded(torch.empty_like(q), end))
        cache = guarded(torch.randn(5, 16, 2, d).half(), end)
        table, lens = (guarded(torch.tensor(x, dtype=torch.int32), end) for x in ([[4, 0, 2], [1, 3, 3]], [40, 17]))
        q = guarded(torch.randn(2, 4, d).half(), end)
        fastops.attention_paged(q, cache, cache, table, lens, out=guarded(torch.empty_like(q), end))


@pytest.mark.parametrize(
    "break_it",
    [lambda t, n, c: t.index_put_((torch.tensor(0), torch.tensor(1)), torch.tensor(99, dtype=torch.int32)), lambda t, n, c: t[0].fill_(-1),
     lambda t, n, c: n[0].fill_(9999), lambda t, n, c: n[0].fill_(-3)],
)  # fmt: skip
def test_indices_outside_their_tensors_give_nan(break_it):
    """Lengths and pages are only known on the device: what is wrong there is never followed, and shows."""
    cache = guarded(torch.randn(5, 16, 2, 64).half(), True)
    table, lens = torch.tensor([[4, 0, 2], [1, 3, 3]], dtype=torch.int32), torch.tensor([40, 17], dtype=torch.int32)
    q = torch.randn(2, 4, 64).half()
    with torch.no_grad(), fastops.override(attention_paged="cuda-emulated"):
        good = fastops.attention_paged(q, cache, cache, table, lens)
        break_it(table, lens, None)
        got = fastops.attention_paged(q, cache, cache, table, lens)
    assert bool(torch.isnan(got[0]).all())
    assert torch.equal(got[1], good[1])


def test_bad_input_and_refusals():
    q, k = torch.randn(1, 5, 4, 64).half(), torch.randn(1, 9, 2, 64).half()
    with fastops.override(attention="cuda-emulated"), torch.no_grad():
        fastops.attention(q, k, k)
        with pytest.raises(ValueError, match="q has 3 heads, k has 2"):
            fastops.attention(q[:, :, :3], k, k)
        with pytest.raises(fastops.NotSupportedError, match="begin at multiples of 16 bytes"):
            fastops.attention(torch.randn(1, 5, 4 * 64 + 4).half()[..., 4:].view(1, 5, 4, 64), k, k)
        with pytest.raises(fastops.NotSupportedError, match="attn_mask"):
            fastops.attention(q, k, k, attn_mask=torch.ones(5, 9, dtype=torch.bool))
        with pytest.raises(fastops.NotSupportedError, match=r"dtype is float32 \(takes float16, bfloat16\)"):
            fastops.attention(q.float(), k.float(), k.float())
    assert "cuda-emulated" in str(fastops.explain("attention", q.detach(), k, k))


def test_splits_fill_the_device(tmp_path):
    """The number of splits, by the same function the library calls."""
    root = Path(__file__).resolve().parents[2]
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    code = """#include <cstdio>
#include <cstdlib>
#include "cuda/attention/attention_config.h"
int main(int, char** a) {
  const int arch = atoi(a[1]), dim = atoi(a[4]);
  const auto tile = fastops::cuda::attention_tile(arch == 90, dim, atoll(a[6]));
  std::printf("%d %lld", tile.hopper, static_cast<long long>(fastops::cuda::attention_splits(atoll(a[2]), atoll(a[3]), tile, atoi(a[5]))));
}"""
    source, program = tmp_path / "splits.cpp", tmp_path / "splits"
    source.write_text(code)
    subprocess.run([compiler, "-std=c++17", f"-I{root}/csrc", source, "-o", program], check=True)

    def splits(*args, arch=80, rows=4):
        ran = subprocess.run([program, *map(str, (arch, *args, rows))], capture_output=True, text=True).stdout
        hopper, count = map(int, ran.split())
        assert hopper == (arch == 90 and args[2] <= 128 and rows > 64)
        return count

    assert splits(8, 8192, 128, 132) == 32  # one sequence of Llama 3 8B on an H200: 256 blocks for 264 places
    assert splits(64, 8192, 128, 132) == 4
    assert splits(256, 8192, 128, 132) == 1  # enough blocks without
    assert splits(8, 300, 128, 132) == 2  # at least four tiles of keys each
    assert splits(0, 8192, 128, 132) == 1
    assert splits(8, 8192, 128, 132, arch=90) == 32  # decoding stays with the kernel for few rows
    assert splits(8, 8192, 128, 132, arch=90, rows=512) == 16  # a block of the other fills its multiprocessor
    assert splits(8, 8192, 256, 132, arch=90, rows=512) == 16  # head size 256 has no kernel of its own there
    assert splits(8, 8192, 128, 132, arch=120, rows=512) == 32
