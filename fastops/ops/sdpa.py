"""scaled_dot_product_attention: exactly torch's function (torch 2.13 semantics), on fastops' kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from fastops import _ops
from fastops.dispatch.record import Call, Implementation
from fastops.dispatch.select import Operator
from fastops.ops import _common as common
from fastops.ops.attention import Attention, check_mask

NAME = "scaled_dot_product_attention"


def validate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    for name, t in (("query", query), ("key", key), ("value", value)):
        common.require_tensor(NAME, name, t)
        if t.dim() < 2:
            raise ValueError(f"{NAME}: {name} has shape {list(t.shape)}, needs at least 2 dimensions [..., S, E]")
        if t.dtype not in common.FLOATS:
            raise TypeError(f"{NAME}: {name} is {common.name_of(t.dtype)}, must be floating point")
        if t.dtype != query.dtype or t.device != query.device:
            raise TypeError(
                f"{NAME}: {name} is {common.name_of(t.dtype)} on {t.device}, query "
                f"{common.name_of(query.dtype)} on {query.device}; they must agree"
            )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"{NAME}: key has head size {key.shape[-1]}, query {query.shape[-1]}; they must agree")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"{NAME}: value has shape {list(value.shape)}, must match key {list(key.shape)} but for the last"
        )
    if is_causal and attn_mask is not None:
        raise ValueError(f"{NAME}: give attn_mask or is_causal=True, not both")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{NAME}: dropout_p is {dropout_p}, must be from 0 to 1")
    if query.dim() >= 3 and key.dim() >= 3:
        hq, hkv = query.shape[-3], key.shape[-3]
        if enable_gqa and (hkv == 0 or hq % hkv):
            raise ValueError(f"{NAME}: query has {hq} heads, key has {hkv}; enable_gqa needs Hq % Hkv == 0")
        if not enable_gqa and hq != hkv and 1 not in (hq, hkv):
            raise ValueError(f"{NAME}: query has {hq} heads, key has {hkv}; unequal heads need enable_gqa=True")
    for a, b in zip(reversed(query.shape[:-3]), reversed(key.shape[:-3]), strict=False):
        if a != b and 1 not in (a, b):
            raise ValueError(
                f"{NAME}: query has shape {list(query.shape)}, key {list(key.shape)}; their first dimensions must "
                "agree, or be 1"
            )
    check_mask(NAME, attn_mask, (*query.shape[:-1], key.shape[-2]), query)


def describe(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Call:  # fmt: skip
    grad = "attn_mask" if common.any_grad(attn_mask) else ""
    return Call(query.device.type, query.dtype, query.shape[-1], value.shape[-1], dropout_p > 0.0, grad)


def reference(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch's own function: it is the definition."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def run_cpp(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    four = query.dim() == key.dim() == 4
    simple = four and query.shape[0] == key.shape[0] and (enable_gqa or query.shape[1] == key.shape[1])
    if not simple:  # other ranks and broadcast batches: views of four dimensions where torch allows them
        return _by_four(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.float64:
        attn_mask = attn_mask.float()
    if common.any_grad(query, key, value):
        if query.shape[-1] % 8 or value.shape[-1] % 8:  # the differentiable operator keeps attention's contract
            return reference(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa)
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        out, _ = Attention.apply(q, k, v, None, None, attn_mask, True, is_causal, scale, -1, -1, 0.0)
        return out.transpose(1, 2)
    return _op(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)


def _by_four(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, gqa: bool
) -> Tensor:
    validate(query, key, value, mask, 0.0, is_causal, scale, gqa)
    heads = query.shape[-3] if query.dim() >= 3 else 1
    kv_heads = key.shape[-3] if key.dim() >= 3 else 1
    if not gqa:
        heads = kv_heads = kv_heads if heads == 1 else heads
    batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3])

    def four(t: Tensor, h: int) -> Tensor:
        return t.expand(*batch, h, *t.shape[-2:]).reshape(-1, h, *t.shape[-2:])

    if mask is not None:
        full = (*batch, heads, query.shape[-2], key.shape[-2])
        mask = mask.expand(full).reshape(-1, *full[-3:])
    q, k, v = four(query, heads), four(key, kv_heads), four(value, kv_heads)
    out = run_cpp(q, k, v, mask, 0.0, is_causal, scale, gqa)
    rank = max(query.dim(), key.dim())
    shape = (*batch, heads, *out.shape[-2:])[-rank:] if rank > 2 else out.shape[-2:]
    return out.reshape(shape)


_op = _ops.ops.scaled_dot_product_attention.default

operator = Operator(
    NAME,
    [
        Implementation("cpp", run_cpp, common.cpp_why_not, 10, source="docs/design/003-cpu-attention.md"),
        Implementation("reference", reference, common.always, 0, source="torch.nn.functional"),
    ],
    validate,
    describe,
)


_direct = _ops.direct(NAME)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, same arguments and meaning.

    Args:
        query: [..., Hq, L, E]; key: [..., H, S, E]; value: [..., H, S, Ev]; any E (kernels up to 256).
        attn_mask: broadcasts to [..., Hq, L, S]; bool (True attends) or added.
        dropout_p: > 0 runs torch's own implementation (a FallbackWarning once).
        is_causal: query i sees keys 0..i (top left); not together with attn_mask.
        scale: default 1 / sqrt(E). enable_gqa: Hq may be a multiple of H.

    Returns:
        [..., Hq, L, Ev] in query's dtype. Rows that a mask leaves no key are 0.

    Example:
        >>> import torch, fastops
        >>> x = torch.randn(2, 4, 10, 64)
        >>> fastops.scaled_dot_product_attention(x, x, x, is_causal=True).shape
        torch.Size([2, 4, 10, 64])
    """
    if dropout_p == 0.0 and not is_compiling():
        y = _direct(query, key, value, attn_mask, is_causal, scale, enable_gqa, None)
        if y is not None:
            return y  # type: ignore[no-any-return]
    common.require_tensor(NAME, "query", query)
    common.require_tensor(NAME, "value", value)
    facts = (
        query.dtype, query.device.type, query.shape[-1:], value.shape[-1:], dropout_p > 0.0,
        attn_mask is not None and common.any_grad(attn_mask),
    )  # fmt: skip
    return operator(facts, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


@torch.library.register_fake("fastops::scaled_dot_product_attention")
def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


_ops.implement_elsewhere(NAME, reference)
