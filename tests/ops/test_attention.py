"""attention against its reference: every variant, dtype, feature and odd shape."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastops
from fastops.ops import _common as common
from fastops.testing import assert_matches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(b, sq, sk, hkv, group, d, dv, dtype):
    q = torch.randn(b, sq, hkv * group, d).to(dtype)
    return q, torch.randn(b, sk, hkv, d).to(dtype), torch.randn(b, sk, hkv, dv).to(dtype)


def check(q, k, v, **options):
    """Against fp64, with torch's own arithmetic in the same dtype as the yardstick."""
    out, lse = fastops.attention(q, k, v, return_lse=True, **options)
    wide = {n: (t.double() if torch.is_tensor(t) and t.dtype != torch.bool else t) for n, t in options.items()}
    exact, exact_lse = common.attend(q.double(), k.double(), v.double(), **wide)
    assert_matches(out, exact, naive(q, k, v, **options), what=f"out {list(q.shape)} {list(v.shape)} {options}")
    _, lse32 = common.attend(q.float(), k.float(), v.float(), **options)
    assert_matches(lse, exact_lse, lse32, factor=4, what=f"lse {list(q.shape)} {options}", least=1.0)
    return out


def naive(
    q, k, v, causal=False, scale=None, window=(-1, -1), softcap=0.0, sinks=None, alibi_slopes=None, attn_mask=None
):
    """Attention as torch computes it in the inputs' own precision."""
    dtype, group = q.dtype, q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    mask, distance = common.visible(q.shape[2], k.shape[2], causal, window, False, q.device)
    if alibi_slopes is not None:
        s = s - (alibi_slopes[:, None, None] * distance.abs()).to(dtype)
    if attn_mask is not None:
        mask, s = (mask & attn_mask, s) if attn_mask.dtype == torch.bool else (mask, s + attn_mask.to(dtype))
    s = s.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        s = torch.cat([s, sinks.to(dtype)[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    p = torch.softmax(s, -1).nan_to_num(0.0)[..., : k.shape[2]]
    return (p @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sq", "sk"), [(1, 1), (1, 300), (2, 129), (7, 64), (16, 15), (65, 65), (130, 300), (3, 0), (0, 5), (33, 8)]
)
def test_matches_reference_over_lengths(isa, dtype, sq, sk):
    for causal, group in itertools.product((False, True), (1, 4)):
        check(*inputs(2, sq, sk, 2, group, 64, 64, dtype), causal=causal)
    run_once()


def run_once():
    """Empty calls run nothing: leave a trace for the variant check."""
    x = torch.zeros(1, 1, 1, 8)
    fastops.attention(x, x, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 24, 40, 72, 96, 128, 192, 256])
def test_matches_reference_over_head_sizes(isa, dtype, d):
    check(*inputs(1, 19, 70, 1, 3, d, d, dtype), causal=True)
    check(*inputs(1, 1, 70, 2, 3, d, 136 if d != 136 else 8, dtype))
    check(*inputs(1, 40, 33, 1, 1, d, 16, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(1, 1), (1, 8), (5, 3), (40, 2)])
def test_every_feature(isa, dtype, rows):
    sq, group = rows
    q, k, v = inputs(2, sq, 150, 2, group, 64, 80, dtype)
    heads = 2 * group
    sinks, slopes = torch.randn(heads), torch.rand(heads)
    check(q, k, v, window=(20, 3))
    check(q, k, v, causal=True, window=(64, -1))
    check(q, k, v, softcap=5.0, causal=True)
    check(q, k, v, sinks=sinks)
    check(q, k, v, sinks=sinks, window=(0, 0))
    check(q, k, v, alibi_slopes=slopes, causal=True)
    check(q, k, v, scale=0.3)
    check(q, k, v, scale=-0.1)
    check(q, k, v, scale=0.0, causal=True)
    check(q, k, v, attn_mask=torch.rand(2, 1, sq, 150) < 0.7)
    check(q, k, v, attn_mask=torch.randn(heads, sq, 150), softcap=2.0, sinks=sinks, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(1, 1), (1, 2), (3, 1), (1, 4), (1, 5), (2, 3), (7, 1), (2, 4)])
@pytest.mark.parametrize(("hkv", "d", "dv"), [(3, 64, 64), (8, 128, 80), (17, 40, 136)])
def test_few_rows_of_many_heads(isa, dtype, rows, hkv, d, dv):
    """What a vector of rows holds, and what is left of it: every number of rows, heads and columns that do not fill it,
    an odd number of keys, several tiles, rows that see different keys."""
    sq, group = rows
    q, k, v = inputs(2, sq, 331, hkv, group, d, dv, dtype)
    k[0, 200, 0] = 1.25 * q[0, 0, 0]  # one row's maximum rises late and far, the others' do not
    check(q, k, v, causal=True)
    check(q, k, v, causal=True, window=(70, -1), sinks=torch.randn(hkv * group))
    if sq > 1:  # the last key is seen by the last row alone
        v[0, -1] = float("nan")
        clean, broken = v.nan_to_num(0.0), fastops.attention(q, k, v, causal=True)
        assert broken[0, -1].isnan().all()
        # AMX computes an item with a NaN once more in another way, whose probabilities are not rounded to bf16.
        rounded = {"atol": 2e-3, "rtol": 2e-2} if "amx" in isa and dtype == torch.bfloat16 else {}
        whole = fastops.attention(q, k, clean, causal=True)
        torch.testing.assert_close(broken[0, :-1], whole[0, :-1], **rounded)


def test_alibi_slopes_per_batch(isa):
    q, k, v = inputs(2, 3, 20, 1, 4, 64, 64, torch.float32)
    slopes = torch.rand(2, 4)
    out = fastops.attention(q, k, v, alibi_slopes=slopes)
    for b in range(2):
        one = fastops.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], alibi_slopes=slopes[b])
        torch.testing.assert_close(out[b : b + 1], one, rtol=0, atol=1e-6)


