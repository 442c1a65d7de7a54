"""rms_norm, fused_add_rms_norm, add_rms_norm, layer_norm against the reference, on every variant."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastops
from fastops.ops.norm import QUANT, quantise_rows, reference_norm
from fastops.testing import ROWS_SERVED_BY, assert_matches, guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SERVED_BY = ROWS_SERVED_BY
SHAPES = [(1,), (7,), (2, 33), (5, 64), (3, 4, 129), (2, 1, 3, 1000), (1, 2, 1, 2, 2, 48), (0, 16), (400, 4099)]


def exact(x, residual=None, weight=None, bias=None, eps=1e-6, **options):
    wide = [None if t is None else t.double() for t in (x, residual, weight, bias)]
    return reference_norm(*wide, eps, **options)


def check(x, weight, offset):
    out = fastops.rms_norm(x, weight, 1e-5, weight_offset=offset)
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    same = reference_norm(x, None, weight, None, 1e-5, weight_offset=offset)[0]
    assert_matches(out, exact(x, None, weight, eps=1e-5, weight_offset=offset)[0], same, what=f"{list(x.shape)}")
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(isa, dtype, shape):
    x, weight = (torch.randn(shape) * 3).to(dtype), torch.randn(shape[-1])
    check(x, weight.to(dtype), 0.0)
    check(x, weight, 1.0)  # fp32 weights with 16-bit rows
    check(x, None, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(isa, dtype, shape):
    x, w, b = (torch.randn(shape) + 2).to(dtype), torch.randn(shape[-1]).to(dtype), torch.randn(shape[-1]).to(dtype)
    for weight, bias in ((w, b), (w.float(), None), (None, None)):
        out = fastops.layer_norm(x, weight, bias)
        same = reference_norm(x, None, weight, bias, 1e-5, layer=True)[0]
        assert_matches(out, exact(x, None, weight, bias, 1e-5, layer=True)[0], same, what=f"{shape}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_add_rms_norm(isa, dtype, shape):
    x, r, w = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    want = exact(x, r, w)
    same = reference_norm(x, r, w, None, 1e-6)
    new, total = fastops.add_rms_norm(x, r, w)
    for got, e, s in zip((new, total), want, same, strict=False):
        assert_matches(got, e, s)
    x2, r2 = x.clone(), r.clone()
    out = fastops.fused_add_rms_norm(x2, r2, w)
    assert out[0] is x2
    assert out[1] is r2
    assert torch.equal(x2, new)
    assert torch.equal(r2, total)
    codes, scales = fastops.fused_add_rms_norm(x, r, w, quant="int8")
    assert torch.equal(r, total)
    assert codes.shape == x.shape
    assert scales.shape == x.shape[:-1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant", ["int8", "fp8"])
@pytest.mark.parametrize("n", [1, 17, 64, 1000])
def test_quantised_results(isa, dtype, quant, n):
    x, w = torch.randn(9, n).to(dtype), torch.randn(n)
    x[3] = 0.0
    codes, scales = fastops.rms_norm(x, w, quant=quant)
    want, want_scales = quantise_rows(exact(x, None, w)[0], QUANT[quant])
    assert codes.dtype == want.dtype
    torch.testing.assert_close(scales, want_scales.float(), rtol=1e-5, atol=0)
    assert scales[3] == 1.0
    # A code may differ where the scaled value lies on the border of two: by one step, and rarely.
    a, b = codes.double(), want.double()
    step = 1.0 if quant == "int8" else torch.maximum(b.abs() / 8, torch.tensor(2.0**-9))
    assert ((a - b).abs() <= step).all()
    assert (a != b).double().mean() <= 0.01
    codes, scales = fastops.layer_norm(x, w, w, quant=quant)
    want, want_scales = quantise_rows(exact(x, None, w, w, 1e-5, layer=True)[0], QUANT[quant])
    torch.testing.assert_close(scales, want_scales.float(), rtol=1e-5, atol=0)


def test_every_fp8_rounding(isa):
    """Codes of numbers around every e4m3 value and border, beside torch's own conversion."""
    codes = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    borders = (codes[1:] + codes[:-1]) / 2
    x = torch.cat(
        [codes, borders, torch.nextafter(borders, torch.tensor(0.0)), torch.nextafter(borders, torch.tensor(1e9))]
    )
    x = torch.cat([x, -x])[None]
    # With a weight of rms(x) / 448 * 448 the row's scale is 1: what is rounded is x.
    rms = x.double().square().mean().sqrt()
    y, scales = fastops.rms_norm(x, torch.full((x.shape[1],), rms.item()), 0.0, quant="fp8")
    assert abs(scales.item() - 1.0) < 1e-6
    differs = y.float() != x.to(torch.float8_e4m3fn).float()
    assert not differs[:, :127].any()
    assert differs.float().mean() < 0.7  # the borders themselves may fall to either side


