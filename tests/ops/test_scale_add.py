"""scale_add against its reference, on every variant. The pattern for a new operator's tests."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastops
from fastops.ops.scale_add import reference
from fastops.testing import assert_matches, guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Instruction sets without code of their own here, and whose code serves them.
SERVED_BY = dict.fromkeys(("avx512_vnni", "avx512_bf16", "amx", "amx_emu"), "avx512")


def check(x, y, alpha=0.7):
    out = fastops.scale_add(x, y, alpha=alpha)
    exact = reference(x.double(), y.double(), alpha=alpha)
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    assert_matches(out, exact, reference(x, y, alpha=alpha), what=f"{list(x.shape)} {x.dtype}")
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (31,), (33, 65), (2, 3, 40001), (5, 1, 7, 1)])
def test_matches_reference(isa, dtype, shape):
    check(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(isa, dtype):
    base = torch.randn(6, 8, 50, 40).to(dtype)
    x, y = base[:3, :, ::2, 3:20], base[3:, :, 1::2, 20:37]
    check(x, y)
    check(x.transpose(0, 2), y.transpose(0, 2))
    check(x.transpose(1, 3), y.transpose(1, 3))  # the last dimension is not dense: copied
    check(x[:1].expand(3, 8, 25, 17), y)
    check(base[None, None], base[None, None])  # six dimensions
    out = torch.empty_like(base)[:3, :, ::2, 3:20]
    assert fastops.scale_add(x, y, alpha=0.7, out=out) is out
    assert torch.equal(out, check(x, y))


@given(
    shape=st.lists(st.integers(0, 9), max_size=5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_shapes_and_orders(isa, shape, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(shape), generator=g).tolist()
    x = torch.randn(shape, generator=g).to(dtype).permute(order)
    y = torch.randn(x.shape, generator=g).to(dtype)
    check(x, y)
    fastops.scale_add(torch.ones(1), torch.ones(1))  # empty calls leave a trace of the variant, too


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("end", [True, False])
def test_stays_inside_its_tensors(isa, dtype, n, end):
    x, y = guarded(torch.randn(n).to(dtype), end), guarded(torch.randn(n).to(dtype), end)
    out = guarded(torch.zeros(n).to(dtype), end)
    fastops.scale_add(x, y, alpha=2.0, out=out)
    assert torch.equal(out, fastops.scale_add(x.clone(), y.clone(), alpha=2.0))


def test_same_bits_for_any_number_of_threads(isa):
    x, y = torch.randn(300, 1001), torch.randn(300, 1001)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fastops.scale_add(x, y, alpha=0.3))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results)


def test_in_place_and_special_values(isa):
    x = torch.tensor([1.0, float("inf"), float("nan"), -0.0] * 5)
    y = torch.tensor([2.0, float("-inf"), 1.0, 0.0] * 5)
    expected = reference(x, y, alpha=2.0)
    assert fastops.scale_add(x, y, alpha=2.0, out=y) is y
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_gradients(isa):
    x, y = torch.randn(3, 17, requires_grad=True), torch.randn(3, 17, requires_grad=True)
    fastops.scale_add(x, y, alpha=3.0).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
    assert torch.equal(y.grad, torch.ones_like(y))
    with fastops.override(scale_add="reference"):
        fn = lambda a, b: fastops.scale_add(a, b, alpha=3.0)  # noqa: E731
        assert torch.autograd.gradcheck(fn, (x.double().detach().requires_grad_(), y.double()))


BAD = [
    (lambda x: (x, [1.0]), TypeError, "scale_add: y must be a tensor, got list"),
    (lambda x: (x.int(), x.int()), TypeError, "scale_add: x is int32, allowed: float32"),
    (lambda x: (x, x.half()), TypeError, "scale_add: y is float16 on cpu, x float32 on cpu; they must agree"),
    (lambda x: (x, x[:1]), ValueError, r"scale_add: y has shape \[1, 3\], x \[2, 3\]; they must agree"),
]


@pytest.mark.parametrize(("make", "kind", "text"), BAD)
def test_bad_input_gets_a_clear_error(make, kind, text):
    x = torch.randn(2, 3)
    for _ in range(2):  # before and after the choice for good input is remembered
        with pytest.raises(kind, match=text):
            fastops.scale_add(*make(x))
        fastops.scale_add(x, x)
    with pytest.raises(ValueError, match=r"scale_add: out has shape \[3, 2\]"):
        fastops.scale_add(x, x, out=torch.empty(3, 2))


def test_compiles_whole(isa):
    torch._dynamo.reset()
    fn = torch.compile(lambda x, y: fastops.scale_add(x, y, alpha=0.5) * 2, fullgraph=True, backend="eager")
    x, y = torch.randn(5, 8), torch.randn(5, 8)
    assert torch.equal(fn(x, y), fastops.scale_add(x, y, alpha=0.5) * 2)
