"""`explain`: every implementation of an operator, which one a call takes, and why not each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastops import _ops
from fastops.dispatch.override import forced
from fastops.dispatch.record import Call


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `explain` found. ``chosen`` is a provider; ``reasons`` maps the others to sentences (None: could run)."""

    op: str
    call: Call
    summary: str
    chosen: str
    variant: str
    forced: bool
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        how = " (forced)" if self.forced else ""
        variant = f" / {self.variant}" if self.variant else ""
        lines = [f"{self.op} {self.summary} -> {self.chosen}{variant}{how}"]
        for name, reason in self.reasons.items():
            note = "chosen" if name == self.chosen else "could run, lower priority" if reason is None else reason
            lines.append(f"  {name:<14}{note}")
        return "\n".join(lines)

    __repr__ = __str__


def explain(op: str, /, *args: Any, **kwargs: Any) -> Explanation:
    """Explains which implementation ``fastops.<op>(*args, **kwargs)`` would take, without running it.

    Raises:
        ValueError: unknown operator, or a call that `op` itself would refuse.
        NotSupportedError: an override in force cannot run the call.

    Example:
        >>> import torch, fastops
        >>> q = torch.zeros(1, 4, 8, 64)
        >>> fastops.explain("attention", q, q, q, causal=True).chosen
        'cpp'
    """
    from fastops.dispatch.select import operators

    if op not in operators:
        raise ValueError(f"explain: unknown operator {op!r}, known: {', '.join(sorted(operators))}")
    operator = operators[op]
    operator.validate(*args, **kwargs)
    call = operator.describe(*args, **kwargs)
    force = forced().get(op)
    row = operator.choose(call, force)
    variant = _ops.control.isa_active() if row.name == "cpp" and _ops.control else ""
    shapes = " ".join(f"[{','.join(map(str, a.shape))}]" for a in args if hasattr(a, "shape"))
    summary = f"{shapes} {str(call.dtype).removeprefix('torch.')} {call.device}"
    return Explanation(op, call, summary, row.name, variant, force is not None, operator.reasons(call))
