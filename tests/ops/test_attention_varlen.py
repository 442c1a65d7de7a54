"""attention_varlen: each sequence equals `attention` on its own rows."""

import pytest
import torch

import fastops
from fastops.ops.attention_varlen import attend
from fastops.testing import assert_matches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ragged(lens_q, lens_k, hkv=2, group=2, d=64, dtype=torch.float32, tail=0):
    cu = [torch.tensor([0, *x], dtype=torch.int32).cumsum(0, dtype=torch.int32) for x in (lens_q, lens_k)]
    q = torch.randn(sum(lens_q) + tail, hkv * group, d).to(dtype)
    k, v = (torch.randn(sum(lens_k), hkv, d).to(dtype) for _ in range(2))
    return q, k, v, *cu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lens_q", "lens_k"),
    [([1, 1, 1], [7, 300, 64]), ([5, 0, 70, 1], [5, 9, 130, 0]), ([0], [0]), ([130, 3], [40, 600])],
)
def test_matches_each_sequence(isa, dtype, lens_q, lens_k):
    args = ragged(lens_q, lens_k, dtype=dtype)
    for options in (
        {},
        {"causal": True},
        {"window": (9, 2), "sinks": torch.randn(4), "alibi_slopes": torch.rand(len(lens_q), 4)},
    ):
        out, lse = fastops.attention_varlen(*args, return_lse=True, **options)
        q, k, v, cu_q, cu_k = args
        exact, exact_lse = attend(q.double(), k.double(), v.double(), cu_q, cu_k, **options)
        same, same_lse = attend(q, k, v, cu_q, cu_k, **options)
        assert_matches(out, exact, same, factor=4, what=f"{options}")
        assert_matches(lse, exact_lse, same_lse, factor=4, what=f"lse {options}")
    x = torch.zeros(1, 1, 1, 8)
    fastops.attention(x, x, x)  # [0] runs nothing: leave a trace for the variant check


def test_many_sequences_and_a_tail():
    q, k, v, cu_q, cu_k = ragged([3] * 200, [5] * 200, tail=4)
    out, lse = fastops.attention_varlen(q, k, v, cu_q, cu_k, causal=True, return_lse=True)
    dense = fastops.attention(q[:600].view(200, 3, 4, 64), k.view(200, 5, 2, 64), v.view(200, 5, 2, 64), causal=True)
    torch.testing.assert_close(out[:600].view_as(dense), dense, rtol=0, atol=1e-6)
    assert (out[600:] == 0).all()
    assert (lse[:, 600:] == float("-inf")).all()


def test_out_argument():
    args = ragged([4, 2], [9, 3])
    out = torch.empty(6, 4, 64)
    got, lse = fastops.attention_varlen(*args, out=out, return_lse=True)
    assert got is out
    want, want_lse = fastops.attention_varlen(*args, return_lse=True)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


def test_gradients():
    q, k, v, cu_q, cu_k = ragged([4, 0, 7], [6, 3, 9])

    def grads(fn):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        fn(*leaves).square().sum().backward()
        return [t.grad for t in leaves]

    got = grads(lambda *x: fastops.attention_varlen(*x, cu_q, cu_k, causal=True))
    want = grads(lambda *x: attend(*x, cu_q, cu_k, causal=True)[0])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def i32(*x):
    return torch.tensor(x, dtype=torch.int32)


BAD = [
    (i32(0, 4, 3), i32(0, 4, 6), ValueError, "cu_seqlens_q must not decrease, but \\[1\\] is 4 and \\[2\\] is 3"),
    (i32(1, 4, 6), i32(0, 4, 6), ValueError, "cu_seqlens_q\\[0\\] must be 0, got 1"),
    (i32(0, 4, 7), i32(0, 4, 6), ValueError, "cu_seqlens_q ends at 7 but q has 6 rows"),
    (i32(0, 4, 6), i32(0, 4, 7), ValueError, "cu_seqlens_k ends at 7 but k has 6 rows"),
    (i32(0, 4, 6), i32(0, 6), ValueError, "cu_seqlens_q has 3 entries, cu_seqlens_k 2"),
    (i32(0, 4, 6).long(), i32(0, 4, 6), TypeError, "cu_seqlens_q must be int32, got int64"),
    ([0, 4, 6], i32(0, 4, 6), TypeError, "cu_seqlens_q must be a tensor, got list"),
]


@pytest.mark.parametrize(("cu_q", "cu_k", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_offsets(cu_q, cu_k, error, message):
    x = torch.randn(6, 2, 64)
    fastops.attention_varlen(x, x, x, i32(0, 4, 6), i32(0, 4, 6))  # warm: the next call takes the cached row
    with pytest.raises(error, match=message):
        fastops.attention_varlen(x, x, x, cu_q, cu_k)
