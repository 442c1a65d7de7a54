"""attention_paged: decode, chunked prefill and any mix of the two against a paged KV cache.

Long sequences are split over the keys and merged (Flash-Decoding), so one sequence uses every core.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastops import _cuda, _ops
from fastops.dispatch.record import Call, Implementation
from fastops.dispatch.select import Operator
from fastops.kv import KVQuant
from fastops.ops import _common as common
from fastops.ops import _kv
from fastops.ops.attention_varlen import _finish
from fastops.ops.attention_varlen import attend as attend_varlen


def validate(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    quant: KVQuant | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> None:
    op = "attention_paged"
    shapes = (("q", q, "T,Hq,D"), ("k_cache", k_cache, "P,page,Hkv,D"), ("v_cache", v_cache, "P,page,Hkv,Dv"))
    for name, t, dims in shapes:
        common.require_tensor(op, name, t)
        common.require_dims(op, name, t, dims)
    common.require_index(op, "seq_lens", seq_lens, (None,), q)
    if _kv.is_quantized(q, k_cache, v_cache, quant):
        _kv.check(op, q, k_cache, v_cache, seq_lens, quant)
    else:
        common.check_qkv(op, q, k_cache, v_cache, ("q", "k_cache", "v_cache"))
    b = seq_lens.shape[0]
    common.require_index(op, "block_table", block_table, (b, None), q)
    pages, page = k_cache.shape[:2]
    if page < 1 or page & (page - 1):
        raise ValueError(f"{op}: page size is {page}, must be a power of two")
    if cu_seqlens_q is not None:
        common.require_index(op, "cu_seqlens_q", cu_seqlens_q, (b + 1,), q)
    elif (b and q.shape[0] % b) or (not b and q.shape[0]):
        raise ValueError(
            f"{op}: q has {q.shape[0]} rows for {b} sequences; give cu_seqlens_q unless each has the same number"
        )
    common.check_options(
        op, q, scale=scale, window=window, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, batch=b
    )
    common.check_out(op, out, (*q.shape[:2], _kv.head_dim(v_cache, quant.v_bits if quant else 0)), q)
    if is_compiling():
        return
    if cu_seqlens_q is not None:
        common.check_cu(op, "cu_seqlens_q", cu_seqlens_q, q.shape[0], "q")
    packed = None if quant is None or quant.packed_lens is None else quant.packed_lens.tolist()
    for i, length in enumerate(seq_lens.tolist()):
        if length < 0:
            raise ValueError(f"{op}: seq_lens[{i}] is {length}, must not be negative")
        length = length if packed is None else packed[i]
        need = -(-length // page)
        if need > block_table.shape[1]:
            raise ValueError(
                f"{op}: seq_lens[{i}] = {length} needs {need} pages of {page}, block_table has room for "
                f"{block_table.shape[1]}"
            )
        for j, index in enumerate(block_table[i, :need].tolist()):
            if not 0 <= index < pages:
                raise ValueError(f"{op}: block_table[{i}, {j}] is {index}, pages run from 0 to {pages - 1}")


def describe(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any, **options: Any) -> Call:
    grad = ""
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("sinks", options.get("sinks")),
                    ("alibi_slopes", options.get("alibi_slopes"))):  # fmt: skip
        if common.any_grad(t):
            grad = name
    quant = options.get("quant")
    head_dim_v = _kv.head_dim(v_cache, quant.v_bits if quant else 0)
    return Call(q.device.type, q.dtype, q.shape[-1], head_dim_v, needs_reference_grad=grad)


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    *,
    quant: KVQuant | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The meaning: gather each sequence's pages (as numbers, where they hold codes), then the ragged batch."""
    page, lens = k_cache.shape[1], seq_lens.tolist()
    wide = common.wide_of(q.dtype) if _kv.is_quantized(q, k_cache, v_cache, quant) else q.dtype
    quant = quant or KVQuant()
    ks = [torch.empty((0, k_cache.shape[2], q.shape[2]), dtype=wide, device=q.device)]
    vs = [torch.empty((0, v_cache.shape[2], _kv.head_dim(v_cache, quant.v_bits)), dtype=wide, device=q.device)]
    for i, length in enumerate(lens):
        packed = length if quant.packed_lens is None else int(quant.packed_lens[i])
        index = block_table[i, : -(-packed // page)].long()
        ks.append(_kv.gather("k", k_cache, index, length, packed, i, quant, wide))
        vs.append(_kv.gather("v", v_cache, index, length, packed, i, quant, wide))
    b = len(lens)
    if cu_seqlens_q is None:
        step = q.shape[0] // b if b else 0
        cu_seqlens_q = torch.arange(b + 1, dtype=torch.int32) * step
    cu_k = torch.zeros(b + 1, dtype=torch.int32)
    cu_k[1:] = torch.tensor(lens, dtype=torch.int32).cumsum(0)
    return attend_varlen(q, torch.cat(ks), torch.cat(vs), cu_seqlens_q, cu_k, **options)


def reference(*args: Any, return_lse: bool = False, out: Tensor | None = None, **options: Any) -> Any:
    return _finish(attend(*args, **options), return_lse, out)


def run_cpp(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    quant: KVQuant | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Any:
    options = {
        "causal": causal, "scale": scale, "window_left": window[0], "window_right": window[1],
        "softcap": softcap, "sinks": common.to_f32(sinks), "alibi_slopes": common.to_f32(alibi_slopes),
        **_kv.arguments(quant),
    }  # fmt: skip
    if out is not None:
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32) if return_lse else None
        _ops.ops.attention_paged_out(
            q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, out=out, lse=lse, **options
        )
        return (out, lse) if return_lse else out
    pair = _op(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, return_lse=return_lse, **options)
    return pair if return_lse else pair[0]


_op = _ops.ops.attention_paged.default
_direct, _direct_quantised = _ops.direct("attention_paged"), _ops.direct("attention_paged_quantised")

operator = Operator(
    "attention_paged",
    [
        Implementation("cpp", run_cpp, common.cpp_why_not, 10, source="docs/design/003-cpu-attention.md"),
        *_cuda.rows(run_cpp, _cuda.why_not_attention),
        Implementation("reference", reference, common.always, 0, source="fastops/ops/attention_paged.py"),
    ],
    validate,
    describe,
)


def attention_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    quant: KVQuant | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Any:
    """Attention of new queries against a paged KV cache.

    Args:
        q: [T, Hq, D], the queries of all sequences one after another.
        k_cache, v_cache: [P, page, Hkv, D] and [P, page, Hkv, Dv] in q's dtype, or quantised; page a power of two from
            1. The new keys and values must be in the cache already.
        block_table: int32 [B, max_pages], the pages of each sequence in order; only those seq_lens needs are read.
        seq_lens: int32 [B], keys of each sequence, the new ones included.
        quant: how a cache of int8, float8_e4m3fn or uint8 codes is to be read (`fastops.kv.KVQuant`, made by
            `fastops.kv.PagedCache`); k_cache and v_cache are then [P, page, Hkv, D * bits / 8]. int8 and e4m3 caches
            may come without it: scales of 1.
        cu_seqlens_q: int32 [B + 1]; without it every sequence has T / B queries (decode: one).
        causal: give True for chunks of several queries; for one query per sequence it changes nothing.
        Others as in `fastops.attention`; LSE is [Hq, T].

    Returns:
        [T, Hq, Dv], or (that, lse).

    Raises:
        ValueError: also for a page index, length or offset outside its tensor. TypeError, NotSupportedError.

    Example:
        >>> import torch, fastops
        >>> cache = torch.randn(8, 16, 2, 64)
        >>> table = torch.tensor([[3, 1], [0, 7]], dtype=torch.int32)
        >>> lens = torch.tensor([20, 32], dtype=torch.int32)
        >>> fastops.attention_paged(torch.randn(2, 4, 64), cache, cache, table, lens).shape
        torch.Size([2, 4, 64])
    """
    if type(window) is tuple and len(window) == 2 and not is_compiling():
        left, right = window
        options = scale, left, 0 if causal else right, softcap, sinks, alibi_slopes, out, return_lse
        if quant is None:
            y = _direct(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, *options)
        elif type(quant) is KVQuant:
            y = _direct_quantised(
                q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, *_kv.values(quant), *options
            )  # fmt: skip
        else:
            y = None
        if y is not None:
            return y
    common.require_tensor("attention_paged", "q", q)
    key = (q.dtype, q.device, common.any_grad(q, k_cache, v_cache, sinks, alibi_slopes))
    return operator(
        key, q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, causal=causal, scale=scale, window=window,
        softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, quant=quant, return_lse=return_lse, out=out,
    )  # fmt: skip


@torch.library.register_fake("fastops::attention_paged")
def _fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    cu_seqlens_q: Tensor | None = None, *, return_lse: bool = False, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lse_shape = (q.shape[1], q.shape[0]) if return_lse else (0,)
    head_dim_v = _kv.head_dim(v_cache, options.get("v_bits", 0))
    return q.new_empty((*q.shape[:2], head_dim_v)), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.register_fake("fastops::attention_paged_out")
def _fake_out(*args: Any, **options: Any) -> None:
    return None


def _elsewhere(
    *args: Any, window_left: int = -1, window_right: int = -1, return_lse: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    quant = KVQuant(**{f.name: options.pop(f.name, f.default) for f in fields(KVQuant)})
    out, lse = attend(*args, window=(window_left, window_right), quant=quant, **options)
    return out, lse if return_lse else out.new_empty((0,), dtype=torch.float32)


def _elsewhere_out(*args: Any, out: Tensor, lse: Tensor | None = None, **options: Any) -> None:
    value, sums = _elsewhere(*args, return_lse=True, **options)
    out.copy_(value)
    if lse is not None:
        lse.copy_(sums)


_ops.implement_elsewhere("attention_paged", _elsewhere)
_ops.implement_elsewhere("attention_paged_out", _elsewhere_out)
