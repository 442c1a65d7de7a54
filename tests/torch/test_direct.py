"""Direct calls (csrc/python/direct.h): taken only where torch's dispatcher has nothing to do but find the kernel."""

from __future__ import annotations

import dataclasses
import sys
import threading
import weakref

import pytest
import torch

import fastops
from fastops import _cuda, _ops

pytestmark = pytest.mark.skipif(_ops.control is None, reason="the compiled library is not built")
C = _ops.control


@pytest.fixture
def x():
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def taken(x, weight=None, out=None):
    return C.direct_rms_norm(x, weight, 1e-6, 0.0, out)


def calls():
    g = torch.Generator().manual_seed(1)
    x, y, w = (torch.randn(*shape, generator=g) for shape in ((6, 64), (6, 64), (64,)))
    q, k = torch.randn(6, 4, 64, generator=g), torch.randn(6, 2, 64, generator=g)
    cos, sin = torch.rand(6, 32, generator=g), torch.rand(6, 32, generator=g)
    none = (None,) * 6
    ops = torch.ops.fastops
    yield "rms_norm", (x, w, 1e-6, 1.0, None), lambda: ops.rms_norm(x, w, 1e-6, weight_offset=1.0)
    yield "layer_norm", (x, w, w, 1e-5, None), lambda: ops.layer_norm(x, w, w, 1e-5)
    for kind, codes in ((1, torch.int8), (2, torch.float8_e4m3fn)):
        yield (
            "rms_norm_quantised",
            (x, w, 1e-6, 1.0, codes),
            lambda kind=kind: ops.norm(x, None, w, None, 1e-6, weight_offset=1.0, quant=kind)[::2][:2],
        )
        yield (
            "layer_norm_quantised",
            (x, w, w, 1e-5, codes),
            lambda kind=kind: ops.norm(x, None, w, w, 1e-5, layer=True, quant=kind)[::2][:2],
        )
    yield "silu_and_mul", (x, torch.empty(6, 32)), lambda: ops.silu_and_mul(x)
    for kind in ("tanh", "none"):
        into = torch.empty(6, 32)
        yield f"gelu_and_mul_{kind}", (x, into), lambda kind=kind: ops.gelu_and_mul(x, approximate=kind)
        yield f"geglu_{kind}", (x, y, None), lambda kind=kind: ops.geglu(x, y, approximate=kind)
    yield "swiglu", (x, y, None), lambda: ops.swiglu(x, y)
    yield (
        "apply_rope",
        (q, k, cos, sin, None, True, None, None),
        lambda: ops.apply_rope(q, k, cos, sin, interleaved=True),
    )
    yield (
        "qk_norm_rope",
        (q, k, w, w, cos, sin, 1e-6, 1.0, None, False, *none),
        lambda: ops.qk_norm_rope(q, k, w, w, cos, sin, eps=1e-6, weight_offset=1.0),
    )
    weight = fastops.int4.quantize(torch.randn(24, 64, generator=g), group_size=32, symmetric=False)
    packed, bias = weight.packed(), torch.randn(24, generator=g)
    yield (
        "int4_linear",
        (x.view(2, 3, 64), *packed.arguments, bias, 1, None),
        lambda: ops.int4_linear(x, packed.codes, packed.scales, 24, **packed.rest, bias=bias, activations=1).view(
            2, 3, 24
        ),
    )
    a, b, c = torch.randn(2, 3, 4, 64, generator=g), torch.randn(2, 9, 2, 64, generator=g), torch.randn(2, 9, 2, 32)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    yield (
        "attention",
        (a, b, c, None, None, 4, 0, 20.0, slopes, slopes, None, False),
        lambda: ops.attention(a, b, c, causal=True, window_left=4, softcap=20.0, sinks=slopes, alibi_slopes=slopes)[0],
    )
    yield (
        "attention",
        (a, b, c, None, None, -1, 0, 0.0, None, None, None, True),
        lambda: ops.attention(a, b, c, causal=True, return_lse=True),
    )
    masks = (
        torch.rand(2, 1, 3, 9, generator=g) > 0.5,
        torch.randn(4, 1, 9, generator=g),
        torch.randn(3, 1, generator=g).expand(3, 9),
        torch.randn(9, 3, generator=g).T.bfloat16(),
    )
    for m in masks:
        yield (
            "attention",
            (a, b, c, m, None, -1, -1, 0.0, None, None, None, False),
            lambda m=m: ops.attention(a, b, c, attn_mask=m)[0],
        )
        yield (
            "scaled_dot_product_attention",
            (a.transpose(1, 2), b.transpose(1, 2), c.transpose(1, 2), m, False, None, True, None),
            lambda m=m: ops.scaled_dot_product_attention(
                a.transpose(1, 2), b.transpose(1, 2), c.transpose(1, 2), m, enable_gqa=True
            ),
        )
    ends = torch.tensor([0, 1, 5], dtype=torch.int32), torch.tensor([0, 0, 9], dtype=torch.int32)
    for lse in (False, True):  # the last row of q is nobody's
        yield (
            "attention_varlen",
            (a.view(6, 4, 64), b[0], c[0], *ends, 0.2, -1, 0, 0.0, slopes, None, None, lse),
            lambda lse=lse: ops.attention_varlen(
                a.view(6, 4, 64), b[0], c[0], *ends, causal=True, scale=0.2, sinks=slopes, return_lse=lse
            )[slice(None) if lse else 0],
        )
    parts = [ops.attention(a, b[:, i : i + 3], c[:, i : i + 3], return_lse=True) for i in (0, 3, 6)]
    outs, lses = [list(x) for x in zip(*parts, strict=True)]
    yield "merge_states", (outs, lses), lambda: ops.merge_states(outs, lses)
    rows = [x.flatten(0, 1) for x in outs], [torch.rand(4, 6, generator=g) for _ in lses]
    yield "merge_states", rows, lambda: ops.merge_states(*rows)
    for outliers in (0.0, 0.01):
        table = fastops.lut.quantize(torch.randn(24, 64, generator=g), sparsity=outliers)
        looked = table.packed()
        yield (
            "lut_linear",
            (x.view(2, 3, 64), *looked.arguments, bias, None),
            lambda p=looked: ops.lut_linear(x, p.codes, p.table, **p.rest, bias=bias).view(2, 3, 24),
        )
    cache, table = torch.randn(5, 4, 2, 64, generator=g), torch.tensor([[3, 0], [1, 4]], dtype=torch.int32)
    lens = torch.tensor([7, 5], dtype=torch.int32)
    yield (
        "attention_paged",
        (a[:, 0], cache, cache, table, lens, None, 0.3, -1, -1, 0.0, None, None, None, True),
        lambda: ops.attention_paged(a[:, 0], cache, cache, table, lens, scale=0.3, return_lse=True),
    )
    for form in ("kv4", "int8", "fp8", "kivi2"):
        small = fastops.kv.PagedCache(form, 5, 32, 2, 64, batch=2)
        small_q = a[:, 0].bfloat16()
        fastops.kv.append(small, *torch.randn(2, 2, 2, 64), table, torch.zeros(2, dtype=torch.int32))
        ones, quant = torch.tensor([1, 1], dtype=torch.int32), small.quant
        named = {f.name: getattr(quant, f.name) for f in dataclasses.fields(quant)}
        yield (
            "attention_paged_quantised",
            (small_q, small.k, small.v, table, ones, None, *named.values(), None, -1, -1, 0.0, None, None, None, False),
            lambda small=small, small_q=small_q, ones=ones, named=named: ops.attention_paged(
                small_q, small.k, small.v, table, ones, **named
            )[0],
        )
    wide = torch.randn(2, 4, 9, 20, generator=g)
    yield (
        "scaled_dot_product_attention",
        (a.transpose(1, 2), b.transpose(1, 2), c.transpose(1, 2), None, True, None, True, None),
        lambda: ops.scaled_dot_product_attention(
            a.transpose(1, 2), b.transpose(1, 2), c.transpose(1, 2), is_causal=True, enable_gqa=True
        ),
    )
    yield (
        "scaled_dot_product_attention",
        (wide[:, :, :3], wide, wide, None, False, 0.2, False, None),
        lambda: ops.scaled_dot_product_attention(wide[:, :, :3], wide, wide, scale=0.2),
    )
    yield "scale_add", (x, y, 2, None), lambda: ops.scale_add(x, y, alpha=2.0)


