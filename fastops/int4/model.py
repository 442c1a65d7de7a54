"""Whole models in 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def quantize_model(
    model: nn.Module,
    *,
    skip: tuple[str, ...] = (),
    eight: tuple[str, ...] = (),
    activations: str = "float",
    progress: Any = None,
    **options: Any,
) -> list[str]:
    """Replaces every nn.Linear of `model` by `Int4Linear`, in place.

    Args:
        skip: parts of module names to leave alone, e.g. ("lm_head",).
        eight: parts of module names to hold in 8 bits (symmetric, rounded to nearest, the same groups) instead of 4.
        progress: called as progress(done, total, name) after each layer.
        options: as in `fastops.int4.quantize`.

    Returns:
        The names replaced. Layers whose K the group size does not divide are left as they are.
    """
    from fastops.nn import Int4Linear

    size = options.get("group_size", 128)
    found = [
        (name, m)
        for name, m in model.named_modules()
        if type(m) is nn.Linear
        and not any(s in name for s in skip)
        and m.in_features % 8 == 0
        and (size == -1 or m.in_features % size == 0)
    ]
    with torch.no_grad():
        for done, (name, linear) in enumerate(found, 1):
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent) if parent else model
            chosen = options
            if any(e in name for e in eight):
                chosen = {**options, "bits": 8, "symmetric": True, "method": "rtn"}
            setattr(owner, child, Int4Linear.from_linear(linear, activations, **chosen))
            if progress is not None:
                progress(done, len(found), name)
    return [name for name, _ in found]