def test_rows_without_keys_are_zero(isa):
    q, k, v = inputs(1, 6, 4, 1, 2, 64, 64, torch.float32)
    out, lse = fastops.attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :2] == 0).all()
    assert (lse[:, :, :2] == float("-inf")).all()
    assert torch.isfinite(lse[:, :, 2:]).all()
    out, lse = fastops.attention(q, k, v, attn_mask=torch.zeros(6, 4, dtype=torch.bool), return_lse=True)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(isa, dtype):
    base = torch.randn(2, 6, 50, 200).to(dtype)  # [B, H, S, D] storage, wider than needed
    q = base[:, :4, :20, 8:72].transpose(1, 2)
    k = base[:, 4:, :, 64:128].transpose(1, 2)
    v = base[:, 4:, :, 100:140].transpose(1, 2)
    check(q, k, v, causal=True)
    check(q[:, -1:], k, v)
    one = torch.randn(1, 30, 1, 64).to(dtype).expand(2, 30, 2, 64)  # broadcast batch and heads
    check(q, one, one)
    check(q[:, :1], one, one)
    check(q, torch.flip(k, [1]), v)
    check(q[:, ::2], k[:, ::3], v[:, ::3])


def same(isa, a, b):
    """AMX multiplies a tile of values by other instructions where one of them is not finite: the last bits may differ."""
    return torch.allclose(a, b, atol=1e-6, rtol=1e-5) if "amx" in isa else torch.equal(a, b)


@pytest.mark.parametrize("sq", [1, 40])
def test_nan_stays_with_rows_that_see_it(isa, sq):
    for value in (float("nan"), float("inf")):
        q, k, v = inputs(1, sq, 100, 2, 2, 64, 64, torch.float32)
        clean = fastops.attention(q, k, v, window=(10, 0))
        k[0, 50, 0, 3], v[0, 51, 0, 5] = value, value
        out = fastops.attention(q, k, v, window=(10, 0))
        sees = torch.tensor([p >= 50 and p - 10 <= 51 for p in range(100 - sq, 100)])
        assert same(isa, out[:, ~sees], clean[:, ~sees])
        assert torch.equal(out[:, :, 2:], clean[:, :, 2:])  # the other KV head
        if sees.any():
            assert not torch.isfinite(out[0, sees][:, :2]).all()


def test_nan_behind_a_bool_mask_is_gone(isa):
    for sq in (1, 30):
        q, k, v = inputs(1, sq, 80, 1, 2, 64, 64, torch.float32)
        mask = torch.ones(80, dtype=torch.bool)
        mask[60:] = False
        clean = fastops.attention(q, k, v, attn_mask=mask.expand(sq, 80))
        k[:, 60:], v[:, 60:] = float("nan"), float("nan")
        assert same(isa, fastops.attention(q, k, v, attn_mask=mask.expand(sq, 80)), clean)


