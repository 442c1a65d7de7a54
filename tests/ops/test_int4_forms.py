"""int4_linear with groups along the outputs (AdaDim) and 2:4 sparse weights, on every variant."""

import pytest
import torch
from test_int4_linear import DTYPES, check, random_weight

import fastops
from fastops import _ops
from fastops.int4 import Int4Weight, gather24, pack_pairs, quantize, spread24, unpack24
from fastops.ops.int4_linear import MODES, _pack24_elsewhere
from fastops.testing import guarded

FORMS = ["columns", "columns_zeros", "columns_rows", "sparse", "sparse_columns", "sparse_perm", "planes_columns"]


def places24(n, k):
    """Two rising places of four, at random: [N, K / 4, 2]."""
    return torch.rand(n, k // 4, 4).topk(2, -1).indices.sort(-1).values


def make(form, n, k, group, slices):
    w = random_weight(n, k, group, "zeros" if form == "columns_rows" else "symmetric")
    parts = w.state_dict()
    if "columns" in form:
        parts["column_scales"] = torch.rand(slices, k) + 0.5
    if form == "columns_zeros":
        parts["column_zeros"] = (torch.rand(slices, k) * 15).half().float()
    if "sparse" in form:
        held, parts["kept"] = gather24(fastops.int4.unpack_pairs(w.codes), places24(n, k))
        parts["codes"] = pack_pairs(held)
    if form == "sparse_perm":
        parts["perm"] = torch.randperm(k).int()
    if form == "planes_columns":
        parts["planes"] = torch.arange(2, dtype=torch.int32)
    return Int4Weight.from_state_dict(parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", MODES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n", "k", "group", "slices"), [
    (1, 64, 256, 64, 4), (3, 160, 128, 32, 10), (4, 40, 96, 48, 1), (7, 224, 512, 128, 7), (70, 96, 64, 32, 2),
])  # fmt: skip
def test_matches_reference(isa, dtype, activations, form, m, n, k, group, slices):
    w = make(form, n, k, group, slices)
    check(torch.randn(m, w.shape[1]).to(dtype), w, torch.randn(n), activations)


@pytest.mark.parametrize("activations", MODES)
@pytest.mark.parametrize("form", ["eight", *FORMS])
def test_few_outputs(isa, many_cores, form, activations):
    """Parts of K (one slice), and shares of rows (any)."""
    for m, n, k, slices in ((1, 24, 16384, 1), (4, 16, 12288, 1), (40, 64, 512, 2)):
        if form == "eight":
            w = quantize(torch.randn(n, k), 128, bits=8)
        else:
            w = make(form, n, k, 96 if k % 96 == 0 else 64, slices)
        check(torch.randn(m, w.shape[1]), w, torch.randn(n), activations)


def test_rows_beyond_a_block_and_many_slices(isa):
    w = make("columns_zeros", 768, 64, 64, 48)
    for activations in MODES:
        check(torch.randn(300, 64), w, torch.randn(768), activations)
        check(torch.randn(6, 64), w, None, activations)


def test_out_and_threads(isa):
    w, x = make("columns", 192, 128, 32, 12), torch.randn(5, 128)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            wide = torch.zeros(5, 200)
            fastops.int4_linear(x, w, out=wide[:, 4:196])
            assert not wide[:, :4].any()
            assert not wide[:, 196:].any()
            results.append(wide)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize("form", ["columns_zeros", "sparse_columns"])
def test_stays_inside_its_tensors(isa, end, m, form):
    w = make(form, 48, 72, 24, 3)
    packed = w.packed()
    args = [guarded(t, end) for t in (torch.randn(m, 72), packed.codes, packed.scales)]
    columns = {n: guarded(t, end) for n, t in packed.rest.items() if n.startswith("column") and t is not None}
    out = guarded(torch.zeros(m, 48), end)
    for mode, activations in enumerate(MODES):
        _ops.ops.int4_linear_out(*args, **columns, activations=mode, out=out)
        assert torch.equal(out, fastops.int4_linear(args[0], w, activations=activations))


@pytest.mark.parametrize(("n", "k"), [(16, 8), (37, 40), (1, 16)])
def test_packing_24_keeps_every_code(n, k):
    dense = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    places = places24(n, k)
    held, kept = gather24(dense, places)
    packed = _ops.ops.int4_pack24(pack_pairs(held), kept)
    assert torch.equal(packed, _pack24_elsewhere(pack_pairs(held), kept))
    codes, back = unpack24(packed, n)
    assert torch.equal(codes, pack_pairs(held))
    assert torch.equal(back, kept)
    there = torch.zeros(n, k // 4, 4, dtype=torch.bool).scatter_(2, places, torch.tensor(True).expand(places.shape))
    assert torch.equal(spread24(held, kept), torch.where(there.flatten(1), dense, 8))


def test_a_24_weight_by_hand():
    # Columns 1 and 3 of the first four, 0 and 2 of the second; codes 3, 15, 8, 0.
    kept = torch.tensor([[1 | 3 << 2 | 0 << 4 | 2 << 6]], dtype=torch.uint8)
    w = Int4Weight(torch.tensor([[0xF3, 0x08]], dtype=torch.uint8), torch.tensor([[0.5]]), kept=kept)
    want = torch.tensor([[0.0, -2.5, 0.0, 3.5, 0.0, 0.0, -4.0, 0.0]])
    assert torch.equal(w.dequantize(), want)
    assert torch.equal(fastops.int4_linear(torch.eye(8), w), want.T)


def test_quantize_24_keeps_the_largest():
    w = torch.randn(32, 128)
    q = quantize(w, 32, sparsity="2:4")
    four = q.dequantize().view(32, 32, 4)
    assert ((four != 0).sum(-1) <= 2).all()
    largest = w.view(32, 32, 4).abs().topk(2, -1).indices
    pruned = torch.zeros_like(four).scatter(2, largest, w.view(32, 32, 4).gather(2, largest))
    step = pruned.view(32, 4, 32).abs().amax(-1, keepdim=True) / 7.5
    assert ((four - pruned).view(32, 4, 32).abs() <= step * 0.5001).all()
    assert q.nbytes == 32 * 128 * 3 // 8 + 32 * 4 * 4
    better = quantize(w, 32, method="mse", sparsity="2:4").dequantize()
    assert (better - pruned.flatten(1)).norm() < (q.dequantize() - pruned.flatten(1)).norm()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 16, 64])
