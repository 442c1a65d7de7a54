"""kv_append against its reference, bit by bit, on every variant."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastops
from fastops import kv
from fastops.kv import KVQuant
from fastops.ops.kv_append import reference
from fastops.testing import ROWS_SERVED_BY, guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SERVED_BY = ROWS_SERVED_BY


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def cache_of(name, pages, page, heads, d, dv, dtype, batch=4, recent=40):
    """k, v and quant: zeros, so that whatever else is written shows. plain: numbers; fixed: given scales a head."""
    if name == "plain":
        return *(torch.zeros(pages, page, heads, n, dtype=dtype) for n in (d, dv)), None
    if name in ("fixed8", "fixed4", "none8"):
        codes = torch.uint8 if name == "fixed4" else torch.int8
        k, v = (torch.zeros(pages, page, heads, n // (2 if name == "fixed4" else 1), dtype=codes) for n in (d, dv))
        if name == "none8":
            return k, v, None
        scale, zero = torch.rand(heads) * 0.1 + 0.2, torch.full((1,), 0.01)
        if name == "fixed8":
            return k, v, KVQuant(k_scale=scale.bfloat16(), v_scale=zero)
        return (
            k,
            v,
            KVQuant(k_scale=scale, k_zero=scale * 30, v_scale=zero + 0.3, v_min=-zero * 200, k_bits=4, v_bits=4),
        )
    cache = kv.PagedCache(name, pages, page, heads, d, dv, dtype=dtype, batch=batch, recent=recent, k_scale=0.02)
    return cache.k, cache.v, cache.quant


NAMES = ["plain", "fixed8", "fixed4", "none8", *kv.FORMATS]


def copied(cache):
    k, v, quant = cache
    if quant is not None:
        quant = KVQuant(**{
            f.name: t.clone() if isinstance(t := getattr(quant, f.name), torch.Tensor) else t
            for f in dataclasses.fields(quant)
        })  # fmt: skip
    return k.clone(), v.clone(), quant


def tensors(cache):
    k, v, quant = cache
    parts = {} if quant is None else {f.name: getattr(quant, f.name) for f in dataclasses.fields(quant)}
    return {"k": k, "v": v, **{n: t for n, t in parts.items() if isinstance(t, torch.Tensor)}}


def assert_same_bits(got, want):
    for name, t in tensors(want).items():
        ours = tensors(got)[name]
        as_bytes = lambda x: x.reshape(-1).clone().view(torch.uint8)  # noqa: E731
        if t.dtype.is_floating_point and t.dtype != torch.float8_e4m3fn:  # NaNs have many patterns
            assert torch.equal(ours.isnan(), t.isnan()), name
            ours, t = ours.nan_to_num(0.0), t.nan_to_num(0.0)
        assert torch.equal(as_bytes(ours), as_bytes(t)), name


def check(cache, k, v, table, lens, cu=None, before=None):
    """One call and the reference's, from the same cache; the new lengths."""
    ours, theirs = cache, copied(before or cache)
    new = fastops.kv_append(k, v, ours[0], ours[1], table, lens, cu, quant=ours[2])
    want = reference(k, v, theirs[0], theirs[1], table, lens, cu, quant=theirs[2])
    assert torch.equal(new, want)
    assert_same_bits(ours, theirs)
    return new


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (8, 24), (40, 8), (256, 128)])
def test_matches_reference(isa, name, dtype, d, dv):
    if name.startswith("kivi"):
        d, dv = d, max(32, dv // 32 * 32)
    page, heads = 32, 3
    cache = cache_of(name, 40, page, heads, d, dv, dtype)
    table, lens = torch.randperm(40)[:32].int().view(4, 8), ints(0, 0, 0, 0)
    for steps in ([1, 0, 70, 33], [1, 1, 1, 1], [0, 90, 5, 100], [32, 31, 33, 1]):  # ragged
        cu = ints(0, *steps).cumsum(0, dtype=torch.int32)
        k = (torch.randn(sum(steps), heads, d) * torch.rand(heads, d) * 3).to(dtype)
        v = (torch.randn(sum(steps), heads, dv) + 1).to(dtype)
        lens = check(cache, k, v, table, lens, cu)
    lens = check(cache, k[:8], v[:8], table, lens)  # two tokens each
    assert lens.tolist() == [36, 124, 111, 137]


def test_what_was_appended_is_read(isa):
    """The codes mean what attention_paged takes them for: all formats of one cache agree with the numbers."""
    k, v = torch.randn(2, 90, 2, 64)
    q, table = torch.randn(1, 4, 64), torch.arange(3, dtype=torch.int32).view(1, 3)
    exact = fastops.attention(q[None], k[None], v[None])[0]
    for name, bound in {"plain": 1e-5, "int8": 0.01, "fp8_token": 0.05, "kv8": 0.01, "kv4": 0.2, "kivi4": 0.2}.items():
        cache = cache_of(name, 3, 32, 2, 64, 64, torch.float32, batch=1)
        lens = fastops.kv_append(k, v, cache[0], cache[1], table, ints(0), quant=cache[2])
        out = fastops.attention_paged(q, cache[0], cache[1], table, lens, quant=cache[2])
        assert (out - exact).abs().max() < bound, name
    fastops.kv_append(k[:0], v[:0], *cache[:2], table, lens, quant=cache[2])  # leaves a trace of the variant


@pytest.mark.parametrize("name", NAMES)
def test_any_strides(isa, name):
    d = 64
    cache = cache_of(name, 4, 32, 2, d, d, torch.float32, batch=2)
    table = torch.tensor([[3, 0, 9, 9], [9, 9, 9, 9], [1, 2, 9, 9]], dtype=torch.int32)[::2, :2]
    k, v = torch.randn(2, 2, 70, 100).transpose(1, 2)[..., 3 : 3 + d]
    wide = [torch.zeros(4, 2, 32, t.shape[3] + 5, dtype=torch.uint8) for t in cache[:2]]  # heads before tokens
    if name not in ("plain", "fp8", "fp8_token"):
        ours = [w.view(t.dtype).transpose(1, 2)[..., : t.shape[3]] for w, t in zip(wide, cache[:2], strict=True)]
        check((*ours, cache[2]), k, v, table, ints(0, 0, 0, 0)[::2], ints(0, 9, 30, 9, 70)[::2])
    else:
        check(cache, k, v, table, ints(0, 0, 0, 0)[::2], ints(0, 9, 30, 9, 70)[::2])


@given(
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from(DTYPES),
    page=st.sampled_from([1, 4, 32, 64]),
    heads=st.integers(1, 4),
    eighths=st.integers(1, 32),
    steps=st.lists(st.lists(st.integers(0, 80), min_size=2, max_size=2), min_size=1, max_size=4),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_calls(isa, name, dtype, page, heads, eighths, steps, seed):
    torch.manual_seed(seed)
    d = dv = 8 * eighths
    if name.startswith("kivi"):
        page, dv = max(page, 32), max(32, dv // 32 * 32)
    most = -(-sum(map(max, steps)) // page)
    cache = cache_of(name, 2 * most + 1, page, heads, d, dv, dtype, batch=2)
    table, lens = torch.randperm(2 * most + 1)[: 2 * most].int().view(2, most), ints(0, 0)
    for counts in steps:
        k, v = ((torch.randn(sum(counts), heads, n) * 10 ** (torch.rand(()) * 8 - 4)).to(dtype) for n in (d, dv))
        lens = check(cache, k, v, table, lens, ints(0, counts[0], sum(counts)))
    x = torch.zeros(1, 1, 8)  # empty calls leave a trace of the variant, too
    fastops.kv_append(x, x, x[None].clone(), x[None].clone(), ints(0)[None], ints(0))


@pytest.mark.parametrize("name", ["int8", "fp8_token", "kv8", "kv4", "kivi4", "kivi2"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_has_no_codes_reads_as_nan(isa, name, bad):
    k, v = torch.randn(2, 80, 2, 64)
    k[5, 0, 9] = v[7, 1, 63] = bad
    cache, table = cache_of(name, 4, 32, 2, 64, 64, torch.float32, batch=1), torch.arange(4, dtype=torch.int32)[None]
    check(cache, k, v, table, ints(0))
    quant = cache[2]
    for role, token, head in (("k", 5, 0), ("v", 7, 1)):
        side = {n: getattr(quant, f"{role}_{n}") for n in ("scale", "zero", "min")}
        bits = getattr(quant, f"{role}_bits")
        rows = kv.dequantize(cache[role == "v"], side["scale"], zero=side["zero"], min=side["min"], bits=bits)
        if bad < 1e38 or side["scale"].dtype != torch.float32:
            assert not rows.flatten(0, 1)[token, head].isfinite().all()
        others = rows.flatten(0, 1)[32:40]
        assert others.isfinite().all()


def test_same_bits_for_any_number_of_threads(isa):
    k, v = torch.randn(2, 700, 8, 128)
    table, before, results = torch.arange(32, dtype=torch.int32).view(1, 32), torch.get_num_threads(), []
    for name in ("kv4", "kivi2"):
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(cache_of(name, 32, 32, 8, 128, 128, torch.float32))
                check(results[-1], k, v, table, ints(0))
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["plain", "fixed8", "fixed4", "int8", "fp8_token", "kv4", "kivi2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("d", [8, 24, 72, 128])
def test_stays_inside_its_tensors(isa, name, dtype, end, d):
    dv = max(32, d // 32 * 32) if name == "kivi2" else 8
    free = cache_of(name, 5, 32, 2, d, dv, dtype, batch=2)
    fence = lambda t: guarded(t, end) if isinstance(t, torch.Tensor) else t  # noqa: E731
    quant = free[2] and KVQuant(**{f.name: fence(getattr(free[2], f.name)) for f in dataclasses.fields(free[2])})
    cache = (fence(free[0]), fence(free[1]), quant)
    table, lens = fence(ints(4, 1, 0, 3).view(2, 2)), fence(ints(0, 0))
    for steps in ((0, 63), (40, 1)):
        k, v = (fence(torch.randn(sum(steps), 2, n).to(dtype)) for n in (d, dv))
        lens = fence(check(cache, k, v, table, lens, fence(ints(0, steps[0], sum(steps))), before=free))
        free = copied(cache)


def test_a_refused_call_writes_nothing(isa):
    for name in ("plain", "kv4", "kivi4"):
        cache = cache_of(name, 4, 32, 2, 64, 64, torch.float32, batch=2)
        before, x = copied(cache), torch.randn(110 if name == "kivi4" else 60, 2, 64)
        for table in (ints(0, 1, 2, 4).view(2, 2), ints(0, 1, -1, 2).view(2, 2), ints(0, 1).view(2, 1)):
            with pytest.raises(ValueError, match=r"kv_append: (block_table\[1|sequence 0 grows)"):
                fastops.kv_append(x.repeat(2, 1, 1), x.repeat(2, 1, 1), *cache[:2], table, ints(0, 0), quant=cache[2])
        assert_same_bits(cache, before)
        fastops.kv_append(x, x, *cache[:2], ints(0, 1, 2, 3)[None], ints(0), quant=cache[2])


def test_fp64_and_gradients_take_the_reference():
    x = torch.randn(2, 1, 8, dtype=torch.float64)
    cache = torch.zeros(1, 4, 1, 8, dtype=torch.float64)
    with pytest.warns(fastops.FallbackWarning):
        assert fastops.kv_append(x, x, cache, cache.clone(), ints(0)[None], ints(1)).tolist() == [3]
    assert torch.equal(cache[0, 1:3], x)
    y = torch.randn(2, 1, 8, requires_grad=True)
    plain = torch.zeros(1, 4, 1, 8)
    fastops.kv_append(y, y, plain, plain.clone(), ints(0)[None], ints(0))
    assert torch.equal(plain[0, :2], y)
    assert not plain.requires_grad


CACHE = torch.zeros(2, 4, 1, 8)
CODES = torch.zeros(2, 4, 1, 8, dtype=torch.int8)
PAGED = torch.rand(2, 4, 1)
WINDOW = {"k_recent": torch.zeros(1, 40, 1, 8), "v_recent": torch.zeros(1, 40, 1, 8), "packed_lens": ints(0)}
BAD = [
    ({"k": [1.0]}, TypeError, "k must be a tensor, got list"),
    ({"k": torch.randn(2, 8)}, ValueError, r"k must be \[T,Hkv,D\]"),
    ({"k": torch.zeros(2, 1, 8).int()}, TypeError, "k is int32, allowed: float32"),
    ({"v": torch.zeros(2, 1, 8).half()}, TypeError, "v is float16 on cpu, k is not"),
    ({"v": torch.zeros(2, 2, 8)}, ValueError, r"v has shape \[2, 2, 8\], must match k"),
    ({"k_cache": CACHE.half()}, TypeError, "k_cache is float16, allowed: k's float32"),
    ({"v_cache": CACHE[:1]}, ValueError, r"v_cache has shape \[1, 4, 1, 8\], must be \[2, 4, 1, 8\]"),
    ({"k_cache": torch.zeros(2, 3, 1, 8), "v_cache": torch.zeros(2, 3, 1, 8)}, ValueError, "page size is 3"),
    ({"k": torch.zeros(2, 1, 264), "k_cache": torch.zeros(2, 4, 1, 264)}, ValueError, "head size 264"),
    ({"block_table": ints(0, 1)}, ValueError, "block_table must have shape"),
    ({"seq_lens": torch.tensor([0])}, TypeError, "seq_lens must be int32"),
    ({"seq_lens": ints(-1)}, ValueError, r"seq_lens\[0\] is -1"),
    ({"seq_lens": ints(2**31 - 1)}, ValueError, "nor grow beyond int32"),
    ({"seq_lens": ints(7)}, ValueError, "sequence 0 grows to 9 tokens in pages, block_table has room for 8"),
    ({"seq_lens": ints(4), "block_table": ints(0, 2)[None]}, ValueError, r"block_table\[0, 1\] is 2, pages run from 0"),
    ({"cu_seqlens": ints(0, 1)}, ValueError, r"cu_seqlens.* must rise from 0 to 2"),
    ({"cu_seqlens": ints(0, 1, 2)}, ValueError, "cu_seqlens must have shape"),
    ({"seq_lens": ints(0, 0, 0), "block_table": ints(0, 1, 0)[:, None]}, ValueError, "2 tokens for 3 sequences"),
    ({"quant": {}}, TypeError, "quant must be a fastops.kv.KVQuant"),
    ({"quant": KVQuant(k_bits=4)}, ValueError, "k_bits is 4, must be 0"),
    ({"quant": KVQuant(k_scale=PAGED)}, ValueError, "k_scale is given, but k_cache has k's dtype"),
    ({"k_cache": CODES, "quant": KVQuant(k_scale=PAGED[:1])}, ValueError, "k_scale has shape"),
    ({"k_cache": CODES, "quant": KVQuant(k_scale=PAGED, k_zero=PAGED)}, NotImplementedError, "take no k_zero or k_min"),
    ({"k_cache": CODES.view(torch.uint8), "quant": KVQuant(k_scale=PAGED, k_bits=8)}, NotImplementedError, "k_scale needs"),
    ({"v_cache": CODES, "quant": KVQuant(v_scale=torch.rand(2, 2, 1, 1))}, NotImplementedError, "shared by 2 tokens"),
    ({"quant": KVQuant(k_recent=CACHE)}, ValueError, "k_recent, v_recent and packed_lens go together"),
    ({"quant": KVQuant(**{**WINDOW, "packed_lens": ints(1)})}, ValueError, r"packed_lens\[0\] is 1"),
    ({"quant": KVQuant(**{**WINDOW, "k_recent": torch.zeros(1, 8, 1, 8), "v_recent": torch.zeros(1, 8, 1, 8)})}, ValueError, "1 of 8 rows"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "text"), BAD)
def test_bad_input_gets_a_clear_error(changes, kind, text):
    x = torch.randn(2, 1, 8)
    call = {"k": x, "v": x, "k_cache": CACHE, "v_cache": CACHE, "block_table": ints(0, 1)[None], "seq_lens": ints(0)}
    with pytest.raises(kind, match=f"kv_append: .*{text}"):
        fastops.kv_append(**{**call, **changes})
    arguments = {f.name: getattr(q, f.name) for q in [changes.get("quant")] if isinstance(q, KVQuant) for f in dataclasses.fields(q)}  # fmt: skip
    if isinstance(changes.get("quant"), dict) or not isinstance(changes.get("k", x), torch.Tensor):
        return
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):  # the kernel's own checks
        torch.ops.fastops.kv_append(**{n: t for n, t in {**call, **changes}.items() if n != "quant"}, **arguments)


@pytest.mark.parametrize("name", ["plain", "kv4", "kivi2"])
def test_compiles_whole(isa, name):
    torch._dynamo.reset()
    cache = cache_of(name, 8, 32, 2, 64, 64, torch.float32, batch=2)
    table, lens = torch.arange(8, dtype=torch.int32).view(2, 4), ints(0, 0)

    def step(k, v, lens):
        return fastops.kv_append(k, v, cache[0], cache[1], table, lens, quant=cache[2]) + 0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (2, 6, 80):
        k, v = torch.randn(2, tokens, 2, 64)
        want = copied(cache)
        expected = reference(k, v, *want[:2], table, lens, quant=want[2])
        lens = compiled(k, v, lens)
        assert torch.equal(lens, expected)
        assert_same_bits(cache, want)
