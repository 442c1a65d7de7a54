"""The CUDA backward of the norms, emulated on CPU tensors, against the reference."""

import pytest
import torch

from fastops.ops.norm import reference_backward, reference_norm
from fastops.testing import assert_matches, guarded
from tests.cuda import capi
from tests.cuda.capi import op
from tests.cuda.test_cuda_attention import seed

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(dtype, rows, n, layer, added):
    s, dout, dsum = (torch.randn(rows, n).to(dtype) for _ in range(3))
    w = torch.randn(n).to(dtype)
    _, _, _, mean, rstd = reference_norm(s.float(), None, w.float(), None, 1e-6, layer=layer, stats=True)
    return dout, dsum if added else None, s, w, mean, rstd


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n"), [(3, 1), (5, 37), (300, 64), (2, 1000), (3, 4096), (4, 9000)])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_matches_reference(dtype, rows, n, layer, added):
    """More rows than groups, more columns than a thread keeps sums of, aligned rows and others."""
    dout, dsum, s, w, mean, rstd = inputs(dtype, rows, n, layer, added)
    options = {"weight_offset": 0.0 if layer else 1.0, "layer": layer, "dbias": layer}
    got = op("norm_backward", dout, dsum, s, w, mean, rstd, **options)
    wide = [None if t is None else t.double() for t in (dout, dsum, s, w, mean, rstd)]
    exact, same = reference_backward(*wide, **options), reference_backward(dout, dsum, s, w, mean, rstd, **options)
    for g, e, a, what in zip(got, exact, same, ("ds", "dweight", "dbias"), strict=True):
        if e.numel():
            assert_matches(g, e, a, factor=4, what=what)
        else:
            assert not g.numel()


def test_without_weight_and_without_rows():
    dout, _, s, _, mean, rstd = inputs(torch.float32, 4, 64, False, False)
    ds, dw, db = op("norm_backward", dout, None, s, None, mean, rstd, dweight=False)
    torch.testing.assert_close(ds, reference_backward(dout, None, s, None, mean, rstd, dweight=False)[0])
    assert not dw.numel()
    assert not db.numel()
    none = torch.empty(0, 64)
    ds, dw, _ = op("norm_backward", none, None, none, torch.ones(64), torch.empty(0), torch.empty(0))
    assert ds.shape == (0, 64)
    assert torch.equal(dw, torch.zeros(64))


def test_every_order_of_warps_gives_the_same_bits():
    call = inputs(torch.float16, 20, 1000, True, True)
    results = []
    for n in range(4):
        with seed(n):
            results.append(op("norm_backward", *call, layer=True, dbias=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("n", [40, 33])
def test_guard_pages(end, n):
    dout, dsum, s, w, mean, rstd = (guarded(t, end) for t in inputs(torch.bfloat16, 6, n, True, True))
    ds, dw, db = (guarded(t, end) for t in (torch.empty_like(s), torch.empty(n), torch.empty(n)))
    capi.run("norm_bwd", capi.NormBackward(layer=1), True, dout=dout, dsum=dsum, s=s, weight=w, mean=mean, rstd=rstd,
             ds=ds, dweight=dw, dbias=db)  # fmt: skip


def test_bad_input():
    dout, dsum, s, w, mean, rstd = inputs(torch.float32, 4, 64, False, False)
    with pytest.raises(ValueError, match="dout has shape"):
        op("norm_backward", dout[:3], dsum, s, w, mean, rstd)
    with pytest.raises(TypeError, match="weight"):
        op("norm_backward", dout, dsum, s, w.double(), mean, rstd)
