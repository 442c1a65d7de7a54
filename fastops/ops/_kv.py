"""What attention_paged asks of a quantised cache, and what such a cache means."""

from __future__ import annotations

from dataclasses import fields
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from fastops.kv import KVQuant, dequantize
from fastops.ops import _common as common

CODES = (torch.int8, torch.float8_e4m3fn, torch.uint8)


def is_quantized(q: Tensor, k_cache: Tensor, v_cache: Tensor, quant: KVQuant | None) -> bool:
    return quant is not None or k_cache.dtype in CODES or v_cache.dtype in CODES


def arguments(quant: KVQuant | None) -> dict[str, Any]:
    """The torch op's arguments."""
    return {} if quant is None else {f.name: getattr(quant, f.name) for f in fields(quant)}


# All of a KVQuant, for the direct call.
values = attrgetter(*(f.name for f in fields(KVQuant)))


def head_dim(cache: Tensor, bits: int) -> int:
    return int(cache.shape[-1]) * 8 // bits if bits in (2, 4) else int(cache.shape[-1])


def check(op: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, quant: KVQuant | None) -> None:
    """Dtypes, shapes and windows. Raises TypeError or ValueError."""
    quant = quant or KVQuant()
    if not isinstance(quant, KVQuant):
        raise TypeError(f"{op}: quant must be a fastops.kv.KVQuant, got {type(quant).__name__}")
    if q.dtype not in common.FLOATS:
        raise TypeError(
            f"{op}: q is {common.name_of(q.dtype)}, allowed: {', '.join(map(common.name_of, common.FLOATS))}"
        )
    if v_cache.shape[:-1] != k_cache.shape[:-1]:
        raise ValueError(
            f"{op}: v_cache has shape {list(v_cache.shape)}, must match k_cache {list(k_cache.shape)} but for the last"
        )
    hq, hkv = q.shape[1], k_cache.shape[2]
    if (hkv == 0 and hq) or (hkv and hq % hkv):
        raise ValueError(f"{op}: q has {hq} heads, k_cache has {hkv}; need Hq % Hkv == 0")
    for role, cache in (("k", k_cache), ("v", v_cache)):
        bits = getattr(quant, f"{role}_bits")
        check_side(op, role, cache, bits, q, *(getattr(quant, f"{role}_{n}") for n in ("scale", "zero", "min")))
        size = head_dim(cache, bits)
        if size % 8 or not 8 <= size <= common.MAX_HEAD_DIM:
            raise ValueError(f"{op}: {role}_cache has head size {size}, allowed: multiples of 8 from 8 to 256")
    if head_dim(k_cache, quant.k_bits) != q.shape[2]:
        raise ValueError(f"{op}: k_cache has head size {head_dim(k_cache, quant.k_bits)}, q has {q.shape[2]}")
    sizes = (hkv, q.shape[2], head_dim(v_cache, quant.v_bits))
    rows = check_window(op, sizes, quant, q, batch=seq_lens.shape[0])
    if quant.packed_lens is not None and not torch.compiler.is_compiling():
        _check_packed(op, seq_lens, rows, quant.packed_lens)


