"""The CUDA norms, gated activations and merge_states, emulated on CPU tensors, against the reference."""

import pytest
import torch

import fastops
from fastops.ops.gated import reference as gated_reference
from fastops.ops.gated import reference_backward
from fastops.ops.merge_states import reference as merge_reference
from fastops.ops.norm import reference_norm
from fastops.testing import assert_matches, guarded
from tests.cuda import capi
from tests.cuda.capi import op

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NORMS = dict.fromkeys(("rms_norm", "layer_norm", "fused_add_rms_norm"), "cuda-emulated")


def near(got, exact, same, what):
    assert_matches(got, exact, same, factor=3, what=what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 37, 64, 1000, 4096, 9000])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_norm(dtype, n, layer, added):
    """Every length takes another way: registers, and what does not fit them; aligned rows and others."""
    x, r = (torch.randn(3, n).to(dtype) for _ in range(2))
    r = r if added else None
    w, b = torch.randn(n).to(dtype), torch.randn(n) if layer else None
    options = {"weight_offset": 1.0, "layer": layer, "stats": True}
    got = op("norm", x, r, w, b, 1e-6, **options)
    wide = [None if t is None else t.double() for t in (x, r, w, b)]
    exact, same = (reference_norm(*a, 1e-6, **options) for a in (wide, (x, r, w, b)))
    near(got[0], exact[0], same[0], "out")
    if added:
        near(got[1], exact[1], same[1], "sum")
    near(got[4], exact[4], same[4], "rstd")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant", ["int8", "fp8"])
@pytest.mark.parametrize("n", [40, 2048])
def test_quantised_results(dtype, quant, n):
    x, w = torch.randn(4, n).to(dtype), torch.randn(n).to(dtype)
    x[2] = 0.0  # a row of zeros has scale 1
    with torch.no_grad(), fastops.override(**NORMS):
        codes, scales = fastops.rms_norm(x, w, quant=quant)
        r = torch.randn(4, n).to(dtype)
        total = (x.float() + r.float()).to(dtype)
        fused, fused_scales = fastops.fused_add_rms_norm(x, r, w, quant=quant)
    want, want_scales = fastops.ops.norm._rms_reference(x, w, quant=quant)
    torch.testing.assert_close(scales, want_scales, rtol=1e-5, atol=0)
    off = (codes.float() - want.float()).abs()
    step = 1.0 if quant == "int8" else want.float().abs() / 8 + 2**-9  # one code, where a sum rounds the other way
    assert bool((off <= step).all())
    assert float((off > 0).float().mean()) < 0.01
    assert torch.equal(r, total)
    assert fused.dtype == codes.dtype
    assert fused_scales.shape == (4,)


def test_norms_as_operators():
    """The public operators with the provider forced: out=, in place, strides, five dimensions."""
    x, w = torch.randn(2, 3, 2, 1, 64), torch.randn(64)
    with torch.no_grad(), fastops.override(**NORMS):
        out = torch.empty_like(x)
        assert fastops.rms_norm(x, w, out=out) is out
        near(
            out,
            reference_norm(x.double(), None, w.double(), None, 1e-6)[0],
            reference_norm(x, None, w, None, 1e-6)[0],
            "out=",
        )
        strided = torch.randn(5, 128)[:, ::2]
        got = fastops.layer_norm(strided, w, w)
        near(got, torch.nn.functional.layer_norm(strided.double(), (64,), w.double(), w.double()),
             torch.nn.functional.layer_norm(strided, (64,), w, w), "strided")  # fmt: skip
        a, r = torch.randn(7, 64), torch.randn(7, 64)
        want = reference_norm(a.double(), r.double(), w.double(), None, 1e-6)
        same = reference_norm(a, r, w, None, 1e-6)
        y, total = fastops.fused_add_rms_norm(a, r, w)
        assert y is a
        assert total is r
        near(a, want[0], same[0], "in place")
        near(r, want[1], same[1], "residual")
        assert fastops.rms_norm(torch.empty(0, 64), w).shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 37), (1, 5000)])
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_gated(dtype, shape, activation):
    gate, up, dout = (torch.randn(shape).to(dtype) * 3 for _ in range(3))
    wide = [t.double() for t in (gate, up)]
    near(
        op("geglu", gate, up, approximate=("", "tanh", "none")[activation]) if activation else op("swiglu", gate, up),
        gated_reference(*wide, activation),
        gated_reference(gate, up, activation),
        "out",
    )
    got = op("gated_backward", dout, gate, up, activation)
    exact, same = (reference_backward(*a, activation) for a in ((dout.double(), *wide), (dout, gate, up)))
    for g, e, s, name in zip(got, exact, same, ("dgate", "dup"), strict=True):
        near(g, e, s, name)


