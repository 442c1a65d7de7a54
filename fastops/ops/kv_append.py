"""kv_append: new keys and values go behind those a paged cache has, as numbers or as the codes of a quantised cache.

The plain-torch reference is the meaning; with it `fastops.kv.quantize` is the meaning of the codes.
"""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastops import _ops, kv
from fastops.dispatch.record import Call, Implementation
from fastops.dispatch.select import Operator
from fastops.errors import NotSupportedError
from fastops.kv import KVQuant, Side
from fastops.ops import _common as common
from fastops.ops import _kv

NAME = "kv_append"
UNIT = kv.GROUP  # tokens that leave a window at once


def side_of(role: str, cache: Tensor, quant: KVQuant) -> Side | None:
    """How keys ("k") or values ("v") are stored; None: as numbers."""
    if cache.dtype not in _kv.CODES:
        return None
    bits = getattr(quant, f"{role}_bits")
    shift = next((n for n in ("zero", "min") if getattr(quant, f"{role}_{n}") is not None), "")
    scale: Tensor | None = getattr(quant, f"{role}_scale")
    if scale is None or scale.dim() == 1:
        return Side(cache.dtype, bits or 8, 0, 0, shift)
    tokens, channels = 1, 0
    if scale.dim() == 4:
        tokens = cache.shape[1] // scale.shape[1]
        channels = _kv.head_dim(cache, bits) // scale.shape[3]
    return Side(cache.dtype, bits or 8, tokens, channels, shift, scale.dtype)


