"""Quantised KV caches: formats, `quantize` and `append`, and a paged cache that `attention_paged` reads directly.

=============  ====================================================  =========================================
format         a code stands for                                     scales
=============  ====================================================  =========================================
``int8``       code * scale, symmetric (amax / 127)                  each token and head
``fp8``        code * scale, e4m3                                    whole cache, given (vLLM's default: 1.0)
``fp8_token``  code * scale, e4m3 (amax / 448)                       each token and head
``kv8 kv4``    (code - zero) * scale, 8 or 4 bits (QServe)           each token and head, float zeros
``kivi4``      code * scale + min, 4 bits (KIVI)                     K: 32 tokens of one channel; V: 32 channels
``kivi2``      the same in 2 bits                                    of one token; recent tokens stay as they are
=============  ====================================================  =========================================

Keys are quantised after RoPE. Layouts: docs/ops/attention_paged.md. Sources: QServe (Lin et al. 2024) section 4.2 for
KV4, KIVI (Liu et al. 2024) section 3.3. KIVI's packed codes lie token by token here: one kernel reads every format.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

import fastops
from fastops import _ops

GROUP = 32  # KIVI's tokens of a channel, and channels of a token, that share a scale


@dataclass(frozen=True)
class KVQuant:
    """What `attention_paged` must know of a quantised cache besides its codes. All tensors on the cache's device.

    Scales are fp32, fp16 or bf16; a zero or min has its scale's dtype and shape. A code stands for (code - zero) *
    scale, for code * scale + min, or, with neither, for code * scale. Shapes: [1] (whole cache), [Hkv], [P, page, Hkv]
    (each token and head), or [P, page / g, Hkv, D / c] (g tokens, a power of two; c channels: 1 or a multiple of 8).

    k_bits, v_bits: 8, 4 or 2 where the codes are uint8 (the first channel in the lowest bits), else 0.
    k_recent, v_recent, packed_lens: token j of sequence b with j >= packed_lens[b] is not in a page but in row j % R of
    [B, R, Hkv, D] and [B, R, Hkv, Dv], in q's dtype; packed_lens is int32 [B].
    """

    k_scale: Tensor | None = None
    k_zero: Tensor | None = None
    k_min: Tensor | None = None
    v_scale: Tensor | None = None
    v_zero: Tensor | None = None
    v_min: Tensor | None = None
    k_recent: Tensor | None = None
    v_recent: Tensor | None = None
    packed_lens: Tensor | None = None
    k_bits: int = 0
    v_bits: int = 0


@dataclass(frozen=True)
class Side:
    """How keys, or values, are stored."""

    dtype: torch.dtype
    bits: int  # of a code
    tokens: int  # that share a scale; 0: all of the cache
    channels: int  # that share one; 0: all of the head
    shift: str = ""  # "zero", "min" or none
    scale_dtype: torch.dtype = torch.float16

    @property
    def packed_bits(self) -> int:
        """The argument k_bits or v_bits."""
        return self.bits if self.dtype == torch.uint8 else 0


@dataclass(frozen=True)
class Format:
    name: str
    k: Side
    v: Side
    recent: bool = False  # keeps a window of recent tokens in full precision


def _both(name: str, side: Side) -> Format:
    return Format(name, side, side)


def _kivi(bits: int) -> Format:
    k, v = (Side(torch.uint8, bits, t, c, "min") for t, c in ((GROUP, 1), (1, GROUP)))
    return Format(f"kivi{bits}", k, v, recent=True)


FORMATS = {
    f.name: f
    for f in (
        _both("int8", Side(torch.int8, 8, 1, 0, scale_dtype=torch.float32)),
        _both("fp8", Side(torch.float8_e4m3fn, 8, 0, 0, scale_dtype=torch.float32)),
        _both("fp8_token", Side(torch.float8_e4m3fn, 8, 1, 0, scale_dtype=torch.float32)),
        _both("kv8", Side(torch.uint8, 8, 1, 0, "zero")),
        _both("kv4", Side(torch.uint8, 4, 1, 0, "zero")),
        _kivi(4),
        _kivi(2),
    )
}


def format_of(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"kv: format is {name!r}, allowed: {', '.join(FORMATS)}")
    return FORMATS[name]


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., D] codes below 2**bits -> uint8 [..., D * bits / 8], the first channel in the lowest bits."""
    per = 8 // bits
    if per == 1:
        return codes
    parts = codes.unflatten(-1, (-1, per))
    out = parts[..., 0].clone()
    for i in range(1, per):
        out |= parts[..., i] << (bits * i)
    return out


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`."""
    per = 8 // bits
    if per == 1:
        return packed
    return torch.stack([packed >> (bits * i) & (2**bits - 1) for i in range(per)], -1).flatten(-2)


def quantize(
    x: Tensor, format: str | Side, role: str = "k", *, scale: Tensor | float | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of a cache in a format.

    Args:
        x: [..., T, H, D] keys (after RoPE) or values, D a multiple of 8; T a multiple of 32 for KIVI's keys, D for its
            values.
        format: a name of `FORMATS`, or one `Side` of a format.
        role: "k" or "v" (they differ in KIVI).
        scale: for "fp8", whose one scale is given and not found (default 1.0).

    Returns:
        (codes [..., T, H, D * bits / 8], scale, zero or min or None): scale and shift are [1], [..., T, H], or
        [..., T / g, H, D / c].

    Raises:
        ValueError: an unknown format or role, or a T or D that groups do not divide.
    """
    if role not in ("k", "v"):
        raise ValueError(f"kv.quantize: role is {role!r}, allowed: 'k', 'v'")
    side = format if isinstance(format, Side) else getattr(format_of(format), role)
    if x.dim() < 3 or x.shape[-1] % 8:
        raise ValueError(f"kv.quantize: x has shape {list(x.shape)}, must be [..., T, H, D] with D a multiple of 8")
    wide = x.float()
    if side.tokens == 0:
        s = torch.as_tensor(1.0 if scale is None else scale, dtype=side.scale_dtype, device=x.device).reshape(1)
        return encode(wide, side, s.float()), s, None
    if scale is not None:
        raise ValueError("kv.quantize: scale is given, but this format finds its own")
    t, h, d = x.shape[-3:]
    g, c = side.tokens, side.channels or d
    if t % g or d % c:
        raise ValueError(f"kv.quantize: x has shape {list(x.shape)}, T must be a multiple of {g} and D of {c}")
    groups = wide.reshape(*x.shape[:-3], t // g, g, h, d // c, c)
    if side.shift:
        low, high = groups.amin((-4, -1), keepdim=True), groups.amax((-4, -1), keepdim=True)
        s = ((high - low) / (2**side.bits - 1)).to(side.scale_dtype).float()
        s = torch.where(s == 0, torch.ones_like(s), s)  # a constant group: any scale does
        shift = (-low / s if side.shift == "zero" else low).to(side.scale_dtype)
        offset = shift.float() if side.shift == "zero" else -shift.float() / s
    else:
        s = (groups.abs().amax((-4, -1), keepdim=True) / TOPS[side.dtype]).to(side.scale_dtype).float()
        s = torch.where(s == 0, torch.ones_like(s), s)
        shift, offset = None, None
    codes = encode(groups, side, s, offset)
    codes = torch.where(s.isfinite(), codes.view(torch.uint8), 0).view(codes.dtype)  # else the group reads as NaN
    codes = codes.reshape(x.shape)

    def shaped(n: Tensor) -> Tensor:
        n = n.squeeze(-4).squeeze(-1).to(side.scale_dtype)  # [..., T / g, H, D / c]
        return n.squeeze(-1) if side.channels == 0 else n

    return pack(codes, side.bits), shaped(s), None if shift is None else shaped(shift)


TOPS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the largest codes of signed formats


def encode(x: Tensor, side: Side, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Codes (not yet packed) of fp32 numbers: x / scale + offset, rounded, cut off; a NaN as integer is the least."""
    y = x / scale
    if side.dtype == torch.float8_e4m3fn:
        return y.clamp(-448, 448).to(side.dtype)
    y = torch.round(y if offset is None else y + offset)
    top = TOPS.get(side.dtype, 2.0**side.bits - 1)
    low = -top if side.dtype in TOPS else 0.0
    return torch.where(y.isnan(), low, y).clamp(low, top).to(side.dtype)


def dequantize(
    codes: Tensor,
    scale: Tensor | None,
    *,
    zero: Tensor | None = None,
    min: Tensor | None = None,
    bits: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The numbers of [..., T, H, D * bits / 8] codes, as [..., T, H, D]: the meaning of every format.

    scale, zero, min: as `KVQuant` has them, with [..., T, H] for [P, page, Hkv]. bits: as k_bits there.
    """
    x = (unpack(codes, bits) if bits else codes).to(dtype)

    def spread(n: Tensor) -> Tensor:
        n = n.to(dtype)
        if n.dim() == 1:
            return n[:, None]
        if n.dim() == x.dim() - 1:
            return n[..., None]
        return n.repeat_interleave(x.shape[-3] // n.shape[-3], -3).repeat_interleave(x.shape[-1] // n.shape[-1], -1)

    if scale is None:
        return x
    if zero is not None:
        return (x - spread(zero)) * spread(scale)
    return x * spread(scale) + spread(min) if min is not None else x * spread(scale)


class PagedCache:
    """A quantised paged KV cache: its tensors, `append`, and the arguments `attention_paged` needs.

    Args:
        format: a name of `FORMATS`.
        pages, page: how many pages, and tokens of each (a power of two; for KIVI a multiple of 32).
        heads, head_dim, head_dim_v: Hkv, D, Dv (default: D).
        dtype: the model's (KIVI's recent tokens are kept in it).
        k_scale, v_scale: for "fp8", the cache's scales (default 1.0).
        batch, recent: for KIVI: how many sequences (row b of the block table owns window b), and how many recent tokens
            of each at least stay in full precision. The window holds one group of 32 more; when that is full, its
            oldest 32 tokens are quantised. (KIVI's own rule keeps fewer keys: up to `recent` of them.)

    Example:
        >>> import torch, fastops
        >>> cache = fastops.kv.PagedCache("kv4", 8, 16, 2, 64)
        >>> table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
        >>> k, v = torch.randn(2, 6, 2, 64).bfloat16()  # three tokens of each sequence
        >>> lens = fastops.kv.append(cache, k, v, table, torch.tensor([0, 0], dtype=torch.int32))
        >>> q = torch.randn(2, 4, 64).bfloat16()
        >>> fastops.attention_paged(q, cache.k, cache.v, table, lens, quant=cache.quant).shape
        torch.Size([2, 4, 64])
    """

    def __init__(
        self,
        format: str,
        pages: int,
        page: int,
        heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: Any = None,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        batch: int = 1,
        recent: int = 128,
    ) -> None:
        self.format, self.page, self.dtype = format_of(format), page, dtype
        dims = {"k": head_dim, "v": head_dim if head_dim_v is None else head_dim_v}
        if page < 1 or page & (page - 1):
            raise ValueError(f"PagedCache: page is {page}, must be a power of two")
        if self.format.recent and page % GROUP:
            raise ValueError(f"PagedCache: page is {page}, must be a multiple of {GROUP} for {format}")
        numbers: dict[str, Any] = {}
        for role, given in (("k", k_scale), ("v", v_scale)):
            side: Side = getattr(self.format, role)
            d = dims[role]
            if d % 8 or not 8 <= d <= 256 or (side.channels and d % side.channels):
                step = max(8, side.channels)
                raise ValueError(f"PagedCache: head size {d}, allowed for {format}: multiples of {step} up to 256")
            codes = torch.empty(pages, page, heads, d * side.bits // 8, dtype=side.dtype, device=device)
            _ops.lasting(codes).zero_()
            setattr(self, role, codes)
            if side.tokens == 0:
                numbers[f"{role}_scale"] = torch.full((1,), given, dtype=side.scale_dtype, device=device)
                continue
            shape: tuple[int, ...] = (pages, page // side.tokens, heads)
            if side.channels:
                shape = (*shape, d // side.channels)
            for name, value in (("scale", 1.0), (side.shift, 0.0)):
                if name:
                    numbers[f"{role}_{name}"] = torch.full(shape, value, dtype=side.scale_dtype, device=device)
            numbers[f"{role}_bits"] = side.packed_bits
        self.recent = recent if self.format.recent else 0
        if self.format.recent:
            if recent < 0 or batch < 1:
                raise ValueError(f"PagedCache: recent is {recent} and batch {batch}, must be at least 0 and 1")
            for role in "kv":
                shape = (batch, recent + GROUP, heads, dims[role])
                numbers[f"{role}_recent"] = torch.zeros(shape, dtype=dtype, device=device)
            numbers["packed_lens"] = torch.zeros(batch, dtype=torch.int32, device=device)
        self.quant = KVQuant(**numbers)

    k: Tensor
    v: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [self.k, self.v, *(getattr(self.quant, f.name) for f in fields(self.quant))]
        return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


def append(
    cache: PagedCache, k: Tensor, v: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Writes new tokens behind those a cache has, and returns the new seq_lens.

    Args:
        k, v: [T, Hkv, D] and [T, Hkv, Dv], the new tokens of all sequences one after another.
        block_table: int32 [B, max_pages]; the pages for the new tokens must be there.
        seq_lens: int32 [B], the tokens each sequence has before the call.
        cu_seqlens: int32 [B + 1], where each sequence's new tokens begin; without it each has T / B.

    Raises:
        ValueError: shapes that do not fit the cache, a page outside it, a table without room. Nothing is written then.

    `fastops.kv_append` is the same for caches that are tensors of your own, plain or quantised.
    """
    if cache.quant.k_recent is not None:
        k, v = k.to(cache.dtype), v.to(cache.dtype)
    return fastops.kv_append(k, v, cache.k, cache.v, block_table, seq_lens, cu_seqlens, quant=cache.quant)
