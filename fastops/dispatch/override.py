"""Forcing an implementation: ``with override(attention="reference")`` and FASTOPS_IMPL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from fastops.dispatch.record import PROVIDERS

_NONE: dict[str, str] = {}
_forced: ContextVar[dict[str, str]] = ContextVar("fastops_forced", default=_NONE)


class _Traced:
    """What torch.compile sees: Dynamo cannot read a ContextVar, but guards on this attribute."""

    choices: dict[str, str] = _NONE


def forced() -> dict[str, str]:
    """The overrides in force here: operator name -> provider."""
    return _Traced.choices if torch.compiler.is_compiling() else _forced.get()


def check_names(choices: dict[str, str], source: str) -> None:
    from fastops.dispatch.select import operators

    for op, provider in choices.items():
        if op not in operators:
            known = ", ".join(sorted(operators))
            raise ValueError(f"{source}: unknown operator {op!r}, known: {known}")
        if provider not in PROVIDERS:
            known = ", ".join(PROVIDERS)
            raise ValueError(f"{source}: unknown implementation {provider!r} for {op}, known: {known}")


@contextmanager
def override(**choices: str) -> Iterator[None]:
    """Forces implementations inside the block, e.g. ``override(attention="reference")``.

    Nests (inner names win), and is local to the thread or task (code being traced by torch.compile sees the process's
    latest). A forced implementation that cannot run a call raises
    NotSupportedError with its reason; nothing falls through.

    Raises:
        ValueError: unknown operator or provider; the message lists the known ones.
    """
    check_names(choices, "override")
    token = _forced.set({**_forced.get(), **choices})
    before, _Traced.choices = _Traced.choices, _forced.get()
    try:
        yield
    finally:
        _forced.reset(token)
        _Traced.choices = before


def read_environment() -> None:
    """Applies FASTOPS_IMPL="attention=cpp,merge_states=reference" once, at import."""
    text = os.environ.get("FASTOPS_IMPL", "").strip()
    if not text:
        return
    choices = {}
    for part in text.split(","):
        op, sign, provider = part.strip().partition("=")
        if not sign:
            raise ValueError(f"FASTOPS_IMPL: {part.strip()!r} is not of the form operator=implementation")
        choices[op.strip()] = provider.strip()
    check_names(choices, "FASTOPS_IMPL")
    _NONE.update(choices)
