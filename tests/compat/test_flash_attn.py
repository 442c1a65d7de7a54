"""flash-attention's names and semantics, against a written-out fp64 oracle of its documentation."""

import inspect
import math

import pytest
import torch

from fastops.compat import flash_attn as fa


def oracle(q, k, v, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None):
    """One sequence, q [Sq, H, D], k and v [Sk, Hkv, D]: out and natural-log LSE [H, Sq], key by key in fp64."""
    sq, h, d = q.shape
    sk, hkv = k.shape[:2]
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(sq, h, v.shape[-1], dtype=torch.float64)
    lse = torch.full((h, sq), -math.inf, dtype=torch.float64)
    right = 0 if causal else window[1]
    for i in range(sq):
        p = i + sk - sq
        low = 0 if window[0] < 0 else max(0, p - window[0])
        high = sk if right < 0 else min(sk, p + right + 1)
        if low >= high:
            continue
        for n in range(h):
            kv = n // (h // hkv)
            s = k[low:high, kv] @ q[i, n] * (d**-0.5 if scale is None else scale)
            if softcap:
                s = softcap * torch.tanh(s / softcap)
            if slopes is not None:
                s = s - slopes[n].double() * (p - torch.arange(low, high)).abs()
            lse[n, i] = torch.logsumexp(s, 0)
            out[i, n] = torch.softmax(s, 0) @ v[low:high, kv]
    return out, lse


def close(got, want, dtype=torch.float32):
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


def test_signatures():
    """Argument names, order and defaults of flash-attention 2.8 (anchors/attention.md section 1b)."""
    tail = "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False"
    want = {
        "flash_attn_func": f"q, k, v, {tail}",
        "flash_attn_varlen_func": f"q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {tail}, block_table=None",
        "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, "
        "causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False",
    }
    for name, text in want.items():
        got = ", ".join(
            p.name + ("" if p.default is p.empty else f"={p.default!r}")
            for p in inspect.signature(getattr(fa, name)).parameters.values()
        )
        assert got == text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (40, 72), (59, 59), (111, 128)])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (3, 1)}, {"causal": True, "softcap": 2.0}])
def test_dense(dtype, d, dv, options):
    q, k, v = torch.randn(2, 7, 4, d).to(dtype), torch.randn(2, 11, 2, d).to(dtype), torch.randn(2, 11, 2, dv).to(dtype)
    out, lse, probabilities = fa.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    assert probabilities is None
    assert torch.equal(out, fa.flash_attn_func(q, k, v, **options))
    names = {"window" if n == "window_size" else n: x for n, x in options.items()}
    for b in range(2):
        want, want_lse = oracle(q[b], k[b], v[b], **names)
        close(out[b], want, dtype)
        close(lse[b], want_lse)


def test_alibi_per_batch_and_scale():
    q, k = torch.randn(2, 5, 4, 32), torch.randn(2, 9, 4, 32)
    slopes = torch.rand(2, 4)
    out = fa.flash_attn_func(q, k, k, softmax_scale=0.3, causal=True, alibi_slopes=slopes)
    for b in range(2):
        close(out[b], oracle(q[b], k[b], k[b], 0.3, True, slopes=slopes[b])[0])


def test_packed_forms_are_the_unpacked_ones():
    qkv = torch.randn(2, 6, 3, 4, 32)
    q, k, v = qkv.unbind(2)
    want = fa.flash_attn_func(q, k, v, 0.0, None, True)
    assert torch.equal(fa.flash_attn_qkvpacked_func(qkv, 0.0, None, True), want)
    assert torch.equal(fa.flash_attn_kvpacked_func(q, qkv[:, :, 1:], causal=True), want)
    cu = torch.tensor([0, 6, 12], dtype=torch.int32)
    flat = qkv.flatten(0, 1)
    assert torch.equal(fa.flash_attn_varlen_qkvpacked_func(flat, cu, 6, causal=True), want.flatten(0, 1))
    got = fa.flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], cu, cu, 6, 6, causal=True)
    assert torch.equal(got, want.flatten(0, 1))