def test_gated_as_operators():
    x = torch.randn(5, 128).half()
    for name, options in (("silu_and_mul", {}), ("gelu_and_mul", {"approximate": "none"})):
        with torch.no_grad(), fastops.override(**{name: "cuda-emulated"}):
            got = getattr(fastops, name)(x, **options)
        kind = 0 if name == "silu_and_mul" else 2
        gate, up = x.chunk(2, -1)
        near(got, gated_reference(gate.double(), up.double(), kind), gated_reference(gate, up, kind), name)
    gate, up = x.chunk(2, -1)
    with torch.no_grad(), fastops.override(swiglu="cuda-emulated", geglu="cuda-emulated"):
        near(
            fastops.swiglu(gate, up),
            gated_reference(gate.double(), up.double(), 0),
            gated_reference(gate, up, 0),
            "swiglu",
        )
        out = torch.empty(5, 64).half()
        fastops.geglu(gate, up, out=out)
        near(out, gated_reference(gate.double(), up.double(), 1), gated_reference(gate, up, 1), "geglu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("four", [True, False])
def test_merge_states(dtype, four):
    shape, sums = ((2, 5, 3, 72), (2, 3, 5)) if four else ((5, 3, 72), (3, 5))
    outs = [torch.randn(shape).to(dtype) for _ in range(4)]
    lses = [torch.randn(sums) * 5 for _ in range(4)]
    lses[1][..., 0] = -torch.inf
    outs[1][..., 0, :, :] = torch.nan  # saw nothing: its values do not count
    for lse in lses:
        lse[..., 2] = -torch.inf  # nobody saw a key
    with torch.no_grad(), fastops.override(merge_states="cuda-emulated"):
        out, lse = fastops.merge_states(outs, lses)
    exact = merge_reference([o.double() for o in outs], [s.double() for s in lses])
    same = merge_reference(outs, lses)
    near(out, exact[0], same[0], "out")
    near(lse, exact[1], same[1], "lse")
    many = [outs[0]] * 33, [lses[0]] * 33
    with (
        fastops.override(merge_states="cuda-emulated"),
        pytest.raises(fastops.NotSupportedError, match="joins up to 32"),
    ):
        fastops.merge_states(*many)


@pytest.mark.parametrize("end", [True, False])
def test_guard_pages(end):
    for n in (8, 37, 1024):
        x, r, w = (guarded(t.half(), end) for t in (torch.randn(3, n), torch.randn(3, n), torch.randn(n)))
        y, total, codes, scales = (
            guarded(t, end) for t in (torch.empty_like(x), x.clone(), x.to(torch.int8), torch.empty(3))
        )
        capi.run("norm", capi.Norm(layer=1, eps=1e-6), x=x, residual=r, sum=total, weight=w, bias=w, out=y)
        capi.run("norm", capi.Norm(eps=1e-6), x=x, weight=w, out=codes, scales=scales)
        capi.run("gated", capi.Gated(), gate=x, up=r, out=y)
        capi.run("gated", capi.Gated(), gate=x, up=r, dout=y, dgate=total, dup=guarded(torch.empty_like(x), end))


def test_every_emulated_row_runs():
    """No operator offers a row that cannot be called."""
    x, r, w = torch.randn(2, 3, 4, 64), torch.randn(2, 3, 4, 64), torch.randn(64)
    half, cos = [t.half() for t in (x, r)], torch.randn(3, 32)
    cu, pages, lens = (torch.tensor(t, dtype=torch.int32) for t in ([0, 2, 6], [[1], [0]], [2, 1]))
    calls = {
        "rms_norm": (x, w), "layer_norm": (x, w), "fused_add_rms_norm": (x.clone(), r.clone(), w), "add_rms_norm": (x, r, w),
        "silu_and_mul": (x,), "gelu_and_mul": (x,), "swiglu": (x, r), "geglu": (x, r), "apply_rope": (x, r, cos, cos),
        "qk_norm_rope": (x, r, w, w, cos, cos), "merge_states": ([x, r], [torch.randn(2, 4, 3)] * 2),
        "attention": (*half, half[1]), "attention_varlen": (half[0].flatten(0, 1),) * 3 + (cu, cu),
        "attention_paged": (half[0][:, 0], half[0].transpose(0, 1)[:2], half[1].transpose(0, 1)[:2], pages, lens),
        "int4_linear": (half[0], fastops.int4.quantize(torch.randn(16, 64), group_size=32)),
    }  # fmt: skip
    offered = {n for n, op in fastops.dispatch.operators.items() if op.row("cuda-emulated")}
    assert offered == set(calls)
    for name, args in calls.items():
        with torch.no_grad(), fastops.override(**{name: "cuda-emulated"}):
            got = getattr(fastops, name)(*args)
        with torch.no_grad(), fastops.override(**{name: "reference"}):
            copies = [t.clone() if isinstance(t, torch.Tensor) else t for t in args]
            if name == "fused_add_rms_norm":
                copies = [x.clone(), r.clone(), w]
            want = getattr(fastops, name)(*copies)
        for g, e in zip(*(t if isinstance(t, tuple) else (t,) for t in (got, want)), strict=True):
            torch.testing.assert_close(g.float(), e.float(), rtol=5e-3, atol=5e-3)
    strided = torch.randn(5, 2, 128)[..., ::2]
    more = torch.randn(5, 2, 64)
    want = reference_norm(strided.double(), more.double(), w.double(), None, 1e-6)
    with torch.no_grad(), fastops.override(fused_add_rms_norm="cuda-emulated"):
        fastops.fused_add_rms_norm(strided, more, w)
    torch.testing.assert_close(strided, want[0].float())
    torch.testing.assert_close(more, want[1].float())
