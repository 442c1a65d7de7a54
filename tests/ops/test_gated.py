"""silu_and_mul, gelu_and_mul, swiglu, geglu against the reference, on every variant."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastops
from fastops.ops.gated import GELU, GELU_TANH, SILU, reference
from fastops.testing import ROWS_SERVED_BY, assert_matches, guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SERVED_BY = ROWS_SERVED_BY
KINDS = [SILU, GELU_TANH, GELU]


def joined(x, kind, **options):
    if kind == SILU:
        return fastops.silu_and_mul(x, **options)
    return fastops.gelu_and_mul(x, approximate="tanh" if kind == GELU_TANH else "none", **options)


def paired(gate, up, kind, **options):
    if kind == SILU:
        return fastops.swiglu(gate, up, **options)
    return fastops.geglu(gate, up, approximate="tanh" if kind == GELU_TANH else "none", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2,), (3, 34), (2, 5, 128), (1, 2, 1, 2, 2, 6), (0, 8), (3, 40002), (4, 0)])
def test_matches_reference(isa, dtype, kind, shape):
    x = (torch.randn(shape) * 4).to(dtype)
    gate, up = x.chunk(2, -1)
    exact, same = reference(gate.double(), up.double(), kind), reference(gate, up, kind)
    out = joined(x, kind)
    assert out.is_contiguous()
    assert_matches(out, exact, same, what=f"{shape} {dtype}")
    assert torch.equal(paired(gate, up, kind), out)
    assert torch.equal(joined(x, kind, out=torch.empty_like(out)), out)
    fastops.silu_and_mul(torch.ones(2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_range(isa, kind):
    """From far below to far above 0: the tails neither overflow nor lose their sign."""
    gate = torch.cat([torch.linspace(-30, 30, 20001), torch.tensor([-1e4, -200.0, -88.0, 88.0, 200.0, 1e4, 0.0, -0.0])])
    up = torch.ones_like(gate)
    exact = reference(gate.double(), up.double(), kind)
    out = paired(gate, up, kind).double()
    assert ((out - exact).abs() <= 3e-7 * exact.abs() + 2e-7).all()
    assert torch.isfinite(out).all()


@given(
    shape=st.lists(st.integers(0, 7), max_size=3),
    n=st.integers(1, 50),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_shapes_and_orders(isa, shape, n, dtype, kind, seed):
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(shape), generator=g).tolist()
    x = torch.randn([*shape, 2 * n + 3], generator=g).to(dtype)[..., 3:].permute(*order, len(shape))
    gate, up = x.chunk(2, -1)
    assert_matches(joined(x, kind), reference(gate.double(), up.double(), kind), reference(gate, up, kind))
    fastops.silu_and_mul(torch.ones(2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("end", [True, False])
def test_stays_inside_its_tensors(isa, dtype, n, end):
    gate, up, out = (guarded(torch.randn(3, n).to(dtype), end) for _ in range(3))
    want = fastops.swiglu(gate.clone(), up.clone())
    assert torch.equal(fastops.swiglu(gate, up, out=out), want)
    x = guarded(torch.randn(3, 2 * n).to(dtype), end).requires_grad_()
    fastops.silu_and_mul(x).sum().backward()
    assert fastops.swiglu(gate, up, out=gate) is gate  # in place
    assert torch.equal(gate, want)


def test_large_results_pass_the_caches(isa):
    for x in (torch.randn(2100, 4096), torch.randn(2100, 8192).bfloat16()):
        parts = torch.cat([fastops.silu_and_mul(p) for p in x.split(100)])
        assert torch.equal(fastops.silu_and_mul(x), parts)


def test_same_bits_for_any_number_of_threads(isa):
    x = torch.randn(300, 2002)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fastops.gelu_and_mul(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(isa, dtype, kind):
    gate, up, g = ((torch.randn(2, 5, 37) * 2).to(dtype) for _ in range(3))

    def grads(run, cast):
        a, b = (cast(t).detach().requires_grad_() for t in (gate, up))
        return torch.autograd.grad(run(a, b), (a, b), cast(g))

    exact = grads(lambda a, b: reference(a, b, kind), lambda t: t.double())
    same = grads(lambda a, b: reference(a, b, kind), lambda t: t.clone())
    two = grads(lambda a, b: paired(a, b, kind), lambda t: t.clone())
    one = grads(lambda a, b: joined(torch.cat((a, b), -1), kind), lambda t: t.clone())
    for got in (two, one):
        for a, e, s in zip(got, exact, same, strict=True):
            assert_matches(a, e, s)
    # A gradient that is not dense.
    a = gate.clone().requires_grad_()
    paired(a, up, kind).transpose(0, 2).backward(g.transpose(0, 2).contiguous())
    assert_matches(a.grad, exact[0], same[0])


@pytest.mark.parametrize("kind", KINDS)
def test_reference_gradcheck(kind):
    x = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    with fastops.override(silu_and_mul="reference", gelu_and_mul="reference"):
        assert torch.autograd.gradcheck(lambda x: joined(x, kind), (x,))


X = torch.randn(2, 4)
BAD = [
    (lambda: fastops.silu_and_mul(3), TypeError, "silu_and_mul: x must be a tensor, got int"),
    (lambda: fastops.silu_and_mul(X.long()), TypeError, "silu_and_mul: x is int64"),
    (
        lambda: fastops.silu_and_mul(X[:, :3]),
        ValueError,
        r"silu_and_mul: x has shape \[2, 3\], its last dimension must",
    ),
    (lambda: fastops.silu_and_mul(X, out=X), ValueError, r"silu_and_mul: out has shape \[2, 4\], must be \[2, 2\]"),
    (lambda: fastops.gelu_and_mul(X, approximate="fast"), ValueError, "gelu_and_mul: approximate is 'fast', allowed"),
    (lambda: fastops.geglu(X, X, approximate="x"), ValueError, "geglu: approximate is 'x'"),
    (lambda: fastops.swiglu(X, X[:1]), ValueError, r"swiglu: up has shape \[1, 4\], gate \[2, 4\]; they must agree"),
    (lambda: fastops.swiglu(X, X.half()), TypeError, "swiglu: up is float16 on cpu, gate float32 on cpu"),
    (lambda: fastops.swiglu(X, None), TypeError, "swiglu: up must be a tensor, got NoneType"),
]


@pytest.mark.parametrize(("call", "kind", "text"), BAD)
def test_bad_input_gets_a_clear_error(call, kind, text):
    for _ in range(2):
        with pytest.raises(kind, match=text):
            call()
        fastops.silu_and_mul(X), fastops.gelu_and_mul(X), fastops.swiglu(X, X), fastops.geglu(X, X)


def test_compiles_whole(isa):
    torch._dynamo.reset()
    fn = torch.compile(
        lambda x: fastops.gelu_and_mul(x) + fastops.swiglu(x, x)[..., :4], fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(5, 8)
    torch.testing.assert_close(fn(x), fastops.gelu_and_mul(x) + fastops.swiglu(x, x)[..., :4])
