"""fastops.nn over the operators."""

import pytest
import torch
import torch.nn.functional as F

import fastops.nn as fnn


def test_norms():
    x, r = torch.randn(3, 16), torch.randn(3, 16)
    norm = fnn.RMSNorm(16, eps=1e-5)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), None, 1e-5))
    gemma = fnn.RMSNorm(16, weight_offset=1.0)
    assert (gemma.weight == 0).all()
    torch.testing.assert_close(gemma(x), F.rms_norm(x, (16,), None, 1e-6))
    with torch.no_grad():
        total = x + r
        out, residual = norm(x, r)
    assert out is x
    torch.testing.assert_close(residual, total)
    torch.testing.assert_close(out, F.rms_norm(total, (16,), None, 1e-5))
    layer, theirs = fnn.LayerNorm(16), torch.nn.LayerNorm(16)
    layer.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(layer(r), theirs(r))
    with pytest.raises(ValueError, match=r"normalized_shape is \[3, 16\], must be one dimension"):
        fnn.LayerNorm((3, 16))


def test_activations_and_loss():
    x = torch.randn(5, 16)
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(fnn.SiluAndMul()(x), F.silu(gate) * up)
    torch.testing.assert_close(fnn.GeluAndMul("none")(x), F.gelu(gate) * up)
    w, target = torch.randn(30, 16), torch.randint(0, 30, (5,))
    loss = fnn.LinearCrossEntropy(reduction="sum")(x, w, target)
    torch.testing.assert_close(loss, F.cross_entropy(x @ w.T, target, reduction="sum"))