@pytest.mark.parametrize(("name", "args", "operator"), [pytest.param(*c, id=c[0]) for c in calls()])
def test_gives_what_the_operator_gives(name, args, operator):
    got, expected = getattr(C, f"direct_{name}")(*args), operator()
    for a, b in zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]:
        assert torch.equal(a, b)
        assert a.is_contiguous()


def test_in_place(x):
    residual = torch.randn(4, 64)
    a, b = x.clone(), residual.clone()
    assert C.direct_fused_add_rms_norm(a, b, None, 1e-6, 0.0) is True
    torch.ops.fastops.fused_add_rms_norm(x, residual)
    assert torch.equal(a, x)
    assert torch.equal(b, residual)


def test_quantised_after_an_addition(x):
    residual = torch.randn(4, 64)
    total, before = residual.clone(), x.clone()
    codes, scales = C.direct_fused_add_rms_norm_quantised(x, total, None, 1e-6, 0.0, torch.int8)
    expected = torch.ops.fastops.norm(x, residual, None, None, 1e-6, quant=1)
    for got, want in zip((codes, total, scales, x), (*expected[:3], before), strict=True):
        assert torch.equal(got, want)
    assert C.direct_rms_norm_quantised(x, None, 1e-6, 0.0, torch.int16) is None
    assert C.direct_rms_norm_quantised(x, None, 1e-6, 0.0, "int8") is None
    assert C.direct_rms_norm_quantised(x[0], None, 1e-6, 0.0, torch.int8) is None  # a scale without dimensions


