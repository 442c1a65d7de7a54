"""Modules over fastops' operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastops.int4.weight import PARTS, Int4Weight
from fastops.ops.gated import gelu_and_mul, silu_and_mul
from fastops.ops.int4_linear import int4_linear
from fastops.ops.linear_cross_entropy import linear_cross_entropy
from fastops.ops.norm import fused_add_rms_norm, layer_norm, rms_norm

_BUFFERS = tuple((n, f"weight_{n}") for n in PARTS)


class Int4Linear(nn.Module):
    """nn.Linear with an `Int4Weight`; no gradient for the weight, one for the input.

    Its state dict has the weight's tensors (weight_codes, weight_scales, ...) and bias; loading one with other groups,
    zeros or order than this module's replaces the weight.

    Args:
        weight: [N, K]. bias: [N] or None. activations: "float", "int8" or "bfloat16", see `fastops.int4_linear`.
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
        held, kept = self._buffers, self._weight
        for name, buffer in _BUFFERS:
            if held[buffer] is not getattr(kept, name):
                parts = {n: held[b] for n, b in _BUFFERS}
                self._weight = Int4Weight(parts.pop("codes"), parts.pop("scales"), **parts)  # type: ignore[arg-type]
                break
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


class RMSNorm(nn.Module):
    """`fastops.rms_norm`; with a residual, `fused_add_rms_norm` (both tensors are overwritten and returned).

    Args:
        size: N. weight_offset: 1.0 for Gemma's norms, whose weight starts at 0; otherwise the weight starts at 1.
    """

    def __init__(
        self, size: int, eps: float = 1e-6, *, weight_offset: float = 0.0, device: Any = None, dtype: Any = None
    ):
        super().__init__()
        self.eps, self.weight_offset = eps, weight_offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - weight_offset, device=device, dtype=dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return rms_norm(x, self.weight, self.eps, weight_offset=self.weight_offset)
        return fused_add_rms_norm(x, residual, self.weight, self.eps, weight_offset=self.weight_offset)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, weight_offset={self.weight_offset}"


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm over the last dimension, by `fastops.layer_norm`.

    Raises:
        ValueError: a normalized_shape of more than one dimension.
    """

    def __init__(self, normalized_shape: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(normalized_shape, *args, **kwargs)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"LayerNorm: normalized_shape is {list(self.normalized_shape)}, must be one dimension")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = layer_norm(x, self.weight, self.bias, self.eps)
        return out


class SiluAndMul(nn.Module):
    """`fastops.silu_and_mul`."""

    def forward(self, x: Tensor) -> Tensor:
        return silu_and_mul(x)


class GeluAndMul(nn.Module):
    """`fastops.gelu_and_mul`; approximate: "tanh" or "none"."""

    def __init__(self, approximate: str = "tanh") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return gelu_and_mul(x, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class LinearCrossEntropy(nn.Module):
    """`fastops.linear_cross_entropy` with its options; called as loss(x, weight, target, bias=None)."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(x, weight, target, bias, **self.options)