@given(
    shape=st.lists(st.integers(0, 7), min_size=0, max_size=4),
    n=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_shapes_and_orders(isa, shape, n, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(shape), generator=g).tolist()
    x = torch.randn([*shape, 2 * n], generator=g).to(dtype)[..., :n].permute(*order, len(shape))
    check(x, torch.randn(n, generator=g), 0.0)
    fastops.rms_norm(torch.ones(1))  # empty calls leave a trace of the variant, too


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 100, 2113])
@pytest.mark.parametrize("end", [True, False])
def test_stays_inside_its_tensors(isa, dtype, n, end):
    def guard(*shape, dtype=dtype):
        return guarded(torch.randn(shape).to(dtype), end)

    x, r, w, b, out = guard(3, n), guard(3, n), guard(n), guard(n), guard(3, n)
    plain = x.clone(), r.clone(), w.clone(), b.clone()
    assert torch.equal(fastops.rms_norm(x, w, out=out), fastops.rms_norm(plain[0], plain[2]))
    assert torch.equal(fastops.layer_norm(x, w, b, out=out), fastops.layer_norm(plain[0], plain[2], plain[3]))
    fastops.rms_norm(x, w, quant="fp8")
    fastops.fused_add_rms_norm(x, r, w)
    assert torch.equal(x, fastops.add_rms_norm(*plain[:3])[0])
    grad = guard(3, n).requires_grad_()
    fastops.layer_norm(grad, w, b).sum().backward()


def test_same_bits_for_any_number_of_threads(isa):
    x, w = torch.randn(70, 1001, requires_grad=True), torch.randn(1001, requires_grad=True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = fastops.rms_norm(x, w)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, w))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_one_after_another(isa, dtype):
    """Long rows are finished while the next one is summed: each has the bits it has alone, however they lie, in place too."""
    x, w = torch.randn(9, 2500).to(dtype), torch.randn(2113).to(dtype)
    for rows in (x[:, :2113], x[::2, 387:], x[:1, :2113].expand(5, 2113), x[:, :2048]):
        weight = w[: rows.shape[1]]
        alone = torch.cat([fastops.rms_norm(r[None].clone(), weight, 1e-5) for r in rows])
        assert torch.equal(check(rows, weight, 0.0), alone)
    view = x[:, 100:2213]
    want = fastops.rms_norm(view.clone(), w)
    fastops.rms_norm(view, w, out=view)
    assert torch.equal(view, want)


def test_large_results_pass_the_caches(isa):
    """Above 16 MiB rows are stored another way; the results are the same."""
    x, w = torch.randn(2100, 2048), torch.randn(2048)
    parts = torch.cat([fastops.rms_norm(p, w) for p in x.split(100)])
    assert torch.equal(fastops.rms_norm(x, w), parts)
    h = x.half()
    assert torch.equal(
        fastops.rms_norm(h.repeat(2, 1), w)[:2100], torch.cat([fastops.rms_norm(p, w) for p in h.split(100)])
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_as_few(isa, dtype):
    """Brief calls are shared out another way, and each thread widens the weights for itself: the same bits."""
    x, w, b = torch.randn(700, 1003).to(dtype), torch.randn(1003).to(dtype), torch.randn(1003).to(dtype)
    calls = [
        lambda t: (fastops.rms_norm(t, w, weight_offset=1.0),),
        lambda t: fastops.rms_norm(t, w, quant="int8"),
        lambda t: (fastops.layer_norm(t, w, b),),
        lambda t: fastops.add_rms_norm(t, t.flip(-1), w),
    ]
    for call in calls:
        parts = [torch.cat(p) for p in zip(*(call(t) for t in x.split(60)), strict=True)]
        assert all(torch.equal(got, want) for got, want in zip(call(x), parts, strict=True))


def test_strides_in_place_and_out(isa):
    base = torch.randn(6, 8, 40)
    x = base[::2, 1::3, 5:30]
    want = fastops.rms_norm(x.contiguous())
    assert torch.equal(fastops.rms_norm(x), want)
    assert torch.equal(fastops.rms_norm(x.transpose(0, 1)), want.transpose(0, 1))
    assert torch.equal(fastops.rms_norm(base.transpose(0, 2)), fastops.rms_norm(base.transpose(0, 2).contiguous()))
    columns = torch.empty(3, 25, 3).transpose(1, 2)
    assert fastops.rms_norm(x, out=columns) is columns
    assert torch.equal(columns, want)
    t, r = base.clone().transpose(0, 2), base.clone().transpose(0, 2)
    fastops.fused_add_rms_norm(t, r)
    assert torch.equal(r, (base + base).transpose(0, 2))
    assert fastops.rms_norm(x, out=x) is x
    assert torch.equal(x, want)


def test_special_values(isa):
    x = torch.ones(4, 40)
    x[0, 3], x[1, 39], x[2] = float("nan"), float("inf"), 0.0
    out, (codes, scales) = fastops.rms_norm(x), fastops.rms_norm(x, quant="int8")
    assert out[0].isnan().all()
    assert out[1, 39].isnan()
    assert (out[1, :39] == 0).all()
    assert (out[2] == 0).all()
    assert scales[:2].isnan().all()
    assert torch.isfinite(scales[2:]).all()
    assert codes.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [False, True])
