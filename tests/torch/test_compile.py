"""torch.compile: one graph, few compiles, overrides respected, gradients too."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastops


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def counted(fn):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(fn, fullgraph=True, backend=counter), counter


def test_attention_over_lengths():
    k = torch.randn(1, 30, 2, 64)
    fn, counter = counted(lambda q: fastops.attention(q, k, k, causal=True, window=(9, -1)))
    for n in (5, 6, 9, 17, 30):
        q = torch.randn(1, n, 4, 64)
        torch.testing.assert_close(fn(q), fastops.attention(q, k, k, causal=True, window=(9, -1)))
    assert counter.frame_count <= 2


def test_sdpa_over_lengths():
    fn, counter = counted(lambda x: fastops.scaled_dot_product_attention(x, x, x, is_causal=True))
    for n in (5, 6, 9, 17, 30):
        x = torch.randn(1, 4, n, 64)
        torch.testing.assert_close(fn(x), fastops.scaled_dot_product_attention(x, x, x, is_causal=True))
    assert counter.frame_count <= 2


def test_varlen_paged_and_merge():
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    cache = torch.randn(5, 4, 2, 64)
    table, lens = torch.tensor([[0, 3], [4, 1]], dtype=torch.int32), torch.tensor([5, 8], dtype=torch.int32)

    def work(q, k):
        a, la = fastops.attention_varlen(q, k, k, cu, cu, return_lse=True)
        b, lb = fastops.attention_paged(q, cache, cache, table, lens, cu, return_lse=True)
        return fastops.merge_states([a, b], [la, lb])

    fn, counter = counted(work)
    q, k = torch.randn(6, 4, 64), torch.randn(6, 2, 64)
    for got, want in zip(fn(q, k), work(q, k), strict=True):
        torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def test_override_outside_the_compiled_region():
    q, k = torch.randn(1, 5, 4, 64), torch.randn(1, 7, 2, 64)
    fn, _ = counted(lambda q: fastops.attention(q, k, k))
    torch.testing.assert_close(fn(q), fastops.attention(q, k, k))
    with fastops.override(attention="reference"):
        torch.testing.assert_close(fn(q), fastops.attention(q, k, k))
    with fastops.override(attention="cuda"), pytest.raises(Exception, match=r"override .*cuda.* cannot run this call"):
        fn(q)


def test_gradients():
    q, k = torch.randn(1, 5, 4, 64), torch.randn(1, 7, 2, 64)

    def grads(fn):
        leaf = q.clone().requires_grad_()
        fn(leaf).square().sum().backward()
        return leaf.grad

    fn, _ = counted(lambda q: fastops.attention(q, k, k, causal=True))
    torch.testing.assert_close(grads(fn), grads(lambda q: fastops.attention(q, k, k, causal=True)))


def test_gradients_of_a_ragged_batch():
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    x = torch.randn(6, 4, 64)

    def grads(fn):
        leaf = x.clone().requires_grad_()
        fn(leaf).square().sum().backward()
        return leaf.grad

    fn, _ = counted(lambda x: fastops.attention_varlen(x, x, x, cu, cu, causal=True))
    torch.testing.assert_close(grads(fn), grads(lambda x: fastops.attention_varlen(x, x, x, cu, cu, causal=True)))


def test_inductor():
    q, k = torch.randn(1, 5, 4, 64), torch.randn(1, 7, 2, 64)
    fn = torch.compile(lambda q: fastops.attention(q * 2, k, k) + 1, fullgraph=True)
    torch.testing.assert_close(fn(q), fastops.attention(q * 2, k, k) + 1)
