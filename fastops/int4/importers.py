"""Int4Weight from the tensors of public checkpoints; each function's docstring has the layout it reads."""

from __future__ import annotations

import torch
from torch import Tensor

from fastops.int4.weight import FLOATS, Int4Weight, pack_pairs

_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that holds logical column j of eight


def _require(op: str, name: str, t: object, dtypes: tuple[torch.dtype, ...], dims: int = 2) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} is {str(t.dtype).removeprefix('torch.')}, must be {allowed}")
    if t.dim() != dims:
        raise ValueError(f"{op}: {name} has shape {list(t.shape)}, must have {dims} dimension(s)")
    return t


def _shape(op: str, name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(t.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {list(t.shape)}, must be {list(shape)}")


def _scales(op: str, name: str, t: object) -> Tensor:
    scales = _require(op, name, t, FLOATS)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(f"{op}: {name} holds an infinity or a NaN")
    if bool((scales == 0).any()):
        raise ValueError(f"{op}: {name} holds a zero")
    return scales


def _groups(op: str, name: str, groups: int, k: int) -> None:
    if groups < 1 or k % 8 or (k // 8) % groups:
        raise ValueError(f"{op}: {name} has {groups} groups for K = {k}; they must divide K / 8")


def _nibbles(words: Tensor) -> Tensor:
    """int32 [...] -> uint8 [..., 8], lowest nibble first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts & 15).to(torch.uint8)


def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None, *, version: int = 1
) -> Int4Weight:
    """A GPTQ layer (AutoGPTQ, GPTQModel; checkpoint_format "gptq" is version 1, "gptq_v2" version 2).

    Args:
        qweight: int32 [K / 8, N], nibble i of word (r, n) is the code of input feature 8 r + i.
        qzeros: int32 [G, N / 8], nibble i of word c belongs to output feature 8 c + i. Version 1 stores zero - 1, so a
            stored 15 stands for 0.
        scales: fp16 [G, N].
        g_idx: int32 [K], the group of each input feature; anything but k // (K / G) means act-order.

    Raises:
        ValueError, TypeError: naming the tensor.
    """
    op = "from_gptq"
    _require(op, "qweight", qweight, (torch.int32,))
    _require(op, "qzeros", qzeros, (torch.int32,))
    s = _scales(op, "scales", scales)
    if version not in (1, 2):
        raise ValueError(f"{op}: version is {version}, allowed: 1 (gptq), 2 (gptq_v2)")
    k, n = qweight.shape[0] * 8, qweight.shape[1]
    groups = s.shape[0]
    _shape(op, "scales", s, (groups, n))
    if n % 8:
        raise ValueError(f"{op}: qweight has N = {n} columns, must be a multiple of 8")
    _shape(op, "qzeros", qzeros, (groups, n // 8))
    _groups(op, "scales", groups, k)
    codes = _nibbles(qweight).permute(1, 0, 2).reshape(n, k)
    zeros = _nibbles(qzeros).flatten(1).T
    if version == 1:
        zeros = (zeros + 1) & 15
    perm = None
    if g_idx is not None:
        _require(op, "g_idx", g_idx, (torch.int32, torch.int64), 1)
        _shape(op, "g_idx", g_idx, (k,))
        if k and not (int(g_idx.min()) >= 0 and int(g_idx.max()) < groups):
            raise ValueError(
                f"{op}: g_idx runs from {int(g_idx.min())} to {int(g_idx.max())}, groups from 0 to {groups - 1}"
            )
        plain = torch.arange(k, device=g_idx.device) // (k // groups)
        if not torch.equal(g_idx.long(), plain):
            order = torch.argsort(g_idx.long(), stable=True)
            if not torch.equal(g_idx.long()[order], plain):
                raise ValueError(f"{op}: g_idx does not give every group {k // groups} input features")
            codes, perm = codes[:, order], order.to(torch.int32)
    symmetric = bool((zeros == 8).all())
    z = None if symmetric else zeros.to(s.dtype).contiguous()
    return Int4Weight(pack_pairs(codes), s.T.contiguous(), zeros=z, perm=perm)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Int4Weight:
    """An AWQ layer (AutoAWQ's "GEMM" version).

    Args:
        qweight: int32 [K, N / 8]; nibble i of word c is output feature 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i].
        qzeros: int32 [G, N / 8], in the same order.
        scales: fp16 [G, N].

    Raises:
        ValueError, TypeError: naming the tensor.
    """
    op = "from_awq"
    _require(op, "qweight", qweight, (torch.int32,))
    _require(op, "qzeros", qzeros, (torch.int32,))
    s = _scales(op, "scales", scales)
    k, n = qweight.shape[0], qweight.shape[1] * 8
    groups = s.shape[0]
    _shape(op, "scales", s, (groups, n))
    _shape(op, "qzeros", qzeros, (groups, n // 8))
    _groups(op, "scales", groups, k)
    order = torch.tensor(_AWQ, device=qweight.device)
    codes = _nibbles(qweight)[..., order].flatten(1).T
    zeros = _nibbles(qzeros)[..., order].flatten(1).T
    return Int4Weight(pack_pairs(codes), s.T.contiguous(), zeros=zeros.to(s.dtype).contiguous())


def from_compressed_tensors(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_shape: Tensor | tuple[int, int],
    weight_zero_point: Tensor | None = None,
    weight_g_idx: Tensor | None = None,
) -> Int4Weight:
    """A compressed-tensors "pack-quantized" layer of 4 bits (llm-compressor).

    Args:
        weight_packed: int32 [N, ceil(K / 8)], lowest nibble first; a nibble is the signed code + 8.
        weight_scale: [N, G].
        weight_shape: (N, K), as a tensor or a tuple.
        weight_zero_point: int32 [ceil(N / 8), G], packed along N with the same offset; absent: symmetric.
        weight_g_idx: [K], as GPTQ's g_idx.

    Raises:
        ValueError, TypeError: naming the tensor.
    """
    op = "from_compressed_tensors"
    _require(op, "weight_packed", weight_packed, (torch.int32,))
    s = _scales(op, "weight_scale", weight_scale)
    shape = [int(x) for x in (weight_shape.tolist() if isinstance(weight_shape, Tensor) else weight_shape)]
    if len(shape) != 2:
        raise ValueError(f"{op}: weight_shape is {shape}, must be (N, K)")
    n, k = shape
    _shape(op, "weight_packed", weight_packed, (n, (k + 7) // 8))
    groups = s.shape[1]
    _shape(op, "weight_scale", s, (n, groups))
    _groups(op, "weight_scale", groups, k)
    codes = _nibbles(weight_packed).flatten(1)[:, :k]
    zeros = None
    if weight_zero_point is not None:
        _require(op, "weight_zero_point", weight_zero_point, (torch.int32,))
        _shape(op, "weight_zero_point", weight_zero_point, ((n + 7) // 8, groups))
        zeros = _nibbles(weight_zero_point).permute(0, 2, 1).flatten(0, 1)[:n].to(s.dtype).contiguous()
    perm = None
    if weight_g_idx is not None:
        _require(op, "weight_g_idx", weight_g_idx, (torch.int32, torch.int64), 1)
        _shape(op, "weight_g_idx", weight_g_idx, (k,))
        order = torch.argsort(weight_g_idx.long(), stable=True)
        plain = torch.arange(k, device=order.device) // (k // groups)
        if not torch.equal(weight_g_idx.long()[order], plain):
            raise ValueError(f"{op}: weight_g_idx does not give each of {groups} groups {k // groups} input features")
        if not torch.equal(order, torch.arange(k, device=order.device)):
            codes, perm = codes[:, order], order.to(torch.int32)
    return Int4Weight(pack_pairs(codes), s.contiguous(), zeros=zeros, perm=perm)


def from_hqq(
    w_q: Tensor, scale: Tensor, zero: Tensor, shape: tuple[int, int], group_size: int | None = None
) -> Int4Weight:
    """An HQQ layer of 4 bits, grouped along the input (axis=1), float zeros: w = (code - zero) * scale.

    Args:
        w_q: uint8 "pack_4bit_u8" [N K / g / 2, g]: byte (i, j) holds row i of the grouped weight [N K / g, g] in its
            high nibble and row i + N K / g / 2 in the low one.
        scale, zero: [N K / g, 1], one floating dtype.
        shape: (N, K). group_size: g, default w_q's row length.

    Raises:
        ValueError, TypeError: naming the tensor.
    """
    op = "from_hqq"
    _require(op, "w_q", w_q, (torch.uint8,))
    s = _scales(op, "scale", scale)
    z = _require(op, "zero", zero, FLOATS)
    n, k = (int(x) for x in shape)
    g = w_q.shape[1] if group_size is None else group_size
    if g < 1 or k % g:
        raise ValueError(f"{op}: group size is {g}, must divide K = {k}")
    rows = n * k // g
    if rows % 2:
        raise ValueError(f"{op}: shape {(n, k)} has an odd number of groups ({rows}), which 4-bit packing cannot hold")
    _groups(op, "scale", k // g, k)
    _shape(op, "w_q", w_q, (rows // 2, g))
    for name, t in (("scale", s), ("zero", z)):
        _shape(op, name, t, (rows, 1))
    if z.dtype != s.dtype:
        raise TypeError(f"{op}: zero is {z.dtype}, scale {s.dtype}; they must agree")
    codes = torch.cat((w_q >> 4, w_q & 15)).view(n, k)
    return Int4Weight(pack_pairs(codes), s.reshape(n, k // g), zeros=z.reshape(n, k // g))


def from_gguf(raw: Tensor, kind: str, shape: tuple[int, int]) -> Int4Weight:
    """A GGUF tensor of 4 bits.

    Args:
        raw: uint8 [N, bytes of a row], as the file holds it.
        kind: "Q4_0" (blocks of 32: fp16 d, 16 bytes; w = d (q - 8)) or "Q4_K" (blocks of 256: fp16 d and dmin, eight
            6-bit scales and mins, 128 bytes; w = d sc q - dmin m).
        shape: (N, K).

    Zero scales are as they are in the file. Q4_K keeps its products d sc and dmin m in fp32: the weights are bit for
    bit those of ggml.

    Raises:
        ValueError, TypeError: naming the tensor.
    """
    op = "from_gguf"
    _require(op, "raw", raw, (torch.uint8,))
    sizes = {"Q4_0": (32, 18), "Q4_K": (256, 144)}
    if kind not in sizes:
        raise ValueError(f"{op}: kind is {kind!r}, allowed: {', '.join(sizes)}")
    n, k = (int(x) for x in shape)
    elements, size = sizes[kind]
    if k % elements or k == 0:
        raise ValueError(f"{op}: K is {k}, {kind} needs a multiple of {elements}")
    _shape(op, "raw", raw, (n, k // elements * size))
    blocks = raw.contiguous().view(n, k // elements, size)

    def half(at: int) -> Tensor:
        return blocks[..., at : at + 2].contiguous().view(torch.float16)[..., 0]

    if kind == "Q4_0":
        data = blocks[..., 2:]
        codes = torch.cat((data & 15, data >> 4), -1)
        return Int4Weight(pack_pairs(codes.view(n, k)), half(0).contiguous())
    b = blocks[..., 4:16]
    low, high, extra = b[..., :4], b[..., 4:8], b[..., 8:]
    sc = torch.cat((low & 63, extra & 15 | low >> 6 << 4), -1).float()
    m = torch.cat((high & 63, extra >> 4 | high >> 6 << 4), -1).float()
    data = blocks[..., 16:].view(n, -1, 4, 32)
    codes = torch.stack((data & 15, data >> 4), 3).view(n, k)
    scales = (half(0).float()[..., None] * sc).view(n, -1)
    mins = (half(2).float()[..., None] * m).view(n, -1)
    return Int4Weight(pack_pairs(codes), scales, mins=mins)
