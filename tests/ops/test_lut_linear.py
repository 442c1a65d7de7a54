"""lut_linear and fastops.lut, on every variant."""

import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastops
from fastops import LutWeight, _ops, lut
from fastops.int4 import pack_pairs, unpack_pairs
from fastops.ops.lut_linear import reference
from fastops.testing import ROWS_SERVED_BY, assert_matches, guarded

SERVED_BY = ROWS_SERVED_BY
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_weight(n, k, count=0, entries=16):
    codes = torch.randint(0, entries, (n, k))
    sparse = {}
    if count:
        sparse["row_starts"] = torch.cat((torch.randint(0, count + 1, (n,)).sort().values, torch.tensor([count]))).int()
        sparse["row_starts"][0] = 0
        sparse["columns"] = torch.randint(0, k, (count,)).int()
        sparse["values"] = torch.randn(count)
    return LutWeight(pack_pairs(codes), torch.randn(n, entries), **sparse)


def check(x, w, bias=None):
    out = fastops.lut_linear(x, w, bias)
    assert out.dtype == x.dtype
    assert out.shape == (*x.shape[:-1], w.shape[0])
    exact = reference(x.double(), w, bias)
    same = (x @ w.dequantize(x.dtype).T + (0 if bias is None else bias.to(x.dtype))).to(x.dtype)
    assert_matches(out, exact, same, what=f"{list(x.shape)} {w}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entries", [8, 16])
@pytest.mark.parametrize(("m", "n", "k", "count"), [
    (1, 64, 256, 0), (2, 40, 104, 30), (3, 130, 32, 500), (4, 8, 72, 1), (5, 72, 512, 9), (33, 136, 384, 2000), (300, 65, 40, 77),
])  # fmt: skip
def test_matches_reference(isa, dtype, entries, m, n, k, count):
    check(torch.randn(m, k).to(dtype), random_weight(n, k, count, entries), torch.randn(n))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(0, 20), n=st.integers(0, 150), words=st.integers(1, 24), count=st.integers(0, 200),
    seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_random_shapes(m, n, words, count, seed, dtype):
    torch.manual_seed(seed)
    check(torch.randn(m, 8 * words).to(dtype), random_weight(n, 8 * words, count if n else 0))


def test_leading_dimensions_strides_out_and_threads(isa):
    w = random_weight(192, 1024, 300)
    x = torch.randn(2, 3, 2048)[..., ::2]
    want = reference(x, w)
    torch.testing.assert_close(fastops.lut_linear(x, w), want, atol=1e-3, rtol=1e-4)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            wide = torch.zeros(6, 200)
            fastops.lut_linear(x.reshape(6, 1024), w, out=wide[:, 4:196])
            assert not wide[:, :4].any()
            assert not wide[:, 196:].any()
            results.append(wide)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    full = torch.empty(2, 3, 192)
    assert fastops.lut_linear(x, w, out=full) is full
    assert torch.equal(full.view(6, 192), results[0][:, 4:196])


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 4, 9])
def test_stays_inside_its_tensors(isa, end, dtype, m):
    w = random_weight(40, 72, 25)
    packed, bias = w.packed(), torch.randn(40)
    args = [guarded(t, end) for t in (torch.randn(m, 72).to(dtype), packed.codes, packed.table)]
    rest = {name: guarded(t, end) for name, t in packed.rest.items()}
    out = guarded(torch.zeros(m, 40, dtype=dtype), end)
    _ops.ops.lut_linear_out(*args, bias=guarded(bias, end), **rest, out=out)
    assert torch.equal(out, fastops.lut_linear(args[0], w, bias))


def test_nan_and_inf_stay_in_their_row(isa):
    w = random_weight(24, 64, 10)
    for m in (3, 8):
        x = torch.randn(m, 64)
        clean = fastops.lut_linear(x, w)
        x[1, 5], x[2, 60] = float("nan"), float("inf")
        out = fastops.lut_linear(x, w)
        assert torch.isnan(out[1]).all()
        assert not torch.isfinite(out[2]).any()
        rest = [i for i in range(m) if i not in (1, 2)]
        assert torch.equal(out[rest], clean[rest])


