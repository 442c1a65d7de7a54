"""Modules over fastops' operators."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastops.int4.weight import PARTS, Int4Weight
from fastops.ops.int4_linear import int4_linear


class Int4Linear(nn.Module):
    """nn.Linear with an `Int4Weight`; no gradient for the weight, one for the input.

    Its state dict has the weight's tensors (weight_codes, weight_scales, ...) and bias; loading one with other groups,
    zeros or order than this module's replaces the weight.

    Args:
        weight: [N, K]. bias: [N] or None. activations: "float" or "int8", see `fastops.int4_linear`.
    """

    bias: Tensor | None
    _weight: Int4Weight

    def __init__(self, weight: Int4Weight, bias: Tensor | None = None, activations: str = "float") -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.activations = activations
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._set(weight)

    @classmethod
    def from_linear(cls, linear: nn.Linear, activations: str = "float", **options: Any) -> Int4Linear:
        """Quantises an nn.Linear; options as in `fastops.int4.quantize`."""
        from fastops.int4 import quantize

        return cls(quantize(linear.weight, **options), linear.bias, activations)

    @property
    def weight(self) -> Int4Weight:
        """The weight behind the buffers (rebuilt after they were moved or loaded)."""
        held = {n: getattr(self, f"weight_{n}") for n in PARTS}
        if any(held[n] is not getattr(self._weight, n) for n in PARTS):
            self._weight = Int4Weight(held.pop("codes"), held.pop("scales"), **held)
        return self._weight

    def _set(self, weight: Int4Weight) -> None:
        self._weight = weight
        for n in PARTS:
            self.register_buffer(f"weight_{n}", getattr(weight, n))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        parts = {n: state[f"{prefix}weight_{n}"] for n in PARTS if f"{prefix}weight_{n}" in state}
        if {"codes", "scales"} <= parts.keys():
            loaded = Int4Weight.from_state_dict(parts)
            if loaded.shape != (self.out_features, self.in_features):
                want = [self.out_features, self.in_features]
                raise ValueError(f"Int4Linear: {prefix}weight is {list(loaded.shape)}, must be {want}")
            self._set(loaded.to(self.weight_codes.device))
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        return int4_linear(x, self.weight, self.bias, activations=self.activations)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self._weight}, {self.activations}"
        )
