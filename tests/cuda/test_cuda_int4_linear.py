"""The CUDA INT4 product, emulated on CPU tensors, against the reference."""

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import fastops
from fastops import Int4Weight, int4
from fastops.ops.int4_linear import reference
from fastops.testing import assert_matches, guarded
from tests.cuda.capi import op, variant

DTYPES = [torch.float16, torch.bfloat16]
CSRC = Path(__file__).resolve().parents[2] / "csrc"


def check(x, weight, bias=None, what="", activations="float"):
    with torch.no_grad(), fastops.override(int4_linear="cuda-emulated"):
        got = fastops.int4_linear(x, weight, bias, activations=activations)
    if activations == "int8":  # rows are rounded once, the same way
        exact = reference(x.float(), weight, bias, activations="int8")
        tolerance = torch.finfo(x.dtype).eps * 4 * max([1.0, *exact.nan_to_num().abs().flatten().tolist()])
        torch.testing.assert_close(got.float(), exact, atol=tolerance, rtol=tolerance, equal_nan=True)
        return got
    exact = reference(x.double(), weight, bias)
    same = (x.float() @ weight.dequantize().to(x.dtype).float().T + (0 if bias is None else bias.float())).to(x.dtype)
    assert_matches(got, exact, same, factor=3, what=what)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 128, 256), (5, 40, 64), (17, 136, 320), (33, 24, 128), (70, 256, 96), (2, 8, 40)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_shapes(dtype, m, n, k, symmetric):
    """Each tile height, tails of every dimension, splits of K; symmetric and with zeros."""
    weight = int4.quantize(torch.randn(n, k), group_size=32 if k % 32 == 0 else -1, symmetric=symmetric)
    check(torch.randn(m, k).to(dtype), weight, torch.randn(n) if m % 2 else None, f"{m} {n} {k}")


STRIPES = [  # on the emulated device of four multiprocessors: eight runs
    (1, 136, 1024),  # two tiles of sixteen steps: runs within a tile
    (20, 400, 640),  # four tiles of ten: runs of five
    (70, 700, 192),  # twelve tiles of three: runs of four and a half, over several tiles, in two rows of tiles
    (33, 1100, 128),  # nine tiles of two: nothing to cut, runs of a tile
]


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize(("m", "n", "k"), STRIPES)
def test_stripes(m, n, k, activations):
    """Runs of steps that begin and end within tiles, and go over several; groups that cuts go through."""
    x, bias = torch.randn(m, k).half(), torch.randn(n)
    for options in ({"symmetric": False}, {"group_size": -1}, {"sparsity": "2:4"}):
        weight = int4.quantize(torch.randn(n, k), **{"group_size": 64, **options})
        check(x, weight, bias, f"{m} {n} {k} {options}", activations)
    eight = int4.quantize(torch.randn(n, k), group_size=-1, bits=8)
    first = check(x, eight, what="8 bits", activations=activations)
    os.environ["FASTOPS_EMULATOR_SEED"] = "5"
    try:
        assert torch.equal(first, check(x, eight, what="another order", activations=activations))
    finally:
        del os.environ["FASTOPS_EMULATOR_SEED"]


