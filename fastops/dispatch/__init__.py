"""Which implementation runs a call: records, selection, overrides, explanations (docs/dispatch.md)."""

from fastops.dispatch.explain import Explanation, explain
from fastops.dispatch.override import override
from fastops.dispatch.record import Call, Implementation
from fastops.dispatch.select import Operator, operators

__all__ = ["Call", "Explanation", "Implementation", "Operator", "explain", "operators", "override"]