def test_nan_query_poisons_its_row_only(isa):
    q, k, v = inputs(1, 30, 80, 1, 1, 64, 64, torch.float32)
    clean = fastops.attention(q, k, v)
    q[0, 7, 0, 0] = float("nan")
    out = fastops.attention(q, k, v)
    assert torch.isnan(out[0, 7]).all()
    rest = torch.arange(30) != 7
    assert torch.equal(out[:, rest], clean[:, rest])


def test_large_finite_bias_is_not_a_mask(isa):
    """torch's convention: a row masked by the smallest finite number everywhere averages all values."""
    q, k, v = inputs(1, 3, 40, 1, 1, 64, 64, torch.float32)
    bias = torch.full((3, 40), torch.finfo(torch.float32).min)
    out = fastops.attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out), rtol=1e-5, atol=1e-6)


def test_large_scores_do_not_overflow(isa):
    q, k, v = inputs(1, 20, 300, 1, 1, 64, 64, torch.float32)
    check(q * 30, k * 30, v)
    check(q[:, :1] * 30, k * 30, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "sq", "sk", "hkv", "group"), [(1, 1, 3000, 2, 4), (2, 70, 500, 2, 2), (1, 600, 600, 1, 1), (2, 5, 900, 3, 3)]
)
def test_same_bits_for_any_number_of_threads(isa, dtype, b, sq, sk, hkv, group):
    """However many cores the plan is for (how many pieces long sequences are cut into)."""
    q, k, v = inputs(b, sq, sk, hkv, group, 64, 64, dtype)
    before = torch.get_num_threads()
    exact, _ = common.attend(q.double(), k.double(), v.double(), causal=True)
    same = naive(q, k, v, causal=True)
    try:
        for cores in (0, 1, 3, 64):
            fastops._ops.control.cores_set(cores)
            results = []
            for threads in (1, 2, 5, 2):
                torch.set_num_threads(threads)
                results.append(fastops.attention(q, k, v, causal=True, return_lse=True))
            for out, lse in results[1:]:
                assert torch.equal(out, results[0][0])
                assert torch.equal(lse, results[0][1])
            assert_matches(results[0][0], exact, same, what=f"{cores} cores")
    finally:
        torch.set_num_threads(before)
        fastops._ops.control.cores_set(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sq", "sk", "hkv", "group", "d"), [(300, 1500, 1, 2, 64), (130, 900, 2, 4, 128), (500, 500, 1, 1, 72)]
)
def test_blocks_of_rows_are_cut_over_keys(isa, many_cores, dtype, sq, sk, hkv, group, d):
    q, k, v = inputs(1, sq, sk, hkv, group, d, d, dtype)
    heads = hkv * group
    check(q, k, v, causal=True)
    check(q, k, v, causal=True, window=(400, 0), sinks=torch.randn(heads))
    check(q, k, v, alibi_slopes=torch.rand(heads), softcap=20.0)
    check(q, k, v, attn_mask=torch.rand(heads, sq, sk) < 0.05)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sq", "hkv", "group", "d", "dv"), [
    (3, 8, 4, 128, 128), (1, 3, 16, 64, 72), (16, 5, 1, 40, 64), (9, 2, 1, 128, 64), (2, 1, 7, 64, 64), (5, 16, 2, 24, 24),
])  # fmt: skip
def test_rows_of_a_head_in_two_groups(isa, dtype, sq, hkv, group, d, dv):
    """9 to 16 rows of a KV head, from 512 keys on: whole groups and others, heads side by side and apart."""
    q, k, v = inputs(2, sq, 601, hkv, group, d, dv, dtype)
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)]
    sinks = torch.randn(hkv * group)
    for options in ({}, {"causal": True}, {"causal": True, "window": (530, 0), "sinks": sinks}, {"window": (-1, 3)}):
        check(q, k, v, **options)
        check(q, *apart, **options)
    v[:, 600] = float("nan")  # the last query alone sees it
    out = fastops.attention(q, k, v, causal=True)
    assert torch.isfinite(out[:, :-1]).all()
    assert torch.isnan(out[:, -1]).all()


