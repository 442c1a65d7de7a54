"""What the documentation says is true: examples run, links lead somewhere, every operator has its room."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import fastops
import fastops.ops
from fastops.dispatch import operators

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
MODULES = [
    "fastops.dispatch.explain",
    "fastops.kv",
    *(f"fastops.ops.{m.name}" for m in pkgutil.iter_modules(fastops.ops.__path__)),
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert failed == 0
    assert tried > 0 or name.rpartition(".")[2].startswith("_")


def blocks():
    for page in PAGES:
        for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S)):
            if "import" in code:  # the others show a signature
                yield pytest.param(code, id=f"{page.relative_to(ROOT)}:{i}")


@pytest.mark.parametrize("code", list(blocks()))
def test_python_blocks_run(code, monkeypatch, capsys, tmp_path):
    if "transformers" in code:
        pytest.importorskip("transformers")
        code = code.replace("model = AutoModelForCausalLM.from_pretrained(", "from_pretrained(")
        code = code.replace('model.save_pretrained("gemma-4-bit")', "")
        names = {"from_pretrained": lambda *a, **options: None, **tiny_model()}
        if "gguf" in code:
            pytest.importorskip("gguf")
            monkeypatch.syspath_prepend(ROOT / "tests" / "integrations")
            importlib.import_module("gguf_files").write(
                names["model"], tmp_path / "model-Q4_0.gguf", "llama", {"down": "Q4_0"}
            )
            names["folder"] = tmp_path
    else:
        names = {}
    before = torch.nn.functional.scaled_dot_product_attention
    try:
        exec(compile(code, "block", "exec"), names)
    finally:
        torch.nn.functional.scaled_dot_product_attention = before


def tiny_model():
    import transformers

    from fastops.integrations.transformers import register

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=register())
    return {"model": model, "ids": torch.tensor([[1, 2, 3]])}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_files_the_text_names_exist():
    for page in PAGES:
        for path in re.findall(r"`((?:csrc|fastops|tests|bench|docs|tools)/[\w./-]+)`", page.read_text()):
            if "results" not in path and path not in ("fastops/fastops.h", "fastops/include", "fastops/lib"):
                assert (ROOT / path).exists(), f"{page.relative_to(ROOT)} names {path}"


@pytest.mark.parametrize("op", sorted(operators))
def test_every_operator_has_a_page_a_test_and_cases(op):
    room = getattr(fastops, op).__module__.rpartition(".")[2]  # several operators may share one
    pages = {"sdpa": "scaled_dot_product_attention"}.get(room, room)
    assert f"ops/{pages}.md" in (ROOT / "docs/index.md").read_text()
    assert (ROOT / f"tests/ops/test_{room}.py").exists()
    assert (ROOT / f"bench/ops/{room}.py").exists()
    page = (ROOT / f"docs/ops/{pages}.md").read_text()
    assert op in page
    for name in importlib.import_module("inspect").signature(getattr(fastops, op)).parameters:
        assert name in page, f"docs/ops/{pages}.md does not name {name}"


def test_public_names_have_docstrings():
    for name in fastops.__all__:
        text = getattr(fastops, name).__doc__
        assert text
        assert len(text) > 20, name
