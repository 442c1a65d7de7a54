"""Decoder against transformers' own generate, for every family it knows."""

import pytest
import torch

T = pytest.importorskip("transformers")

from families import CONFIGS, SMALL, model_of  # noqa: E402

import fastops  # noqa: E402
from fastops.int4 import quantize_model  # noqa: E402
from fastops.integrations.transformers import Decoder, growing_cache, register  # noqa: E402

IDS = torch.randint(3, 128, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 2])
def test_same_logits_and_tokens(name, batch):
    model = model_of(name)
    ids = IDS[:batch]
    decoder = Decoder(model, max_length=40, batch=batch)
    with torch.no_grad():
        torch.testing.assert_close(decoder.step(ids), model(ids).logits[:, -1], rtol=5e-4, atol=5e-4)
        more = IDS[:batch, :3]  # several tokens behind a text, then one
        torch.testing.assert_close(
            decoder.step(more), model(torch.cat((ids, more), 1)).logits[:, -1], rtol=5e-4, atol=5e-4
        )
        one = torch.cat((ids, more, IDS[:batch, 5:6]), 1)
        torch.testing.assert_close(decoder.step(IDS[:batch, 5:6]), model(one).logits[:, -1], rtol=5e-4, atol=5e-4)
        want = model.generate(ids, max_new_tokens=15, do_sample=False, attention_mask=torch.ones_like(ids))
    got = decoder.generate(ids, 15)
    assert torch.equal(got, want[:, ids.shape[1] :])
    assert torch.equal(decoder.generate(ids, 15), got)  # a new text each time


@pytest.mark.parametrize("options", [
    {"group_size": 32}, {"group_size": 32, "symmetric": False, "activations": "int8", "eight": ("",)},
    {"group_size": 32, "eight": ("v_proj", "up_proj")},  # forms that cannot be joined
])  # fmt: skip
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "phi3"])
def test_four_bit_models(name, options):
    model = model_of(name)
    quantize_model(model, **options)
    model.set_attn_implementation(register())
    with torch.no_grad():
        want = model(IDS, past_key_values=growing_cache(model.config)).logits[:, -1]
    got = Decoder(model, max_length=30, batch=2).step(IDS)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 if "int8" in str(options) else 1e-3)


def test_bf16_and_sampling():
    model = model_of("gemma3", torch.bfloat16)
    decoder = Decoder(model, max_length=40)
    with torch.no_grad():
        want = model(IDS[:1]).logits[:, -1].float()
    assert (decoder.step(IDS[:1]).float() - want).abs().max() < 0.1 * want.abs().max()
    seen = []

    def pick(logits):
        seen.append(logits.shape)
        return torch.tensor([7])

    assert decoder.generate(IDS[:1], 5, pick=pick).tolist() == [[7] * 5]
    assert seen == [(1, 128)] * 5
    assert decoder.generate(IDS[:1], 5, pick=pick, stop=(7,)).tolist() == [[7]]
    assert decoder.generate(IDS[:1], 0).shape == (1, 0)


def test_refusals():
    model = model_of("llama")
    decoder = Decoder(model, max_length=20, batch=2)
    with pytest.raises(ValueError, match=r"ids has shape \[1, 17\], must be \[2, S\]"):
        decoder.step(IDS[:1])
    decoder.step(IDS)
    with pytest.raises(ValueError, match="the text would have 34 tokens, max_length is 20"):
        decoder.step(IDS)
    other = T.AutoModelForCausalLM.from_config(T.Gemma2Config(**SMALL, head_dim=16))
    with pytest.raises(fastops.NotSupportedError, match="Gemma2ForCausalLM is not a causal language model of llama"):
        Decoder(other)
    with pytest.raises(fastops.NotSupportedError, match="the model is on meta"):
        Decoder(model.to("meta"))
    stretched = T.AutoModelForCausalLM.from_config(
        T.LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    )
    with pytest.raises(fastops.NotSupportedError, match="rope type 'dynamic' depends on the length"):
        Decoder(stretched)
