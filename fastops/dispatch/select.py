"""Selection: a small table per operator, a dictionary hit per call."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from fastops.dispatch.override import _forced
from fastops.dispatch.override import forced as traced
from fastops.dispatch.record import PROVIDERS, Call, Implementation
from fastops.dispatch.transforms import REASON, transformed
from fastops.errors import FallbackWarning, NotSupportedError, translate

operators: dict[str, Operator] = {}
STRICT = os.environ.get("FASTOPS_STRICT", "") not in ("", "0")


class Operator:
    """An operator's rows, its validation, and the choice among the rows.

    Args:
        name: as in ``torch.ops.fastops``.
        implementations: rows; ``reference`` takes every valid call.
        validate: raises ValueError or TypeError for a wrong call. Runs off the hot path only: before the reference,
            and to phrase what a kernel refused.
        describe: the Call behind arguments.
    """

    def __init__(
        self,
        name: str,
        implementations: list[Implementation],
        validate: Callable[..., None],
        describe: Callable[..., Call],
    ) -> None:
        self.name = name
        self.rows = sorted(implementations, key=lambda r: -r.priority)
        self.validate = validate
        self.describe = describe
        self._cache: dict[Any, Implementation] = {}
        self._warned: set[str] = set()
        operators[name] = self

    def row(self, provider: str) -> Implementation | None:
        return next((r for r in self.rows if r.name == provider), None)

    def reasons(self, call: Call) -> dict[str, str | None]:
        """Why each provider cannot run the call; None where it can."""
        out: dict[str, str | None] = {}
        for provider in PROVIDERS:
            row = self.row(provider)
            out[provider] = row.why_not(call) if row else f"{self.name} has no {provider} implementation yet"
        return out

    def choose(self, call: Call, forced: str | None) -> Implementation:
        """The row for a call. Raises NotSupportedError when the forced one cannot run it."""
        if forced is not None:
            reasons = self.reasons(call)
            reason = reasons[forced]
            if reason is not None:
                others = "; ".join(f"{n} {r or 'ok'}" for n, r in reasons.items() if n != forced)
                raise NotSupportedError(
                    f"{self.name}: override {forced!r} cannot run this call: {reason}. Others: {others}."
                )
            row = self.row(forced)
            assert row is not None
            return row
        able = [r for r in self.rows if r.why_not(call) is None]
        if len(able) > 1 and all(r.cost for r in able[:2]):
            able.sort(key=lambda r: r.cost(call) if r.cost else float("inf"))
        return able[0]

    def __call__(self, key: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the call. `key` holds the static facts; equal keys take the same row."""
        if torch.compiler.is_compiling():  # static facts only, no cache to guard on; the kernel validates
            return self.choose(self.describe(*args, **kwargs), traced().get(self.name)).run(*args, **kwargs)
        forced = _forced.get().get(self.name)
        if transformed(args, kwargs):
            return self._composed(forced, args, kwargs)
        full = (key, forced)
        row = self._cache.get(full)
        if row is None:
            row = self._first(full, args, kwargs)
        try:
            return row.run(*args, **kwargs)
        except (RuntimeError, AttributeError, TypeError) as error:  # the last two: not even tensors
            return self._refused(error, row, forced, args, kwargs)

    def _first(self, full: Any, args: Any, kwargs: Any) -> Implementation:
        call = self.describe(*args, **kwargs)
        self.validate(*args, **kwargs)
        row = self.choose(call, full[1])
        if row.name == "reference":
            if full[1] is None:
                self._fallback(call)
            return row  # not cached: nothing else checks a call before the reference runs it
        self._cache[full] = row
        return row

    def _fallback(self, call: Call) -> None:
        reasons = "; ".join(f"{n}: {r}" for n, r in self.reasons(call).items() if n != "reference" and r is not None)
        self._warn(reasons, 6)

    def _warn(self, reasons: str, level: int) -> None:
        if STRICT:
            raise NotSupportedError(f"{self.name}: only the reference can run this call ({reasons})")
        if reasons in self._warned:
            return
        self._warned.add(reasons)
        warnings.warn(f"{self.name} runs on the plain-torch reference ({reasons})", FallbackWarning, stacklevel=level)

    def _composed(self, forced: str | None, args: Any, kwargs: Any) -> Any:
        """A call that must be made of torch's operators."""
        if forced not in (None, "reference"):
            raise NotSupportedError(f"{self.name}: override {forced!r} cannot run this call: {REASON}.")
        self.validate(*args, **kwargs)
        if forced is None:
            self._warn(REASON, 5)
        reference = self.row("reference")
        assert reference is not None
        return reference.run(*args, **kwargs)

    def _refused(self, error: Exception, row: Implementation, forced: str | None, args: Any, kwargs: Any) -> Any:
        """A kernel said no: phrase it, or (where it only lacks the feature) try the reference."""
        self.validate(*args, **kwargs)
        typed = translate(error)
        if typed is error:
            raise error
        if isinstance(typed, NotSupportedError) and forced is None:
            if STRICT:
                raise typed from None
            if str(typed) not in self._warned:
                self._warned.add(str(typed))
                warnings.warn(f"{typed}; running the reference", FallbackWarning, stacklevel=5)
            reference = self.row("reference")
            assert reference is not None
            return reference.run(*args, **kwargs)
        raise typed from None
