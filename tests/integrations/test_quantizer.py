"""FastopsInt4Config through from_pretrained: quantised at load, saved, loaded again."""

import pytest
import torch

T = pytest.importorskip("transformers")

from fastops.integrations.transformers import FastopsInt4Config, patch  # noqa: E402
from fastops.nn import Int4Linear  # noqa: E402

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["llama", "qwen2", "gemma3"])
def folder(request, tmp_path):
    torch.manual_seed(0)
    config = {
        "llama": lambda: T.LlamaConfig(**SMALL),
        "qwen2": lambda: T.Qwen2Config(**SMALL),  # biases
        "gemma3": lambda: T.Gemma3TextConfig(**SMALL, head_dim=16),  # tied output layer
    }[request.param]()
    model = T.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "plain")
    return tmp_path


OPTIONS = [
    {"group_size": 32},
    {"group_size": 32, "symmetric": False, "method": "mse", "scale_dtype": "float32"},
    {"group_size": 32, "eight": ["mlp", "lm_head"], "activations": "int8", "float_activations": ["down_proj"], "modules_to_not_convert": []},
    {"group_size": -1, "modules_to_not_convert": ["o_proj", "lm_head"]},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_load_save_load(folder, options):
    plain = T.AutoModelForCausalLM.from_pretrained(folder / "plain").eval()
    model = T.AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=FastopsInt4Config(**options)
    ).eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Int4Linear)}
    assert len(layers) >= 2 * 6
    assert ("lm_head" in layers) == (options.get("modules_to_not_convert") == [])
    with torch.no_grad():
        exact, want = plain(IDS).logits, model(IDS).logits
        assert 0 < (want - exact).abs().max() < 0.5 * exact.abs().max()
        model.save_pretrained(folder / "four")
        again = T.AutoModelForCausalLM.from_pretrained(folder / "four").eval()
        assert torch.equal(again(IDS).logits, want)
    twins = {n: m for n, m in again.named_modules() if isinstance(m, Int4Linear)}
    assert twins.keys() == layers.keys()
    for n, m in layers.items():
        assert twins[n].activations == m.activations
        assert torch.equal(twins[n].weight.dequantize(), m.weight.dequantize())
    saved = sum(f.stat().st_size for f in (folder / "four").glob("*.safetensors"))
    assert saved < sum(f.stat().st_size for f in (folder / "plain").glob("*.safetensors"))
    with torch.no_grad(), patch(again):
        torch.testing.assert_close(again(IDS).logits, want, rtol=2e-2, atol=2e-2)


def test_bad_options():
    with pytest.raises(ValueError, match="method is 'gptq', allowed: rtn, mse"):
        FastopsInt4Config(method="gptq")
    with pytest.raises(ValueError, match="scale_dtype is 'int8', allowed: float16"):
        FastopsInt4Config(scale_dtype="int8")
