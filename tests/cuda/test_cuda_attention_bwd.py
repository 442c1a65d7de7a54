"""Attention's backward on CUDA, emulated on CPU tensors (and on a GPU where there is one) against the reference."""

import pytest
import torch

import fastops
from fastops.testing import assert_matches, guarded
from tests.cuda import capi
from tests.cuda.capi import op
from tests.cuda.test_cuda_attention import DTYPES, OPTIONS, PROVIDERS, seed


@pytest.fixture(params=PROVIDERS)
def provider(request):
    return request.param


def gradients(name, provider, inputs, index, dout, dlse, dtype, **options):
    """Of q, k, v (and sinks), through autograd; CPU tensors in and out."""
    device = "cuda" if provider == "cuda" else "cpu"
    leaves = [t.detach().to(device, t.dtype if i > 2 else dtype).requires_grad_() for i, t in enumerate(inputs)]
    options = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    if len(leaves) > 3:
        options["sinks"] = leaves[3]
    with fastops.override(**{name: provider}):
        out, lse = getattr(fastops, name)(*leaves[:3], *(t.to(device) for t in index), return_lse=True, **options)
        values, grads = [out], [dout.to(device, dtype)]
        if dlse is not None:
            values, grads = [out, lse], [*grads, dlse.to(device)]
        return [g.cpu() for g in torch.autograd.grad(values, leaves, grads)]


def check(name, provider, inputs, index, dout, dlse, dtype, **options):
    got = gradients(name, provider, inputs, index, dout, dlse, dtype, **options)
    exact = gradients(name, "reference", inputs, index, dout, dlse, torch.float64, **options)
    same = gradients(name, "reference", inputs, index, dout, dlse, dtype, **options)
    for g, e, s, what in zip(got, exact, same, ("dq", "dk", "dv"), strict=False):
        assert_matches(g, e, s, factor=4, what=f"{what} {options}")
    if len(got) > 3:  # from the forward's out, which is rounded to its dtype; the reference keeps fp32
        tolerance = torch.finfo(dtype).eps * 4
        torch.testing.assert_close(got[3].double(), exact[3].double(), atol=tolerance, rtol=tolerance)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sq", "sk", "hkv", "d", "dv"),
    [(70, 130, 3, 64, 40), (33, 20, 1, 8, 16), (20, 90, 2, 128, 128), (9, 70, 3, 72, 104), (40, 50, 2, 256, 200), (1, 65, 6, 64, 64)],
)  # fmt: skip
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_dense(provider, dtype, sq, sk, hkv, d, dv, options):
    inputs = [torch.randn(2, s, h, n).to(dtype) for s, h, n in ((sq, 6, d), (sk, hkv, d), (sk, hkv, dv))]
    if "sinks" in options:
        inputs.append(options["sinks"])
    options = {n: o for n, o in options.items() if n != "sinks"}
    dout = torch.randn(2, sq, 6, dv).to(dtype)
    for dlse in (None, torch.randn(2, 6, sq)):
        check("attention", provider, inputs, (), dout, dlse, dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_varlen(provider, dtype):
    inputs = [torch.randn(n, h, 64).to(dtype) for n, h in ((80, 4), (150, 2), (150, 2))]
    inputs.append(torch.randn(4))
    cu_q = torch.tensor([0, 3, 3, 70], dtype=torch.int32)  # ten rows belong to no one
    cu_k = torch.tensor([0, 90, 100, 140], dtype=torch.int32)
    dout, dlse = torch.randn(80, 4, 64).to(dtype), torch.zeros(4, 80)
    dlse[:, :70] = torch.randn(4, 70)
    got = check("attention_varlen", provider, inputs, (cu_q, cu_k), dout, dlse, dtype, causal=True)
    assert not got[0][70:].any()
    assert not got[1][90:100].any()  # keys without a query
    assert not got[2][140:].any()


def call(q, k, v, dout, **options):
    out, lse = op("attention", q, k, v, return_lse=True, **options)
    return op("attention_backward", dout, None, out, lse, q, k, v, **options)


def test_every_order_of_warps_gives_the_same_bits():
    q, k, v = (torch.randn(1, s, 2, 64).half() for s in (70, 200, 200))
    results = []
    for n in range(4):
        with seed(n):
            results.append(call(q, k, v, torch.ones_like(q), causal=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("d", [8, 72, 136])
def test_guard_pages(end, d):
    """Every tensor, gradients too, between unreadable pages."""
    for sq, sk in ((1, 37), (70, 65)):
        q, k, v = (guarded(torch.randn(1, s, 2, d).half(), end) for s in (sq, sk, sk))
        dout, out = (guarded(torch.zeros(1, sq, 2, d).half(), end) for _ in range(2))
        lse, sinks, dsinks = (guarded(t, end) for t in (torch.zeros(1, 2, sq), torch.zeros(2), torch.zeros(2)))
        dq, dk, dv = (guarded(torch.empty_like(t), end) for t in (q, k, v))
        forward = capi.attention(q, window_right=0)
        capi.run("attention_fwd", forward, True, q=q, k=k, v=v, out=out, lse=lse, sinks=sinks)
        backward = capi.AttentionBackward(fwd=forward)
        capi.run("attention_bwd", backward, True, dout=dout, dq=dq, dk=dk, dv=dv, dsinks=dsinks)


def test_indices_outside_their_tensors_give_nan():
    q, k = torch.randn(10, 2, 64).half(), torch.randn(20, 2, 64).half()
    cu_q, cu_k = torch.tensor([0, 4, 10]).int(), torch.tensor([0, 9, 20]).int()
    out, lse = op("attention_varlen", q, k, k, cu_q, cu_k, return_lse=True)
    cu_k[1] = 99
    dq, dk, _, _ = op("attention_varlen_backward", torch.ones_like(q), None, out, lse, q, k, k, cu_q, cu_k)
    assert bool(torch.isnan(dq).all())
    assert dk.shape == k.shape


def test_refusals():
    q, k = torch.randn(1, 5, 4, 64).half().requires_grad_(), torch.randn(1, 9, 2, 64).half()
    with fastops.override(attention="cuda-emulated"), pytest.raises(fastops.NotSupportedError, match="attn_mask"):
        fastops.attention(q, k, k, attn_mask=torch.ones(5, 9, dtype=torch.bool))
    q, k = q.detach(), torch.randn(1, 9, 2, 64)
    with pytest.raises(TypeError):
        call(q, k.half(), k.half(), torch.ones(1, 5, 4, 64))
    with pytest.raises(fastops.NotSupportedError, match="float32"):
        op("attention_backward", q.float(), None, q.float(), torch.zeros(1, 4, 5), q.float(), k, k)
