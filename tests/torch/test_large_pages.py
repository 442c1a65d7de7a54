"""Memory that lasts is asked for in large pages: packed weights and caches."""

import re
from pathlib import Path

import pytest
import torch

from fastops import _ops, int4, kv

SMAPS = Path("/proc/self/smaps")
pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists() or not SMAPS.exists() or _ops.control is None,
    reason="no transparent huge pages on this system",
)


def advised(t):
    """Whether the kernel was asked for large pages where the middle of the tensor lies ("hg" among a mapping's flags)."""
    place = t.data_ptr() + t.nbytes // 2
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text()):
        low, high = (int(x, 16) for x in mapping.split(" ", 1)[0].split("-"))
        if low <= place < high:
            return " hg" in mapping[mapping.index("VmFlags") :].split("\n", 1)[0]
    raise AssertionError("no such mapping")


def test_packed_weights_and_caches():
    weight = int4.quantize(torch.randn(4096, 4096), 128)
    assert advised(weight.packed().codes)
    assert not advised(torch.empty(8 << 20, dtype=torch.uint8))
    cache = kv.PagedCache("kv4", 1024, 64, 8, 128)
    assert advised(cache.k)
    assert advised(cache.v)
    assert not cache.k.any()
    sparse = int4.quantize(torch.randn(4096, 4096), -1, sparsity="2:4")
    assert advised(sparse.packed().codes)


@pytest.mark.parametrize("size", [0, 1, 4096, (2 << 20) - 1, (4 << 20) + 5])
def test_sizes_without_a_whole_page_are_left_alone(size):
    t = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    assert _ops.lasting(t) is t
    assert torch.equal(t, torch.arange(size, dtype=torch.int64).to(torch.uint8))