def test_gradient_and_compile():
    w, bias = random_weight(24, 64, 10), torch.randn(24, requires_grad=True)
    x = torch.randn(5, 64, requires_grad=True)
    fastops.lut_linear(x, w).sum().backward()
    torch.testing.assert_close(x.grad, w.dequantize().sum(0).expand(5, 64))
    with pytest.warns(fastops.FallbackWarning, match="bias"):
        fastops.lut_linear(x.detach(), w, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((24,), 5.0))
    w.packed()
    f = torch.compile(lambda x: fastops.lut_linear(x, w) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(f(x.detach()), fastops.lut_linear(x.detach(), w) * 2)


def test_a_weight_by_hand():
    w = LutWeight(
        torch.tensor([[0x10, 0x32, 0x10, 0x00]], dtype=torch.uint8), torch.arange(16.0)[None] * 10 + 1,
        torch.tensor([0, 2]).int(), torch.tensor([7, 2]).int(), torch.tensor([0.5, -1.0]),
    )  # fmt: skip
    want = torch.tensor([[1.0, 11.0, 20.0, 31.0, 1.0, 11.0, 1.0, 1.5]])
    assert torch.equal(w.dequantize(), want)
    assert torch.equal(fastops.lut_linear(torch.eye(8), w), want.T)
    for other in (copy.deepcopy(w), pickle.loads(pickle.dumps(w)), LutWeight.from_state_dict(w.state_dict())):
        assert torch.equal(other.dequantize(), want)
    assert w.to("meta").shape == (1, 8)
    assert repr(w) == "LutWeight([1, 8], 16 entries, 25.00% sparse)"
    assert w.nbytes == 4 + 64 + 8 + 8 + 8


def test_kmeans_finds_clusters_and_minds_sensitivity():
    centres = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0, 5.0])
    w = centres[torch.arange(64) % 8].repeat(4, 1)[:, torch.randperm(64)]
    torch.testing.assert_close(lut.quantize(w, bits=3).dequantize(), w)
    w = torch.randn(16, 4096)  # 16 levels: 0.0115 at best if evenly spaced, 0.0095 if not (Max 1960, table I)
    plain = lut.quantize(w).dequantize()
    assert (plain - w).square().mean() < 0.0099
    sensitivity = torch.rand(16, 4096).pow(8)
    aware = lut.quantize(w, sensitivity=sensitivity).dequantize()
    assert ((aware - w).square() * sensitivity).sum() < ((plain - w).square() * sensitivity).sum()


def test_outliers_are_kept():
    w = torch.randn(32, 256)
    w[3, 100:132] = torch.linspace(20.0, 60.0, 32)
    q = lut.quantize(w, sparsity=32 / w.numel())
    assert q.values.shape == (32,)
    back = q.dequantize()
    torch.testing.assert_close(back[3, 100:132], w[3, 100:132])
    assert (back[3] - w[3]).norm() < (lut.quantize(w).dequantize()[3] - w[3]).norm() * 0.5


