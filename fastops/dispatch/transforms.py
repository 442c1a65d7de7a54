"""What only plain torch can follow: forward-mode differentiation, and torch.func's transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C import _functorch
from torch.autograd import forward_ad

REASON = (
    "a transform of torch.func or forward-mode differentiation is active (kernels have reverse-mode gradients only)"
)
_TRANSFORMS = tuple(getattr(_functorch.TransformType, name) for name in ("Grad", "Jvp", "Vmap"))
_stack: Callable[[], Any] = getattr(_functorch, "get_interpreter_stack", lambda: None)  # torch's own, but private


def transformed(args: Iterable[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call is under torch.func's grad, jvp or vmap (and all made of them), or an argument has a tangent."""
    stack = _stack()
    if stack and any(level.key() in _TRANSFORMS for level in stack):
        return True
    return getattr(forward_ad, "_current_level", 0) >= 0 and any(_has_tangent(a) for a in (*args, *kwargs.values()))


def _has_tangent(a: Any) -> bool:
    if isinstance(a, (tuple, list)):
        return any(_has_tangent(each) for each in a)
    return isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None