def check_side(
    op: str, role: str, cache: Tensor, bits: int, q: Tensor, scale: Tensor | None, zero: Tensor | None,
    low: Tensor | None, like: str = "q",
) -> None:  # fmt: skip
    """`q`: the tensor, called `like`, whose dtype and device are the model's."""
    if cache.device != q.device:
        raise TypeError(f"{op}: {role}_cache is on {cache.device}, {like} on {q.device}")
    if cache.dtype not in (*CODES, q.dtype):
        raise TypeError(
            f"{op}: {role}_cache is {common.name_of(cache.dtype)}, allowed: {like}'s {common.name_of(q.dtype)}, int8, "
            "float8_e4m3fn, uint8"
        )
    if cache.dtype == torch.uint8 and bits not in (2, 4, 8):
        raise ValueError(f"{op}: {role}_bits is {bits}, must be 8, 4 or 2 for a uint8 cache")
    if cache.dtype != torch.uint8 and bits:
        raise ValueError(f"{op}: {role}_bits is {bits}, must be 0 unless the cache is uint8")
    if scale is None:
        if zero is not None or low is not None:
            raise ValueError(f"{op}: {role}_zero or {role}_min is given without {role}_scale")
        if cache.dtype == torch.uint8:
            raise ValueError(f"{op}: a uint8 cache needs {role}_scale")
        return
    if cache.dtype not in CODES:
        raise ValueError(f"{op}: {role}_scale is given, but {role}_cache has {like}'s dtype")
    if zero is not None and low is not None:
        raise ValueError(f"{op}: give {role}_zero or {role}_min, not both")
    for name, t in ((f"{role}_scale", scale), (f"{role}_zero", zero), (f"{role}_min", low)):
        if t is None:
            continue
        common.require_tensor(op, name, t)
        if t.device != q.device:
            raise TypeError(f"{op}: {name} is on {t.device}, {like} on {q.device}")
        if t.dtype not in (torch.float32, torch.float16, torch.bfloat16) or t.dtype != scale.dtype:
            raise TypeError(
                f"{op}: {name} is {common.name_of(t.dtype)}, must be float32, float16 or bfloat16, and as {role}_scale"
            )
        if t.shape != scale.shape:
            raise ValueError(f"{op}: {name} has shape {list(t.shape)}, {role}_scale {list(scale.shape)}")
    pages, page, heads = cache.shape[:3]
    shape, dim, name = list(scale.shape), head_dim(cache, bits), f"{op}: {role}_scale has shape {list(scale.shape)}"
    if len(shape) == 1:
        if shape[0] not in (1, heads):
            raise ValueError(f"{name}, must be [1], [{heads}], [{pages}, {page}, {heads}] or [P, page / g, Hkv, D / c]")
    elif len(shape) == 3:
        if shape != [pages, page, heads]:
            raise ValueError(f"{name}, must be [{pages}, {page}, {heads}]")
    elif len(shape) == 4:
        if shape[0] != pages or shape[2] != heads or shape[1] < 1 or page % shape[1]:
            raise ValueError(f"{name}, must be [{pages}, {page} / g, {heads}, {dim} / c]")
        if shape[3] < 1 or dim % shape[3] or (shape[3] != dim and dim // shape[3] % 8):
            raise ValueError(f"{name}: groups of channels must have 1 channel or a multiple of 8")
    else:
        raise ValueError(f"{name}, must have 1, 3 or 4 dimensions")


def check_window(
    op: str, sizes: tuple[int, int, int], quant: KVQuant, q: Tensor, like: str = "q", batch: int | None = None
) -> int:
    """Rows of the windows, or 0 without. sizes: heads, head size of K, of V. `q`, `like`: as in check_side.

    batch: the sequences there must be; None: as many as packed_lens has."""
    k, v, packed = parts = (quant.k_recent, quant.v_recent, quant.packed_lens)
    if all(t is None for t in parts):
        return 0
    if k is None or v is None or packed is None:
        raise ValueError(f"{op}: k_recent, v_recent and packed_lens go together")
    common.require_index(op, "packed_lens", packed, (batch,), q)
    heads, d, dv = sizes
    rows = int(k.shape[1]) if k.dim() == 4 else 0
    for name, t, size in (("k_recent", k, d), ("v_recent", v, dv)):
        if t.dtype != q.dtype or t.device != q.device:
            raise TypeError(f"{op}: {name} is {common.name_of(t.dtype)} on {t.device}, must be as {like}")
        want = [packed.shape[0], rows, heads, size]
        if list(t.shape) != want:
            raise ValueError(f"{op}: {name} has shape {list(t.shape)}, must be {want}")
    return rows


def _check_packed(op: str, seq_lens: Tensor, rows: int, packed: Tensor) -> None:
    for i, (n, at) in enumerate(zip(seq_lens.tolist(), packed.tolist(), strict=True)):
        if not max(0, n - rows) <= at <= n:
            raise ValueError(f"{op}: packed_lens[{i}] is {at}, must be from seq_lens - {rows} to seq_lens = {n}")


def gather(
    role: str, cache: Tensor, index: Tensor, length: int, packed: int, b: int, quant: KVQuant, dtype: torch.dtype
) -> Tensor:
    """[length, Hkv, D] of one sequence: what its pages mean, then its window."""

    def pick(name: str) -> Tensor | None:
        t: Tensor | None = getattr(quant, f"{role}_{name}")
        return t if t is None or t.dim() == 1 else t[index]

    bits = getattr(quant, f"{role}_bits")
    rows = dequantize(cache[index], pick("scale"), zero=pick("zero"), min=pick("min"), bits=bits, dtype=dtype)
    rows = rows.flatten(0, 1)[:packed]
    if packed < length:
        window: Tensor = getattr(quant, f"{role}_recent")
        rows = torch.cat([rows, window[b, torch.arange(packed, length) % window.shape[1]].to(dtype)])
    return rows