def test_takes_masks_that_broadcast_only():
    q, k = torch.randn(2, 3, 4, 16), torch.randn(2, 9, 4, 16)
    with pytest.raises(ValueError, match="not both"):
        fastops.scaled_dot_product_attention(q, q, q, torch.ones(4, 4, dtype=torch.bool), is_causal=True)
    for mask in (
        torch.ones(9),
        torch.ones(2, 9),
        torch.ones(1, 2, 4, 3, 9),
        torch.ones(3, 9).double(),
        torch.ones(3, 9).int(),
    ):
        assert C.direct_attention(q, k, k, mask, None, -1, -1, 0.0, None, None, None, False) is None
    with pytest.raises(ValueError, match="must broadcast to"):
        fastops.attention(q, k, k, attn_mask=torch.ones(2, 9))


def test_merges_what_goes_together_only():
    o, l = torch.randn(2, 3, 8), torch.randn(3, 2)
    assert C.direct_merge_states([o, o], [l, l]) is not None
    for outs, lses in (
        ([], []), ([o], [l, l]), ((o, o), (l, l)), ([o, o[:1]], [l, l]), ([o, o], [l, l.T]), ([o, o], [l, l.double()]),
        ([o, 1], [l, l]), ([o] * 17, [l] * 17),
    ):  # fmt: skip
        assert C.direct_merge_states(outs, lses) is None
    many = fastops.merge_states([o] * 17, [l] * 17)
    assert torch.allclose(many[0], o, atol=1e-6)


def test_writes_to_out_and_returns_it(x):
    out = torch.empty_like(x)
    assert taken(x, out=out) is out
    assert torch.equal(out, torch.ops.fastops.rms_norm(x))


class Sub(torch.Tensor):
    pass


def test_takes_plain_dense_tensors_only(x):
    assert taken(x) is not None
    assert taken(x, torch.nn.Parameter(torch.ones(64), requires_grad=False)) is not None
    imaginary = torch.randn(4, 64, dtype=torch.complex64).conj().imag
    assert imaginary.is_neg()
    for other in (
        x.double(), x.t(), x[:, ::2], imaginary, x.to("meta"), x.to_sparse(), x.as_subclass(Sub), x.view(1, 1, 1, 1, 4, 64),
        x.int(), torch.tensor(1.0), None, 3, torch.nn.UninitializedParameter(),
    ):  # fmt: skip
        assert taken(other) is None
    assert taken(x, weight=torch.ones(63)) is None
    assert taken(x, weight=torch.ones(64).double()) is None
    assert taken(x, out=torch.empty(4, 63)) is None
    assert taken(x, out=[1]) is None
    assert C.direct_rms_norm(x, None, "1", 0.0, None) is None
    assert C.direct_rms_norm(x, None, -1.0, 0.0, None) is None
    with pytest.raises(TypeError, match="needs 5 arguments, got 1"):
        C.direct_rms_norm(x)


def test_negated_tensors_come_out_right():
    imaginary = torch.randn(4, 64, dtype=torch.complex64).conj().imag
    assert torch.allclose(fastops.rms_norm(imaginary), fastops.rms_norm(imaginary.clone()))


def test_leaves_gradients_to_autograd(x):
    wants = x.clone().requires_grad_()
    assert taken(wants) is None
    assert taken(x, weight=torch.ones(64, requires_grad=True)) is None
    with torch.no_grad():
        assert taken(wants) is not None
    with torch.inference_mode():
        assert taken(x) is not None


def test_leaves_modes_to_torch(x):
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    out = torch.empty_like(x)
    with Seen():
        assert taken(x, out=out) is None
        fastops.rms_norm(x, out=out)
    assert any(name.startswith("fastops.rms_norm") for name in names)
    with TorchFunctionMode():
        assert taken(x) is None
    with fastops.override(rms_norm="reference"):
        assert taken(x) is None
    with _cuda.emulated():
        assert taken(x) is None
    assert taken(x) is not None


def test_transforms_see_the_operator(x):
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda t: fastops.rms_norm(t))(x)
    assert "fastops.rms_norm" in graph.code
    seen = []
    torch.func.functionalize(lambda t: seen.append(taken(t)) or t)(x)
    torch.func.vmap(lambda t: seen.append(taken(t)) or t)(x)
    torch.func.grad(lambda t: seen.append(taken(t)) or t.sum())(x)
    assert seen == [None] * 3