def test_gradients(isa, dtype, layer):
    x, r = torch.randn(2, 11, 37).to(dtype), torch.randn(2, 11, 37).to(dtype)
    w, b, g = torch.randn(37).to(dtype), torch.randn(37).to(dtype), torch.randn(2, 11, 37).to(dtype)

    def grads(run, cast):
        inputs = [cast(t).detach().requires_grad_() for t in (x, r, w, b)]
        out = run(*inputs)
        total = sum((o * cast(g) * (i + 1)).sum() for i, o in enumerate(out))
        return torch.autograd.grad(total, inputs[: 4 if layer else 3], allow_unused=True)

    def ours(x, r, w, b):
        return (fastops.layer_norm(x, w, b), x + r) if layer else fastops.add_rms_norm(x, r, w)

    def theirs(x, r, w, b):
        eps = 1e-5 if layer else 1e-6
        if layer:
            return torch.nn.functional.layer_norm(x, (37,), w, b, eps), x + r
        return torch.nn.functional.rms_norm(x + r, (37,), w, eps), x + r

    got = grads(ours, lambda t: t.clone())
    want, same = grads(theirs, lambda t: t.double()), grads(theirs, lambda t: t.clone())
    for name, a, e, s in zip("xrwb", got, want, same, strict=False):
        assert_matches(a, e, s, what=f"gradient of {name}")
    fastops.rms_norm(x)


def test_in_place_gradients(isa):
    """Two layers that write over one residual, as models chain them."""
    x, w = torch.randn(5, 24, requires_grad=True), torch.randn(2, 24, requires_grad=True)

    def chain(norm):
        h, residual = x * 1.0, x * 0.5
        for i in range(2):
            h, residual = norm(h, residual, w[i])
            h = h * 1.5
        return (h * residual).sum()

    got = torch.autograd.grad(chain(fastops.fused_add_rms_norm), (x, w))
    want = torch.autograd.grad(chain(fastops.add_rms_norm), (x, w))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_reference_gradcheck():
    x, w = (
        torch.randn(3, 6, dtype=torch.double, requires_grad=True),
        torch.randn(6, dtype=torch.double, requires_grad=True),
    )
    for op in ("rms_norm", "layer_norm", "add_rms_norm"):
        with fastops.override(**{op: "reference"}):
            fn = getattr(fastops, op)
            run = (lambda a, b: fn(a, a * 2, b)) if op == "add_rms_norm" else fn  # noqa: B023
            assert torch.autograd.gradcheck(run, (x, w))


X = torch.randn(2, 3)
BAD = [
    (lambda: fastops.rms_norm([1.0]), TypeError, "rms_norm: x must be a tensor, got list"),
    (lambda: fastops.rms_norm(X.int()), TypeError, "rms_norm: x is int32, allowed: float32"),
    (lambda: fastops.rms_norm(torch.tensor(1.0)), ValueError, r"rms_norm: x has shape \[\], needs a last dimension"),
    (lambda: fastops.rms_norm(X, torch.ones(4)), ValueError, r"rms_norm: weight has shape \[4\], must be \[3\]"),
    (lambda: fastops.rms_norm(X, X[0].int()), TypeError, "rms_norm: weight is int32"),
    (lambda: fastops.rms_norm(X, eps=-1.0), ValueError, "rms_norm: eps is -1.0, must not be negative"),
    (lambda: fastops.rms_norm(X, eps=float("nan")), ValueError, "rms_norm: eps is nan"),
    (lambda: fastops.rms_norm(X, quant="int4"), ValueError, "rms_norm: quant is 'int4', allowed: None, 'int8', 'fp8'"),
    (lambda: fastops.rms_norm(X, quant="fp8", out=X), ValueError, "out cannot be combined with quant"),
    (lambda: fastops.rms_norm(X, out=X[:1]), ValueError, r"rms_norm: out has shape \[1, 3\], x \[2, 3\]"),
    (lambda: fastops.layer_norm(X, None, X), ValueError, r"layer_norm: bias has shape \[2, 3\], must be \[3\]"),
    (lambda: fastops.fused_add_rms_norm(X, None), TypeError, "fused_add_rms_norm: residual must be a tensor"),
    (lambda: fastops.fused_add_rms_norm(X, X.half()), TypeError, "fused_add_rms_norm: residual is float16 on cpu"),
    (lambda: fastops.add_rms_norm(X, X[:1]), ValueError, r"add_rms_norm: residual has shape \[1, 3\]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), BAD)
def test_bad_input_gets_a_clear_error(call, kind, text):
    for _ in range(2):  # before and after the choice for good input is remembered
        with pytest.raises(kind, match=text):
            call()
        fastops.rms_norm(X), fastops.layer_norm(X), fastops.add_rms_norm(X, X)
        fastops.fused_add_rms_norm(X.clone(), X.clone())


def test_compiles_whole(isa):
    torch._dynamo.reset()

    def block(x, r, w):
        fastops.fused_add_rms_norm(x, r, w)
        return fastops.layer_norm(fastops.rms_norm(x, w) * 2) + r

    x, r, w = torch.randn(5, 8), torch.randn(5, 8), torch.randn(8)
    want = block(x.clone(), r.clone(), w)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x, r, w), want)