def test_gradients_reach_packed_inputs_and_padded_heads():
    qkv = torch.randn(1, 9, 3, 2, 20, dtype=torch.float32, requires_grad=True)
    twin = qkv.detach().double().requires_grad_()
    weight = torch.randn(1, 9, 2, 20)
    (fa.flash_attn_qkvpacked_func(qkv, causal=True) * weight).sum().backward()
    q, k, v = (t.transpose(1, 2) for t in twin.unbind(2))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    (want * weight.double()).sum().backward()
    torch.testing.assert_close(qkv.grad.double(), twin.grad, atol=2e-5, rtol=2e-5)


def test_varlen():
    lens_q, lens_k = [3, 0, 5, 1], [7, 2, 5, 9]
    q, k = torch.randn(9, 4, 64), torch.randn(23, 2, 64)
    cu_q = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
    cu_k = torch.tensor([0, 7, 9, 14, 23], dtype=torch.int32)
    out, lse, _ = fa.flash_attn_varlen_func(
        q, k, k, cu_q, cu_k, max(lens_q), max(lens_k), causal=True, return_attn_probs=True
    )
    for b in range(4):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        want, want_lse = oracle(q[rows], k[keys], k[keys], causal=True)
        close(out[rows], want)
        close(lse[:, rows], want_lse)
    assert lse.shape == (4, 9)


def test_varlen_paged():
    k_cache, v_cache = torch.randn(6, 8, 2, 32), torch.randn(6, 8, 2, 32)
    table = torch.tensor([[4, 1, 0], [2, 5, 3]], dtype=torch.int32)
    cu_q, cu_k = torch.tensor([0, 4, 5], dtype=torch.int32), torch.tensor([0, 19, 32], dtype=torch.int32)
    q = torch.randn(5, 4, 32)
    out = fa.flash_attn_varlen_func(q, k_cache, v_cache, cu_q, cu_k, 4, 19, causal=True, block_table=table)
    for b, n in enumerate([19, 13]):
        k, v = (c[table[b].long()].flatten(0, 1)[:n] for c in (k_cache, v_cache))
        rows = slice(cu_q[b], cu_q[b + 1])
        close(out[rows], oracle(q[rows], k, v, causal=True)[0])


@pytest.mark.parametrize("varlen", [False, True])
def test_dropout_keeps_the_mean_and_drops_the_share(varlen):
    """With value = identity the output is the dropped probability matrix itself."""
    n, p = 64, 0.3
    q, k = torch.randn(1, n, 2, 64), torch.randn(1, n, 2, 64)
    v = torch.eye(n)[None, :, None].expand(1, n, 2, n)
    cu = torch.tensor([0, n], dtype=torch.int32)
    if varlen:
        out = fa.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, n, n, p)[None]
    else:
        out = fa.flash_attn_func(q, k, v, p)
    full = fa.flash_attn_func(q, k, v)
    dropped = (out == 0).float().mean()
    assert 0.25 < dropped < 0.35
    kept = out != 0
    torch.testing.assert_close(out[kept], full[kept] / (1 - p))


def rotate(x, cos, sin, positions, interleaved):
    """x [S, H, D] by complex numbers, fp64."""
    r = cos.shape[1]
    turn = torch.complex(cos.double(), sin.double())[positions][:, None]
    part = x[..., : 2 * r].double()
    pairs = part.unflatten(-1, (r, 2)) if interleaved else part.unflatten(-1, (2, r)).transpose(-1, -2)
    z = torch.complex(pairs[..., 0].contiguous(), pairs[..., 1].contiguous()) * turn
    pairs = torch.view_as_real(z)
    part = pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)
    return torch.cat((part, x[..., 2 * r :].double()), -1)


def dense_cache(kind, rows, size, heads, d):
    if kind == "contiguous":
        return torch.randn(rows, size, heads, d)
    if kind == "heads-first":
        return torch.randn(rows, heads, size, d).transpose(1, 2)
    if kind == "slice":  # of a longer allocation: rows do not touch
        return torch.randn(rows, size + 5, heads, d)[:, :size]
    if kind == "odd":  # rows do not begin where a page could
        return torch.randn(rows, size * heads * d + 8)[:, 8:].unflatten(1, (size, heads, d))
    return torch.randn(rows, size, 3 * heads, d)[:, :, heads : 2 * heads]  # packed with something else


