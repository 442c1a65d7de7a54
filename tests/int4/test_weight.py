"""Int4Weight as an object, quantisation, modules and whole models."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastops
from fastops.int4 import METHODS, Int4Weight, pack_pairs, quantize, quantize_model, unpack_pairs
from fastops.nn import Int4Linear


def weight(**parts):
    return Int4Weight(pack_pairs(torch.randint(0, 16, (8, 32))), torch.rand(8, 2) + 0.1, **parts)


def test_pairs():
    codes = torch.randint(0, 16, (5, 16))
    packed = pack_pairs(codes)
    assert packed.shape == (5, 8)
    assert packed[2, 3] == codes[2, 6] + 16 * codes[2, 7]
    assert torch.equal(unpack_pairs(packed).long(), codes)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"zeros": torch.rand(8, 2)},
        {"mins": torch.rand(8, 2), "perm": torch.randperm(32).int()},
        {"planes": torch.arange(2, dtype=torch.int32)},
        {"column_scales": torch.rand(1, 32).half(), "column_zeros": torch.rand(1, 32).half()},
    ],
)
def test_survives_copies_and_files(parts):
    w = weight(**parts)
    k = 16 if "planes" in parts else 32
    x = torch.randn(3, k)
    want = fastops.int4_linear(x, w)
    file = io.BytesIO()
    torch.save(w.state_dict(), file)
    file.seek(0)
    for other in (
        copy.deepcopy(w),
        pickle.loads(pickle.dumps(w)),
        Int4Weight.from_state_dict(torch.load(file)),
        w.to("cpu"),
    ):
        assert other.shape == w.shape == (8, k)
        assert other.state_dict().keys() == w.state_dict().keys()
        assert torch.equal(other.dequantize(), w.dequantize())
        assert torch.equal(fastops.int4_linear(x, other), want)
    moved = w.to("meta")
    assert moved.device.type == "meta"
    assert moved.shape == w.shape


def test_repr_and_size():
    w = weight(zeros=torch.rand(8, 2))
    assert repr(w) == "Int4Weight([8, 32], group_size=16, zeros, float32 scales)"
    assert w.nbytes == 8 * 16 + 2 * 8 * 2 * 4


C = torch.zeros(8, 16, dtype=torch.uint8)
S = torch.ones(8, 2)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: Int4Weight(C.int(), S), TypeError, "codes is int32, must be uint8"),
    (lambda: Int4Weight(C[0], S), ValueError, "codes has shape [16], must have 2"),
    (lambda: Int4Weight(C[:, :15], S), ValueError, "so K is 30; must be a multiple of 8"),
    (lambda: Int4Weight(C, torch.ones(8, 3)), ValueError, "scales has 3 groups; they must divide K / 8 = 4"),
    (lambda: Int4Weight(C, torch.ones(7, 2)), ValueError, "scales has shape [7, 2], must be [8, groups]"),
    (lambda: Int4Weight(C, S.double()), TypeError, "scales is float64"),
    (lambda: Int4Weight(C, S / 0), ValueError, "scales holds an infinity or a NaN"),
    (lambda: Int4Weight(C, S, zeros=S.half()), TypeError, "zeros is float16"),
    (lambda: Int4Weight(C, S, zeros=S, mins=S), ValueError, "give one of zeros, mins and column_zeros"),
    (lambda: Int4Weight(C, S, perm=torch.zeros(32, dtype=torch.int32)), ValueError, "perm is no permutation of 0..31"),
    (lambda: Int4Weight(C, S, perm=torch.arange(31, dtype=torch.int32)), ValueError, "perm has 31 entries"),
    (lambda: Int4Weight(C, S, perm=torch.arange(32)), TypeError, "perm is int64, must be int32"),
    (lambda: Int4Weight(C, S, planes=torch.arange(3).int()), ValueError, "planes is 3; must divide the 2 groups of 32"),
    (lambda: Int4Weight(C, S, planes=torch.arange(2)), TypeError, "planes is int64, must be int32"),
    (lambda: quantize(torch.ones(8, 32), 32, bits=5), ValueError, "bits is 5, allowed: 4, 8"),
    (lambda: quantize(torch.ones(8, 32), 32, False, bits=8), ValueError, "8 bits are symmetric and rounded to nearest"),
    (lambda: quantize(torch.ones(8, 32), 32, method="gptq"), ValueError, "method 'gptq' needs a hessian"),
    (lambda: quantize(torch.ones(8, 32), 32, hessian=torch.eye(32)), ValueError, "got method 'rtn'"),
    (lambda: quantize(torch.ones(8, 32), 32, method="gptq", hessian=torch.eye(8)), ValueError, "hessian has shape [8, 8]"),
    (lambda: quantize(torch.ones(8, 32), 32, method="gptq", hessian=torch.full((32, 32), torch.nan)), ValueError, "hessian holds"),
    (lambda: quantize_model(nn.Linear(8, 8), method="gptq"), ValueError, "method='gptq' and calibration go together"),
    (lambda: Int4Weight(C, 1.0), TypeError, "scales must be a tensor, got float"),
    (lambda: Int4Weight(C, S.to("meta")), TypeError, "scales is on meta, codes on cpu"),
    (lambda: Int4Weight.from_state_dict({"codes": C}), ValueError, "scales is missing"),
    (lambda: Int4Weight.from_state_dict({"codes": C, "scales": S, "x": S}), ValueError, "unknown tensor 'x'"),
    (lambda: quantize(torch.ones(8, 30)), ValueError, "w has shape [8, 30], must be [N, K] with K a multiple of 8"),
    (lambda: quantize(torch.ones(8, 32), 12), ValueError, "group_size is 12, must be -1 or a multiple of 8"),
    (lambda: quantize(torch.ones(8, 32), 24), ValueError, "divides K = 32"),
    (lambda: quantize(torch.ones(8, 32), 32, method="awq"), ValueError, "method is 'awq', allowed: rtn, mse, gptq"),
    (lambda: quantize(torch.ones(8, 32).int()), TypeError, "w must be a floating-point tensor"),
    (lambda: quantize(torch.ones(8, 32) / 0, 32), ValueError, "w holds an infinity or a NaN"),
])  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize("method", ["rtn", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_quantize_error_is_at_most_half_a_step(method, symmetric, dtype):
    w = torch.randn(24, 128).to(dtype)
    w[3] = 0.0
    q = quantize(w, 32, symmetric, method)
    assert q.shape == w.shape
    assert (q.zeros is None) == symmetric
    error = (q.dequantize() - w.float()).abs().view(24, 4, 32)
    step = q.scales.float()[..., None]
    if method == "rtn":  # the largest positive value of a symmetric group is half a step past the last code
        assert (error <= step * 0.54).all()
    assert not q.dequantize()[3].any()


def test_searched_scales_err_less():
    w = torch.randn(64, 256) ** 3
    for symmetric in (True, False):
        errors = [(quantize(w, 64, symmetric, m).dequantize() - w).square().sum().item() for m in ("rtn", "mse")]
        assert errors[1] < 0.98 * errors[0]


def test_module():
    linear = nn.Linear(64, 24)
    module = Int4Linear.from_linear(linear, group_size=32)
    x = torch.randn(5, 64)
    want = x @ module.weight.dequantize().T + linear.bias
    torch.testing.assert_close(module(x), want, atol=1e-4, rtol=1e-4)
    assert set(module.state_dict()) == {"bias", "weight_codes", "weight_scales"}
    other = Int4Linear(quantize(torch.randn(24, 64), 64, symmetric=False), torch.zeros(24))
    other.load_state_dict(module.state_dict(), strict=False)  # other groups, no zeros any more
    torch.testing.assert_close(other(x), module(x))
    clone = copy.deepcopy(module)
    assert torch.equal(clone(x), module(x))
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
    assert clone.to("meta").weight.device.type == "meta"
    wrong = {
        **module.state_dict(),
        "weight_codes": torch.zeros(23, 32, dtype=torch.uint8),
        "weight_scales": torch.ones(23, 2),
    }
    with pytest.raises(ValueError, match=r"weight is \[23, 64\], must be \[24, 64\]"):
        module.load_state_dict(wrong)


def test_quantize_model():
    model = nn.Sequential(
        nn.Linear(64, 48), nn.ReLU(), nn.Sequential(nn.Linear(48, 32), nn.Linear(32, 8)), nn.Linear(8, 64)
    )
    seen = []
    names = quantize_model(
        model, skip=("3",), group_size=16, progress=lambda done, total, name: seen.append((done, total, name))
    )
    assert names == ["0", "2.0", "2.1"]
    assert seen == [(1, 3, "0"), (2, 3, "2.0"), (3, 3, "2.1")]
    assert type(model[3]) is nn.Linear
    assert isinstance(model[2][0], Int4Linear)
    assert model(torch.randn(2, 64)).shape == (2, 64)


def test_quantize_model_in_8_bits_where_asked():
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32))
    x = torch.randn(2, 64)
    want = model(x)
    options = {"group_size": 16, "symmetric": False, "activations": "int8", "float_activations": ("1",)}
    assert quantize_model(model, eight=("1",), **options) == ["0", "1"]
    assert [m.activations for m in model] == ["int8", "float"]
    assert model[0].weight.planes is None
    assert model[1].weight.planes.shape == (2,)
    assert model[1].weight.shape == (32, 48)
    assert (model(x) - want).abs().max() < 0.2
    modes = {"activations": "int8", "float_activations": ("1",)}
    twin = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32))
    quantize_model(twin, group_size=-1, **modes)
    twin.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 32, 96, -1])
def test_gptq_errs_less_on_inputs_like_the_calibration(symmetric, group):
    torch.manual_seed(0)
    mix = torch.randn(8, 192) * torch.linspace(0.1, 3.0, 192)  # inputs with few directions
    x = torch.randn(500, 8) @ mix + 0.1 * torch.randn(500, 192)
    x[:, 7] = 0.0  # an input that is always 0
    w = torch.randn(48, 192)
    kinds = {m: quantize(w, group, symmetric, m, hessian=x.T @ x if m == "gptq" else None) for m in METHODS}
    errors = {m: (x @ (q.dequantize() - w).T).square().mean().item() for m, q in kinds.items()}
    assert errors["gptq"] < 0.5 * errors["rtn"]
    assert errors["gptq"] < 0.5 * errors["mse"]
    fresh = torch.randn(100, 8) @ mix
    assert (fresh @ (kinds["gptq"].dequantize() - w).T).square().mean() < errors["rtn"]


def test_gptq_with_uncorrelated_inputs_is_rounding():
    w = torch.randn(16, 64)
    plain, compensated = quantize(w, 32), quantize(w, 32, method="gptq", hessian=torch.eye(64) * 5)
    assert torch.equal(plain.codes, compensated.codes)
    assert torch.equal(plain.scales, compensated.scales)


def test_quantize_model_with_calibration(monkeypatch):
    from fastops.int4 import gptq

    torch.manual_seed(0)
    mix = torch.randn(6, 64)
    batches = [torch.randn(100, 6) @ mix for _ in range(3)]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(64, 96), nn.Linear(96, 32), nn.Linear(64, 8)

        def forward(self, x, scale=1.0):
            return self.b(torch.relu(self.a(x))) * scale

    def error(**options):
        torch.manual_seed(1)
        model = Model()
        want = model(batches[0])
        names = quantize_model(model, group_size=32, **options)
        assert names == ["a", "b", "unused"]
        return (model(batches[0]) - want).square().mean().item()

    plain = error()
    assert error(method="gptq", calibration=batches) < 0.5 * plain
    kinds = [batches[0], (batches[1],), {"x": batches[2], "scale": 2.0}]
    monkeypatch.setattr(gptq, "BUDGET", 1)  # one layer at a time
    assert error(method="gptq", calibration=kinds) < 0.5 * plain
    assert error(method="gptq", calibration=kinds, eight=("b",)) < 0.5 * plain
