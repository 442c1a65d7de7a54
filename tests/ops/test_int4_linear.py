"""int4_linear against its reference, on every variant."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastops
from fastops import _ops
from fastops.int4 import Int4Weight, pack_pairs, unpack_codes
from fastops.ops.int4_linear import MODES, reference
from fastops.testing import assert_matches, guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = ["symmetric", "zeros", "mins"]


def random_weight(n, k, group, kind="symmetric", perm=False, scale_dtype=torch.float32):
    codes = torch.randint(0, 16, (n, k))
    groups = k // group
    parts = {}
    if kind == "zeros":
        parts["zeros"] = (torch.rand(n, groups) * 15).to(scale_dtype)
    if kind == "mins":
        parts["mins"] = torch.randn(n, groups).to(scale_dtype)
    if perm:
        parts["perm"] = torch.randperm(k).int()
    return Int4Weight(pack_pairs(codes), (torch.rand(n, groups) / 8 + 0.01).to(scale_dtype), **parts)


def check(x, w, bias=None, activations="float"):
    out = fastops.int4_linear(x, w, bias, activations=activations)
    assert out.dtype == x.dtype
    assert out.shape == (*x.shape[:-1], w.shape[0])
    if activations == "float":
        exact = reference(x.double(), w, bias)
        same = (x @ w.dequantize(x.dtype).T + (0 if bias is None else bias.to(x.dtype))).to(x.dtype)
        assert_matches(out, exact, same, what=f"{list(x.shape)} {w}")
    else:  # rows are rounded once, the same way: the rounding of sums is left alone
        exact = reference(x.float(), w, bias, activations=activations)
        size = exact.abs().max().item() if exact.numel() else 0.0
        tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[x.dtype] * max(size, 1.0) * 4
        torch.testing.assert_close(out.float(), exact, atol=tolerance, rtol=tolerance)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k", "group"), [
    (1, 64, 256, 32), (2, 40, 256, 64), (3, 200, 128, 128), (4, 8, 64, 64), (5, 72, 512, 128), (33, 136, 384, 96),
])  # fmt: skip
def test_matches_reference(isa, dtype, activations, kind, m, n, k, group):
    check(torch.randn(m, k).to(dtype), random_weight(n, k, group, kind), torch.randn(n), activations)


@pytest.mark.parametrize("activations", MODES)
@pytest.mark.parametrize(("k", "group"), [(8, 8), (24, 24), (4104, 4104), (2056, 8), (1032, 344)])
@pytest.mark.parametrize("m", [1, 7])
def test_groups_of_any_size(isa, activations, k, group, m):
    check(torch.randn(m, k), random_weight(48, k, group, "zeros"), None, activations)


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 9])
def test_scale_dtypes_and_act_order(isa, scale_dtype, m):
    w = random_weight(72, 256, 64, "zeros", perm=True, scale_dtype=scale_dtype)
    for activations in MODES:
        check(torch.randn(m, 256), w, torch.randn(72), activations)
        check(torch.randn(m, 256).bfloat16(), w, None, activations)


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [32, 96])
@pytest.mark.parametrize("m", [47, 48, 70, 260])  # 260: the last block has four rows
def test_small_groups_and_many_rows(isa, scale_dtype, kind, group, m):
    w = random_weight(88, 480, group, kind, scale_dtype=scale_dtype)
    for activations in MODES:
        check(torch.randn(m, 480), w, torch.randn(88), activations)
    check(torch.randn(m, 480).bfloat16(), w)


def test_rounded_to_bfloat16(isa):
    w, x = random_weight(40, 128, 64, "mins"), torch.randn(20, 128)
    for m in (1, 4, 20):
        out = fastops.int4_linear(x[:m], w, activations="bfloat16")
        torch.testing.assert_close(out, fastops.int4_linear(x[:m].bfloat16().float(), w), atol=1e-5, rtol=1e-5)
        assert not torch.equal(out, fastops.int4_linear(x[:m], w))


def test_many_rows(isa):
    w = random_weight(80, 256, 64, "mins")
    x = torch.randn(900, 256)  # more than two blocks of rows
    out = check(x, w)
    assert torch.equal(out[384:768], fastops.int4_linear(x[384:768], w))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 64, 128, 24])
@pytest.mark.parametrize("m", [3, 15, 16, 17, 31, 49, 257, 259])
def test_rows_that_do_not_fill_a_tile(isa, dtype, group, m):
    w = random_weight(88, 384, group, "zeros")
    for activations in MODES:
        check(torch.randn(m, 384).to(dtype), w, None, activations)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activations", ["float", "bfloat16"])
@pytest.mark.parametrize("m", [1, 3, 20, 50])
def test_numbers_of_any_size(isa, activations, m, bits):
    """x and weights are multiplied in parts somewhere: the sum must be all of it, an infinity must not become NaN."""
    w = random_weight(48, 128, 32, scale_dtype=torch.float16)
    if bits == 8:
        w = fastops.int4.quantize(torch.randn(48, 128), 32, bits=8)
    x = torch.randn(m, 128) * 10.0 ** torch.randint(-30, 30, (m, 1))
    out = fastops.int4_linear(x, w, activations=activations)
    exact = reference(x.double(), w, activations=activations)
    assert ((out - exact).abs().amax(-1) <= 1e-5 * exact.abs().amax(-1)).all()
    if bits == 8:
        return  # (two planes: an infinity meets two numbers for each weight, maybe of two signs)
    x = torch.randn(m, 128)
    x[0, 5] = float("inf")
    out = fastops.int4_linear(x, w, activations=activations)[0]
    column = w.dequantize(torch.float32)[:, 5]
    assert torch.isnan(out[column == 0]).all()
    assert torch.equal(out[column != 0], column[column != 0].sign() * torch.tensor(float("inf")))


@given(
    m=st.integers(0, 40), n=st.integers(1, 20), words=st.integers(1, 24), dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS), perm=st.booleans(), seed=st.integers(0, 99), data=st.data(),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_shapes(m, n, words, dtype, kind, perm, seed, data):
    torch.manual_seed(seed)
    group = data.draw(st.sampled_from([d * 8 for d in range(1, words + 1) if words % d == 0]))
    w = random_weight(n * 8, words * 8, group, kind, perm)
    check(torch.randn(m, words * 8).to(dtype), w, None, data.draw(st.sampled_from(list(MODES))))


def test_leading_dimensions_strides_and_out(isa):
    w = random_weight(24, 64, 32)
    x = torch.randn(2, 3, 5, 128)[..., ::2].transpose(0, 1)
    want = reference(x, w)
    torch.testing.assert_close(fastops.int4_linear(x, w), want, atol=1e-4, rtol=1e-4)
    rows = torch.randn(6, 200)[:, 10:74]
    out = torch.full((6, 40), 7.0)[:, 5:29]
    assert fastops.int4_linear(rows, w, out=out) is out
    torch.testing.assert_close(out, reference(rows, w), atol=1e-4, rtol=1e-4)
    wide = torch.empty(6, 24)
    got = fastops.int4_linear(rows.bfloat16(), w, out=wide)
    torch.testing.assert_close(got, reference(rows.bfloat16().float(), w), atol=1e-4, rtol=1e-4)
    assert fastops.int4_linear(torch.randn(64), w).shape == (24,)
    assert fastops.int4_linear(torch.randn(0, 64), w).shape == (0, 24)


@pytest.mark.parametrize("activations", MODES)
@pytest.mark.parametrize("m", [1, 3, 20])
def test_same_bits_for_any_number_of_threads(isa, activations, m):
    w, x = random_weight(1000, 256, 64, "zeros"), torch.randn(m, 256)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fastops.int4_linear(x, w, activations=activations))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("activations", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k", "group"), [
    (1, 8, 16384, 16384), (2, 24, 12288, 96), (3, 56, 8192, 128), (4, 16, 9216, 3072), (40, 72, 1024, 32), (17, 8, 256, 256),
])  # fmt: skip
def test_few_outputs(isa, many_cores, activations, dtype, kind, m, n, k, group):
    """Fewer outputs than cores could share: few rows cut K (within groups, too), more rows are shared out themselves."""
    w, x, bias = random_weight(n, k, group, kind), torch.randn(m, k).to(dtype), torch.randn(n)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(check(x, w, bias, activations))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_parts_of_k_need_many_features(isa):
    """K is cut for long rows only: elsewhere the same bits come of plans for any number of cores."""
    for k, differs in ((4096, False), (65536, True)):
        w, x = random_weight(16, k, 128), torch.randn(1, k)
        results = []
        try:
            for cores in (1, 64):
                _ops.control.cores_set(cores)
                results.append(check(x, w))
        finally:
            _ops.control.cores_set(0)
        assert torch.equal(*results) != differs


@pytest.mark.parametrize("activations", MODES)
def test_nan_and_inf_stay_in_their_row(isa, activations):
    w = random_weight(24, 64, 32, "zeros")
    for m in (3, 8):
        x = torch.randn(m, 64)
        clean = fastops.int4_linear(x, w, activations=activations)
        x[1, 5] = float("nan")
        x[2, 60] = float("inf")
        out = fastops.int4_linear(x, w, activations=activations)
        assert torch.isnan(out[1]).all()
        assert not torch.isfinite(out[2]).any()
        rest = [i for i in range(m) if i not in (1, 2)]
        assert torch.equal(out[rest], clean[rest])
    assert not fastops.int4_linear(torch.zeros(2, 64), w, activations=activations).any()


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 4, 9])
def test_stays_inside_its_tensors(isa, dtype, m, end):
    w = random_weight(40, 72, 24, "zeros", perm=True, scale_dtype=torch.float16)
    packed = w.packed()
    args = [guarded(t, end) for t in (torch.randn(m, 72).to(dtype), packed.codes, packed.scales)]
    options = {
        "zeros": guarded(packed.rest["zeros"], end),
        "perm": guarded(w.perm, end),
        "bias": guarded(torch.randn(40), end),
    }
    out = guarded(torch.zeros(m, 40, dtype=dtype), end)
    for activations in range(3):
        _ops.ops.int4_linear_out(*args, **options, activations=activations, out=out)
        assert torch.isfinite(out).all()


def test_gradient_of_the_input():
    w = random_weight(24, 64, 32, "zeros")
    x = torch.randn(2, 5, 64, requires_grad=True)
    grad = torch.randn(2, 5, 24)
    fastops.int4_linear(x, w).backward(grad)
    torch.testing.assert_close(x.grad, grad @ w.dequantize(), atol=1e-4, rtol=1e-4)


def test_bias_gradient_runs_the_reference():
    w, bias = random_weight(24, 64, 32), torch.randn(24, requires_grad=True)
    with pytest.warns(fastops.FallbackWarning, match="bias requires a gradient"):
        fastops.int4_linear(torch.randn(3, 64), w, bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((24,), 3.0))


def test_compiles_whole():
    w = random_weight(24, 64, 32)
    w.packed()
    f = torch.compile(lambda x: fastops.int4_linear(x, w) * 2, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (2, 5, 9):
        x = torch.randn(m, 64)
        torch.testing.assert_close(f(x), reference(x, w) * 2, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("n", "k"), [(16, 8), (20, 64), (7, 16)])
def test_packing_keeps_every_code(n, k):
    codes = pack_pairs(torch.randint(0, 16, (n, k)))
    packed = _ops.ops.int4_pack(codes)
    assert packed.shape == ((n + 15) // 16, k // 8, 16, 4)
    assert torch.equal(unpack_codes(packed, n), codes)
    from fastops.ops.int4_linear import _pack_elsewhere

    assert torch.equal(packed, _pack_elsewhere(codes))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda w, x: fastops.int4_linear(x, w.dequantize()), TypeError, "weight must be an Int4Weight, got Tensor"),
    (lambda w, x: fastops.int4_linear(x[:, :56], w), ValueError, "its last dimension must be K = 64"),
    (lambda w, x: fastops.int4_linear(x.int(), w), TypeError, "x is int32, allowed: float32"),
    (lambda w, x: fastops.int4_linear(x, w, activations="fp8"), ValueError, "activations is 'fp8', allowed: float, int8, bfloat16"),
    (lambda w, x: fastops.int4_linear(x, w, torch.zeros(23)), ValueError, "bias has shape [23], must be [24]"),
    (lambda w, x: fastops.int4_linear(x, w, torch.zeros(24).int()), TypeError, "bias is int32"),
    (lambda w, x: fastops.int4_linear(x, w, out=torch.zeros(3, 23)), ValueError, "out has shape [3, 23]"),
    (lambda w, x: fastops.int4_linear([1.0], w), TypeError, "x must be a tensor, got list"),
])  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call(random_weight(24, 64, 32), torch.randn(3, 64))
    assert words in str(caught.value)


@pytest.mark.parametrize(("change", "words"), [
    ({"scales": torch.ones(2, 3, 16)}, "scales have 3 groups, must divide K / 8 = 8"),
    ({"scales": torch.ones(3, 2, 16)}, "scales has size 3 in dimension 0, must be 2"),
    ({"codes": torch.zeros(2, 7, 16, 4, dtype=torch.uint8)}, "codes have 56 columns, must be x's 64, or several times that"),
    ({"zeros": torch.ones(2, 2, 16).half()}, "zeros must be float32, float16 or bfloat16, all of one dtype"),
    ({"perm": torch.full((64,), 64, dtype=torch.int32)}, "perm[0] is 64, must be from 0 to 63"),
    ({"bias": torch.zeros(23)}, "bias has size 23 in dimension 0, must be 24"),
])  # fmt: skip
def test_the_operator_refuses(change, words):
    call = {
        "x": torch.randn(3, 64),
        "codes": torch.zeros(2, 8, 16, 4, dtype=torch.uint8),
        "scales": torch.ones(2, 2, 16),
        "n": 24,
    }
    with pytest.raises(RuntimeError) as caught:
        _ops.ops.int4_linear(**{**call, **change})
    assert words in str(caught.value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_planes_are_8_bit_weights(isa, mode, m, dtype):
    w = torch.randn(40, 96)
    q = fastops.int4.quantize(w, 32, bits=8)
    assert q.shape == (40, 96)
    assert (q.dequantize() - w).abs().max() <= (w.abs().amax() / 119) * 0.51
    for weight in (q, shuffled(q)):
        check(torch.randn(m, 96).to(dtype), weight, None, mode)


def shuffled(q):
    """The same weight with its columns in another order, planes and all (groups of 8, each moved as one)."""
    codes = fastops.int4.unpack_pairs(q.codes)
    scales = q.scales.repeat_interleave(4, 1)
    order = torch.randperm(codes.shape[1] // 8)
    columns = (order[:, None] * 8 + torch.arange(8)).flatten()
    return fastops.Int4Weight(
        fastops.int4.pack_pairs(codes[:, columns]), scales[:, order].contiguous(), planes=q.planes,
        perm=(columns % q.shape[1]).int(),
    )  # fmt: skip


@pytest.mark.parametrize("features", [64, 256])
@pytest.mark.parametrize("grad", [False, True])
def test_another_number_of_features_is_refused_on_every_call(features, grad):
    """The packed codes would pass for those of another number of planes."""
    weight = fastops.int4.quantize(torch.randn(32, 128), group_size=32)
    fastops.int4_linear(torch.randn(3, 128), weight)
    for x in (torch.randn(3, features, requires_grad=grad), torch.randn(2, 2, features, requires_grad=grad)):
        with pytest.raises(ValueError, match="its last dimension must be K = 128"):
            fastops.int4_linear(x, weight)
