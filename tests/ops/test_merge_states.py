"""merge_states: split attention joins to the whole; empty states count for nothing."""

import itertools

import pytest
import torch

import fastops
from fastops.ops.merge_states import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_joins_splits_to_the_whole(isa, dtype):
    q, k, v = torch.randn(2, 5, 6, 64), torch.randn(2, 90, 2, 64), torch.randn(2, 90, 2, 72)
    whole, whole_lse = fastops.attention(q, k, v, return_lse=True)
    cuts = [0, 1, 40, 40, 90]
    parts = [fastops.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in itertools.pairwise(cuts)]
    out, lse = fastops.merge_states([o.to(dtype) for o, _ in parts], [l for _, l in parts])
    tol = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(out.float(), whole, rtol=0, atol=tol)
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=1e-5)


def test_matches_reference(isa):
    outs, lses = list(torch.randn(5, 7, 3, 40)), list(torch.randn(5, 3, 7) * 10)
    got, want = fastops.merge_states(outs, lses), reference(outs, lses)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


def test_is_associative(isa):
    outs, lses = list(torch.randn(3, 4, 2, 64)), list(torch.randn(3, 2, 4))
    left = fastops.merge_states(outs[:2], lses[:2])
    twice = fastops.merge_states([left[0], outs[2]], [left[1], lses[2]])
    for a, b in zip(twice, fastops.merge_states(outs, lses), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_empty_states(isa):
    outs, lses = torch.randn(3, 4, 2, 64), torch.randn(3, 2, 4)
    outs[1], lses[1] = float("nan"), float("-inf")
    got = fastops.merge_states(outs, lses)
    want = fastops.merge_states([outs[0], outs[2]], [lses[0], lses[2]])
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    out, lse = fastops.merge_states(outs[1:2], lses[1:2])
    assert (out == 0).all()
    assert (lse == float("-inf")).all()


def test_any_strides(isa):
    outs = [torch.randn(2, 3, 9, 64).transpose(1, 2) for _ in range(2)]
    lses = [torch.randn(2, 9, 3).transpose(1, 2) for _ in range(2)]
    got, want = fastops.merge_states(outs, lses), reference(outs, lses)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


def test_gradients():
    outs = [torch.randn(2, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lses = [torch.randn(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    with fastops.override(merge_states="reference"):
        assert torch.autograd.gradcheck(lambda a, b, c, d: fastops.merge_states([a, b], [c, d]), (*outs, *lses))


O, L = torch.randn(4, 2, 64), torch.randn(2, 4)
BAD = [
    ([], [], ValueError, "got 0 outs and 0 lses"),
    ([O], [L, L], ValueError, "got 1 outs and 2 lses"),
    ([O, O[:3]], [L, L], ValueError, r"outs\[1\] has shape \[3, 2, 64\], outs\[0\]"),
    ([O, O.half()], [L, L], TypeError, r"outs\[1\] is float16, outs\[0\] float32"),
    ([O], [L.t()], ValueError, r"lses\[0\] has shape \[4, 2\], must be \[2, 4\]"),
    ([O], [L.half()], TypeError, r"lses\[0\] is float16, must be float32"),
    ([O[0]], [L], ValueError, r"outs\[0\] must be \[B,S,H,D\] or \[T,H,D\]"),
    ([O.int()], [L], TypeError, r"outs\[0\] is int32"),
]


@pytest.mark.parametrize(("outs", "lses", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(outs, lses, error, message):
    with fastops.override(merge_states="reference"), pytest.raises(error, match=message):
        fastops.merge_states(outs, lses)
    with pytest.raises(error):
        fastops.merge_states(outs, lses)
