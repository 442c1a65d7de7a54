"""torch.func's transforms and forward mode: plain torch takes over, so that no derivative is lost."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import fastops
from fastops.errors import FallbackWarning, NotSupportedError

pytestmark = pytest.mark.filterwarnings("ignore::fastops.FallbackWarning")
G = torch.Generator().manual_seed(0)
X, W = torch.randn(6, 64, generator=G), torch.randn(64, generator=G)
Q, K = torch.randn(1, 5, 4, 16, generator=G), torch.randn(1, 7, 2, 16, generator=G)
COS, SIN = torch.rand(5, 8, generator=G), torch.rand(5, 8, generator=G)
INT4 = fastops.int4.quantize(torch.randn(16, 64, generator=G), group_size=32)
CU_Q, CU_K = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 3, 7], dtype=torch.int32)
TABLE, LENS = torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([7], dtype=torch.int32)
PAGES = torch.randn(2, 4, 2, 16, generator=G)
TARGET = torch.tensor([0, 3, 2, 1, 5, -100])

# Name -> (a function of one tensor, that tensor).
CALLS = {
    "attention": (lambda t: fastops.attention(t, K, K, causal=True), Q),
    "attention_varlen": (lambda t: fastops.attention_varlen(t, K[0], K[0], CU_Q, CU_K), Q[0]),
    "attention_paged": (lambda t: fastops.attention_paged(t, PAGES, PAGES, TABLE, LENS, causal=True), Q[0]),
    "merge_states": (lambda t: fastops.merge_states([t, t * 2], [torch.zeros(4, 5), torch.ones(4, 5)])[0], Q[0]),
    "scaled_dot_product_attention": (lambda t: fastops.scaled_dot_product_attention(t, t, t, is_causal=True), X[None]),
    "int4_linear": (lambda t: fastops.int4_linear(t, INT4), X),
    "rms_norm": (lambda t: fastops.rms_norm(t, W), X),
    "layer_norm": (lambda t: fastops.layer_norm(t, W, W), X),
    "add_rms_norm": (lambda t: fastops.add_rms_norm(t, X, W)[0], X),
    "fused_add_rms_norm": (lambda t: fastops.fused_add_rms_norm(t * 1.0, X * 1.0 + t, W)[0], X),
    "silu_and_mul": (fastops.silu_and_mul, X),
    "gelu_and_mul": (fastops.gelu_and_mul, X),
    "swiglu": (lambda t: fastops.swiglu(t, X), X),
    "geglu": (lambda t: fastops.geglu(t, X), X),
    "apply_rope": (lambda t: fastops.apply_rope(t, None, COS, SIN)[0], Q),
    "qk_norm_rope": (lambda t: fastops.qk_norm_rope(t, None, W[:16], None, COS, SIN)[0], Q),
    "linear_cross_entropy": (lambda t: fastops.linear_cross_entropy(t, torch.ones(8, 64), TARGET), X),
    "scale_add": (lambda t: fastops.scale_add(t, X), X),
}


@pytest.fixture(autouse=True)
def warn_again():
    """What is warned of once is left for other tests to see."""
    rows = fastops.dispatch.select.operators.values()
    before = [set(each._warned) for each in rows]
    yield
    for each, warned in zip(rows, before, strict=True):
        each._warned = warned


@pytest.fixture(params=list(CALLS))
def call(request):
    return (request.param, *CALLS[request.param])


def slope(f, x, direction):
    """By differences, in fp64 where the operator has it."""
    step = 1e-2
    return (f(x + step * direction).double() - f(x - step * direction).double()) / (2 * step)


def close(a, b):
    assert (a - b).abs().max() <= 1e-2 * (1 + b.abs().max())


def test_forward_mode_keeps_the_tangent(call):
    _, f, x = call
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, direction))).tangent
    assert tangent is not None
    close(tangent.double(), slope(f, x, direction))
    close(torch.func.jvp(f, (x,), (direction,))[1].double(), slope(f, x, direction))


def test_grad_is_that_of_autograd(call):
    _, f, x = call
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf).square().sum(), leaf)
    close(torch.func.grad(lambda t: f(t).square().sum())(x), expected)


def test_vmap_is_a_loop(call):
    name, f, x = call
    if name == "fused_add_rms_norm":
        pytest.skip("in place")
    batch = torch.stack([x, x + 1])
    close(torch.func.vmap(f)(batch), torch.stack([f(each) for each in batch]))


def test_says_so_once_and_obeys_what_is_forced():
    f, x = CALLS["geglu"]
    fastops.dispatch.select.operators["geglu"]._warned.clear()
    with pytest.warns(FallbackWarning, match="geglu runs on the plain-torch reference"):
        torch.func.grad(lambda t: f(t).sum())(x)
    with fastops.override(geglu="cpp"), pytest.raises(NotSupportedError, match="forward-mode"):
        torch.func.grad(lambda t: f(t).sum())(x)
    with fastops.override(geglu="reference"):
        torch.func.grad(lambda t: f(t).sum())(x)


def test_constants_inside_need_nothing_special():
    def f(t):
        return t * fastops.rms_norm(X)

    close(torch.func.grad(lambda t: f(t).sum())(X), fastops.rms_norm(X))
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(fastops.rms_norm(X)).tangent is None