def validate(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    quant: KVQuant | None = None,
) -> None:
    shapes = (("k", k, "T,Hkv,D"), ("v", v, "T,Hkv,Dv"), ("k_cache", k_cache, "P,page,Hkv,D"),
              ("v_cache", v_cache, "P,page,Hkv,Dv"))  # fmt: skip
    for name, t, dims in shapes:
        common.require_tensor(NAME, name, t)
        common.require_dims(NAME, name, t, dims)
    if k.dtype not in common.FLOATS:
        raise TypeError(
            f"{NAME}: k is {common.name_of(k.dtype)}, allowed: {', '.join(map(common.name_of, common.FLOATS))}"
        )
    if v.dtype != k.dtype or v.device != k.device:
        raise TypeError(f"{NAME}: v is {common.name_of(v.dtype)} on {v.device}, k is not; they must agree")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"{NAME}: v has shape {list(v.shape)}, must match k {list(k.shape)} but for the last")
    if quant is not None and not isinstance(quant, KVQuant):
        raise TypeError(f"{NAME}: quant must be a fastops.kv.KVQuant, got {type(quant).__name__}")
    quantised, quant = _kv.is_quantized(k, k_cache, v_cache, quant), quant or KVQuant()
    pages, page = k_cache.shape[:2]
    if page < 1 or page & (page - 1):
        raise ValueError(f"{NAME}: page size is {page}, must be a power of two")
    for role, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        bits, d = getattr(quant, f"{role}_bits"), x.shape[2]
        scale, zero, low = (getattr(quant, f"{role}_{n}") for n in ("scale", "zero", "min"))
        _kv.check_side(NAME, role, cache, bits, k, scale, zero, low, like="k")
        if not 1 <= d <= common.MAX_HEAD_DIM or (quantised and d % 8):
            raise ValueError(f"{NAME}: {role} has head size {d}, allowed: 1 to 256, in quantised caches multiples of 8")
        want = [pages, page, k.shape[1], d * bits // 8 if bits else d]
        if list(cache.shape) != want:
            raise ValueError(f"{NAME}: {role}_cache has shape {list(cache.shape)}, must be {want}")
    window = _kv.check_window(NAME, (k.shape[1], k.shape[2], v.shape[2]), quant, k, like="k")
    for role, cache in (("k", k_cache), ("v", v_cache)):
        _check_format(role, side_of(role, cache, quant), window)
    common.require_index(NAME, "seq_lens", seq_lens, (None,), k)
    b = seq_lens.shape[0]
    if quant.packed_lens is not None and (quant.packed_lens.shape[0] < b or window < UNIT):
        raise ValueError(
            f"{NAME}: the windows are {quant.packed_lens.shape[0]} of {window} rows for {b} sequences, each must have "
            f"{UNIT} or more"
        )
    common.require_index(NAME, "block_table", block_table, (b, None), k)
    if cu_seqlens is not None:
        common.require_index(NAME, "cu_seqlens", cu_seqlens, (b + 1,), k)
    elif (b and k.shape[0] % b) or (not b and k.shape[0]):
        raise ValueError(f"{NAME}: k has {k.shape[0]} tokens for {b} sequences; give cu_seqlens")
    if not is_compiling():
        _check_contents(k, k_cache, v_cache, block_table, seq_lens, cu_seqlens, quant)


def _check_format(role: str, side: Side | None, window: int) -> None:
    if side is None:
        return
    if side.dtype != torch.uint8 and side.shift:
        raise NotSupportedError(f"{NAME}: {role}_cache is int8 or e4m3, whose codes take no {role}_zero or {role}_min")
    if side.dtype == torch.uint8 and side.tokens and not side.shift:
        raise NotSupportedError(f"{NAME}: {role}_scale needs {role}_zero or {role}_min to find codes of uint8")
    if side.tokens > UNIT or (side.tokens > 1 and not window):
        raise NotSupportedError(
            f"{NAME}: {role}_scale is shared by {side.tokens} tokens, allowed: 1, and with a window of recent tokens "
            f"up to {UNIT}"
        )


def _spans(
    k: Tensor, seq_lens: Tensor, cu_seqlens: Tensor | None, quant: KVQuant
) -> list[tuple[int, int, int, int, int]]:
    """Of each sequence: its first row of k, its length before and after, the tokens [begin, end) that enter pages."""
    old, b = seq_lens.tolist(), seq_lens.shape[0]
    cu = [i * (k.shape[0] // b) for i in range(b + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    spans = []
    for i, n in enumerate(old):
        new = n + cu[i + 1] - cu[i]
        begin, end = n, new
        if quant.packed_lens is not None and quant.k_recent is not None:
            begin = int(quant.packed_lens[i])
            end = begin + max(0, new - begin - (quant.k_recent.shape[1] - UNIT)) // UNIT * UNIT
        spans.append((cu[i], n, new, begin, end))
    return spans


def _check_contents(
    k: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens: Tensor | None,
    quant: KVQuant,
) -> None:  # fmt: skip
    if cu_seqlens is not None:
        cu = cu_seqlens.tolist()
        if cu[0] != 0 or cu[-1] != k.shape[0] or any(x > y for x, y in itertools.pairwise(cu)):
            raise ValueError(f"{NAME}: cu_seqlens is {cu}, must rise from 0 to {k.shape[0]}")
    sides = [side_of(r, c, quant) for r, c in (("k", k_cache), ("v", v_cache))]
    align = max([1, *(s.tokens for s in sides if s)])
    rows = 0 if quant.k_recent is None else quant.k_recent.shape[1]
    pages, page = k_cache.shape[:2]
    for i, (_, n, new, begin, end) in enumerate(_spans(k, seq_lens, cu_seqlens, quant)):
        if n < 0 or new > 2**31 - 1:
            raise ValueError(f"{NAME}: seq_lens[{i}] is {n}, must not be negative nor grow beyond int32")
        if rows and not (max(0, n - rows) <= begin <= n and begin % align == 0):
            raise ValueError(
                f"{NAME}: packed_lens[{i}] is {begin}, must be a multiple of {align} from seq_lens - {rows} to "
                f"seq_lens = {n}"
            )
        if end > block_table.shape[1] * page:
            raise ValueError(
                f"{NAME}: sequence {i} grows to {end} tokens in pages, block_table has room for "
                f"{block_table.shape[1] * page}"
            )
        for j in range(begin // page, -(-end // page) if end > begin else begin // page):
            if not 0 <= int(block_table[i, j]) < pages:
                raise ValueError(
                    f"{NAME}: block_table[{i}, {j}] is {int(block_table[i, j])}, pages run from 0 to {pages - 1}"
                )


def describe(k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Call:
    return Call(k.device.type, k.dtype, k.shape[-1], v.shape[-1])


@torch.no_grad()
def reference(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    quant: KVQuant | None = None,
) -> Tensor:
    quant, device, page = quant or KVQuant(), k.device, k_cache.shape[1]
    spans = _spans(k, seq_lens, cu_seqlens, quant)
    none = torch.zeros(0, dtype=torch.long, device=device)
    at = torch.cat([none, *(torch.arange(begin, end, device=device) for *_, begin, end in spans)])
    owner = torch.cat([none, *(torch.full((s[4] - s[3],), i, device=device) for i, s in enumerate(spans))])
    pages, slots = block_table[owner, at // page].long(), at % page
    for role, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        rows = x if quant.packed_lens is None else _through_window(getattr(quant, f"{role}_recent"), x, spans)
        _write(role, cache, quant, rows, pages, slots)
    if quant.packed_lens is not None:
        quant.packed_lens[: len(spans)] = torch.tensor([s[4] for s in spans], dtype=torch.int32, device=device)
    return torch.tensor([s[2] for s in spans], dtype=torch.int32, device=seq_lens.device)


def _write(role: str, cache: Tensor, quant: KVQuant, x: Tensor, pages: Tensor, slots: Tensor) -> None:
    """Token i of x [T, H, D] to (pages[i], slots[i]); where tokens share scales, whole groups of them."""
    side = side_of(role, cache, quant)
    if side is None:
        cache[pages, slots] = x
        return
    scale, zero, low = (getattr(quant, f"{role}_{name}") for name in ("scale", "zero", "min"))
    if side.tokens == 0:
        wide = torch.ones(1, device=x.device) if scale is None else scale.float()
        offset = zero.float() if zero is not None else None if low is None else -low.float() / wide
        codes = kv.encode(x.float(), side, wide[:, None], None if offset is None else offset[:, None])
        cache[pages, slots] = kv.pack(codes, side.bits)
        return
    codes, found, shift = kv.quantize(x, side)
    cache[pages, slots] = codes
    at = (pages[:: side.tokens], slots[:: side.tokens] // side.tokens)
    scale[at] = found
    if shift is not None:
        (low if zero is None else zero)[at] = shift


def _through_window(windows: Tensor, x: Tensor, spans: list[tuple[int, int, int, int, int]]) -> Tensor:
    """New tokens enter the windows of recent ones; the rows that leave them, of all sequences in order."""
    size, leaving = windows.shape[1], [x[:0]]
    for i, (row, n, new, begin, end) in enumerate(spans):
        held = windows[i, torch.arange(begin, n, device=x.device) % size]
        rows = torch.cat([held, x[row : row + new - n]])
        leaving.append(rows[: end - begin])
        windows[i, torch.arange(end, new, device=x.device) % size] = rows[end - begin :]
    return torch.cat(leaving)


def run_cpp(*args: Any, quant: KVQuant | None = None) -> Tensor:
    result: Tensor = _op(*args, **_kv.arguments(quant))
    return result


_op = _ops.ops.kv_append.default

operator = Operator(
    NAME,
    [
        Implementation("cpp", run_cpp, common.cpp_why_not, 10, source="csrc/cpu/kv_append"),
        Implementation("reference", reference, common.always, 0, source="fastops/ops/kv_append.py"),
    ],
    validate,
    describe,
)

_direct = _ops.direct(NAME)


def kv_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    quant: KVQuant | None = None,
) -> Tensor:
    """Writes new keys and values behind those a paged cache has: what `attention_paged` reads afterwards.

    Args:
        k, v: [T, Hkv, D] and [T, Hkv, Dv], fp32, fp16 or bf16, keys after RoPE: the new tokens of all sequences one
            after another. No gradients pass.
        k_cache, v_cache: [P, page, Hkv, D] and [P, page, Hkv, Dv] in k's dtype, or quantised (codes, as in
            `attention_paged`); page a power of two. Written in place. No page may be written for two sequences at once.
        block_table: int32 [B, max_pages]; only the pages of the new tokens are read.
        seq_lens: int32 [B], the tokens each sequence has before the call.
        cu_seqlens: int32 [B + 1], where each sequence's new tokens begin; without it each has T / B.
        quant: how a cache of codes is stored (`fastops.kv.KVQuant`). Scales of each token and head, with zeros or
            minima for uint8, are found and written; scales of [1] and [Hkv] are used as they are (int8 and e4m3 caches
            may come without: 1). With a window of R recent tokens, those that exceed R - 32 leave it for the pages, the
            oldest 32 at a time, and packed_lens is updated; only then may up to 32 tokens share a scale.

    Returns:
        int32 [B], the new seq_lens.

    Raises:
        ValueError: also for a page outside the cache, or a table without room; nothing is written then. TypeError,
        NotSupportedError: a format whose codes cannot be found this way.

    Numerics: codes, scales and zeros are the bits of `fastops.kv.quantize`. A group that holds an infinity or a NaN, or
    whose scale overflows its dtype, reads as NaN.
    Sources: QServe (Lin et al. 2024) section 4.2, KIVI (Liu et al. 2024) section 3.3; vLLM's reshape_and_cache.

    Example:
        >>> import torch, fastops
        >>> cache = torch.zeros(2, 8, 16, 2, 64)
        >>> table, lens = torch.tensor([[3, 1], [0, 7]], dtype=torch.int32), torch.tensor([15, 0], dtype=torch.int32)
        >>> k, v = torch.randn(2, 4, 2, 64)  # two tokens of each sequence
        >>> fastops.kv_append(k, v, cache[0], cache[1], table, lens)
        tensor([17,  2], dtype=torch.int32)
    """
    if not is_compiling() and (quant is None or type(quant) is KVQuant):
        lens = _direct(
            k, v, k_cache, v_cache, block_table, seq_lens, cu_seqlens, *_kv.values(quant or NO_QUANT), None
        )  # fmt: skip
        if lens is not None:
            return lens  # type: ignore[no-any-return]
    common.require_tensor(NAME, "k", k)
    key = (k.dtype, k.device)
    return operator(key, k, v, k_cache, v_cache, block_table, seq_lens, cu_seqlens, quant=quant)  # type: ignore[no-any-return]


NO_QUANT = KVQuant()


@torch.library.register_fake("fastops::kv_append")
def _fake(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, *args: Any, **kw: Any
) -> Tensor:
    return seq_lens.new_empty(seq_lens.shape)


def _elsewhere(*args: Any, **options: Any) -> Tensor:
    return reference(*args, quant=KVQuant(**{f.name: options.get(f.name, f.default) for f in fields(KVQuant)}))


_ops.implement_elsewhere("kv_append", _elsewhere)
