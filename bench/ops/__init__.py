"""One module per operator, each with ``cases(shapes, dtypes) -> list[Case]``. docs/adding-an-op.md has the steps."""

from __future__ import annotations

from importlib import import_module
from typing import Any

NAMES = ("attention", "attention_varlen", "attention_paged", "merge_states", "sdpa", "int4_linear", "scale_add")


def module(name: str) -> Any:
    """The benchmark module of an operator."""
    return import_module(f"{__name__}.{name}")