@pytest.mark.parametrize("sq", [1, 50])
def test_variants_agree(sq):
    from fastops.info import isas

    q, k, v = inputs(1, sq, 200, 2, 3, 72, 72, torch.float32)
    outs = {}
    for name in isas():
        with fastops.use_isa(name):
            outs[name] = fastops.attention(q, k, v, causal=True, softcap=20.0)
    assert outs, "the compiled library is not built"
    for name, out in outs.items():
        torch.testing.assert_close(out, outs["scalar"], rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "sq", "sk", "heads"), [(0, 3, 5, 2), (2, 3, 5, 0), (2, 0, 5, 2), (2, 3, 0, 2), (1, 0, 0, 0)]
)
def test_nothing_to_do(many_cores, dtype, b, sq, sk, heads):
    q, k, v = (torch.randn(b, n, heads, d).to(dtype) for n, d in ((sq, 64), (sk, 64), (sk, 32)))
    out, lse = fastops.attention(q, k, v, causal=True, return_lse=True)
    assert out.shape == (b, sq, heads, 32)
    assert lse.shape == (b, heads, sq)
    assert not out.any()
    assert torch.isneginf(lse).all()


def test_out_argument(isa):
    q, k, v = inputs(2, 5, 9, 1, 2, 64, 64, torch.bfloat16)
    want, want_lse = fastops.attention(q, k, v, return_lse=True)
    out = torch.empty(2, 2, 5, 64, dtype=torch.bfloat16).transpose(1, 2)
    got, lse = fastops.attention(q, k, v, out=out, return_lse=True)
    assert got is out
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    wide = torch.empty(2, 5, 2, 64)
    fastops.attention(q, k, v, out=wide)
    assert torch.equal(wide.bfloat16(), want)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_shapes(data):
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    d, dv = (8 * draw(st.integers(1, 32)) for _ in range(2))
    sq, sk = draw(st.integers(0, 90)), draw(st.integers(0, 200))
    q, k, v = inputs(draw(st.integers(1, 3)), sq, sk, draw(st.integers(1, 3)), draw(st.integers(1, 9)), d, dv, dtype)
    left, right = draw(st.integers(-1, 100)), draw(st.integers(-1, 20))
    try:
        fastops._ops.control.cores_set(draw(st.sampled_from([0, 1, 5, 64])))
        check(q, k, v, causal=draw(st.booleans()), window=(left, right), softcap=draw(st.sampled_from([0.0, 8.0])))
    finally:
        fastops._ops.control.cores_set(0)


