"""patch(model): the same logits, losses and gradients with fastops under every known family; undone without a trace."""

import copy

import pytest
import torch

T = pytest.importorskip("transformers")

from families import CONFIGS, IDS, SMALL, model_of  # noqa: E402

from fastops.integrations.transformers import growing_cache, patch  # noqa: E402
from fastops.nn import Int4Linear  # noqa: E402


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_undo(name):
    model = model_of(name)
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    with torch.no_grad():
        want = model(IDS, attention_mask=mask).logits
        state = {k: v.clone() for k, v in model.state_dict().items()}
        patched = patch(model)
        got = model(IDS, attention_mask=mask).logits
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=5e-4, atol=5e-4)
        assert not torch.equal(got, want)  # something else did run
        assert model.state_dict().keys() == state.keys()
        kinds = {what for _, what in patched.replaced}
        rope = "qk_norm_rope" if name in ("qwen3", "gemma3") else "apply_rope"
        assert kinds == {"rms_norm", "add_rms_norm", rope, "attention", "geglu" if name == "gemma3" else "swiglu"}
        assert not patched.skipped
        patched.undo()
        patched.undo()
        assert torch.equal(model(IDS, attention_mask=mask).logits, want)
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("name", CONFIGS)
def test_generates_the_same(name):
    model = model_of(name)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    want = model.generate(IDS, **options)
    with patch(model):
        assert torch.equal(model.generate(IDS, **options), want)
        assert torch.equal(model.generate(IDS, past_key_values=growing_cache(model.config), **options), want)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_bf16(name):
    """No further from fp32 than the unpatched model in bf16."""
    exact, half = model_of(name), model_of(name, torch.bfloat16)
    with torch.no_grad():
        want, plain = exact(IDS).logits, half(IDS).logits.float()
        with patch(half):
            got = half(IDS).logits.float()
    assert (got - want).abs().mean() <= 1.2 * (plain - want).abs().mean()


@pytest.mark.parametrize("name", CONFIGS)
def test_trains(name):
    model = model_of(name).train()

    def gradients():
        model.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    want_loss, want = gradients()
    with patch(model):
        loss, got = gradients()
    torch.testing.assert_close(loss, want_loss, rtol=1e-4, atol=1e-4)
    for n, g in want.items():
        torch.testing.assert_close(got[n], g, rtol=2e-3, atol=2e-3 * g.abs().max().item(), msg=n)


def test_gradient_checkpointing_and_hidden_states():
    model = model_of("gemma3").train()
    with torch.no_grad():
        want = model(IDS, output_hidden_states=True).hidden_states
        with patch(model):
            got = model(IDS, output_hidden_states=True).hidden_states
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    model.gradient_checkpointing_enable()
    with patch(model):
        model(IDS, labels=IDS).loss.backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_int4_is_reversible():
    model = model_of("qwen3")
    linears = [m for m in model.modules() if type(m) is torch.nn.Linear]
    with torch.no_grad():
        want = model(IDS).logits
        patched = patch(model, int4={"group_size": 32, "skip": ("lm_head",)})
        assert sum(isinstance(m, Int4Linear) for m in model.modules()) == len(linears) - 1
        assert ("lm_head", "Linear: skipped, or the group size does not divide its inputs") in patched.skipped
        assert not torch.allclose(model(IDS).logits, want)
        patched.undo()
        assert torch.equal(model(IDS).logits, want)
    assert [m for m in model.modules() if type(m) is torch.nn.Linear] == linears


def test_under_eager_attention():
    model = model_of("gemma3")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(IDS).logits
        with patch(model, attention=False):
            torch.testing.assert_close(model(IDS).logits, want, rtol=5e-4, atol=5e-4)


def test_parts_and_reasons():
    model = model_of("llama")
    patched = patch(model, norms=False, rope=False, attention=False)
    assert {what for _, what in patched.replaced} == {"swiglu"}
    assert ("model.norm", "LlamaRMSNorm: norms=False") in patched.skipped
    assert "3 x swiglu" in str(patched)
    assert "left as they are" in str(patched)
    again = patch(model)
    assert ("model.layers.0.mlp", "LlamaMLP: its forward was replaced by somebody else") in again.skipped
    again.undo()
    patched.undo()


def test_unknown_models_are_left_alone():
    config = T.Gemma2Config(**SMALL, head_dim=16)
    model = T.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        want = model(IDS).logits
        patched = patch(model, attention=False)
        assert not patched.replaced
        assert any("Gemma2RMSNorm: not of a known family" in why for _, why in patched.skipped)
        assert torch.equal(model(IDS).logits, want)
    config = T.LlamaConfig(**SMALL, hidden_act="relu")
    patched = patch(T.AutoModelForCausalLM.from_config(config))
    assert any("activation ReLU is not SiLU or GELU" in why for _, why in patched.skipped)
    meta = patch(T.AutoModelForCausalLM.from_config(CONFIGS["llama"]()).to("meta"))
    assert meta.skipped == [("", "the model is on meta: fastops has kernels for the CPU only")]


def test_a_copy_runs_on_its_own_weights():
    model = model_of("llama")
    patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(IDS).logits, model(IDS).logits)
        for p in twin.parameters():
            p.zero_()
        assert (twin(IDS).logits == 0).all()
        assert (model(IDS).logits != 0).any()


def test_compiles():
    torch._dynamo.reset()
    model = model_of("qwen3")
    with torch.no_grad(), patch(model):
        want = model(IDS, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)
