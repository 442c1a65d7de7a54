"""Whole models in 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastops.int4.gptq import collect, in_turns


def quantizable(model: nn.Module, skip: tuple[str, ...], group_size: int) -> list[tuple[str, nn.Linear]]:
    """The linear layers that `quantize_model` replaces: not skipped, with inputs the group size divides."""
    return [
        (name, m)
        for name, m in model.named_modules()
        if type(m) is nn.Linear
        and not any(s in name for s in skip)
        and m.in_features % 8 == 0
        and (group_size == -1 or m.in_features % group_size == 0)
    ]


def activations_of(name: str, default: str, floats: tuple[str, ...], bfloat16s: tuple[str, ...]) -> str:
    """The activations of the layer of that name."""
    if any(f in name for f in floats):
        return "float"
    return "bfloat16" if any(f in name for f in bfloat16s) else default


def quantize_model(
    model: nn.Module,
    *,
    skip: tuple[str, ...] = (),
    eight: tuple[str, ...] = (),
    activations: str = "float",
    float_activations: tuple[str, ...] = (),
    bfloat16_activations: tuple[str, ...] = (),
    calibration: list[Any] | None = None,
    progress: Any = None,
    **options: Any,
) -> list[str]:
    """Replaces every nn.Linear of `model` by `Int4Linear`, in place.

    Args:
        skip: parts of module names to leave alone, e.g. ("lm_head",).
        eight: parts of module names to hold in 8 bits (symmetric, rounded to nearest, the same groups) instead of 4.
        activations: "float", "int8" or "bfloat16", see `fastops.int4_linear`; float_activations and
            bfloat16_activations: parts of names that have these instead (inputs with outliers, which int8 activations
            would round coarsely: ("down_proj",)).
        calibration: for method="gptq": batches to run the model on, each a tensor, a tuple of positional or a dict of
            keyword arguments; a few thousand tokens of text like the text to come. Layers are done in the model's
            order, as many at once as 2 GiB of statistics allow; each turn runs all batches, later ones on what is in 4
            bits already.
        progress: called as progress(done, total, name) after each layer.
        options: as in `fastops.int4.quantize`.

    Returns:
        The names replaced. Layers whose K the group size does not divide are left as they are.

    Raises:
        ValueError: method="gptq" without calibration, or the reverse.
    """
    size = options.get("group_size", 128)
    if (options.get("method") == "gptq") != (calibration is not None):
        raise ValueError("quantize_model: method='gptq' and calibration go together")
    found = quantizable(model, skip, size)
    done = 0

    def replace(name: str, linear: nn.Linear, hessian: Tensor | None) -> None:
        from fastops.nn import Int4Linear

        chosen = dict(options)
        if hessian is not None:
            chosen["hessian"] = hessian
        elif any(e in name for e in eight):
            chosen.update(bits=8, symmetric=True, method="rtn")
        elif chosen.get("method") == "gptq":  # the calibration never reached it
            chosen["method"] = "rtn"
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent) if parent else model
        mode = activations_of(name, activations, float_activations, bfloat16_activations)
        with torch.no_grad():
            setattr(owner, child, Int4Linear.from_linear(linear, mode, **chosen))
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(found), name)

    if calibration is None:
        for name, linear in found:
            replace(name, linear, None)
        return [name for name, _ in found]
    plain = [(n, m) for n, m in found if any(e in n for e in eight)]
    for name, linear in plain:
        replace(name, linear, None)
    for turn in in_turns([f for f in found if f not in plain]):
        hessians = collect(model, turn, calibration)
        for name, linear in turn:
            replace(name, linear, hessians.pop(name, None))
    return [name for name, _ in found]