@pytest.mark.parametrize("kind", ["contiguous", "heads-first", "slice", "packed", "odd", "paged-1", "paged-8"])
@pytest.mark.parametrize("rotary", [None, "interleaved", "halves"])
@pytest.mark.parametrize(("sq", "new", "causal", "window"), [
    (1, 1, True, (-1, -1)), (3, 3, True, (-1, -1)), (4, 2, False, (-1, -1)), (2, 2, False, (6, 0)), (1, 0, False, (-1, -1)),
])  # fmt: skip
def test_kvcache(kind, rotary, sq, new, causal, window):
    b, heads, d, size = 3, 2, 32, 24
    seqlens = torch.tensor([0, 7, 21 - new], dtype=torch.int32)
    table = index = None
    if kind.startswith("paged"):
        page = int(kind[-1])
        k_cache, v_cache = (
            torch.randn(b * size // page + 2, page, heads, d),
            torch.randn(b * size // page + 2, page, heads, d),
        )
        table = torch.randperm(k_cache.shape[0])[: b * size // page].view(b, -1).to(torch.int32)
    else:
        k_cache, v_cache = dense_cache(kind, 5, size, heads, d), dense_cache(kind, 5, size, heads, d)
        index = torch.tensor([3, 0, 4], dtype=torch.int32)

    def row(cache, i):
        return cache[table[i].long()].flatten(0, 1) if table is not None else cache[int(index[i])]

    q, k, v = torch.randn(b, sq, 4, d), torch.randn(b, new, heads, d), torch.randn(b, new, heads, d)
    angles = torch.rand(40, 8) * 6
    cos, sin = (angles.cos(), angles.sin()) if rotary else (None, None)
    before = [(row(k_cache, i).clone(), row(v_cache, i).clone()) for i in range(b)]
    untouched = k_cache.clone()
    out, lse = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache, k if new else None, v if new else None, cos, sin, seqlens, index, None, table,
        causal=causal, window_size=window, rotary_interleaved=rotary != "halves", return_softmax_lse=True,
    )  # fmt: skip
    assert lse.shape == (b, 4, sq)
    for i in range(b):
        n, (kc, vc) = int(seqlens[i]), before[i]
        local = causal or window != (-1, -1)
        qi, ki = q[i], k[i]
        if rotary:
            at = n + (torch.arange(sq) if local else torch.zeros(sq, dtype=torch.long))
            qi = rotate(qi, cos, sin, at, rotary == "interleaved")
            ki = rotate(ki, cos, sin, n + torch.arange(new), rotary == "interleaved")
        kc, vc = kc.double(), vc.double()
        kc[n : n + new], vc[n : n + new] = ki.double(), v[i].double()
        close(row(k_cache, i), kc)
        close(row(v_cache, i), vc)
        want, want_lse = oracle(qi, kc[: n + new], vc[: n + new], causal=causal, window=window)
        close(out[i], want)
        close(lse[i], want_lse)
    if table is None:
        spare = [i for i in range(5) if i not in index.tolist()]
        assert torch.equal(k_cache[spare], untouched[spare])


def test_kvcache_leftpad_and_int_length():
    k_cache, v_cache = torch.randn(2, 17, 2, 32), torch.randn(2, 17, 2, 32)
    q, pad = torch.randn(2, 3, 4, 32), torch.tensor([4, 0], dtype=torch.int32)
    k_cache[0, :4], v_cache[0, :4] = math.nan, math.nan
    out = fa.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=12, cache_leftpad=pad, causal=True)
    for i in range(2):
        keys = slice(int(pad[i]), 12)
        close(out[i], oracle(q[i], k_cache[i, keys], v_cache[i, keys], causal=True)[0])


def test_kvcache_whole_cache_by_default():
    cache = torch.randn(2, 16, 2, 32)
    q = torch.randn(2, 1, 2, 32)
    out = fa.flash_attn_with_kvcache(q, cache, cache)
    close(out[1], oracle(q[1], cache[1], cache[1])[0])
    empty = fa.flash_attn_with_kvcache(q[:0], cache[:0], cache[:0])
    assert empty.shape == (0, 1, 2, 32)


def i32(*x):
    return torch.tensor(x, dtype=torch.int32)


@pytest.mark.parametrize(("change", "kind", "words"), [
    ({"cache_seqlens": 17}, ValueError, "cache_seqlens[0] is 17, must be from 0 to 16"),
    ({"cache_seqlens": i32(3)}, ValueError, "cache_seqlens must have shape [2]"),
    ({"k": torch.ones(2, 1, 2, 32)}, ValueError, "k and v come together, v is missing"),
    ({"k": torch.ones(2, 1, 2, 32), "v": torch.ones(2, 1, 2, 32)}, ValueError, "need cache_seqlens"),
    ({"k": torch.ones(2, 2, 2, 32), "v": torch.ones(2, 2, 2, 32), "cache_seqlens": i32(3, 15)}, ValueError,
     "sequence 1 would hold 17 keys, the cache has room for 16"),
    ({"k": torch.ones(2, 2, 2, 32), "v": torch.ones(2, 1, 2, 32), "cache_seqlens": 3}, ValueError, "v has shape [2, 1, 2, 32]"),
    ({"cache_batch_idx": i32(0, 2)}, ValueError, "cache_batch_idx[1] is 2, must be from 0 to 1"),
    ({"cache_batch_idx": torch.tensor([0, 1])}, TypeError, "cache_batch_idx must be int32"),
    ({"cache_leftpad": i32(9, 0), "cache_seqlens": 8}, ValueError, "cache_leftpad[0] is 9, but sequence 0 has 8 keys"),
    ({"block_table": i32(0, 1)[:, None], "cache_leftpad": i32(0, 0)}, ValueError, "cache_leftpad goes with a dense cache"),
    ({"block_table": i32(0, 2)[:, None]}, ValueError, "block_table[1, 0] is 2, pages run from 0 to 1"),
    ({"rotary_cos": torch.ones(16, 8), "cache_seqlens": 1}, ValueError, "rotary_sin is missing"),
    ({"rotary_cos": torch.ones(9, 8), "rotary_sin": torch.ones(9, 8), "cache_seqlens": 9}, ValueError, "needs position 9"),
    ({"rotary_cos": torch.ones(16, 17), "rotary_sin": torch.ones(16, 17), "cache_seqlens": 1}, ValueError, "at most D = 32"),
    ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
    ({"q": torch.ones(3, 1, 2, 32)}, ValueError, "q has batch size 3, k_cache 2"),
    ({"q": torch.ones(2, 1, 2, 32, dtype=torch.bfloat16)}, TypeError, "k_cache is float32, q is bfloat16"),
])  # fmt: skip
def test_kvcache_bad_input(change, kind, words):
    cache = torch.zeros(2, 16, 2, 32)
    call = {"q": torch.ones(2, 1, 2, 32), "k_cache": cache, "v_cache": cache, **change}
    with pytest.raises(kind) as caught:
        fa.flash_attn_with_kvcache(**call)
    assert words in str(caught.value)
    assert str(caught.value).startswith("flash_attn_with_kvcache: ")
    assert not cache.any()  # nothing was written


@pytest.mark.parametrize(("call", "words"), [
    (lambda x, cu: fa.flash_attn_func(x, x, x, 1.0), "dropout_p is 1.0"),
    (lambda x, cu: fa.flash_attn_func(x, x, x, 0.1, softcap=1.0), "use one of them"),
    (lambda x, cu: fa.flash_attn_qkvpacked_func(x), "qkv must be [B,S,3,H,D], got shape [2, 4, 2, 32]"),
    (lambda x, cu: fa.flash_attn_varlen_kvpacked_func(x[0], x, cu, cu, 4, 4), "kv must be [T,2,H,D], got shape [2, 4, 2, 32]"),
    (lambda x, cu: fa.flash_attn_varlen_func(x[0], x, x, cu, cu, 4, 4, 0.1, block_table=cu[None]), "takes no dropout"),
])  # fmt: skip
def test_bad_input(call, words):
    with pytest.raises(ValueError) as caught:
        call(torch.ones(2, 4, 2, 32), i32(0, 4))
    assert words in str(caught.value)
