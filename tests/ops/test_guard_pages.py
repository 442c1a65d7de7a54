"""No read or write outside a tensor: every tensor stands against an unreadable page, at its end or at its start."""

import pytest
import torch

import fastops
from fastops.testing import guarded


def fence(end, *tensors):
    return [guarded(t, end) for t in tensors]


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [8, 24, 64, 72, 136, 256])
def test_dense(isa, dtype, end, d):
    for sq, sk, hkv, group in ((1, 37, 2, 1), (3, 130, 1, 2), (50, 70, 1, 1), (2, 5, 3, 3)):
        q, k, v = fence(
            end,
            *(
                torch.randn(1, s, h, n).to(dtype)
                for s, h, n in ((sq, hkv * group, d), (sk, hkv, d), (sk, hkv, 264 - d))
            ),
        )
        out = guarded(torch.empty(1, sq, hkv * group, 264 - d, dtype=dtype), end)
        extra = fence(end, torch.randn(hkv * group), torch.rand(hkv * group))
        mask = guarded(torch.rand(1, hkv * group, sq, sk) < 0.9, end)
        fastops.attention(q, k, v, causal=True, out=out)
        fastops.attention(q, k, v, sinks=extra[0], alibi_slopes=extra[1], attn_mask=mask, out=out, return_lse=True)


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_paged_and_varlen(isa, dtype, end):
    for page in (1, 8, 64):
        lens = [70, 3]
        need = [-(-n // page) for n in lens]
        k, v = fence(end, *(torch.randn(sum(need), page, 2, 40).to(dtype) for _ in range(2)))
        table = torch.zeros(2, max(need), dtype=torch.int32)
        table[0, : need[0]] = torch.arange(need[0])
        table[1, : need[1]] = torch.arange(need[0], sum(need))
        q = guarded(torch.randn(6, 4, 40).to(dtype), end)
        table, seq_lens, cu = fence(
            end, table, torch.tensor(lens, dtype=torch.int32), torch.tensor([0, 5, 6], dtype=torch.int32)
        )
        fastops.attention_paged(q, k, v, table, seq_lens, cu, causal=True, out=guarded(torch.empty_like(q), end))
    cu = guarded(torch.tensor([0, 2, 6], dtype=torch.int32), end)
    fastops.attention_varlen(q, q, q, cu, cu, causal=True, out=guarded(torch.empty_like(q), end))
    outs = fence(end, *(torch.randn(5, 2, 40).to(dtype) for _ in range(2)))
    fastops.merge_states(outs, fence(end, torch.randn(2, 5), torch.randn(2, 5)))


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [8, 40, 64])
def test_backward(isa, dtype, end, d):
    for sq, sk in ((3, 5), (50, 70)):
        q, k, v, dout = fence(
            end,
            *(
                torch.randn(1, s, h, n).to(dtype)
                for s, h, n in ((sq, 4, d), (sk, 2, d), (sk, 2, 72 - d), (sq, 4, 72 - d))
            ),
        )
        sinks = guarded(torch.randn(4), end)
        out, lse = fastops.attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
        out, lse = fence(end, out, lse)
        torch.ops.fastops.attention_backward(dout, lse, out, lse, q, k, v, causal=True, sinks=sinks)


def test_the_fence_bites():
    """The guard itself: one element past the end kills a child process."""
    import subprocess
    import sys

    code = (
        "import torch, ctypes; from fastops.testing import guarded; t = guarded(torch.zeros(8)); "
        "ctypes.c_float.from_address(t.data_ptr() + 32).value"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode < 0
