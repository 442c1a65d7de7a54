"""The functions of flash-attention 2 (`flash_attn`), same names, argument order and meaning, on fastops' kernels.

    from fastops.compat.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

Differences, all in docs/integrations/flash_attn.md: fp32 works too, any device fastops runs on works, a row that sees
no key has LSE -inf (flash-attention 2: +inf; 3 and 4: -inf), and ``return_attn_probs`` returns None for the
probabilities, which flash-attention defines only under dropout. ``deterministic`` and ``num_splits`` change nothing:
results never depend on the number of threads, and the split of the keys is chosen from the shape.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastops
from fastops.ops import _common as common
from fastops.ops import attention_varlen as varlen

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Window = tuple[int, int]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Dense attention: q [B, Sq, Hq, D], k and v [B, Sk, Hkv, D or Dv] -> [B, Sq, Hq, Dv]. Differentiable.

    Head sizes that are no multiple of 8 are padded (a copy). dropout_p > 0 runs the plain-torch reference.

    Returns:
        out, or with return_attn_probs (out, lse [B, Hq, Sq], None).

    Raises:
        ValueError, TypeError: as `fastops.attention`.
    """
    name = "flash_attn_func"
    check_dropout(name, dropout_p, softcap)
    options: dict[str, Any] = {
        "causal": causal, "window": tuple(window_size), "softcap": softcap, "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    (q, k, v), scale, dv = padded(name, q, k, v, softmax_scale)
    if dropout_p:
        fastops.ops.attention.validate(q, k, v, scale=scale, **options)
        pair = common.attend(q, k, v, scale=scale, dropout_p=dropout_p, **options)
    else:
        pair = with_lse(fastops.attention, return_attn_probs, q, k, v, scale=scale, **options)
    return result(pair, return_attn_probs, dv)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`flash_attn_func` with k and v as kv [B, Sk, 2, Hkv, D]; the other arguments follow in the same order."""
    k, v = unpacked("flash_attn_kvpacked_func", "kv", kv, 5, 2)
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`flash_attn_func` with all three as qkv [B, S, 3, H, D]; the other arguments follow in the same order."""
    q, k, v = unpacked("flash_attn_qkvpacked_func", "qkv", qkv, 5, 3)
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """A ragged batch: q [T, Hq, D], k and v [Tk, Hkv, D], cu_seqlens int32 [B + 1]. Differentiable without block_table.

    The maxima are not needed here and not used. With block_table (int32 [B, pages]), k and v are a paged cache
    [P, page, Hkv, D], page any power of two, and cu_seqlens_k gives the lengths.

    Returns:
        [T, Hq, Dv], or with return_attn_probs (out, lse [Hq, T], None).
    """
    name = "flash_attn_varlen_func"
    check_dropout(name, dropout_p, softcap)
    options: dict[str, Any] = {
        "causal": causal, "window": tuple(window_size), "softcap": softcap, "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    if block_table is not None:
        if dropout_p:
            raise ValueError(f"{name}: dropout_p is {dropout_p}; a paged cache (block_table) takes no dropout")
        common.require_tensor(name, "cu_seqlens_k", cu_seqlens_k)
        lens = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
        pair = with_lse(
            fastops.attention_paged, return_attn_probs, q, k, v, block_table, lens, cu_seqlens_q,
            scale=softmax_scale, **options,
        )  # fmt: skip
        return result(pair, return_attn_probs, v.shape[-1])
    (q, k, v), scale, dv = padded(name, q, k, v, softmax_scale)
    if dropout_p:
        varlen.validate(q, k, v, cu_seqlens_q, cu_seqlens_k, scale=scale, **options)
        pair = varlen.attend(q, k, v, cu_seqlens_q, cu_seqlens_k, scale=scale, dropout_p=dropout_p, **options)
    else:
        pair = with_lse(
            fastops.attention_varlen, return_attn_probs, q, k, v, cu_seqlens_q, cu_seqlens_k, scale=scale, **options
        )
    return result(pair, return_attn_probs, dv)


def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """`flash_attn_varlen_func` with k and v as kv [Tk, 2, Hkv, D]."""
    k, v = unpacked("flash_attn_varlen_kvpacked_func", "kv", kv, 4, 2)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *args, **kwargs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args: Any, **kwargs: Any
) -> Any:
    """`flash_attn_varlen_func` with all three as qkv [T, 3, H, D] and one cu_seqlens."""
    q, k, v = unpacked("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 4, 3)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Decoding: rotates q and the new k, appends k and v to the cache in place, attends to everything in the cache.

    Args:
        q: [B, Sq, Hq, D].
        k_cache, v_cache: [Bc, S, Hkv, D]; with block_table [P, page, Hkv, D], page any power of two.
        k, v: [B, Snew, Hkv, D], written at cache_seqlens.. ; need cache_seqlens.
        rotary_cos, rotary_sin: [positions, R / 2], the first R <= D entries of each head are rotated. Key i at
            cache_seqlens + i; query i there too when causal or windowed, else every query at cache_seqlens.
        cache_seqlens: keys in the cache before the call, int or int32 [B]; default: all S.
        cache_batch_idx: int32 [B], the cache row of each sequence (dense cache only).
        cache_leftpad: int32 [B], keys before this position are not there (dense cache only).
        block_table: int32 [B, pages].
        rotary_interleaved: pairs (0, 1), (2, 3).. as in GPT-J; False pairs the halves as in GPT-NeoX.

    Returns:
        [B, Sq, Hq, Dv], or with return_softmax_lse (out, lse [B, Hq, Sq]). No gradients.

    Raises:
        ValueError: also where the new keys do not fit or an index lies outside its tensor; the cache is then unchanged.
    """
    name = "flash_attn_with_kvcache"
    window = (int(window_size[0]), int(window_size[1]))
    for label, t, dims in (
        ("q", q, "B,Sq,Hq,D"), ("k_cache", k_cache, "Bc,S,Hkv,D"), ("v_cache", v_cache, "Bc,S,Hkv,Dv"),
    ):  # fmt: skip
        common.require_tensor(name, label, t)
        common.require_dims(name, label, t, dims)
    common.check_qkv(name, q, k_cache, v_cache, ("q", "k_cache", "v_cache"))
    b, sq = q.shape[:2]
    common.check_options(
        name, q, scale=softmax_scale, window=window, softcap=softcap, sinks=None, alibi_slopes=alibi_slopes, batch=b
    )
    page = k_cache.shape[1]
    if block_table is not None:
        for label, extra in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
            if extra is not None:
                raise ValueError(f"{name}: {label} goes with a dense cache, not with block_table")
        common.require_index(name, "block_table", block_table, (b, None), q)
        if page < 1 or page & (page - 1):
            raise ValueError(f"{name}: page size is {page}, must be a power of two")
    elif cache_batch_idx is None and k_cache.shape[0] != b:
        raise ValueError(
            f"{name}: q has batch size {b}, k_cache {k_cache.shape[0]}; they must agree without cache_batch_idx"
        )
    room = page if block_table is None else page * block_table.shape[1]
    lens, counts = cached_lengths(name, cache_seqlens, b, room, q)
    new = check_new(name, q, k_cache, v_cache, k, v, cache_seqlens)
    rows = indices(name, "cache_batch_idx", cache_batch_idx, b, k_cache.shape[0], q)
    pads = indices(name, "cache_leftpad", cache_leftpad, b, room + 1, q)
    for i, n in enumerate(counts):
        if n + new > room:
            raise ValueError(f"{name}: sequence {i} would hold {n + new} keys, the cache has room for {room}")
        if pads is not None and pads[i] > n + new:
            raise ValueError(f"{name}: cache_leftpad[{i}] is {pads[i]}, but sequence {i} has {n + new} keys")
    if block_table is not None:
        check_table(name, block_table, lens, new, page, k_cache.shape[0])

    if rotary_cos is not None or rotary_sin is not None:
        walks = causal or window != (-1, -1)  # query i stands at key i
        last = max(counts, default=0) + max(sq if walks else min(sq, 1), new) - 1
        cos, sin = check_rotary(name, q, rotary_cos, rotary_sin, last)
        at = lens[:, None] + torch.arange(max(sq, new), device=q.device)
        q_at = at[:, :sq] if walks else lens[:, None].expand(b, sq)
        q = rotated(q, cos, sin, q_at, rotary_interleaved)
        if k is not None:
            k = rotated(k, cos, sin, at[:, :new], rotary_interleaved)
    if block_table is None:
        layout = row_pages(k_cache, v_cache, pads)
        if layout is None:  # the pages are a copy, and the new keys are in it
            if k is not None and v is not None:
                where = (torch.arange(b) if rows is None else rows)[:, None], lens[:, None].long() + torch.arange(new)
                k_cache[where], v_cache[where] = k, v
                k, lens = None, lens + new
            k_cache, v_cache = k_cache.contiguous(), v_cache.contiguous()
            layout = row_pages(k_cache, v_cache, pads)
            assert layout is not None, "contiguous rows are pages"
        k_cache, v_cache, block_table = as_pages(k_cache, v_cache, layout, rows, pads, b)
    keys = lens if pads is None else lens - pads.to(lens)
    if k is not None and v is not None:
        keys = fastops.kv_append(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, block_table, keys)
    out, lse = with_lse(
        fastops.attention_paged, return_softmax_lse, q.reshape(b * sq, *q.shape[2:]), k_cache, v_cache, block_table,
        keys, scale=softmax_scale, causal=causal, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    out = out.view(b, sq, *out.shape[1:])
    return (out, lse.view(-1, b, sq).transpose(0, 1)) if return_softmax_lse else out


def with_lse(op: Any, wanted: bool, *args: Any, **options: Any) -> Any:
    """(out, lse or None) of an operator."""
    got = op(*args, return_lse=wanted, **options)
    return got if wanted else (got, None)


def result(pair: Any, return_attn_probs: bool, dv: int) -> Any:
    out = pair[0][..., :dv]
    return (out, pair[1], None) if return_attn_probs else out


def check_dropout(name: str, dropout_p: float, softcap: float) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{name}: dropout_p is {dropout_p}, must be from 0 to below 1")
    if dropout_p and softcap:
        raise ValueError(f"{name}: dropout_p is {dropout_p} and softcap {softcap}; use one of them")


def unpacked(name: str, label: str, t: Any, dims: int, parts: int) -> tuple[Tensor, ...]:
    """The views along the packing dimension, third from the end."""
    common.require_tensor(name, label, t)
    if t.dim() != dims or t.shape[-3] != parts:
        want = "[B,S," if dims == 5 else "[T,"
        raise ValueError(f"{name}: {label} must be {want}{parts},H,D], got shape {list(t.shape)}")
    return t.unbind(-3)


def padded(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[list[Tensor], float | None, int]:
    """q, k, v with head sizes rounded up to a multiple of 8 by zeros, the scale for the size before, v's size."""
    for label, t in (("q", q), ("k", k), ("v", v)):
        common.require_tensor(name, label, t)
        if t.dim() == 0:
            raise ValueError(f"{name}: {label} is a scalar")
    d, dv = q.shape[-1], v.shape[-1]
    if d % 8 == 0 and dv % 8 == 0:
        return [q, k, v], scale, dv
    return [F.pad(t, (0, -t.shape[-1] % 8)) for t in (q, k, v)], d**-0.5 if scale is None else scale, dv


def cached_lengths(name: str, given: int | Tensor | None, b: int, room: int, q: Tensor) -> tuple[Tensor, list[int]]:
    """Keys in the cache before the call: int32 [B] on q's device, and on the host."""
    if given is None or isinstance(given, int):
        counts = [room if given is None else given] * b
        lens = torch.full((b,), min(max(counts, default=0), room), dtype=torch.int32, device=q.device)
    else:
        common.require_index(name, "cache_seqlens", given, (b,), q)
        lens, counts = given, given.tolist()
    for i, n in enumerate(counts):
        if not 0 <= n <= room:
            raise ValueError(f"{name}: cache_seqlens[{i}] is {n}, must be from 0 to {room}")
    return lens, counts


def check_new(name: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any, v: Any, seqlens: Any) -> int:
    """How many keys are new."""
    if k is None and v is None:
        return 0
    if k is None or v is None:
        raise ValueError(f"{name}: k and v come together, {'k' if k is None else 'v'} is missing")
    if seqlens is None:
        raise ValueError(f"{name}: k and v need cache_seqlens, the place to write them")
    for label, t, cache in (("k", k, k_cache), ("v", v, v_cache)):
        common.require_tensor(name, label, t)
        common.require_dims(name, label, t, "B,Snew,Hkv,D")
        if t.dtype != q.dtype or t.device != q.device:
            raise TypeError(f"{name}: {label} is {common.name_of(t.dtype)} on {t.device}, q is not; they must agree")
        want = [q.shape[0], k.shape[1], *cache.shape[2:]]
        if list(t.shape) != want:
            raise ValueError(f"{name}: {label} has shape {list(t.shape)}, must be {want}")
    return int(k.shape[1])


def indices(name: str, label: str, t: Any, b: int, end: int, q: Tensor) -> Tensor | None:
    """`t`, int32 [B] with values from 0 to end - 1, as int64 on the CPU."""
    if t is None:
        return None
    common.require_index(name, label, t, (b,), q)
    for i, value in enumerate(t.tolist()):
        if not 0 <= value < end:
            raise ValueError(f"{name}: {label}[{i}] is {value}, must be from 0 to {end - 1}")
    return t.to("cpu", torch.long)


def check_table(name: str, table: Tensor, lens: Tensor, new: int, page: int, pages: int) -> None:
    if table.numel():
        low, high = table.aminmax()
        if low >= 0 and high < pages:
            return
    needed = torch.arange(table.shape[1])[None] * page < lens.to("cpu")[:, None] + new
    host = table.to("cpu")
    for i, j in (needed & ((host < 0) | (host >= pages))).nonzero().tolist():
        raise ValueError(f"{name}: block_table[{i}, {j}] is {host[i, j]}, pages run from 0 to {pages - 1}")


def check_rotary(name: str, q: Tensor, cos: Any, sin: Any, last: int) -> tuple[Tensor, Tensor]:
    for label, t in (("rotary_cos", cos), ("rotary_sin", sin)):
        if t is None:
            raise ValueError(f"{name}: rotary_cos and rotary_sin come together, {label} is missing")
        common.require_tensor(name, label, t)
        common.require_dims(name, label, t, "positions,R/2")
        if t.device != q.device:
            raise TypeError(f"{name}: {label} is on {t.device}, q on {q.device}")
        if t.shape != cos.shape or 2 * t.shape[1] > q.shape[-1]:
            raise ValueError(
                f"{name}: {label} has shape {list(t.shape)}, rotary_cos {list(cos.shape)}; they must agree and rotate "
                f"at most D = {q.shape[-1]} entries"
            )
        if last >= t.shape[0]:
            raise ValueError(f"{name}: {label} holds {t.shape[0]} positions, the call needs position {last}")
    same = cos.dtype == sin.dtype and cos.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return (cos, sin) if same else (cos.float(), sin.float())


def rotated(x: Tensor, cos: Tensor, sin: Tensor, at: Tensor, interleaved: bool) -> Tensor:
    """x [B, S, H, D] with its first 2 cos.shape[1] entries rotated to the positions at [B, S]; fp32 inside."""
    return fastops.apply_rope(x, None, cos, sin, positions=at, interleaved=interleaved)[0]


@functools.lru_cache(64)
def page_rows(b: int, jump: int, per_row: int, device: torch.device) -> Tensor:
    """The block_table of a dense cache, int32 [b, per_row]. Never written to."""
    table = torch.arange(b)[:, None] * jump + torch.arange(per_row)
    return table.to(device=device, dtype=torch.int32)


def row_pages(k: Tensor, v: Tensor, pads: Tensor | None) -> tuple[int, int] | None:
    """Keys of a page, and pages from row to row, by which a dense cache [Bc, S, H, D] can be seen as pages; None where
    its rows overlap or begin at odd places."""
    size = 1 if pads is not None else (k.shape[1] & -k.shape[1]) or 1
    if k.shape[0] <= 1:
        return size, 0
    if any(t.stride(1) == 0 or t.stride(0) % t.stride(1) for t in (k, v)):
        return None
    while any(t.stride(0) % (size * t.stride(1)) for t in (k, v)):
        size //= 2
    jump, other = (t.stride(0) // (size * t.stride(1)) for t in (k, v))
    return (size, jump) if jump == other else None


def as_pages(
    k: Tensor, v: Tensor, layout: tuple[int, int], rows: Tensor | None, pads: Tensor | None, b: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A dense cache seen as pages (`row_pages` has their layout), and the block_table that names them."""
    size, jump = layout
    per_row = k.shape[1] // size
    pages = (k.shape[0] - 1) * jump + per_row if k.numel() else 0

    def view(t: Tensor) -> Tensor:
        shape, inner = (pages, size, *t.shape[2:]), t.stride()[1:]
        return t.as_strided(shape, (size * t.stride(1), *inner), t.storage_offset())

    if rows is None and pads is None and torch._C._len_torch_dispatch_stack() == 0:  # fake tensors are not to be kept
        return view(k), view(v), page_rows(b, jump, per_row, k.device)
    row = torch.arange(b) if rows is None else rows
    table = row[:, None] * jump + torch.arange(per_row)
    if pads is not None:  # pages of one key: drop the padding, whatever follows the sequence is never read
        table = torch.minimum(table + pads[:, None], (row * jump + per_row - 1)[:, None])
    return view(k), view(v), table.to(device=k.device, dtype=torch.int32)
