"""One row of the dispatch table, and the facts it decides on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# torch: compositions of torch's own operators, where nothing of ours would be faster. cuda-emulated: the CUDA kernels,
# every thread run on the CPU; only on request (it is slow).
PROVIDERS = ("cpp", "cuda", "cuda-emulated", "triton", "torch", "reference")


@dataclass(frozen=True, slots=True)
class Call:
    """The static facts of a call. Lengths are absent on purpose: a choice made under torch.compile must not depend
    on them."""

    device: str
    dtype: torch.dtype
    head_dim: int = 0
    head_dim_v: int = 0
    dropout: bool = False
    needs_reference_grad: str = ""  # an input whose gradient only plain autograd computes


@dataclass(frozen=True, slots=True)
class Implementation:
    """A provider of one operator.

    ``why_not`` returns None when the provider can run the call, else one sentence with the actual and the allowed
    value. It is a function of the Call alone: no environment, no globals.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[[Call], str | None]
    priority: int
    cost: Callable[[Call], float] | None = None  # predicted microseconds, where two rows really compete
    source: str = ""

    def __post_init__(self) -> None:
        if self.name not in PROVIDERS:
            raise ValueError(f"Implementation: name is {self.name!r}, known: {', '.join(PROVIDERS)}")