def test_groups_of_outputs_are_those_of_the_transposed_weight(symmetric, group):
    w = torch.randn(64, 128)
    mine = quantize(w, group, symmetric, dim="input").dequantize()
    theirs = quantize(w.T.contiguous(), group, symmetric).dequantize().T
    assert torch.equal(mine, theirs)


def test_adaptive_takes_what_changes_the_output_least():
    w = torch.randn(64, 64)
    w[:, 5] *= 50.0  # an input with outliers spoils every group of its row
    assert quantize(w, 64, dim="adaptive").column_scales is not None
    w = torch.randn(64, 64)
    w[7] *= 50.0
    assert quantize(w, 64, dim="adaptive").column_scales is None
    # Where one input dominates, only its column counts.
    w = torch.randn(64, 64)
    w[:, :32] *= 8.0
    hessian = torch.zeros(64, 64)
    hessian[40, 40] = 1.0
    small = [quantize(w, 64, dim=d).dequantize()[:, 40] - w[:, 40] for d in ("output", "input")]
    assert (quantize(w, 64, dim="adaptive", hessian=hessian).column_scales is None) == bool(
        small[0].norm() < small[1].norm()
    )


CODES, SCALES = torch.zeros(32, 8, dtype=torch.uint8), torch.ones(32, 2)
KEPT = torch.full((32, 4), 0x44, dtype=torch.uint8)
COLUMNS = torch.ones(2, 16)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: Int4Weight(CODES, SCALES, column_zeros=COLUMNS), ValueError, "column_zeros need column_scales"),
    (lambda: Int4Weight(CODES, SCALES, column_scales=torch.ones(3, 16)), ValueError, "column_scales has 3 rows; must be 1, or divide N = 32"),
    (lambda: Int4Weight(CODES, SCALES, column_scales=torch.ones(4, 16)), ValueError, "into multiples of 16"),
    (lambda: Int4Weight(CODES, SCALES, column_scales=torch.ones(2, 15)), ValueError, "column_scales has shape [2, 15], must be [2, 16]"),
    (lambda: Int4Weight(CODES, SCALES, column_scales=COLUMNS.double()), TypeError, "column_scales is float64"),
    (lambda: Int4Weight(CODES, SCALES, column_scales=COLUMNS / 0), ValueError, "column_scales holds an infinity or a NaN"),
    (lambda: Int4Weight(CODES, SCALES, column_scales=COLUMNS, column_zeros=COLUMNS, zeros=SCALES), ValueError, "give one of zeros, mins and column_zeros"),
    (lambda: Int4Weight(CODES, SCALES, kept=KEPT[:, :3]), ValueError, "kept has shape [32, 3], must be [32, 4]"),
    (lambda: Int4Weight(CODES, SCALES, kept=KEPT.int()), TypeError, "kept is int32, must be uint8"),
    (lambda: Int4Weight(CODES, SCALES, kept=KEPT * 0), ValueError, "kept holds places that do not rise"),
    (lambda: Int4Weight(CODES, SCALES, kept=KEPT, zeros=SCALES), ValueError, "a 2:4 sparse weight is symmetric"),
    (lambda: quantize(torch.ones(32, 32), 32, sparsity="1:2"), ValueError, "sparsity is '1:2', allowed: None, '2:4'"),
    (lambda: quantize(torch.ones(32, 32), 32, False, sparsity="2:4"), ValueError, "2:4 sparse weights are symmetric"),
    (lambda: quantize(torch.ones(32, 32), 32, dim="rows"), ValueError, "dim is 'rows', allowed: output, input, adaptive"),
    (lambda: quantize(torch.ones(32, 32), 24, dim="input"), ValueError, "multiple of 16 that divides N = 32"),
    (lambda: quantize(torch.ones(32, 32), 32, bits=8, dim="input"), ValueError, "dim 'input' takes 4 bits"),
])  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize(("change", "words"), [
    ({"column_scales": torch.ones(3, 64)}, "column_scales have 3 slices, must be 1 or divide N = 32"),
    ({"column_scales": torch.ones(2, 60)}, "column_scales has size 60 in dimension 1, must be 64"),
    ({"column_scales": torch.ones(2, 64).half()}, "column_scales must be float32"),
    ({"column_zeros": torch.ones(2, 64)}, "column_zeros need column_scales"),
    ({"codes": torch.zeros(2, 8, 16, 3, dtype=torch.uint8), "zeros": torch.ones(2, 2, 16)}, "2:4 sparse codes are symmetric"),
    ({"column_scales": torch.ones(2, 64), "eight": True}, "eight needs two planes"),
])  # fmt: skip
def test_the_operator_refuses(change, words):
    call = {
        "x": torch.randn(3, 64),
        "codes": torch.zeros(2, 8, 16, 4, dtype=torch.uint8),
        "scales": torch.ones(2, 2, 16),
    }
    with pytest.raises(RuntimeError) as caught:
        _ops.ops.int4_linear(**{**call, "n": 32, **change})
    assert words in str(caught.value)
