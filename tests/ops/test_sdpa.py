"""scaled_dot_product_attention is torch's function."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastops
from fastops.testing import assert_matches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(q, k, v, *args, **options):
    out = fastops.scaled_dot_product_attention(q, k, v, *args, **options)
    wide = [t.double() if torch.is_tensor(t) and t.dtype != torch.bool else t for t in (q, k, v, *args)]
    opts = {n: t.double() if torch.is_tensor(t) and t.dtype != torch.bool else t for n, t in options.items()}
    exact = F.scaled_dot_product_attention(*wide, **opts)
    same = F.scaled_dot_product_attention(q, k, v, *args, **options)
    assert out.shape == same.shape
    assert out.dtype == same.dtype
    assert_matches(out, exact.nan_to_num(0.0), same.nan_to_num(0.0), factor=3, what=f"{list(q.shape)} {options}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_torch(isa, dtype):
    for sq, sk, e, ev in ((5, 9, 64, 64), (40, 70, 33, 20), (1, 100, 128, 128), (9, 4, 7, 7)):
        q, k, v = (torch.randn(2, 4, s, n).to(dtype) for s, n in ((sq, e), (sk, e), (sk, ev)))
        check(q, k, v)
        check(q, k, v, is_causal=True)
        check(q, k, v, scale=0.2)
        check(q, k, v, torch.rand(sq, sk) < 0.8)
        check(q, k, v, torch.rand(2, 1, 1, sk) < 0.8)
        check(q, k, v, attn_mask=torch.randn(4, sq, sk).to(dtype))
        check(q, k[:, :2], v[:, :2], enable_gqa=True, is_causal=True)


@pytest.mark.parametrize("shape", [(9, 64), (3, 9, 64), (2, 3, 2, 9, 64)])
def test_other_ranks(shape):
    q, k, v = (torch.randn(shape) for _ in range(3))
    check(q, k, v)
    check(q, k, v, is_causal=True)
    check(q, k, v, torch.rand(9, 9) < 0.7)


def test_broadcast_batch():
    check(torch.randn(3, 2, 5, 64), torch.randn(1, 2, 7, 64), torch.randn(1, 2, 7, 64))


def test_strided_inputs_need_no_copy(isa):
    x = torch.randn(2, 20, 3, 4, 64)
    check(*(x[:, :, i].transpose(1, 2) for i in range(3)), is_causal=True)


def test_dropout_runs_torch():
    q = torch.randn(1, 2, 8, 64)
    with pytest.warns(fastops.FallbackWarning, match="dropout_p"):
        out = fastops.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    assert out.shape == q.shape


def test_head_size_over_256_runs_torch():
    q = torch.randn(1, 2, 8, 300)
    with pytest.warns(fastops.FallbackWarning, match="head size is 300"):
        check(q, q, q)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [32, 20])
def test_gradients(masked, size):
    q, k, v = (torch.randn(2, 4, 7, size) for _ in range(3))
    mask = torch.rand(7, 7) < 0.8 if masked else None

    def grads(fn):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        fn(*leaves, mask, is_causal=not masked).square().sum().backward()
        return [t.grad for t in leaves]

    for g, w in zip(grads(fastops.scaled_dot_product_attention), grads(F.scaled_dot_product_attention), strict=True):
        # dS = P (dP - delta) cancels where one key takes all: a few ulps of dP, here about 10, remain.
        torch.testing.assert_close(g, w, rtol=1e-4, atol=3e-5)


def test_mask_gradient_runs_the_reference():
    q = torch.randn(1, 2, 5, 64)
    mask = torch.zeros(5, 5, requires_grad=True)
    with pytest.warns(fastops.FallbackWarning, match="attn_mask requires a gradient"):
        fastops.scaled_dot_product_attention(q, q, q, mask).sum().backward()
    assert mask.grad is not None


Q = torch.randn(1, 4, 5, 64)
BAD = [
    (lambda: fastops.scaled_dot_product_attention(Q, Q, Q, torch.ones(5, 5, dtype=torch.bool), is_causal=True), ValueError, "not both"),
    (lambda: fastops.scaled_dot_product_attention(Q, Q[..., :32], Q), ValueError, "key has head size 32, query 64"),
    (lambda: fastops.scaled_dot_product_attention(Q, Q, Q[:, :, :3]), ValueError, "must match key"),
    (lambda: fastops.scaled_dot_product_attention(Q, Q.half(), Q), TypeError, "key is float16"),
    (lambda: fastops.scaled_dot_product_attention(Q[0, 0, 0], Q, Q), ValueError, "needs at least 2 dimensions"),
    (lambda: fastops.scaled_dot_product_attention(Q, Q, Q, torch.ones(4, 4)), ValueError, r"attn_mask has shape \[4, 4\]"),
    (lambda: fastops.scaled_dot_product_attention(Q, Q[:, :3], Q[:, :3], enable_gqa=True), ValueError, "query has 4 heads, key has 3"),
    (lambda: fastops.scaled_dot_product_attention("x", Q, Q), TypeError, "query must be a tensor, got str"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    fastops.scaled_dot_product_attention(Q, Q, Q)
    with pytest.raises(error, match=message):
        call()


RANKS = [
    (5, 8),
    (2, 5, 8),
    (4, 5, 8),
    (1, 4, 5, 8),
    (3, 4, 5, 8),
    (3, 1, 5, 8),
    (2, 2, 5, 8),
    (2, 3, 4, 5, 8),
    (2, 1, 1, 5, 8),
]


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("mask", [None, (5, 5), (5, 1)])
def test_every_pair_of_ranks_is_torchs(gqa, mask):
    """What torch broadcasts is broadcast, what it refuses is refused with a clear error, at the first call and later."""
    g = torch.Generator().manual_seed(0)
    m = None if mask is None else torch.randn(mask, generator=g)
    for a, b in itertools.product(RANKS, RANKS):
        q, k = torch.randn(a, generator=g), torch.randn(b, generator=g)
        for _ in range(2):
            try:
                expected = F.scaled_dot_product_attention(q, k, k, m, enable_gqa=gqa)
            except (RuntimeError, IndexError):
                if min(len(a), len(b)) > 2:  # otherwise a single head, for us
                    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
                        fastops.scaled_dot_product_attention(q, k, k, m, enable_gqa=gqa)
                continue
            got = fastops.scaled_dot_product_attention(q, k, k, m, enable_gqa=gqa)
            assert got.shape == expected.shape, (a, b)
            assert torch.allclose(got, expected, atol=1e-5), (a, b)
