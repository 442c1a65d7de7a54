"""int4.load_gguf: the file's own codes in a transformers model."""

import copy

import pytest
import torch

T = pytest.importorskip("transformers")
pytest.importorskip("gguf")

from families import CONFIGS, IDS, SMALL, model_of  # noqa: E402
from gguf_files import write  # noqa: E402

from fastops import int4  # noqa: E402
from fastops.int4 import gguf_model  # noqa: E402

ARCHES = {"llama": "llama", "qwen3": "qwen3", "gemma3": "gemma3"}
KINDS = {"down_proj": "Q4_0", "q_proj": "Q4_0", "k_proj": "Q4_0", "up_proj": "Q5_0", "v_proj": "Q8_0"}


@pytest.mark.parametrize("name", ARCHES)
def test_four_bit_layers_are_the_files_and_the_others_have_eight(name, tmp_path):
    model = model_of(name)
    if name == "qwen3":  # its head size is no multiple of 32
        config = T.Qwen3Config(**SMALL, head_dim=32)
        model = T.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    write(model, tmp_path / "m.gguf", ARCHES[name], KINDS)
    other = copy.deepcopy(model)
    seen = []
    kinds = int4.load_gguf(other, tmp_path / "m.gguf", progress=lambda *a: seen.append(a))
    linears = {n: m for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    assert kinds == {n: next((k for part, k in KINDS.items() if part in n), "" if n == "lm_head" else "F32")
                     for n in linears}  # fmt: skip
    assert seen[-1][0] == seen[-1][1] == sum(k != "Q4_0" for k in kinds.values())
    for layer, linear in linears.items():
        weight = other.get_submodule(layer).weight
        assert weight.planes is None if kinds[layer] == "Q4_0" else weight.planes.shape[0] == 2
        if kinds[layer] == "Q4_0":
            assert torch.equal(weight.dequantize(), linear.weight)
        else:
            step = linear.weight.abs().amax(1, keepdim=True) / 119
            assert ((weight.dequantize() - linear.weight).abs() <= 0.51 * step).all()
    with torch.no_grad():
        want = model(IDS).logits
        assert (other(IDS).logits - want).abs().max() < 0.03 * want.abs().max()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_q4_k(scale_dtype, tmp_path):
    model = T.AutoModelForCausalLM.from_config(T.Qwen3Config(**{**SMALL, "intermediate_size": 512}))
    write(model, tmp_path / "m.gguf", "qwen3", {"down_proj": "Q4_K"})
    want = model.model.layers[1].mlp.down_proj.weight
    int4.load_gguf(model, tmp_path / "m.gguf", skip=("lm_head",), scale_dtype=scale_dtype)
    assert type(model.lm_head) is torch.nn.Linear
    got = model.model.layers[1].mlp.down_proj.weight
    assert got.mins is not None
    assert got.scales.dtype == scale_dtype
    if scale_dtype == torch.float32:
        assert torch.equal(got.dequantize(), want)
    else:
        torch.testing.assert_close(got.dequantize(), want, rtol=1e-2, atol=2e-3 * float(want.detach().abs().max()))


def test_modes(tmp_path):
    model = model_of("llama")
    write(model, tmp_path / "m.gguf", "llama", KINDS)
    int4.load_gguf(model, tmp_path / "m.gguf", activations="int8", float_activations=("down_proj", "lm_head"))
    modes = {n.rsplit(".", 1)[-1]: m.activations for n, m in model.named_modules() if hasattr(m, "activations")}
    assert modes.pop("down_proj") == modes.pop("lm_head") == "float"
    assert set(modes.values()) == {"int8"}


def test_refusals(tmp_path):
    model = model_of("llama")
    path = tmp_path / "m.gguf"
    write(model, path, "llama", KINDS)
    other = CONFIGS["llama"]()
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q\.weight is not the weight of model\.layers\.0\.self_attn"):
        int4.load_gguf(T.AutoModelForCausalLM.from_config(other), path)
    other.intermediate_size = 128
    wide = T.AutoModelForCausalLM.from_config(other)
    for mine, its in zip(wide.model.layers, model.model.layers, strict=True):
        mine.self_attn = its.self_attn
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_down\.weight is \[64, 96\], .*down_proj is \[64, 128\]"):
        int4.load_gguf(wide, path)
    with pytest.raises(TypeError, match=r"scale_dtype is torch\.float64"):
        int4.load_gguf(model, path, scale_dtype=torch.float64)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        int4.load_gguf(model, tmp_path / "none.gguf")
    strange = bytearray(path.read_bytes())
    at = strange.index(b"llama", strange.index(b"general.architecture"))
    strange[at : at + 5] = b"lamla"
    (tmp_path / "strange.gguf").write_bytes(strange)
    with pytest.raises(ValueError, match="architecture 'lamla'"):
        int4.load_gguf(model, tmp_path / "strange.gguf")
    assert all(type(m) is torch.nn.Linear for n, m in model.named_modules() if n.endswith("_proj"))


def test_scales_that_do_not_fit_name_their_tensor(tmp_path, monkeypatch):
    model = model_of("llama")
    path = tmp_path / "m.gguf"
    write(model, path, "llama", KINDS)

    def huge(*args, read=gguf_model.from_gguf):
        weight = read(*args)
        return int4.Int4Weight(weight.codes, weight.scales.float() * 1e9)

    monkeypatch.setattr(gguf_model, "from_gguf", huge)
    with pytest.raises(ValueError, match=r"load_gguf: blk\.0\.attn_q\.weight: Int4Weight: scales"):
        int4.load_gguf(model, path, scale_dtype=torch.float16)


def test_truncated_files_are_named(tmp_path):
    model = model_of("llama")
    path = tmp_path / "m.gguf"
    write(model, path, "llama", KINDS)
    whole = path.read_bytes()
    for length in [0, 3, 4, 12, 24, 30, 60, 200, 500, 900, len(whole) // 2, len(whole) - 40000]:
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"load_gguf: .*cut\.gguf is damaged or no GGUF file"):
            int4.load_gguf(copy.deepcopy(model), tmp_path / "cut.gguf")
