"""apply_rope and qk_norm_rope against the reference, on every variant."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastops
from fastops.ops.rope import _qk_reference, _rope_reference
from fastops.testing import ROWS_SERVED_BY, assert_matches, guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SERVED_BY = ROWS_SERVED_BY


def table(places, half):
    angle = torch.arange(places)[:, None] * 100.0 ** -(torch.arange(half) / half)
    return angle.cos(), angle.sin()


def compare(got, exact, same):
    for a, e, s in zip(got, exact, same, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert_matches(a, e, s)


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("d", "half"), [(2, 1), (64, 32), (80, 20), (128, 64), (256, 64), (34, 17), (7, 2), (8, 0)])
def test_apply_rope(isa, dtype, interleaved, d, half):
    q, k = torch.randn(2, 5, 4, d).to(dtype), torch.randn(2, 5, 1, d).to(dtype)
    cos, sin = table(5, half)
    for c, s in ((cos, sin), (cos.to(dtype), sin.to(dtype)), (cos.expand(2, 5, half), sin.expand(2, 5, half))):
        exact = _rope_reference(*double(q, k, c, s), interleaved=interleaved)
        same = _rope_reference(q, k, c, s, interleaved=interleaved)
        compare(fastops.apply_rope(q, k, c, s, interleaved=interleaved), exact, same)
    got = fastops.apply_rope(q, None, cos, sin, interleaved=interleaved)
    assert got[1] is None
    ragged = fastops.apply_rope(q[1], k[1], cos, sin, interleaved=interleaved)
    assert torch.equal(ragged[0], got[0][1])


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_positions(isa, kind):
    q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16)
    cos, sin = table(100, 8)
    for positions in (torch.tensor([3, 99, 0, 7, 8]), torch.randint(0, 100, (2, 5))):
        want = fastops.apply_rope(q, k, cos[positions], sin[positions])
        got = fastops.apply_rope(q, k, cos, sin, positions=positions.to(kind))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    got = fastops.apply_rope(q[0], None, cos, sin, positions=torch.arange(10, dtype=kind)[::2])
    assert torch.equal(got[0], fastops.apply_rope(q[0], None, cos[:10:2].contiguous(), sin[:10:2].contiguous())[0])


@pytest.mark.parametrize("strided", [False, True])
def test_k_into_the_cache_alone(strided):
    """out=(q_out, None), by the direct call, by torch's dispatcher (which a profiler brings in) and by the reference."""
    q, k, w = torch.randn(5, 4, 16), torch.randn(5, 2, 16), torch.randn(16)
    table_of = table(5, 8)
    found = []

    def run():
        cache, v_cache = torch.zeros(2, 4, 2, 16), torch.zeros(2, 4, 2, 16)
        q_out = torch.zeros(5, 4, 32)[..., ::2] if strided else torch.zeros(5, 4, 16)
        got = fastops.qk_norm_rope(
            q, k, w, w, *table_of, v=k, k_cache=cache, v_cache=v_cache, slots=torch.arange(5), out=(q_out, None)
        )
        assert got[0] is q_out
        assert got[1] is None
        found.append((q_out, cache, v_cache))

    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        run()
    with fastops.override(qk_norm_rope="reference"):
        run()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    with pytest.raises(TypeError, match=r"out\[1\] must be a tensor, got NoneType"):
        fastops.qk_norm_rope(q, k, w, w, *table_of, out=(torch.empty_like(q), None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("interleaved", [False, True])
def test_qk_norm_rope(isa, dtype, offset, interleaved):
    for d, half in ((64, 32), (128, 64), (24, 8), (9, 3)):
        q, k = torch.randn(2, 7, 6, d).to(dtype), torch.randn(2, 7, 2, d).to(dtype)
        qw, kw = torch.randn(d).to(dtype), torch.randn(d)
        cos, sin = table(7, half)
        options = {"eps": 1e-5, "weight_offset": offset, "interleaved": interleaved}
        exact = _qk_reference(*double(q, k, qw, kw, cos, sin), **options)
        compare(
            fastops.qk_norm_rope(q, k, qw, kw, cos, sin, **options),
            exact,
            _qk_reference(q, k, qw, kw, cos, sin, **options),
        )
        plain = fastops.qk_norm_rope(q, k, None, None, cos, sin, interleaved=interleaved)
        want = fastops.apply_rope(q, k, cos, sin, interleaved=interleaved)
        assert all(torch.equal(a, b) for a, b in zip(plain, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_into_a_paged_cache(isa, dtype):
    t, d, dv = 9, 64, 40
    q, k, v = torch.randn(t, 4, d).to(dtype), torch.randn(t, 2, d).to(dtype), torch.randn(t, 2, dv).to(dtype)
    w, (cos, sin) = torch.randn(d), table(t, 32)
    slots = torch.randperm(5 * 4)[:t]
    slots[4] = -1
    room = torch.randn(5, 4, 2, d + 3).to(dtype)
    k_cache, v_cache = room[..., :d], torch.randn(5, 4, 2, dv).to(dtype)
    before_k, before_v = k_cache.clone(), v_cache.clone()
    want_q, want_k = fastops.qk_norm_rope(q, k, w, w, cos, sin)
    got = fastops.qk_norm_rope(q, k, w, w, cos, sin, v=v, k_cache=k_cache, v_cache=v_cache, slots=slots)
    assert torch.equal(got[0], want_q)
    assert torch.equal(got[1], want_k)
    for cache, before, new in ((k_cache, before_k, want_k), (v_cache, before_v, v)):
        expect = before.reshape(20, 2, -1).clone()
        for i, s in enumerate(slots.tolist()):
            if s >= 0:
                expect[s] = new[i]
        assert torch.equal(cache.reshape(20, 2, -1), expect)
    # What attention_paged then reads: one sequence in order.
    cache = torch.zeros(3, 4, 2, d, dtype=dtype)
    fastops.qk_norm_rope(q, k, w, w, cos, sin, k_cache=cache, slots=torch.arange(t))
    assert torch.equal(cache.view(12, 2, d)[:t], want_k)


def test_out_in_place_and_strides(isa):
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)  # [B,H,S,D], as transformers has them
    cos, sin = table(5, 8)
    want = fastops.apply_rope(q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), cos, sin)
    view = q.transpose(1, 2), k.transpose(1, 2)
    assert all(torch.equal(a, b) for a, b in zip(fastops.apply_rope(*view, cos, sin), want, strict=True))
    doubled = torch.cat((cos, cos), -1)[:, :8], torch.cat((sin, sin), -1)[:, :8]
    assert torch.equal(fastops.apply_rope(*view, *doubled)[0], want[0])
    odd = torch.empty(2, 5, 16, 4).transpose(2, 3), torch.empty(2, 5, 16, 2).transpose(2, 3)
    fastops.apply_rope(*view, cos, sin, out=odd)
    assert torch.equal(odd[1], want[1])
    got = fastops.apply_rope(*view, cos, sin, out=view)
    assert got[0] is view[0]
    assert torch.equal(q, want[0].transpose(1, 2))
    assert torch.equal(k, want[1].transpose(1, 2))


@given(
    lead=st.lists(st.integers(0, 4), min_size=1, max_size=2),
    heads=st.tuples(st.integers(0, 3), st.integers(0, 2)),
    d=st.integers(1, 40),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_shapes(isa, lead, heads, d, share, dtype, interleaved, seed):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn([*lead, h, d], generator=g).to(dtype) for h in heads)
    half = int(share * (d // 2))
    cos, sin = (torch.randn([*lead, half], generator=g) for _ in range(2))
    w = torch.randn(d, generator=g)
    exact = _qk_reference(*double(q, k, w, w, cos, sin), interleaved=interleaved)
    same = _qk_reference(q, k, w, w, cos, sin, interleaved=interleaved)
    compare(fastops.qk_norm_rope(q, k, w, w, cos, sin, interleaved=interleaved), exact, same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [6, 16, 34, 64])
@pytest.mark.parametrize("end", [True, False])
def test_stays_inside_its_tensors(isa, dtype, d, end):
    def guard(*shape):
        return guarded(torch.randn(shape).to(dtype), end)

    q, k, v, w = guard(3, 4, d), guard(3, 2, d), guard(3, 2, d), guard(d)
    cos, sin, out = guard(3, d // 2 - 1), guard(3, d // 2 - 1), (guard(3, 4, d), guard(3, 2, d))
    cache, v_cache, slots = guard(2, 2, 2, d), guard(2, 2, 2, d), guarded(torch.tensor([3, 0, 1]), end)
    for interleaved in (False, True):
        fastops.qk_norm_rope(
            q, k, w, w, cos, sin, interleaved=interleaved, out=out, v=v, k_cache=cache, v_cache=v_cache, slots=slots
        )
        want = fastops.qk_norm_rope(*(t.clone() for t in (q, k, w, w, cos, sin)), interleaved=interleaved)
        assert torch.equal(out[0], want[0])
        assert torch.equal(cache.view(4, 2, d)[3], want[1][0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(isa, dtype, interleaved):
    q, k = torch.randn(2, 5, 4, 24).to(dtype), torch.randn(2, 5, 2, 24).to(dtype)
    gq, gk, w = torch.randn_like(q), torch.randn_like(k), torch.randn(24).to(dtype)
    cos, sin = table(5, 8)

    def grads(run, cast):
        a, b, c = (cast(t).detach().requires_grad_() for t in (q, k, w))
        out = run(a, b, c, cast(cos), cast(sin))
        return torch.autograd.grad(out, (a, b, c), (cast(gq), cast(gk)), allow_unused=True)

    def rope(fn):
        return lambda a, b, c, cos, sin: fn(a, b, cos.float(), sin.float(), interleaved=interleaved)

    def norm(fn):
        return lambda a, b, c, cos, sin: fn(a, b, c, c, cos.float(), sin.float(), interleaved=interleaved)

    for ours, theirs in (
        (rope(fastops.apply_rope), rope(_rope_reference)),
        (norm(fastops.qk_norm_rope), norm(_qk_reference)),
    ):
        got = grads(ours, lambda t: t.clone())
        exact, same = grads(theirs, lambda t: t.double()), grads(theirs, lambda t: t.clone())
        # Two kernels, so two roundings, where the reference has one.
        for a, e, s in zip(got, exact, same, strict=True):
            if e is not None:
                assert_matches(a, e, s, factor=4.0)


X, C = torch.randn(2, 5, 4, 16), torch.randn(5, 8)
CACHE, SLOTS = torch.randn(2, 8, 4, 16), torch.arange(10)
BAD = [
    (lambda: fastops.apply_rope(1, None, C, C), TypeError, "apply_rope: q must be a tensor, got int"),
    (lambda: fastops.apply_rope(X[0, 0], None, C, C), ValueError, r"q has shape \[4, 16\], must be \[B,S,H,D\]"),
    (lambda: fastops.apply_rope(X, X.half(), C, C), TypeError, "apply_rope: k is float16 on cpu, q float32"),
    (lambda: fastops.apply_rope(X, X[:1], C, C), ValueError, r"k has shape \[1, 5, 4, 16\], must be \[2, 5, 'Hkv', 16\]"),
    (lambda: fastops.apply_rope(X, None, C, C[:4]), ValueError, r"sin has shape \[4, 8\], cos \[5, 8\]; they must agree"),
    (lambda: fastops.apply_rope(X, None, C[:4], C[:4]), ValueError, r"cos has shape \[4, 8\], must be \[2, 5, 'R/2'\] or"),
    (lambda: fastops.apply_rope(X, None, C.repeat(1, 2), C.repeat(1, 2)), ValueError, "cos has 16 angles, the head size 16 has room for 8. Hint"),
    (lambda: fastops.apply_rope(X, None, C, C, positions=torch.arange(5.0)), TypeError, "positions must be int32 or int64"),
    (lambda: fastops.apply_rope(X, None, C, C, positions=torch.arange(4)), ValueError, r"positions has shape \[4\], must be"),
    (lambda: fastops.apply_rope(X, None, C, C, positions=torch.arange(1, 6)), ValueError, "positions run from 1 to 5, cos has rows 0 to 4"),
    (lambda: fastops.apply_rope(X, None, C, C, positions=torch.arange(-1, 4)), ValueError, "positions run from -1"),
    (lambda: fastops.apply_rope(X, X, C, C, out=(X, X[:1])), ValueError, r"out\[1\] has shape"),
    (lambda: fastops.qk_norm_rope(X, None, C, None, C, C), ValueError, r"q_weight has shape \[5, 8\], must be \[16\]"),
    (lambda: fastops.qk_norm_rope(X, X, None, None, C, C, k_cache=CACHE), ValueError, "v, k_cache and v_cache need slots"),
    (lambda: fastops.qk_norm_rope(X, X, None, None, C, C, slots=SLOTS), ValueError, "slots need k and k_cache"),
    (lambda: fastops.qk_norm_rope(X, X, None, None, C, C, k_cache=CACHE, slots=SLOTS + 7), ValueError, "slots go up to 16, the cache has 16"),
    (lambda: fastops.qk_norm_rope(X, X, None, None, C, C, k_cache=CACHE, slots=SLOTS.int()), TypeError, "slots must be int64"),
    (lambda: fastops.qk_norm_rope(X, X, None, None, C, C, k_cache=CACHE[:, :, :2], slots=SLOTS), ValueError, r"k_cache has shape \[2, 8, 2, 16\]"),
    (lambda: fastops.qk_norm_rope(X, X, None, None, C, C, v=X, k_cache=CACHE, slots=SLOTS), ValueError, "v and v_cache go together"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), BAD)
def test_bad_input_gets_a_clear_error(call, kind, text):
    for _ in range(2):
        with pytest.raises(kind, match=text):
            call()
        fastops.apply_rope(X, X, C, C), fastops.qk_norm_rope(X, X, None, None, C, C)


def test_compiles_whole(isa):
    torch._dynamo.reset()
    q, w = torch.randn(5, 4, 16), torch.randn(16)

    def run(q):
        a, b = fastops.apply_rope(q, q, C, C)
        c, _ = fastops.qk_norm_rope(q, None, w, None, C, C)
        return a + b + c

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(q), run(q))