BAD = [
    (lambda q, k, v: fastops.attention(q[0], k, v), ValueError, r"q must be \[B,Sq,Hq,D\], got shape \[4, 4, 64\]"),
    (lambda q, k, v: fastops.attention([1], k, v), TypeError, "q must be a tensor, got list"),
    (lambda q, k, v: fastops.attention(q, k.half(), v), TypeError, "k is float16, q is float32"),
    (lambda q, k, v: fastops.attention(q.int(), k, v), TypeError, "q is int32, allowed"),
    (lambda q, k, v: fastops.attention(q[:, :, :3], k, v), ValueError, "q has 3 heads, k has 2; need Hq % Hkv == 0"),
    (lambda q, k, v: fastops.attention(q, k[..., :32], v), ValueError, "k has head size 32, q has 64"),
    (lambda q, k, v: fastops.attention(q, k, v[:, :5]), ValueError, r"v has shape \[2, 5, 2, 64\], must match k"),
    (lambda q, k, v: fastops.attention(q, k[:1], v[:1]), ValueError, "q has batch size 2, k has 1"),
    (lambda q, k, v: fastops.attention(q[..., :60], k[..., :60], v), ValueError, "head size D is 60, allowed: multiples"),
    (lambda q, k, v: fastops.attention(q, k, v[..., :4]), ValueError, "head size Dv is 4, allowed: multiples"),
    (lambda q, k, v: fastops.attention(q, k, v, scale=float("inf")), ValueError, "scale is inf, must be finite"),
    (lambda q, k, v: fastops.attention(q, k, v, softcap=-1.0), ValueError, "softcap is -1.0, must be 0"),
    (lambda q, k, v: fastops.attention(q, k, v, window=(-2, 0)), ValueError, r"window is \(-2, 0\), must be"),
    (lambda q, k, v: fastops.attention(q, k, v, sinks=torch.zeros(3)), ValueError, r"sinks has shape \[3\], must be \[4\]"),
    (lambda q, k, v: fastops.attention(q, k, v, sinks=torch.zeros(4, dtype=torch.int)), TypeError, "sinks is int32"),
    (lambda q, k, v: fastops.attention(q, k, v, alibi_slopes=torch.zeros(2, 3)), ValueError, r"alibi_slopes has shape \[2, 3\]"),
    (lambda q, k, v: fastops.attention(q, k, v, attn_mask=torch.zeros(5, 5)), ValueError, r"attn_mask has shape \[5, 5\], must"),
    (lambda q, k, v: fastops.attention(q, k, v, attn_mask=torch.zeros(4, 6, dtype=torch.int)), TypeError, "attn_mask is int32"),
    (lambda q, k, v: fastops.attention(q, k, v, out=torch.empty(1)), ValueError, r"out has shape \[1\], must be \[2, 4, 4, 64\]"),
    (lambda q, k, v: fastops.attention(q, k, v, out=torch.empty(2, 4, 4, 64).half()), TypeError, "out is float16, must be"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    q, k, v = inputs(2, 4, 6, 2, 2, 64, 64, torch.float32)
    with pytest.raises(error, match=message):
        call(q, k, v)
    with fastops.override(attention="reference"), pytest.raises(error, match=message):
        call(q, k, v)


def test_last_dimension_must_be_dense():
    q, k, v = inputs(1, 4, 6, 1, 1, 64, 64, torch.float32)
    with pytest.raises(ValueError, match="last dimension of k must be contiguous"):
        fastops.attention(q, k.transpose(1, 3).contiguous().transpose(1, 3), v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sq", "sk", "group", "d", "dv"), [(9, 14, 2, 32, 40), (70, 130, 3, 72, 64), (1, 200, 4, 64, 64)]
)
def test_gradients(isa, dtype, sq, sk, group, d, dv):
    q, k, v = inputs(2, sq, sk, 2, group, d, dv, dtype)
    heads = 2 * group
    weight = torch.randn(2, sq, heads, dv)
    cases = [
        {"causal": True}, {"softcap": 4.0, "window": (50, 2)}, {"sinks": torch.randn(heads)}, {"scale": -0.2},
        {"alibi_slopes": torch.rand(heads)}, {"attn_mask": torch.rand(sq, sk) < 0.7}, {"attn_mask": torch.randn(sq, sk)},
    ]  # fmt: skip
    for options in cases:

        def run(fn, cast, options=options):
            leaves = [cast(t).detach().requires_grad_() for t in (q, k, v)]
            opts = {n: cast(t) if torch.is_tensor(t) and t.dtype != torch.bool else t for n, t in options.items()}
            (fn(*leaves, **opts).float() * weight).sum().backward()
            return [t.grad for t in leaves]

        got = run(fastops.attention, lambda t: t)
        exact = run(lambda *a, **o: common.attend(*a, **o)[0], lambda t: t.double())
        same = run(naive, lambda t: t)
        for g, e, s, name in zip(got, exact, same, "qkv", strict=True):
            assert_matches(g, e, s, what=f"d{name} {list(options)}")


def test_gradients_of_lse_and_sinks(isa):
    q, k, v = inputs(2, 11, 30, 1, 4, 64, 64, torch.float32)
    sinks, w, wl = torch.randn(4), torch.randn(2, 11, 4, 64), torch.randn(2, 4, 11)

    def run(fn):
        leaves = [t.clone().requires_grad_() for t in (q, k, v, sinks)]
        out, lse = fn(*leaves[:3], causal=True, sinks=leaves[3])
        ((out * w).sum() + (lse * wl).sum()).backward()
        return [t.grad for t in leaves]

    got = run(lambda *a, **o: fastops.attention(*a, return_lse=True, **o))
    for g, e in zip(got, run(common.attend), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)


def test_gradients_have_the_same_bits_for_any_number_of_threads(isa):
    q, k, v = inputs(1, 150, 200, 2, 2, 64, 64, torch.float32)
    sinks, before, results = torch.randn(4), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (q, k, v, sinks)]
            fastops.attention(*leaves[:3], causal=True, sinks=leaves[3]).square().sum().backward()
            results.append([t.grad for t in leaves])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck_through_out_lse_and_sinks():
    q, k, v = (t.double().requires_grad_() for t in inputs(1, 4, 6, 1, 2, 8, 8, torch.float32))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    with fastops.override(attention="reference"):

        def fn(q, k, v, s):
            return fastops.attention(q, k, v, causal=True, window=(3, -1), sinks=s, softcap=3.0, return_lse=True)

        assert torch.autograd.gradcheck(fn, (q, k, v, sinks))


def test_gradient_of_rows_without_keys_is_zero():
    q, k, v = (t.requires_grad_() for t in inputs(1, 6, 2, 1, 1, 32, 32, torch.float32))
    fastops.attention(q, k, v, causal=True).sum().backward()
    for t in (q, k, v):
        assert torch.isfinite(t.grad).all()
    assert (q.grad[:, :4] == 0).all()
