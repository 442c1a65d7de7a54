"""Int4Weight: one logical form for every 4-bit format; each provider packs it once for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastops import _ops
from fastops._parts import TensorParts

BLOCK = 16  # output features that lie together in the packed form
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PARTS = ("codes", "scales", "zeros", "mins", "perm", "planes", "column_scales", "column_zeros", "kept")


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def pack_pairs(codes: Tensor) -> Tensor:
    """uint8 [N, K] codes from 0 to 15 -> uint8 [N, K / 2], input feature 2 j in the low nibble of byte j."""
    codes = codes.to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack_pairs(codes: Tensor) -> Tensor:
    """The inverse of `pack_pairs`."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(1)


def unpack_codes(packed: Tensor, n: int) -> Tensor:
    """The canonical codes [N, K / 2] behind the packed ones [ceil(N / 16), K / 8, 16, 4]."""
    eight = torch.cat((packed & 15, packed >> 4), -1).transpose(1, 2)  # [blocks, 16, K / 8, 8]
    return pack_pairs(eight.flatten(2).flatten(0, 1)[:n])


def unpack24(packed: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The canonical (codes [N, K / 4], kept [N, K / 8]) behind packed 2:4 sparse codes [ceil(N / 16), K / 8, 16, 3]."""
    words = packed.flatten(2)
    codes = words[..., : 2 * BLOCK].unflatten(2, (BLOCK, 2)).transpose(1, 2).flatten(2).flatten(0, 1)[:n]
    return codes ^ 0x88, words[..., 2 * BLOCK :].transpose(1, 2).flatten(0, 1)[:n].contiguous()


@dataclass(frozen=True, slots=True)
class Packed:
    """What the kernels read: codes [N / 16, K / 8, 16, 4] (2:4 sparse: 3), scales [N / 16, groups, 16], and the rest
    by the operator's names: zeros, mins (as scales), perm, column_scales, column_zeros (fp32 [slices, K]), eight (two
    planes are 16 high + low of 8-bit codes). `arguments` is all of it, for the direct call."""

    codes: Tensor
    scales: Tensor
    rest: dict[str, Any]
    arguments: tuple[Any, ...]


class Int4Weight(TensorParts):
    """A weight [N, K] of 4-bit codes.

        w[n, k] = (code[n, k] - zeros[n, g]) * scales[n, g]     (zeros absent: 8)
        w[n, k] = code[n, k] * scales[n, g] - mins[n, g]        (mins given)

    with g = k // group_size. With perm, column k belongs to input feature perm[k] (act-order). With P planes the codes
    have P K columns, and those that belong to one feature add up: two planes hold 8-bit weights.

    Groups along the outputs of one input feature (per input channel, AdaDim, arXiv:2309.15531) have

        w[n, k] = (code[n, k] - column_zeros[s, k]) * scales[n, g] * column_scales[s, k],   s = n // (N / S)

    and with `kept` the weight is 2:4 sparse: two of each four neighbouring columns are stored, the others are 0.

    Args:
        codes: uint8 [N, K / 2], feature 2 j in the low nibble of byte j, 2 j + 1 in the high one.
        scales: [N, G] fp32, fp16 or bf16; G divides K / 8.
        zeros, mins: like scales; at most one of them. zeros need not be whole numbers.
        perm: int32 [K], a permutation.
        planes: None for one, or int32 [P], of which only the length counts (so that it survives any device): all of the
            above have P K columns then, column k belongs to feature k modulo K, and perm has each feature P times.
        column_scales: [S, K], any floating dtype; S is 1, or N / S a multiple of 16. Without column_zeros the code's
            zero is that of the row (zeros, or 8).
        column_zeros: like column_scales; not with zeros or mins.
        kept: uint8 [N, K / 8], the places (0 to 3, the first in the lowest bits, in rising order) of the two columns
            kept of each four, two fours to a byte. codes are [N, K / 4] then, of the columns kept. Symmetric only.

    Plain tensors behind attributes of the same names: pickle, deepcopy and torch.save work, `state_dict()` and
    `Int4Weight.from_state_dict` name them, `.to(device)` moves them. The packed form is made at first use, not saved.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value; names the tensor.
    """

    PARTS = PARTS

    def __init__(
        self, codes: Tensor, scales: Tensor, *, zeros: Tensor | None = None, mins: Tensor | None = None,
        perm: Tensor | None = None, planes: Tensor | None = None, column_scales: Tensor | None = None,
        column_zeros: Tensor | None = None, kept: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.codes, self.scales, self.zeros, self.mins, self.perm = codes, scales, zeros, mins, perm
        self.planes, self.column_scales, self.column_zeros, self.kept = planes, column_scales, column_zeros, kept
        self._packed: Packed | None = None
        self._shape = _check(self)

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self._shape

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return _columns(self) // self.scales.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] in the order of the input features, computed in fp32 (fp64 for fp64)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        n, features = self.shape
        w = self.columns(wide)
        if self.column_scales is not None:
            w = w * self._over_rows(self.column_scales.to(wide))
        if self.perm is not None:
            w = w.new_zeros(n, features).index_add_(1, self.perm.long(), w)
        elif self.planes is not None:
            w = w.view(n, -1, features).sum(1)
        return w.to(dtype)

    def columns(self, wide: torch.dtype) -> Tensor:
        """[N, columns of the codes] in their order, before column_scales; computed in `wide`."""
        n = self.shape[0]
        codes = unpack_pairs(self.codes) if self.kept is None else spread24(unpack_pairs(self.codes), self.kept)
        q = codes.to(wide).view(n, self.scales.shape[1], -1)
        scales = self.scales.to(wide)[..., None]
        if self.mins is not None:
            w = q * scales - self.mins.to(wide)[..., None]
        elif self.column_zeros is not None:
            w = (q - self._over_rows(self.column_zeros.to(wide)).view(q.shape)) * scales
        else:
            w = (q - (8.0 if self.zeros is None else self.zeros.to(wide)[..., None])) * scales
        return w.view(n, -1)

    def _over_rows(self, columns: Tensor) -> Tensor:
        """[S, K] -> [N, K]."""
        return columns.repeat_interleave(self.shape[0] // max(columns.shape[0], 1), 0)

    def packed(self) -> Packed:
        """The form the kernels read; made once."""
        if self._packed is None:
            scales = _lanes(self.scales)
            assert scales is not None
            eight = self.planes is not None and self.planes.shape[0] == 2
            if eight and all(getattr(self, part) is None for part in PARTS[2:] if part != "planes"):
                high, low = self.scales.chunk(2, 1)
                eight = bool((high == 16.0 * low).all())
            else:
                eight = False
            pack = _ops.ops.int4_pack
            codes = pack(self.codes) if self.kept is None else _ops.ops.int4_pack24(self.codes, self.kept)
            rest = {"zeros": _lanes(self.zeros), "mins": _lanes(self.mins), "perm": self.perm, "eight": eight}
            for name in ("column_scales", "column_zeros"):
                t = getattr(self, name)
                rest[name] = None if t is None else t.float().contiguous()
            names = ("zeros", "mins", "perm", "column_scales", "column_zeros", "eight")
            n, k = self.shape
            self._packed = Packed(codes, scales, rest, (k, n, codes, scales, *(rest[name] for name in names)))
        return self._packed

    def __repr__(self) -> str:
        n, k = self.shape
        kind = "mins" if self.mins is not None else "symmetric" if self.zeros is None else "zeros"
        order = ", act-order" if self.perm is not None else ""
        if self.planes is not None:
            order += f", {self.planes.shape[0]} planes"
        if self.column_scales is not None:
            order += f", {self.column_scales.shape[0]} x columns" + ("" if self.column_zeros is None else " with zeros")
        if self.kept is not None:
            order += ", 2:4 sparse"
        return f"Int4Weight([{n}, {k}], group_size={self.group_size}, {kind}{order}, {_dtype(self.scales)} scales)"


def spread24(codes: Tensor, kept: Tensor) -> Tensor:
    """Codes of the columns kept, uint8 [N, K / 2], among code 8 for the others: [N, K]. The inverse of `gather24`."""
    places = torch.stack([kept >> 2 * i & 3 for i in range(4)], -1).view(codes.shape[0], -1, 2)
    dense = codes.new_full((*places.shape[:2], 4), 8)
    return dense.scatter_(2, places.long(), codes.view(places.shape)).flatten(1)


def gather24(codes: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Of codes [N, K] those at `places` [N, K / 4, 2] (rising, from 0 to 3), and the places as `kept`."""
    n, k = codes.shape
    held = codes.view(n, k // 4, 4).gather(2, places.long()).flatten(1)
    four = places.to(torch.uint8).view(n, k // 8, 4)
    return held, four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6


def _columns(w: Int4Weight) -> int:
    """Columns the codes stand for."""
    return w.codes.shape[1] * (2 if w.kept is None else 4)


def _lanes(t: Tensor | None) -> Tensor | None:
    """[N, G] -> [ceil(N / 16), G, 16]."""
    if t is None:
        return None
    n, g = t.shape
    t = torch.cat((t, t.new_zeros((-n % BLOCK, g))))
    return t.view(-1, BLOCK, g).transpose(1, 2).contiguous()


def _check_columns(w: Int4Weight, n: int, k: int) -> None:
    if w.column_scales is None:
        if w.column_zeros is not None:
            raise ValueError("Int4Weight: column_zeros need column_scales")
        return
    slices = w.column_scales.shape[0]
    if slices < 1 or (slices > 1 and (n % slices or n // slices % BLOCK)):
        raise ValueError(
            f"Int4Weight: column_scales has {slices} rows; must be 1, or divide N = {n} into multiples of {BLOCK}"
        )
    for name in ("column_scales", "column_zeros"):
        t = getattr(w, name)
        if t is not None and list(t.shape) != [slices, k]:
            raise ValueError(f"Int4Weight: {name} has shape {list(t.shape)}, must be [{slices}, {k}]")
        if t is not None and t.dtype not in FLOATS:
            raise TypeError(f"Int4Weight: {name} is {_dtype(t)}, must be float32, float16 or bfloat16")


def _check_kept(w: Int4Weight, n: int, k: int) -> None:
    if w.kept is None:
        return
    if w.kept.dtype != torch.uint8:
        raise TypeError(f"Int4Weight: kept is {_dtype(w.kept)}, must be uint8")
    if list(w.kept.shape) != [n, k // 8]:
        raise ValueError(f"Int4Weight: kept has shape {list(w.kept.shape)}, must be [{n}, {k // 8}]")
    if w.zeros is not None or w.mins is not None or w.column_zeros is not None:
        raise ValueError("Int4Weight: a 2:4 sparse weight is symmetric: no zeros, mins or column_zeros with kept")
    if w.kept.device.type != "meta" and not bool(
        ((w.kept & 3) < (w.kept >> 2 & 3)).logical_and_((w.kept >> 4 & 3) < w.kept >> 6).all()
    ):
        raise ValueError("Int4Weight: kept holds places that do not rise")


def _check(w: Int4Weight) -> torch.Size:
    """[N, K] of a weight that is right."""
    for name in PARTS:
        t = getattr(w, name)
        if t is None and name not in ("codes", "scales"):
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"Int4Weight: {name} must be a tensor, got {type(t).__name__}")
        if isinstance(w.codes, Tensor) and t.device != w.codes.device:
            raise TypeError(f"Int4Weight: {name} is on {t.device}, codes on {w.codes.device}; they must agree")
        dims = 1 if name in ("perm", "planes") else 2
        if t.dim() != dims:
            raise ValueError(f"Int4Weight: {name} has shape {list(t.shape)}, must have {dims} dimension(s)")
    if w.codes.dtype != torch.uint8:
        raise TypeError(f"Int4Weight: codes is {_dtype(w.codes)}, must be uint8")
    n, k = w.codes.shape[0], _columns(w)
    if k == 0 or k % 8:
        raise ValueError(f"Int4Weight: codes has shape {list(w.codes.shape)}, so K is {k}; must be a multiple of 8")
    for name in ("scales", "zeros", "mins"):
        t = getattr(w, name)
        if t is None:
            continue
        if t.dtype not in FLOATS or t.dtype != w.scales.dtype:
            raise TypeError(f"Int4Weight: {name} is {_dtype(t)}, must be float32, float16 or bfloat16 like scales")
        if t.shape[0] != n or t.shape != w.scales.shape:
            raise ValueError(f"Int4Weight: {name} has shape {list(t.shape)}, must be [{n}, groups] like scales")
    groups = w.scales.shape[1]
    if groups < 1 or (k // 8) % groups:
        raise ValueError(f"Int4Weight: scales has {groups} groups; they must divide K / 8 = {k // 8}")
    if (w.zeros is not None) + (w.mins is not None) + (w.column_zeros is not None) > 1:
        raise ValueError("Int4Weight: give one of zeros, mins and column_zeros")
    _check_columns(w, n, k)
    _check_kept(w, n, k)
    for name in ("scales", "zeros", "mins", "column_scales", "column_zeros"):
        t = getattr(w, name)
        if t is not None and t.device.type != "meta" and not bool(torch.isfinite(t).all()):
            raise ValueError(f"Int4Weight: {name} holds an infinity or a NaN")
    features = k
    if w.planes is not None:
        if w.planes.dtype != torch.int32:
            raise TypeError(f"Int4Weight: planes is {_dtype(w.planes)}, must be int32")
        planes = w.planes.shape[0]
        if planes < 1 or k % planes or (k // planes) % 8 or groups % planes:
            raise ValueError(f"Int4Weight: planes is {planes}; must divide the {groups} groups of {k} columns")
        features = k // planes
    if w.perm is not None:
        if w.perm.dtype != torch.int32:
            raise TypeError(f"Int4Weight: perm is {_dtype(w.perm)}, must be int32")
        if w.perm.shape[0] != k:
            raise ValueError(f"Int4Weight: perm has {w.perm.shape[0]} entries, must have K = {k}")
        each = torch.arange(features, dtype=torch.int32, device=w.perm.device).repeat_interleave(k // features)
        if w.perm.device.type != "meta" and not torch.equal(w.perm.sort().values, each):
            raise ValueError(f"Int4Weight: perm is no permutation of 0..{features - 1}")
    return torch.Size((n, features))