def test_stripes_fill_the_device(tmp_path):
    """Their number, by the function the library calls; every step is in one run, and runs are of one length."""
    code = r"""
#include <cstdio>
#include <cstdlib>
#include "cuda/int4_linear/int4_config.h"
using namespace fastops::cuda;
int main(int, char** a) {
  const int64_t tiles = atoll(a[1]), chunks = atoll(a[2]), steps = tiles * chunks;
  const int64_t n = int4_stripes(tiles, chunks, atoi(a[3]));
  int64_t least = steps, most = 0;
  for (int64_t s = 0; s < n; ++s) {
    const int64_t from = int4_stripe_begin(steps, n, s), to = int4_stripe_begin(steps, n, s + 1);
    for (int64_t i = from; i < to; ++i)
      if (int4_stripe_of(steps, n, i) != s) return 1;
    least = to - from < least ? to - from : least;
    most = to - from > most ? to - from : most;
  }
  if (int4_stripe_begin(steps, n, n) != steps || most - least > 1) return 2;
  std::printf("%lld %lld", static_cast<long long>(n), static_cast<long long>(least));
}"""
    source, program = tmp_path / "stripes.cpp", tmp_path / "stripes"
    source.write_text(code)
    subprocess.run(["c++", "-std=c++20", f"-I{CSRC}", f"-I{CSRC}/include", source, "-o", program], check=True)

    def stripes(*args):
        ran = subprocess.run([program, *map(str, args)], capture_output=True, text=True, check=True)
        return tuple(map(int, ran.stdout.split()))

    assert stripes(32, 64, 132) == (264, 7)  # Llama 3 8B's 4096 x 4096, one row, on an H200: 7 or 8 steps each
    assert stripes(112, 64, 132) == (264, 27)  # 14336 x 4096
    assert stripes(264, 64, 132) == (264, 64)  # the tiles fill it exactly
    assert stripes(300, 64, 132) == (264, 72)  # no second wave of 36 tiles
    assert stripes(4096, 64, 132) == (4096, 64)  # many waves: a run for each tile
    assert stripes(8, 20, 132) == (40, 4)  # not less than four steps
    assert stripes(3, 2, 132) == (3, 2)


@pytest.mark.parametrize("group", [-1, 32, 64, 96, 128])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_groups_zeros_and_minima(group, scale_dtype):
    n, k = 48, 384
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    groups = 1 if group == -1 else k // group
    scales = (torch.rand(n, groups) * 0.1 + 0.01).to(scale_dtype)
    x = torch.randn(9, k).half()
    check(x, Int4Weight(codes, scales), what="symmetric")
    check(x, Int4Weight(codes, scales, zeros=(torch.rand(n, groups) * 15).to(scale_dtype)), what="float zeros")
    mins = torch.rand(n, groups).to(scale_dtype)
    scales[3] = 0.0  # a group of one value: only its minimum counts
    check(x, Int4Weight(codes, scales, mins=mins), what="minima")


def test_act_order_planes_and_shapes_of_x():
    weight = int4.quantize(torch.randn(64, 256), group_size=32)
    perm = torch.randperm(256, dtype=torch.int32)
    check(torch.randn(3, 256).half(), Int4Weight(weight.codes, weight.scales, perm=perm), what="perm")
    check(torch.randn(3, 256).half(), int4.quantize(torch.randn(64, 256), group_size=32, bits=8), what="8 bits")
    x = torch.randn(2, 3, 512).half()[..., :256]
    assert check(x, weight, what="strided").shape == (2, 3, 64)
    check(torch.empty(0, 256).half(), weight, what="no rows")


def test_orders_of_warps_agree():
    weight, x = int4.quantize(torch.randn(136, 1024), group_size=128), torch.randn(20, 1024).half()
    results = []
    for seed in range(4):
        os.environ["FASTOPS_EMULATOR_SEED"] = str(seed)
        try:
            results.append(check(x, weight))
        finally:
            del os.environ["FASTOPS_EMULATOR_SEED"]
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("end", [True, False])
def test_guard_pages(end):
    for m, n, k in ((1, 40, 64), (19, 24, 1024)):
        packed = int4.quantize(torch.randn(n, k), group_size=32, symmetric=False).packed()
        x, codes, scales, zeros = (
            guarded(t, end) for t in (torch.randn(m, k).half(), packed.codes, packed.scales, packed.rest["zeros"])
        )
        op("int4_linear_out", x, codes, scales, zeros, out=guarded(torch.empty(m, n).half(), end))


def test_refusals():
    weight, x = int4.quantize(torch.randn(16, 48), group_size=16), torch.randn(2, 48)
    with torch.no_grad(), fastops.override(int4_linear="cuda-emulated"):
        with pytest.raises(fastops.NotSupportedError, match="x is float32"):
            fastops.int4_linear(x, weight)
        with pytest.raises(fastops.NotSupportedError, match="multiple of 32 columns"):
            fastops.int4_linear(x.half(), weight)
        with pytest.raises(fastops.NotSupportedError, match="column_scales"):
            fastops.int4_linear(torch.randn(2, 64).half(), int4.quantize(torch.randn(16, 64), 16, dim="input"))


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
    ("m", "n", "k", "group"),
    [
        (70, 128, 128, 64),
        (130, 200, 192, -1),
        (256, 136, 640, 128),
        (65, 24, 72, -1),
        (90, 40, 320, 320),
        (70, 130, 128, 64),  # two blocks of features, a cluster; the rows of x end in its second half, or before
        (100, 520, 384, 64),
    ],
)
def test_many_rows_on_hopper(dtype, m, n, k, group):
    w, x = torch.randn(n, k), torch.randn(m, k).to(dtype)
    with hopper():
        check(x, int4.quantize(w, group), torch.randn(n), "symmetric")
        check(x, int4.quantize(w, group, symmetric=False), None, "zeros")
        symmetric = int4.quantize(w, group)
        check(x, Int4Weight(symmetric.codes, symmetric.scales, mins=torch.rand(symmetric.scales.shape)), None, "minima")


