"""Int4Weight: one logical form for every 4-bit format; each provider packs it once for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastops import _ops

BLOCK = 16  # output features that lie together in the packed form
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PARTS = ("codes", "scales", "zeros", "mins", "perm", "planes")


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


@dataclass(frozen=True, slots=True)
class Packed:
    """What the kernels read: codes [N / 16, K / 8, 16, 4]; scales, zeros, mins [N / 16, groups, 16]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    mins: Tensor | None
    eight: bool  # two planes are 16 high + low of 8-bit codes


class Int4Weight:
    """A weight [N, K] of 4-bit codes.

        w[n, k] = (code[n, k] - zeros[n, g]) * scales[n, g]     (zeros absent: 8)
        w[n, k] = code[n, k] * scales[n, g] - mins[n, g]        (mins given)

    with g = k // group_size. With perm, column k belongs to input feature perm[k] (act-order). With P planes the codes
    have P K columns, and those that belong to one feature add up: two planes hold 8-bit weights.

    Args:
        codes: uint8 [N, K / 2], feature 2 j in the low nibble of byte j, 2 j + 1 in the high one.
        scales: [N, G] fp32, fp16 or bf16; G divides K / 8.
        zeros, mins: like scales; at most one of them. zeros need not be whole numbers.
        perm: int32 [K], a permutation.
        planes: None for one, or int32 [P], of which only the length counts (so that it survives any device): all of the
            above have P K columns then, column k belongs to feature k modulo K, and perm has each feature P times.

    Plain tensors behind attributes of the same names: pickle, deepcopy and torch.save work, `state_dict()` and
    `Int4Weight.from_state_dict` name them, `.to(device)` moves them. The packed form is made at first use, not saved.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value; names the tensor.
    """

    def __init__(
        self, codes: Tensor, scales: Tensor, *, zeros: Tensor | None = None, mins: Tensor | None = None,
        perm: Tensor | None = None, planes: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.codes, self.scales, self.zeros, self.mins, self.perm = codes, scales, zeros, mins, perm
        self.planes = planes
        self._packed: Packed | None = None
        self._shape = _check(self)

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self._shape

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return 2 * self.codes.shape[1] // self.scales.shape[1]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zeros or mins, and perm."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] in the order of the input features, computed in fp32 (fp64 for fp64)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        n, features = self.shape
        q = unpack_pairs(self.codes).to(wide).view(n, self.scales.shape[1], -1)
        scales = self.scales.to(wide)[..., None]
        if self.mins is not None:
            w = q * scales - self.mins.to(wide)[..., None]
        else:
            w = (q - (8.0 if self.zeros is None else self.zeros.to(wide)[..., None])) * scales
        w = w.view(n, -1)
        if self.perm is not None:
            w = w.new_zeros(n, features).index_add_(1, self.perm.long(), w)
        elif self.planes is not None:
            w = w.view(n, -1, features).sum(1)
        return w.to(dtype)

    def packed(self) -> Packed:
        """The form the kernels read; made once."""
        if self._packed is None:
            scales = _lanes(self.scales)
            assert scales is not None
            eight = self.planes is not None and self.planes.shape[0] == 2
            if eight and self.zeros is None and self.mins is None and self.perm is None:
                high, low = self.scales.chunk(2, 1)
                eight = bool((high == 16.0 * low).all())
            else:
                eight = False
            self._packed = Packed(_ops.ops.int4_pack(self.codes), scales, _lanes(self.zeros), _lanes(self.mins), eight)
        return self._packed

    def to(self, device: Any) -> Int4Weight:
        """A copy on `device` (self, if it is there already)."""
        if torch.device(device) == self.device:
            return self
        return Int4Weight.from_state_dict({n: t.to(device) for n, t in self.state_dict().items()})

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        return {n: t for n in PARTS if (t := getattr(self, n)) is not None}

    @classmethod
    def from_state_dict(cls, tensors: dict[str, Tensor]) -> Int4Weight:
        """The inverse of `state_dict`."""
        for name in tensors:
            if name not in PARTS:
                raise ValueError(f"Int4Weight: unknown tensor {name!r}, known: {', '.join(PARTS)}")
        for name in ("codes", "scales"):
            if name not in tensors:
                raise ValueError(f"Int4Weight: {name} is missing")
        return cls(**tensors)

    def __getstate__(self) -> dict[str, Tensor]:
        return self.state_dict()

    def __setstate__(self, state: dict[str, Tensor]) -> None:
        for name in PARTS:
            setattr(self, name, state.get(name))
        self._packed = None
        self._shape = _check(self)

    def __repr__(self) -> str:
        n, k = self.shape
        kind = "mins" if self.mins is not None else "symmetric" if self.zeros is None else "zeros"
        order = ", act-order" if self.perm is not None else ""
        if self.planes is not None:
            order += f", {self.planes.shape[0]} planes"
        return f"Int4Weight([{n}, {k}], group_size={self.group_size}, {kind}{order}, {_dtype(self.scales)} scales)"


def _lanes(t: Tensor | None) -> Tensor | None:
    """[N, G] -> [ceil(N / 16), G, 16]."""
    if t is None:
        return None
    n, g = t.shape
    t = torch.cat((t, t.new_zeros((-n % BLOCK, g))))
    return t.view(-1, BLOCK, g).transpose(1, 2).contiguous()


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
    n, k = w.codes.shape[0], 2 * w.codes.shape[1]
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
    if w.zeros is not None and w.mins is not None:
        raise ValueError("Int4Weight: give zeros or mins, not both")
    for name in ("scales", "zeros", "mins"):
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