@pytest.mark.parametrize("bits", [3, 4])
def test_squeezellm_checkpoints(bits):
    n, k = 6, 64
    codes = torch.randint(0, 2**bits, (n, k))
    # Packed along K: the bits of 32 codes one behind the other, from the lowest bit of the first word up.
    words = torch.zeros(k // 32 * bits, n, dtype=torch.int64)
    for i in range(k):
        for b in range(bits):
            place = i * bits + b
            words[place // 32] |= (codes[:, i] >> b & 1) << place % 32
    table = torch.randn(n, 2**bits)
    qweight = torch.where(words >= 2**31, words - 2**32, words).int()
    dense = table.gather(1, codes)
    assert torch.equal(lut.from_squeezellm(qweight, table).dequantize(), dense)
    rows, cols, vals = torch.tensor([0, 1, 1, 3, 3, 3, 4]).int(), torch.tensor([5, 0, 63, 9]).int(), torch.randn(4)
    want = dense.clone()
    for row, col, val in zip([0, 2, 2, 5], cols.tolist(), vals, strict=True):
        want[row, col] += val
    assert torch.equal(lut.from_squeezellm(qweight, table, rows, cols, vals).dequantize(), want)
    full = torch.randn(k, 2)
    want[4] += full[:, 0]
    want[2] += full[:, 1]
    hybrid = lut.from_squeezellm(qweight, table, rows, cols, vals, full, torch.tensor([4, 2]).int())
    torch.testing.assert_close(hybrid.dequantize(), want)


C, T = torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4, 16)
R, I, V = torch.tensor([0, 1, 1, 2, 2]).int(), torch.tensor([3, 15]).int(), torch.ones(2)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: LutWeight(C.int(), T), TypeError, "codes is int32, must be uint8"),
    (lambda: LutWeight(C[:, :7], T), ValueError, "so K is 14; must be a multiple of 8"),
    (lambda: LutWeight(C, T[:, :9]), ValueError, "table has shape [4, 9], must be [4, 8] or [4, 16]"),
    (lambda: LutWeight(C + 8, T[:, :8]), ValueError, "codes go beyond a table of 8 entries"),
    (lambda: LutWeight(C, T / 0), ValueError, "table holds an infinity or a NaN"),
    (lambda: LutWeight(C, T, R), ValueError, "row_starts, columns and values go together, got row_starts"),
    (lambda: LutWeight(C, T, R[:4], I, V), ValueError, "row_starts has 4 entries"),
    (lambda: LutWeight(C, T, R.flip(0), I, V), ValueError, "row_starts must rise from 0 to the 2 values"),
    (lambda: LutWeight(C, T, R, I + 1, V), ValueError, "columns holds a number outside 0 to 15"),
    (lambda: LutWeight(C, T, R.long(), I, V), TypeError, "row_starts is int64, must be int32"),
    (lambda: LutWeight(C, T.to("meta")), TypeError, "table is on meta, codes on cpu"),
    (lambda: LutWeight(C, [1.0]), TypeError, "table must be a tensor, got list"),
    (lambda: LutWeight.from_state_dict({"codes": C}), ValueError, "table is missing"),
    (lambda: lut.quantize(torch.ones(4, 16), bits=2), ValueError, "bits is 2, allowed: 3, 4"),
    (lambda: lut.quantize(torch.ones(4, 16), sparsity=1.0), ValueError, "sparsity is 1.0, must be from 0 to below 1"),
    (lambda: lut.quantize(torch.ones(4, 15)), ValueError, "must be [N, K] with K a multiple of 8"),
    (lambda: lut.quantize(torch.ones(4, 16), sensitivity=torch.ones(4)), ValueError, "sensitivity must be like w"),
    (lambda: lut.from_squeezellm(C, T), TypeError, "qweight is uint8, must be int32"),
    (lambda: lut.from_squeezellm(torch.zeros(5, 4).int(), T[:, :8]), ValueError, "qweight has 5 rows, must be a multiple of 3"),
    (lambda: lut.from_squeezellm(torch.zeros(8, 3).int(), T), ValueError, "lookup_table has shape [4, 16], must be [3, 8 or 16]"),
    (lambda: fastops.lut_linear(torch.ones(2, 15), LutWeight(C, T)), ValueError, "its last dimension must be K = 16"),
    (lambda: fastops.lut_linear(torch.ones(2, 16), T), TypeError, "weight must be a LutWeight, got Tensor"),
    (lambda: fastops.lut_linear(torch.ones(2, 16), LutWeight(C, T), torch.ones(5)), ValueError, "bias has shape [5], must be [4]"),
])  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize(("change", "words"), [
    ({"columns": I + 1}, "columns hold a number outside 0 to 15"),
    ({"row_starts": R - 1}, "row_starts[0] is -1, must rise from 0 to the 2 values"),
    ({"row_starts": R + 1}, "row_starts[3] is 3"),
    ({"values": None}, "row_starts, columns and values go together"),
    ({"table": T.half()}, "table must be float32"),
    ({"codes": torch.zeros(4, 2, 16, dtype=torch.uint8)}, "codes"),
])  # fmt: skip
def test_the_operator_refuses(change, words):
    call = {"x": torch.ones(2, 16), "codes": torch.zeros(4, 1, 16, dtype=torch.uint8), "table": T}
    with pytest.raises(RuntimeError) as caught:
        _ops.ops.lut_linear(**{**call, "row_starts": R, "columns": I, "values": V, **change})
    assert words in str(caught.value)


def test_elsewhere_reads_the_packed_form():
    from fastops.ops.lut_linear import _elsewhere

    w = random_weight(24, 72, 20)
    x, packed = torch.randn(3, 72), w.packed()
    torch.testing.assert_close(_elsewhere(x, packed.codes, packed.table, **packed.rest), reference(x, w))
    assert torch.equal(unpack_pairs(w.codes)[:, :16], (packed.codes[:, 0] & 15))