@pytest.mark.parametrize("n", [64, 256])  # one block of features, and a cluster of two
def test_planes_strides_and_orders_on_hopper(n):
    w = int4.quantize(torch.randn(n, 128), 64, bits=8)
    x = torch.randn(80, 300).half()[:, :128]
    x = torch.empty(80, 304).half()[:, :128].copy_(x)
    results = []
    for seed in range(4):
        os.environ["FASTOPS_EMULATOR_SEED"] = str(seed)
        try:
            with hopper():
                results.append(check(x, w, what="8 bits"))
        finally:
            del os.environ["FASTOPS_EMULATOR_SEED"]
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k", "group"),
    [(1, 128, 2048, -1), (5, 40, 64, 32), (20, 136, 2560, 160), (33, 24, 104, -1), (70, 256, 96, 32)],
)
def test_int8_activations(dtype, m, n, k, group):
    """Tails of every dimension, splits of K inside groups and at their ends; zeros, minima, planes, act-order."""
    w, x = torch.randn(n, k), torch.randn(m, k).to(dtype)
    plain = int4.quantize(w, group)
    check(x, plain, torch.randn(n), "symmetric", "int8")
    check(x, int4.quantize(w, group, symmetric=False), None, "zeros", "int8")
    check(x, Int4Weight(plain.codes, plain.scales, mins=torch.rand(plain.scales.shape)), None, "minima", "int8")
    check(x, Int4Weight(plain.codes, plain.scales, perm=torch.randperm(k).int()), None, "perm", "int8")
    if k % 16 == 0:
        check(x, int4.quantize(w, group, bits=8), None, "8 bits", "int8")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize(("m", "n", "k", "group"), [(1, 136, 2048, 128), (20, 40, 96, 32), (70, 24, 72, -1)])
def test_24_sparse(dtype, activations, m, n, k, group):
    weight = int4.quantize(torch.randn(n, k), group, sparsity="2:4")
    check(torch.randn(m, k).to(dtype), weight, torch.randn(n), "2:4", activations)


def test_int8_rows_of_zeros_and_nan():
    x = torch.randn(4, 64).half()
    x[1], x[2, 3], x[3, 5] = 0.0, torch.nan, torch.inf
    got = check(x, int4.quantize(torch.randn(24, 64), 32), activations="int8")
    assert not got[1].any()
    assert bool(torch.isnan(got[2:]).all())


@pytest.mark.parametrize("end", [True, False])
def test_guard_pages_of_the_other_kernels(end):
    for m, n, k, arch, int8, sparse in (
        (80, 40, 192, "90", False, False), (80, 136, 192, "90", False, False), (3, 40, 1032, "80", True, False), (19, 24, 64, "80", True, True),
        (2, 24, 72, "80", False, True),
    ):  # fmt: skip
        packed = int4.quantize(torch.randn(n, k), -1, symmetric=sparse, sparsity="2:4" if sparse else None).packed()
        x, codes, scales = (guarded(t, end) for t in (torch.randn(m, k).half(), packed.codes, packed.scales))
        zeros = None if sparse else guarded(packed.rest["zeros"], end)
        os.environ["FASTOPS_EMULATOR_ARCH"] = arch
        try:
            op(
                "int4_linear_out",
                x,
                codes,
                scales,
                zeros,
                activations=int(int8),
                out=guarded(torch.empty(m, n).half(), end),
            )
        finally:
            del os.environ["FASTOPS_EMULATOR_ARCH"]
