"""What AMX multiplies by tiles: where rows lie, parts of fp16 and fp32, numbers that are not finite."""

import pytest
import torch
from test_attention_paged import check_pages, paged

import fastops
from fastops.info import isas
from fastops.testing import assert_matches


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=2e-2, equal_nan=True)


def inputs(sk, hkv, group, d, dv, sq=1, b=2):
    def some(*shape):
        return torch.randn(*shape).bfloat16()

    return some(b, sq, hkv * group, d), some(b, sk, hkv, d), some(b, sk, hkv, dv)


@pytest.mark.parametrize(("hkv", "group", "sq"), [(8, 4, 1), (1, 8, 1), (2, 3, 2), (5, 3, 1), (16, 4, 1), (3, 8, 2)])
@pytest.mark.parametrize(("d", "dv"), [(128, 128), (64, 64), (32, 256), (256, 32), (96, 160), (80, 64)])
@pytest.mark.parametrize("sk", [1, 16, 75, 530])
def test_matches_reference(isa, hkv, group, sq, d, dv, sk):
    q, k, v = inputs(sk, hkv, group, d, dv, sq)
    for options in ({"causal": True}, {"window": (20, 0), "sinks": torch.randn(hkv * group)}):
        out, lse = fastops.attention(q, k, v, return_lse=True, **options)
        with fastops.override(attention="reference"):
            exact, exact_lse = fastops.attention(q.double(), k.double(), v.double(), return_lse=True, **options)
            same, same_lse = fastops.attention(q, k, v, return_lse=True, **options)
        assert_matches(out, exact, same, what=f"{options}")
        assert_matches(lse, exact_lse, same_lse, factor=4, what=f"lse {options}", least=1.0)


@pytest.mark.parametrize("page", [1, 8, 16, 64])
@pytest.mark.parametrize("d", [64, 128])
def test_pages_of_any_size(isa, page, d):
    args = paged([700, 33, 0, 5], [1, 3, 1, 1], page, hkv=4, group=4, d=d, dtype=torch.bfloat16)
    for options in ({"causal": True}, {"causal": True, "window": (37, -1)}):
        check_pages(args, options)


def test_strides(isa):
    q, k, v = inputs(200, 4, 4, 64, 64)
    exact = fastops.attention(q, k, v)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)]
    backwards = [t.flip(1).contiguous() for t in (k, v)]
    for keys, values in (heads_first, [t[:, torch.arange(199, -1, -1)] for t in backwards]):
        close(fastops.attention(q, keys, values), exact)
    one = k[:, :1].expand(-1, 200, -1, -1)  # stride 0
    close(fastops.attention(q, one, v), fastops.attention(q, one.contiguous(), v))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_values_not_finite_stay_in_their_channel(isa, value):
    q, k, v = inputs(100, 4, 4, 64, 64, b=1)
    clean = fastops.attention(q, k, v)
    v[0, 40, 1, 6] = value
    out = fastops.attention(q, k, v)
    hit = torch.zeros(16, 64, dtype=torch.bool)
    hit[4:8, 6] = True
    expected = torch.full((16,), value)
    close(out[0, 0, 4:8, 6].float(), expected[:4])
    close(out[0, 0][~hit], clean[0, 0][~hit])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_keys_not_finite_stay_in_their_head(isa, value):
    q, k, v = inputs(100, 4, 4, 64, 64, b=1)
    clean = fastops.attention(q, k, v)
    k[0, 40, 1, 6] = value
    out = fastops.attention(q, k, v)
    others = [h for h in range(16) if h // 4 != 1]
    close(out[0, 0, others], clean[0, 0, others])
    assert torch.isnan(out[0, 0, 4:8]).any(dim=-1).any()
    k[0, 40, 1, 6] = 0.0
    seen = fastops.attention(q, k, v, window=(20, 0))
    k[0, 40, 1, 6] = v[0, 41, 2, 3] = value  # where nobody looks
    close(fastops.attention(q, k, v, window=(20, 0)), seen)


FLOATS = [torch.float32, torch.float16]


def many(dtype, sq=70, sk=150, d=64, dv=64):
    """As many rows as are packed."""
    return torch.randn(1, sq, 4, d).to(dtype), torch.randn(1, sk, 2, d).to(dtype), torch.randn(1, sk, 2, dv).to(dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (72, 40), (128, 256), (8, 8), (256, 16)])
def test_tiles_are_those_of_the_emulator(dtype, d, dv):
    """Bit for bit: what the emulator shows on other machines is what AMX does."""
    if "amx" not in isas():
        pytest.skip("no AMX here")
    for sq in (1, 2, 70):
        q, k, v = many(dtype, sq, d=d, dv=dv)
        outs = []
        for name in ("amx", "amx_emu"):
            with fastops.use_isa(name):
                outs.append(fastops.attention(q, k, v, causal=True, return_lse=True))
        assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_one_number_not_finite(isa, dtype, where, value):
    """Against the reference: infinities are no NaNs, and a score of minus infinity is no key."""
    tensors = dict(zip("qkv", many(dtype), strict=True))
    tensors[where][0, 30, 1, 5] = value
    out, lse = fastops.attention(**tensors, causal=True, return_lse=True)
    with fastops.override(attention="reference"):
        exact, exact_lse = fastops.attention(
            **{n: t.double() for n, t in tensors.items()}, causal=True, return_lse=True
        )
    tol = {"atol": 2e-3, "rtol": 2e-3} if dtype == torch.float16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(out.double(), exact, equal_nan=True, **tol)
    torch.testing.assert_close(lse.double(), exact_lse.double(), equal_nan=True, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [3.4e38, 1e38, 1e30, 1e-20, 1e-30])
def test_numbers_of_any_size(isa, size):
    """From those whose first part would round up to an infinity down to those whose last part is subnormal."""
    q, k, v = many(torch.float32)
    values = v / v.abs().max() * min(size, 1e34)  # sums stay finite
    large, small = q / q.abs().max() * size, k * min(max(1.0 / size, 1e-25), 1e25)
    scale = 0.5 / (large.abs().max() * small.abs().max()).item()
    with fastops.override(attention="reference"):
        exact = fastops.attention(q.double(), k.double(), values.double())
        whole = fastops.attention(large.double(), small.double(), v.double(), scale=scale)
    assert ((fastops.attention(q, k, values) - exact).abs() <= 1e-6 * values.abs().max()).all()
    torch.testing.assert_close(fastops.attention(large, small, v, scale=scale).double(), whole, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, 0x7F800001])
def test_a_nan_of_any_bits_is_one(isa, dtype, bits):
    """GPUs write NaNs with all bits set, which rounding by an addition turns into zeros."""
    for at in range(3):
        tensors = many(dtype)
        if dtype == torch.float32:
            tensors[at].view(torch.int32)[0, 30, 1, 5] = bits
        else:
            tensors[at].view(torch.int16)[0, 30, 1, 5] = -1 if bits == -1 else 0x7FFF if bits == 0x7FFFFFFF else 0x7C01
        hit = torch.isnan(fastops.attention(*tensors)[0])
        if at == 0:
            assert hit[30, 1].all()
        elif at == 1:
            assert hit[:, 2:].all()
        else:
            assert hit[:, 2:, 5].all()
        assert hit.sum() == (64, 70 * 2 * 64, 70 * 2)[at]
