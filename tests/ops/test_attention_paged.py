"""attention_paged: decode, chunks and mixes against gathered pages; page tables are never trusted."""

import pytest
import torch

import fastops
from fastops.ops.attention_paged import attend
from fastops.testing import assert_matches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def paged(lens, queries, page, hkv=2, group=2, d=64, dtype=torch.float32, spare=3):
    """Random pages in random order, with NaN wherever no sequence may look."""
    need = [-(-n // page) for n in lens]
    pages = sum(need) + spare
    order = torch.randperm(pages)
    caches = [torch.full((pages, page, hkv, d), float("nan")).to(dtype) for _ in range(2)]
    table = torch.full((len(lens), max([*need, 1])), -7, dtype=torch.int32)
    at = 0
    for i, (length, n) in enumerate(zip(lens, need, strict=True)):
        ids = order[at : at + n]
        at += n
        table[i, :n] = ids.int()
        for c in caches:
            flat = torch.randn(length, hkv, d).to(dtype)
            for j in range(n):
                rows = flat[j * page : (j + 1) * page]
                c[ids[j], : rows.shape[0]] = rows
    q = torch.randn(sum(queries), hkv * group, d).to(dtype)
    cu = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return q, *caches, table, torch.tensor(lens, dtype=torch.int32), cu


def check_pages(args, options):
    """Against the reference, at double precision and at the same one."""
    out, lse = fastops.attention_paged(*args, return_lse=True, **options)
    q, k, v, *index = args
    exact, exact_lse = attend(q.double(), k.double(), v.double(), *index, **options)
    same, same_lse = attend(*args, **options)
    assert_matches(out, exact, same, factor=4, what=f"{options}")
    assert_matches(lse, exact_lse, same_lse, factor=4, what=f"lse {options}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page", [1, 4, 16, 256])
@pytest.mark.parametrize(
    ("lens", "queries"),
    [([1, 700, 33], [1, 1, 1]), ([50, 300, 9, 0], [50, 1, 4, 0]), ([130], [70]), ([600, 40, 900], [6, 1, 8])],
)
def test_matches_gathered_pages(isa, dtype, page, lens, queries):
    args = paged(lens, queries, page, dtype=dtype)
    for options in ({"causal": True}, {"causal": True, "window": (40, -1), "sinks": torch.randn(4)}, {"softcap": 9.0}):
        check_pages(args, options)


def test_equals_dense_decode():
    k, v = torch.randn(2, 3, 512, 2, 64)
    q = torch.randn(3, 1, 8, 64)
    dense = fastops.attention(q, k, v)
    table = torch.arange(3 * 32, dtype=torch.int32).view(3, 32)
    pages = [t.view(96, 16, 2, 64) for t in (k, v)]
    out = fastops.attention_paged(q[:, 0], *pages, table, torch.full((3,), 512, dtype=torch.int32))
    assert torch.equal(out, dense[:, 0])


def test_without_cu_seqlens_each_sequence_has_as_many_queries():
    q, k, v, table, lens, _ = paged([20, 40], [3, 3], 8)
    cu = torch.tensor([0, 3, 6], dtype=torch.int32)
    a = fastops.attention_paged(q, k, v, table, lens, causal=True)
    b = fastops.attention_paged(q, k, v, table, lens, cu, causal=True)
    assert torch.equal(a, b)


def test_gradients_run_through_the_reference():
    q, k, v, table, lens, cu = paged([5, 9], [2, 1], 4)
    k, v = k.nan_to_num(0.0), v.nan_to_num(0.0)
    q.requires_grad_()
    with pytest.warns(fastops.FallbackWarning, match="q requires a gradient"):
        fastops.attention_paged(q, k, v, table, lens, cu).sum().backward()
    assert q.grad is not None


def broken(**changes):
    names = ("q", "k_cache", "v_cache", "block_table", "seq_lens", "cu_seqlens_q")
    args = dict(zip(names, paged([20, 40], [1, 1], 8), strict=True))
    for name, change in changes.items():
        args[name] = change(args[name])
    return args


def put(t, at, value):
    t = t.clone()
    t[at] = value
    return t


BAD = [
    ({"block_table": lambda t: put(t, (1, 2), 99)}, ValueError, r"block_table\[1, 2\] is 99, pages run from 0 to 10"),
    ({"block_table": lambda t: put(t, (0, 0), -1)}, ValueError, r"block_table\[0, 0\] is -1"),
    ({"block_table": lambda t: t[:, :2].contiguous()}, ValueError, r"seq_lens\[0\] = 20 needs 3 pages of 8, block_table has room for 2"),
    ({"block_table": lambda t: t[:1]}, ValueError, "block_table must have shape"),
    ({"block_table": lambda t: t.long()}, TypeError, "block_table must be int32, got int64"),
    ({"seq_lens": lambda t: put(t, 1, -3)}, ValueError, r"seq_lens\[1\] is -3, must not be negative"),
    ({"seq_lens": lambda t: t.float()}, TypeError, "seq_lens must be int32, got float32"),
    ({"cu_seqlens_q": lambda t: put(t, 2, 9)}, ValueError, "cu_seqlens_q ends at 9 but q has 2 rows"),
    ({"cu_seqlens_q": lambda t: t[:2]}, ValueError, "cu_seqlens_q must have shape"),
    ({"k_cache": lambda t: t[:, :6], "v_cache": lambda t: t[:, :6]}, ValueError, "page size is 6, must be a power of two"),
    ({"k_cache": lambda t: t[:, :, 0]}, ValueError, "k_cache must be"),
    ({"q": lambda t: t[:, :3]}, ValueError, "q has 3 heads, k_cache has 2"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(changes, error, message):
    fastops.attention_paged(**broken())
    with pytest.raises(error, match=message):
        fastops.attention_paged(**broken(**changes))


def test_rows_must_divide_among_sequences():
    args = broken(q=lambda t: torch.cat([t, t[:1]]), cu_seqlens_q=lambda t: None)
    with pytest.raises(ValueError, match="q has 3 rows for 2 sequences; give cu_seqlens_q"):
        fastops.attention_paged(**args)
