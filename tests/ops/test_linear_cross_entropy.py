"""linear_cross_entropy against torch's cross entropy over materialised logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastops
from fastops.ops import linear_cross_entropy as room
from fastops.testing import assert_matches

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of rows and of classes, the last ones cut off."""
    monkeypatch.setattr(room, "ROWS", 7)
    monkeypatch.setattr(room, "CLASSES", 10)


def data(t, k, n, dtype, ignored=2):
    x, w, b = torch.randn(t, k).to(dtype), (torch.randn(n, k) / 2).to(dtype), torch.randn(n).to(dtype)
    target = torch.randint(0, n, (t,))
    target[:ignored] = -100
    return x, w, target, b


def results(run, x, w, target, b, cast, **options):
    inputs = [cast(t).detach().requires_grad_() for t in (x, w, b)]
    loss = run(inputs[0], inputs[1], target, inputs[2], **options)
    weights = torch.linspace(0.5, 2.0, loss.numel()).to(loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), inputs)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum"}, {"reduction": "none", "label_smoothing": 0.1}, {"softcap": 3.0}]
)
def test_values_and_gradients(dtype, options):
    args = data(30, 24, 47, dtype)
    got = results(fastops.linear_cross_entropy, *args, lambda t: t.clone(), **options)
    exact = results(room.reference, *args, lambda t: t.double(), **options)
    same = results(room.reference, *args, lambda t: t.clone(), **options)
    assert got[0].dtype == torch.float32
    for a, e, s in zip(got, exact, same, strict=True):
        assert_matches(a, e, s, factor=3.0)


@given(t=st.integers(1, 20), k=st.integers(1, 9), n=st.integers(1, 25), seed=st.integers(0, 1 << 30))
@settings(max_examples=30, deadline=None)
def test_random_shapes(t, k, n, seed):
    torch.manual_seed(seed)
    x, w, target, _ = data(t, k, n, torch.float32, ignored=0)
    got = fastops.linear_cross_entropy(x, w, target)
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(x @ w.T, target))


def test_leading_dimensions_and_int32_targets():
    x, w, target, b = data(30, 8, 12, torch.float32)
    flat = fastops.linear_cross_entropy(x, w, target, b, reduction="none")
    shaped = fastops.linear_cross_entropy(x.view(5, 6, 8), w, target.view(5, 6).int(), b, reduction="none")
    assert torch.equal(shaped, flat.view(5, 6))
    assert (flat[:2] == 0).all()


def test_no_logits_in_memory():
    """The largest tensor that is made has a block's size, not rows x classes."""
    x, w, target, _ = data(50, 8, 400, torch.float32)
    x.requires_grad_()
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
            out = fn(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Watch():
        losses, lse = room.blocked_forward(x.detach(), w, target)
        room.blocked_backward(torch.ones(50), lse, x.detach(), w, target)
    assert losses.shape == (50,)
    assert max(seen) <= w.numel()
    assert max(seen) < 50 * 400


def test_all_ignored_and_empty():
    x, w, target, _ = data(6, 8, 12, torch.float32, ignored=6)
    assert fastops.linear_cross_entropy(x, w, target).isnan()  # 0 / 0, as torch
    assert fastops.linear_cross_entropy(x, w, target, reduction="sum") == 0
    empty = fastops.linear_cross_entropy(x[:0], w, target[:0], reduction="none")
    assert empty.shape == (0,)


def test_gradcheck_of_the_reference():
    x, w, target, b = data(5, 3, 7, torch.double)
    with fastops.override(linear_cross_entropy="reference"):
        fn = lambda x, w, b: fastops.linear_cross_entropy(x, w, target, b, label_smoothing=0.2, softcap=2.0)  # noqa: E731
        assert torch.autograd.gradcheck(fn, tuple(t.requires_grad_() for t in (x, w, b)))


X, W, T = torch.randn(3, 4), torch.randn(6, 4), torch.tensor([0, 5, 2])
CALL = fastops.linear_cross_entropy
BAD = [
    (lambda: CALL([1], W, T), TypeError, "linear_cross_entropy: x must be a tensor, got list"),
    (lambda: CALL(X, W.half(), T), TypeError, "weight is float16 on cpu, x float32 on cpu"),
    (lambda: CALL(X, W[:, :3], T), ValueError, r"weight has shape \[6, 3\], must be \[N, 4\]"),
    (lambda: CALL(X, W, T.float()), TypeError, "target must be int64 or int32, got float32"),
    (lambda: CALL(X, W, T[:2]), ValueError, r"target has shape \[2\], must be \[3\]"),
    (lambda: CALL(X, W, T + 1), ValueError, "target has values from 1 to 6, allowed: 0 to 5, and ignore_index -100"),
    (lambda: CALL(X, W, T - 1), ValueError, "target has values from -1 to 4"),
    (lambda: CALL(X, W, T, W[0]), ValueError, r"bias has shape \[4\], must be \[6\]"),
    (lambda: CALL(X, W, T, label_smoothing=2.0), ValueError, "label_smoothing is 2.0, allowed: 0 to 1"),
    (lambda: CALL(X, W, T, softcap=-1.0), ValueError, "softcap is -1.0"),
    (lambda: CALL(X, W, T, reduction="avg"), ValueError, "reduction is 'avg', allowed: 'mean', 'sum', 'none'"),
]


@pytest.mark.parametrize(("call", "kind", "text"), BAD)
def test_bad_input_gets_a_clear_error(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


@pytest.mark.parametrize(("call", "kind", "text"), BAD)
def test_bad_input_after_good(call, kind, text):
    CALL(X, W, T)
    with pytest.raises(kind, match=text):
        call()


def test_compiles_whole():
    torch._dynamo.reset()
    fn = torch.compile(lambda x: fastops.linear_cross_entropy(x, W, T) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fn(X), CALL(X, W, T) * 2)