def test_a_profile_shows_the_operator(x):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert taken(x) is None
        fastops.rms_norm(x)
    assert any("fastops::rms_norm" in event.key for event in profile.key_averages())
    assert taken(x) is not None


def test_autograd_notices_what_was_overwritten(x):
    leaf = torch.ones(4, 64, requires_grad=True)
    out = torch.empty_like(x)
    y = leaf * out  # keeps out
    before = out._version
    assert taken(x, out=out) is out
    assert out._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_products_take_rows_without_a_copy_only(x):
    weight = fastops.int4.quantize(torch.randn(16, 64), group_size=32)

    def product(x, out=None):
        return C.direct_int4_linear(x, *weight.packed().arguments, None, 0, out)

    expected = product(x)
    assert torch.equal(product(x.view(2, 2, 64)), expected.view(2, 2, 16))
    assert torch.allclose(product(x[1]), expected[1], atol=1e-4)
    assert product(torch.empty(2, 0, 64)).shape == (2, 0, 16)
    every_other = torch.randn(4, 3, 2, 64)[:, :, 0]
    assert torch.equal(product(every_other), product(every_other.clone()))
    assert product(torch.randn(2, 3, 64).transpose(0, 1)) is None
    assert product(x, torch.empty(4, 15)) is None
    assert product(x[:, :32]) is None
    assert product(torch.randn(4, 128)) is None  # would pass for two planes
    wide = torch.zeros(4, 32)
    assert product(x, wide[:, 8:24]) is not None
    assert torch.equal(wide[:, 8:24], expected)
    assert not wide[:, :8].any()


def test_sdpa_refuses_unequal_heads_without_gqa():
    q, k = torch.randn(1, 4, 2, 16), torch.randn(1, 2, 2, 16)
    assert C.direct_scaled_dot_product_attention(q, k, k, None, False, None, False, None) is None
    assert C.direct_scaled_dot_product_attention(q, k, k, None, False, None, True, None) is not None
    with pytest.raises(ValueError, match="enable_gqa"):
        fastops.scaled_dot_product_attention(q, k, k)


def test_rope_makes_only_the_results_that_are_wanted():
    q, k, angles = torch.randn(2, 1, 16), torch.randn(2, 1, 16), torch.rand(2, 8)
    caches = torch.zeros(1, 4, 1, 16), torch.zeros(1, 4, 1, 16)
    slots = torch.tensor([2, 0])
    out, none = fastops.qk_norm_rope(
        q, k, None, None, angles, angles, v=k, slots=slots, k_cache=caches[0], v_cache=caches[1],
        out=(torch.empty_like(q), None),
    )  # fmt: skip
    assert none is None
    turned = fastops.apply_rope(q, k, angles, angles)
    assert torch.equal(out, turned[0])
    assert torch.equal(caches[0][0, [2, 0]], turned[1])
    assert fastops.apply_rope(q, None, angles, angles)[1] is None


@pytest.mark.parametrize("form", ["int8", "fp8", "kv4", "kivi2"])
def test_kv_append_writes_what_the_operator_writes(form):
    k, v = torch.randn(2, 80, 2, 64).bfloat16()
    table, lens = torch.tensor([[3, 0, 1]], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    caches = [fastops.kv.PagedCache(form, 5, 32, 2, 64, recent=16) for _ in range(2)]
    quants = [{f.name: getattr(c.quant, f.name) for f in dataclasses.fields(c.quant)} for c in caches]
    before = caches[0].k._version
    got = C.direct_kv_append(k, v, caches[0].k, caches[0].v, table, lens, None, *quants[0].values(), None)
    assert caches[0].k._version == before + 1
    assert torch.equal(got, torch.ops.fastops.kv_append(k, v, caches[1].k, caches[1].v, table, lens, **quants[1]))
    assert caches[0].k.any()
    pairs = zip(*(q.values() for q in quants), strict=True)
    for ours, theirs in [(caches[0].k, caches[1].k), (caches[0].v, caches[1].v), *pairs]:
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_keeps_no_references(x):
    out, weight = torch.empty_like(x), torch.ones(64)
    objects = (x, out, weight, None)
    before = [sys.getrefcount(o) for o in objects[:3]]
    for _ in range(100):
        taken(x, weight, out)
        taken(x, weight)
        taken(x.double())
        taken(x, torch.ones(63), out)
        taken(x, torch.ones(63))
    assert [sys.getrefcount(o) for o in objects[:3]] == before
    result = weakref.ref(taken(x))
    assert result() is None


def test_many_threads_at_once(x):
    expected, wrong = taken(x), []

    def work():
        for _ in range(200):
            if not torch.equal(taken(x), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
