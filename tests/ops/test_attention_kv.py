"""attention_paged on quantised caches: every format against the numbers its codes stand for."""

import dataclasses

import pytest
import torch

import fastops
from fastops import kv
from fastops.ops import _kv
from fastops.ops.attention_paged import attend
from fastops.ops.attention_varlen import attend as attend_varlen
from fastops.testing import assert_matches, guarded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def filled(name, lens, page=32, hkv=2, d=64, dv=None, dtype=torch.float32, spare=2, recent=40, chunks=(1.0,)):
    """A cache of `lens` tokens, in shuffled pages, appended in pieces; and its block table and lengths."""
    need = [-(-n // page) for n in lens]
    cache = kv.PagedCache(
        name, sum(need) + spare, page, hkv, d, dv, dtype=dtype, k_scale=0.02, v_scale=0.01, batch=len(lens), recent=recent
    )  # fmt: skip
    order = torch.randperm(sum(need) + spare)
    table = torch.full((len(lens), max([*need, 1])), -7, dtype=torch.int32)
    for i, n in enumerate(need):
        table[i, :n] = order[sum(need[:i]) : sum(need[:i]) + n].int()
    have = torch.zeros(len(lens), dtype=torch.int32)
    for part in chunks:
        want = [int(n * part) for n in lens]
        steps = [max(0, w - h) for w, h in zip(want, have.tolist(), strict=True)]
        cu = torch.tensor([0, *steps], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        k = torch.randn(sum(steps), hkv, d) + torch.randn(hkv, d)  # keys have channels that stand out
        have = kv.append(cache, k.to(dtype), torch.randn(sum(steps), hkv, dv or d).to(dtype), table, have, cu)
    assert have.tolist() == list(lens)
    return cache, table, have


def exact(q, cache, table, lens, cu, **options):
    return attend(q.double(), cache.k, cache.v, table, lens, cu, quant=cache.quant, **options)


def same(q, cache, table, lens, cu, **options):
    """As a torch program in q's precision has it: the cache rounded to it, then attention."""
    quant, rows = cache.quant, {"k": [], "v": []}
    for i, n in enumerate(lens.tolist()):
        packed = n if quant.packed_lens is None else int(quant.packed_lens[i])
        index = table[i, : -(-packed // cache.page)].long()
        for role, x in rows.items():
            x.append(_kv.gather(role, getattr(cache, role), index, n, packed, i, quant, torch.float32).to(q.dtype))
    k, v = torch.cat(rows["k"]), torch.cat(rows["v"])
    if cu is None:
        cu = torch.arange(len(lens) + 1, dtype=torch.int32)
    cu_k = torch.tensor([0, *lens.tolist()], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return attend_varlen(q, k, v, cu, cu_k, **options)


@pytest.mark.parametrize("name", kv.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lens", "queries"), [([1, 700, 33], [1, 1, 1]), ([50, 300, 9, 0], [50, 1, 4, 0]), ([130], [70])]
)
def test_matches_what_the_codes_stand_for(isa, name, dtype, lens, queries):
    cache, table, have = filled(name, lens, dtype=dtype, chunks=(0.4, 0.9, 1.0))
    q = torch.randn(sum(queries), 4, 64).to(dtype)
    cu = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    for options in ({"causal": True}, {"causal": True, "window": (40, -1), "sinks": torch.randn(4)}, {"softcap": 9.0}):
        out, lse = fastops.attention_paged(
            q, cache.k, cache.v, table, have, cu, quant=cache.quant, return_lse=True, **options
        )
        want, want_lse = exact(q, cache, table, have, cu, **options)
        near, near_lse = same(q, cache, table, have, cu, **options)
        assert_matches(out, want, near, factor=4, what=f"{name} {options}")
        assert_matches(lse, want_lse, near_lse, factor=4, what=f"{name} lse {options}")


@pytest.mark.parametrize("name", ["int8", "kv4", "fp8", "fp8_token", "kivi2"])
@pytest.mark.parametrize(
    ("d", "dv", "hkv", "group"), [(8, 8, 1, 1), (72, 40, 3, 5), (256, 256, 16, 1), (128, 64, 8, 4)]
)
def test_head_sizes(isa, name, d, dv, hkv, group):
    if name == "kivi2" and dv % 32:
        dv = 32 * -(-dv // 32)
    cache, table, have = filled(name, [90, 37], page=64, hkv=hkv, d=d, dv=dv, dtype=torch.bfloat16)
    q = torch.randn(2, hkv * group, d).bfloat16()
    out = fastops.attention_paged(q, cache.k, cache.v, table, have, quant=cache.quant)
    assert_matches(
        out, exact(q, cache, table, have, None)[0], same(q, cache, table, have, None)[0], factor=4, what=name
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int8", "kv8", "kv4", "fp8", "fp8_token"])
@pytest.mark.parametrize(
    ("hkv", "group", "d", "dv"), [(1, 7, 64, 128), (3, 3, 40, 72), (9, 2, 128, 256), (17, 1, 256, 64), (2, 4, 136, 8)]
)
def test_products_of_codes(isa, name, dtype, hkv, group, d, dv):
    """Few rows against one scale a key and head: several tiles and blocks, every number of rows, tails of all sides."""
    cache, table, have = filled(name, [601, 130, 5], page=16, hkv=hkv, d=d, dv=dv, dtype=dtype)
    cu = torch.tensor([0, 1, 3, 4], dtype=torch.int32)
    q = torch.randn(4, hkv * group, d).to(dtype)
    q[0, 0] = 0.0
    q[0, -1] *= 1e-7  # fp16: next to nothing
    q[1, -1] *= 50.0  # one key has all the weight
    out = fastops.attention_paged(q, cache.k, cache.v, table, have, cu, quant=cache.quant, causal=True)
    want, near = (f(q, cache, table, have, cu, causal=True)[0] for f in (exact, same))
    assert_matches(out, want, near, factor=2, what=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["kivi2", "kivi4"])
@pytest.mark.parametrize(
    ("hkv", "group", "d", "dv"),
    [(8, 4, 128, 128), (8, 1, 64, 96), (4, 3, 256, 32), (5, 7, 32, 160), (16, 1, 96, 64), (6, 2, 160, 256)],
)
def test_groups_of_keys_and_of_channels(isa, name, dtype, hkv, group, d, dv):
    """Keys in pages and recent ones, together and alone; windows that begin within a group; a group without a number."""
    recent = {8: 40, 4: 0}.get(hkv, 150)
    cache, table, have = filled(
        name, [737, 205, 161, 23, 32], page=64, hkv=hkv, d=d, dv=dv, dtype=dtype, recent=recent, chunks=(0.3, 1.0)
    )
    cu = torch.tensor([0, 1, 2 + (group < 5), 4, 5, 6], dtype=torch.int32)
    q = torch.randn(6, hkv * group, d).to(dtype)
    q[1, -1] *= 5.0  # one key has nearly all the weight
    for options in ({}, {"window": (100, -1), "sinks": torch.randn(hkv * group)}):
        args = (q, cache, table, have, cu)
        out, lse = fastops.attention_paged(
            q, cache.k, cache.v, table, have, cu, quant=cache.quant, causal=True, return_lse=True, **options
        )
        want, want_lse = exact(*args, causal=True, **options)
        near, near_lse = same(*args, causal=True, **options)
        assert_matches(out, want, near, factor=2, what=name)
        assert_matches(lse, want_lse, near_lse, factor=4, what=f"{name} lse")
    clean = fastops.attention_paged(q, cache.k, cache.v, table, have, cu, quant=cache.quant)
    for bad in (cache.quant.k_scale, cache.quant.k_min, cache.quant.v_scale, cache.quant.v_min):
        before = bad[int(table[0, 1]), 0, 1, -1].clone()  # token 64 of the first sequence, or its group
        bad[int(table[0, 1]), 0, 1, -1] = torch.nan
        out = fastops.attention_paged(q, cache.k, cache.v, table, have, cu, quant=cache.quant)
        mine = out[0, group : 2 * group]
        assert bool((mine if bad is cache.quant.k_scale or bad is cache.quant.k_min else mine[:, -32:]).isnan().all())
        out[0, group : 2 * group] = clean[0, group : 2 * group]
        assert torch.equal(out, clean)
        bad[int(table[0, 1]), 0, 1, -1] = before


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("scales", DTYPES)
@pytest.mark.parametrize(
    ("hkv", "group", "d", "dv"),
    [(8, 4, 128, 128), (16, 1, 64, 192), (9, 1, 128, 256), (6, 2, 128, 128), (5, 8, 256, 24), (4, 3, 16, 40)],
)
@pytest.mark.parametrize("format", ["int8", "kv8", "kv4", "fp8_token"])
def test_whatever_lies_beside_what(isa, turned, scales, hkv, group, d, dv, format):
    """Scales of every type, heads or tokens side by side; the dtype of one side's may differ."""
    cache, table, have = filled(format, [333, 64], page=16, hkv=hkv, d=d, dv=dv, dtype=torch.bfloat16)
    numbers = {}
    for name in ("k_scale", "k_zero", "v_scale", "v_zero"):
        if getattr(cache.quant, name) is None:
            continue
        t = getattr(cache.quant, name).to(scales if name[0] == "k" or scales == torch.float16 else torch.bfloat16)
        numbers[name] = t.transpose(1, 2).contiguous().transpose(1, 2) if turned else t.contiguous()
    cache.quant = dataclasses.replace(cache.quant, **numbers)
    q = torch.randn(2, hkv * group, d).bfloat16()
    out = fastops.attention_paged(q, cache.k, cache.v, table, have, quant=cache.quant, window=(300, -1), causal=True)
    want, near = (f(q, cache, table, have, None, window=(300, -1), causal=True)[0] for f in (exact, same))
    assert_matches(out, want, near, factor=2, what=format)


@pytest.mark.parametrize("name", ["int8", "kv8", "kv4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("hkv", "group"), [(8, 4), (8, 1), (1, 8)])
def test_largest_codes_and_smallest_weights(isa, name, dtype, hkv, group):
    """Nothing overflows where every code and every number of q is as large as can be; and beside a key that has half
    of the weight, a thousand that share the rest are not lost."""
    cache, table, have = filled(name, [1000], hkv=hkv, d=256, dtype=dtype)
    largest = {"int8": 127, "kv8": 255, "kv4": 255}[name]
    q = torch.full((1, hkv * group, 256), 3.0).to(dtype)
    for low in (largest, {"int8": -128}.get(name, 0)):  # the same everywhere, or one of two
        cache.k[:, 1::2], cache.v[:, 1::2] = low, low
        cache.k[:, ::2] = cache.v[:, ::2] = largest
        args = (q, cache, table, have, None)
        out = fastops.attention_paged(q, cache.k, cache.v, table, have, quant=cache.quant, scale=1e-4)
        assert_matches(out, exact(*args, scale=1e-4)[0], same(*args, scale=1e-4)[0], factor=2, what=name)
    cache, table, have = filled(name, [1000], hkv=hkv, d=256, dtype=dtype)
    first = int(table[0, 0])
    keys = _kv.gather("k", cache.k, table[0, :1].long(), 1, 1, 0, cache.quant, torch.float32)[0]  # [heads, d]
    q = (keys / (keys * keys).sum(-1, keepdim=True)).repeat_interleave(group, 0)[None].to(dtype)
    cache.v[first, 0] = 0  # the weight of all others is what is left
    args = (q, cache, table, have, None)
    _, others = exact(*args, scale=0.0)
    scale = float(others[0, 0])  # of 1 to the first key: as much as all others together
    out = fastops.attention_paged(q, cache.k, cache.v, table, have, quant=cache.quant, scale=scale)
    assert_matches(out, exact(*args, scale=scale)[0], same(*args, scale=scale)[0], factor=2, what=name)


@pytest.mark.parametrize("name", ["int8", "kv8", "kv4", "fp8_token"])
@pytest.mark.parametrize("hkv", [2, 8])
def test_numbers_that_are_none_stay_in_their_rows(isa, name, hkv):
    """A NaN or infinity of q, of a key's scale and of a value's: those rows are NaN, all others as before."""
    for dtype in (torch.bfloat16, torch.float16):
        cache, table, have = filled(name, [200, 40], hkv=hkv, d=64, dtype=dtype)
        q = torch.randn(2, 2 * hkv, 64).to(dtype)

        def run(q, have=have, cache=cache, table=table):
            return fastops.attention_paged(q, cache.k, cache.v, table, have, quant=cache.quant)

        clean = run(q)
        for bad in (torch.nan, torch.inf):
            broken = q.clone()
            broken[0, 1, 5] = bad
            out = run(broken)
            assert bool(out[0, 1].isnan().all())
            out[0, 1] = clean[0, 1]
            assert torch.equal(out, clean)
        page = int(table[1, 1])  # tokens 32 to 39 of the second sequence
        for scale in (cache.quant.k_scale, cache.quant.v_scale):
            before = scale[page, 7, 1].clone()
            scale[page, 7, 1] = torch.nan
            out = run(q)
            assert bool(out[1, 2:4].isnan().all())
            assert torch.equal(out[0], clean[0])
            out[1, 2:4] = clean[1, 2:4]
            assert torch.equal(out, clean)
            scale[page, 8, 1] = torch.nan  # behind the end
            scale[page, 7, 1] = before
            assert torch.equal(run(q), clean)


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("name", kv.FORMATS)
def test_guard_pages(isa, end, name):
    for d, heads in ((32, 4), (96, 4), (96, 8), (128, 8)):
        cache, table, have = filled(name, [70, 3], d=d, dtype=torch.bfloat16)
        tensors = {f.name: getattr(cache.quant, f.name) for f in dataclasses.fields(cache.quant)}
        fenced = {n: guarded(t, end) if isinstance(t, torch.Tensor) else t for n, t in tensors.items()}
        for queries in ([1, 1], [9, 2]):
            cu = guarded(torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32), end)
            q = guarded(torch.randn(sum(queries), heads, d).bfloat16(), end)
            k, v, t, n = (guarded(x, end) for x in (cache.k, cache.v, table, have))
            out = guarded(torch.empty_like(q), end)
            fastops.attention_paged(q, k, v, t, n, cu, causal=True, quant=kv.KVQuant(**fenced), out=out)


def test_threads_give_the_same_bits():
    cache, table, have = filled("kv4", [1500, 700], hkv=2)
    q = torch.randn(2, 8, 64)
    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(fastops.attention_paged(q, cache.k, cache.v, table, have, quant=cache.quant))
    torch.set_num_threads(2)
    assert torch.equal(*results)


@pytest.mark.parametrize("q_dtype", DTYPES)
def test_scales_of_every_shape(isa, q_dtype):
    """[1], [Hkv], [P, page, Hkv] and groups, in each float type, strided too; and K and V of different kinds."""
    pages, page, hkv, d = 4, 16, 3, 64
    codes = torch.randint(-127, 128, (2, pages, page, hkv, d), dtype=torch.int8)
    table, lens = torch.tensor([[2, 0, 3]], dtype=torch.int32), torch.tensor([40], dtype=torch.int32)
    q = torch.randn(1, 6, d).to(q_dtype)
    for dtype in DTYPES:
        for shape in (
            [1],
            [hkv],
            [pages, page, hkv],
            [pages, 4, hkv, d],
            [pages, page, hkv, d // 16],
            [pages, 1, hkv, 1],
        ):
            scale = (torch.rand(*shape, 2) * 0.02 + 0.001).to(dtype)[..., 0]
            low = torch.randn(*shape).to(dtype)
            quant = kv.KVQuant(k_scale=scale.contiguous(), k_min=low, v_scale=scale.contiguous())
            out = fastops.attention_paged(q, codes[0], codes[1], table, lens, quant=quant)
            want = attend(q.double(), codes[0], codes[1], table, lens, quant=quant)[0]
            assert_matches(
                out, want, attend(q, codes[0], codes[1], table, lens, quant=quant)[0], factor=4, what=str(shape)
            )
    plain = torch.randn(pages, page, hkv, d).to(q_dtype)
    for k, v, quant in ((plain, codes[1], kv.KVQuant(v_scale=scale)), (codes[0], plain, kv.KVQuant(k_scale=scale))):
        out = fastops.attention_paged(q, k, v, table, lens, quant=quant)
        assert_matches(out, attend(q.double(), k, v, table, lens, quant=quant)[0], attend(q, k, v, table, lens, quant=quant)[0], factor=4, what="mixed")  # fmt: skip
    out = fastops.attention_paged(q * 1e-3, *codes, table, lens)  # scales of 1
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_e4m3_is_read_exactly(isa, dtype):
    """All 256 codes, the NaN among them, as values of one key each; and as keys, met by a q of one 1."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 1, 32, 8)
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    out = fastops.attention_paged(torch.zeros(1, 32, 8, dtype=dtype), torch.zeros_like(codes), codes, table, lens)
    assert torch.equal(out.float().view(-1).nan_to_num(1e9), codes.float().view(-1).nan_to_num(1e9))
    codes.view(torch.uint8)[codes.isnan()] = 0  # a key's NaN is seen by all channels
    for d in range(8):
        q = torch.zeros(1, 32, 8, dtype=dtype)
        q[..., d] = 1.0
        lse = fastops.attention_paged(q, codes, codes, table, lens, scale=1.0, return_lse=True)[1]
        torch.testing.assert_close(lse.view(-1), codes[0, 0, :, d].float(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", ["fp8", "fp8_token"])
def test_a_nan_behind_the_mask_stays_there(isa, name):
    cache, table, have = filled(name, [70], hkv=2, d=64, dtype=torch.bfloat16)
    q = torch.randn(3, 8, 64).bfloat16()  # positions 67, 68, 69
    cu = torch.tensor([0, 3], dtype=torch.int32)

    def run():
        return fastops.attention_paged(q, cache.k, cache.v, table, have, cu, quant=cache.quant, causal=True)

    clean = run()
    page = int(table[0, 2])  # tokens 64 to 69
    cache.v.view(torch.uint8)[page, 4, 1, 33] = 0x7F
    out = run()
    assert bool(out[1:, 4:, 33].isnan().all())
    out[1:, 4:, 33] = clean[1:, 4:, 33]
    torch.testing.assert_close(out, clean)  # row 0 by another path: not the same bits


@pytest.mark.parametrize("name", kv.FORMATS)
def test_quantize_dequantize(name):
    fmt = kv.FORMATS[name]
    for role in "kv":
        side = getattr(fmt, role)
        x = torch.randn(3, 64, 2, 96)
        x[0, :32, 0, :32] = 1.5  # a constant group
        codes, scale, shift = kv.quantize(x, name, role, scale=0.01 if side.tokens == 0 else None)
        numbers = {side.shift: shift} if side.shift else {}
        back = kv.dequantize(codes, scale, bits=side.packed_bits, **numbers)
        assert codes.shape == (3, 64, 2, 96 * side.bits // 8)
        if side.dtype == torch.float8_e4m3fn:
            bound = x.abs() * 2**-4 + scale.max() * 2**-9
        else:  # half a step, and the rounding of the numbers themselves
            step = kv.dequantize(torch.full_like(codes, -1 if side.bits < 8 else 1), scale, bits=side.packed_bits)
            bound = step.abs() / (2**side.bits - 1 if side.bits < 8 else 1) * 0.51 + x.abs().max() * 2**-9
        assert bool(((back - x).abs() <= bound).all()), name


def test_kivi_keeps_recent_tokens_and_few_bytes():
    cache, _, have = filled("kivi2", [700, 20], dtype=torch.bfloat16, recent=40, chunks=(0.2, 0.5, 0.51, 1.0))
    packed = cache.quant.packed_lens.tolist()
    assert packed[1] == 0
    assert packed[0] % 32 == 0
    assert 40 <= 700 - packed[0] < 72
    plain = cache.k.numel() * 4 * 2 * 2
    codes_and_scales = sum(
        t.nbytes
        for t in (cache.k, cache.v, cache.quant.k_scale, cache.quant.k_min, cache.quant.v_scale, cache.quant.v_min)
    )
    assert codes_and_scales <= 0.2 * plain
    assert cache.nbytes > codes_and_scales
    assert have.tolist() == [700, 20]


def test_append_in_pieces_is_append_at_once():
    for name in kv.FORMATS:
        torch.manual_seed(3)
        x = torch.randn(2, 150, 2, 32)
        table = torch.arange(6, dtype=torch.int32).view(1, 6)
        caches = []
        for steps in ([150], [1, 40, 31, 2, 76]):
            cache, have, at = (
                kv.PagedCache(name, 6, 32, 2, 32, dtype=torch.float32, recent=32),
                torch.zeros(1, dtype=torch.int32),
                0,
            )
            for n in steps:
                have = kv.append(cache, x[0, at : at + n], x[1, at : at + n], table, have)
                at += n
            caches.append(cache)
        q = torch.randn(1, 2, 32)
        outs = [fastops.attention_paged(q, c.k, c.v, table, have, quant=c.quant) for c in caches]
        assert torch.equal(*outs), name


def call(**changes):
    cache, table, have = filled("kv4", [20, 40])
    args = {"q": torch.randn(2, 4, 64), "k_cache": cache.k, "v_cache": cache.v, "block_table": table, "seq_lens": have}
    args["quant"] = dataclasses.replace(cache.quant, **changes.pop("quant", {}))
    return {**args, **{n: f(args[n]) for n, f in changes.items()}}


BAD = [
    ({"quant": {"k_bits": 3}}, ValueError, "k_bits is 3, must be 8, 4 or 2"),
    ({"quant": {"k_bits": 2}}, ValueError, "k_cache has head size 128, q has 64|must have shape"),
    ({"quant": {"v_scale": None}}, ValueError, "v_zero.* is given without v_scale"),
    ({"quant": {"v_scale": None, "v_zero": None}}, ValueError, "a uint8 cache needs v_scale"),
    ({"quant": {"k_min": torch.zeros(1)}}, ValueError, "give k_zero or k_min, not both"),
    ({"quant": {"k_zero": torch.zeros(1)}}, TypeError, "k_zero"),
    ({"quant": {"k_scale": torch.zeros(7), "k_zero": None}}, ValueError, "k_scale has"),
    ({"quant": {"k_scale": torch.zeros(2, 2), "k_zero": None}}, ValueError, "k_scale"),
    ({"quant": {"k_scale": torch.zeros(2).long(), "k_zero": None}}, TypeError, "k_scale"),
    ({"quant": {"v_scale": torch.zeros(5, 32, 2, 5).half(), "v_zero": None}}, ValueError, "v_scale has"),
    ({"quant": {"k_recent": torch.zeros(2, 8, 2, 64)}}, ValueError, "go together"),
    ({"quant": {"k_recent": torch.zeros(2, 8, 2, 64), "v_recent": torch.zeros(2, 8, 2, 64), "packed_lens": torch.tensor([20, 31], dtype=torch.int32)}}, ValueError, r"packed_lens\[1\] is 31, must be from seq_lens - 8 to seq_lens = 40"),
    ({"quant": {"k_recent": torch.zeros(2, 8, 2, 64), "v_recent": torch.zeros(2, 8, 2, 32), "packed_lens": torch.tensor([20, 40], dtype=torch.int32)}}, ValueError, "v_recent has shape"),
    ({"k_cache": lambda t: t.to(torch.int16)}, TypeError, "k_cache|k must have"),
    ({"k_cache": lambda t: t.to(torch.int8)}, ValueError, "k_bits is 4, must be 0 unless"),
    ({"v_cache": lambda t: t[:, :, :1]}, ValueError, "v"),
    ({"q": lambda t: t[:, :3]}, ValueError, "q has 3 heads"),
]  # fmt: skip


@pytest.mark.parametrize("impl", ["cpp", "reference"])
@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(impl, changes, error, message):
    with fastops.override(attention_paged=impl):
        fastops.attention_paged(**call())
        with pytest.raises(error, match=message):
            fastops.attention_paged(**call(**{n: dict(c) if n == "quant" else c for n, c in changes.items()}))


def test_bad_append():
    cache, table, have = filled("kv4", [20, 40])
    x = torch.randn(2, 2, 64)
    for match, args in {
        "k_cache has shape": (x[:, :1], x[:, :1], table, have),
        "v_cache has shape": (x, x[..., :32], table, have),
        "block_table must have shape": (x, x, table[:1], have),
        "3 tokens for 2": (torch.randn(3, 2, 64), torch.randn(3, 2, 64), table, have),
        "block_table has room": (x, x, table, have + 100),
        "pages run from 0": (x, x, table * 0 + 99, have),
    }.items():
        before = cache.k.clone()
        with pytest.raises(ValueError, match=match):
            kv.append(cache, *args)
        assert torch.equal(cache.k, before)
    for bad in ({"page": 24}, {"head_dim": 20}, {"format": "kv3"}, {"format": "kivi2", "page": 16}):
        options = {"format": "kv4", "pages": 2, "page": 32, "heads": 1, "head_dim": 64, **bad}
        with pytest.raises(ValueError, match=r"PagedCache|kv: format"):
            kv.PagedCache(**options)
    for bad in ({"role": "q"}, {"format": "int3"}, {"scale": 1.0}):
        with pytest.raises(ValueError, match=r"kv"):
            kv.quantize(**{"x": x, "format": "int8", **bad})


def test_compiles_fullgraph():
    cache, table, have = filled("kv4", [20, 40])
    quant = cache.quant

    @torch.compile(fullgraph=True, backend="eager")
    def f(q):
        return fastops.attention_paged(q, cache.k, cache.v, table, have, quant=quant)

    q = torch.randn(2, 4, 64)
    assert torch.equal(f(q), fastops.attention_paged(q, cache.k, cache.v, table, have, quant=quant))
