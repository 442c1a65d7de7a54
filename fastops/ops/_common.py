"""What the attention rooms share: checks, the reference arithmetic, and the facts dispatch decides on."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from fastops import _ops
from fastops.dispatch.override import _forced
from fastops.dispatch.record import Call

_ops.begin_direct(_forced)

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_HEAD_DIM = 256


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require_tensor(op: str, name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")


def require_dims(op: str, name: str, t: Tensor, dims: str) -> None:
    n = len(dims.split(","))
    if t.dim() != n:
        raise ValueError(f"{op}: {name} must be [{dims}], got shape {list(t.shape)}")


def require_index(op: str, name: str, t: Any, shape: tuple[int | None, ...], like: Tensor) -> None:
    require_tensor(op, name, t)
    if t.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be int32, got {name_of(t.dtype)}")
    if t.device != like.device:
        raise TypeError(f"{op}: {name} is on {t.device}, q on {like.device}")
    if t.dim() != len(shape) or any(w is not None and w != g for w, g in zip(shape, t.shape, strict=True)):
        want = ", ".join("any" if w is None else str(w) for w in shape)
        raise ValueError(f"{op}: {name} must have shape [{want}], got {list(t.shape)}")


def check_qkv(op: str, q: Any, k: Any, v: Any, names: tuple[str, str, str], any_dim: bool = False) -> None:
    """Dtypes, devices, head counts and head sizes of q [..., Hq, D], k [..., Hkv, D], v [..., Hkv, Dv]."""
    for name, t in zip(names, (q, k, v), strict=True):
        require_tensor(op, name, t)
        if t.dtype not in FLOATS:
            known = ", ".join(map(name_of, FLOATS))
            raise TypeError(f"{op}: {name} is {name_of(t.dtype)}, allowed: {known}")
    for name, t in zip(names[1:], (k, v), strict=True):
        if t.dtype != q.dtype:
            raise TypeError(f"{op}: {name} is {name_of(t.dtype)}, {names[0]} is {name_of(q.dtype)}; they must agree")
        if t.device != q.device:
            raise TypeError(f"{op}: {name} is on {t.device}, {names[0]} on {q.device}; they must agree")
    hq, hkv, d, dv = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    if k.shape[-1] != d:
        raise ValueError(f"{op}: {names[1]} has head size {k.shape[-1]}, {names[0]} has {d}; they must agree")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{op}: {names[2]} has shape {list(v.shape)}, must match {names[1]} {list(k.shape)} but for the last"
        )
    if (hkv == 0 and hq != 0) or (hkv and hq % hkv):
        raise ValueError(
            f"{op}: {names[0]} has {hq} heads, {names[1]} has {hkv}; need Hq % Hkv == 0. Hint: expand or repack K/V."
        )
    for label, size in (("D", d), ("Dv", dv)):
        if not any_dim and (size % 8 or not 8 <= size <= MAX_HEAD_DIM):
            raise ValueError(
                f"{op}: head size {label} is {size}, allowed: multiples of 8 from 8 to {MAX_HEAD_DIM}. "
                "Hint: pad with zeros and keep scale."
            )


def check_options(
    op: str,
    q: Tensor,
    *,
    scale: float | None,
    window: tuple[int, int],
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    batch: int,
) -> None:
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{op}: scale is {scale}, must be finite")
    if not (softcap >= 0.0 and math.isfinite(softcap)):
        raise ValueError(f"{op}: softcap is {softcap}, must be 0 (off) or positive")
    if len(window) != 2 or any(int(w) < -1 for w in window):
        raise ValueError(f"{op}: window is {tuple(window)}, must be (left, right), each -1 (unbounded) or more")
    hq = q.shape[-2]
    for name, t in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if t is None:
            continue
        require_tensor(op, name, t)
        if not t.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} is {name_of(t.dtype)}, must be a floating-point tensor")
        if t.device != q.device:
            raise TypeError(f"{op}: {name} is on {t.device}, q on {q.device}")
        shapes = [[hq]] if name == "sinks" else [[hq], [batch, hq]]
        if list(t.shape) not in shapes:
            allowed = " or ".join(map(str, shapes))
            raise ValueError(f"{op}: {name} has shape {list(t.shape)}, must be {allowed}")


def check_out(op: str, out: Tensor | None, shape: tuple[int, ...], q: Tensor) -> None:
    if out is None:
        return
    require_tensor(op, "out", out)
    if tuple(out.shape) != shape:
        raise ValueError(f"{op}: out has shape {list(out.shape)}, must be {list(shape)}")
    if out.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"{op}: out is {name_of(out.dtype)}, must be {name_of(q.dtype)} or float32")


def check_cu(op: str, name: str, cu: Tensor, rows: int, of: str) -> None:
    """cu_seqlens: int32 [B+1] from 0, never falling, ending at most at `rows`. Reads the values."""
    values = cu.tolist()
    if values[0] != 0:
        raise ValueError(f"{op}: {name}[0] must be 0, got {values[0]}")
    for i, (a, b) in enumerate(itertools.pairwise(values)):
        if b < a:
            raise ValueError(f"{op}: {name} must not decrease, but [{i}] is {a} and [{i + 1}] is {b}")
    if values[-1] > rows:
        raise ValueError(f"{op}: {name} ends at {values[-1]} but {of} has {rows} rows")


def cpp_why_not(call: Call) -> str | None:
    """Whether the C++ CPU kernels take a call."""
    if _ops.missing:
        return _ops.missing
    if call.device != "cpu":
        return f"device is {call.device} (needs cpu)"
    if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype is {name_of(call.dtype)} (takes float32, float16, bfloat16)"
    if max(call.head_dim, call.head_dim_v) > MAX_HEAD_DIM:
        return f"head size is {max(call.head_dim, call.head_dim_v)} (takes up to {MAX_HEAD_DIM})"
    if call.dropout:
        return "dropout_p is not 0 (the kernel has no dropout)"
    if call.needs_reference_grad:
        return f"{call.needs_reference_grad} requires a gradient (the kernel gives none for it)"
    return None


def always(call: Call) -> str | None:
    """The reference's why_not: it takes every valid call."""
    return None


def to_f32(t: Tensor | None) -> Tensor | None:
    """Other float types become fp32; anything else is left for the kernel to refuse."""
    return t if t is None or t.dtype == torch.float32 or not t.dtype.is_floating_point else t.float()


def visible(
    sq: int, sk: int, causal: bool, window: tuple[int, int], top_left: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(mask [Sq, Sk], distance p - j): query i stands at p = i + Sk - Sq (top left: i)."""
    p = torch.arange(sq, device=device)[:, None] + (0 if top_left else sk - sq)
    distance = p - torch.arange(sk, device=device)[None, :]
    left, right = window[0], 0 if causal else window[1]
    mask = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        mask = mask & (distance <= left)
    if right >= 0:
        mask = mask & (-distance <= right)
    return mask, distance


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    attn_mask: Tensor | None = None,
    top_left: bool = False,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The meaning of attention: q [B,Sq,Hq,D], k [B,Sk,Hkv,D], v [B,Sk,Hkv,Dv] -> out [B,Sq,Hq,Dv], lse [B,Hq,Sq].

    Plain torch in fp32 (fp64 for fp64 inputs), differentiable, O(Sq Sk) memory.
    """
    b, sq, hq, d = q.shape
    sk, hkv = k.shape[1], k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = hq // hkv if hkv else 1
    qw = q.to(wide).transpose(1, 2)
    kw = k.to(wide).repeat_interleave(group, 2).transpose(1, 2)
    vw = v.to(wide).repeat_interleave(group, 2).transpose(1, 2)
    s = qw @ kw.transpose(-1, -2) * (scale if scale is not None else 1.0 / math.sqrt(max(d, 1)))
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    mask, distance = visible(sq, sk, causal, window, top_left, q.device)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(wide)
        slopes = slopes[:, :, None, None] if slopes.dim() == 2 else slopes[None, :, None, None]
        s = s - slopes * distance.abs()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            mask = mask & attn_mask
        else:
            s = s + attn_mask.to(wide)
    s = s.masked_fill(~mask, -math.inf)
    top = s.amax(-1, keepdim=True) if sk else s.new_full((b, hq, sq, 1), -math.inf)
    sink = None if sinks is None else sinks.to(wide)[None, :, None, None]
    if sink is not None:
        top = torch.maximum(top, sink)
    top = torch.where(top == -math.inf, torch.zeros_like(top), top).detach()
    p = torch.exp(s - top)
    total = p.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    empty = total == 0
    safe = torch.where(empty, torch.ones_like(total), total)
    out = _weigh(torch.dropout(p / safe, dropout_p, dropout_p > 0), vw)
    lse = torch.where(empty, torch.full_like(total, -math.inf), top + torch.log(safe))
    return out.transpose(1, 2).to(q.dtype), lse.squeeze(-1).to(torch.float32 if wide is torch.float32 else wide)


def _weigh(p: Tensor, v: Tensor) -> Tensor:
    """p @ v where a probability of 0 silences its key: an inf or NaN value reaches only the rows that see it."""
    if torch.compiler.is_compiling() or bool(torch.isfinite(v).all()):
        return p @ v
    weights = p[..., None]
    return torch.where(weights == 0, torch.zeros_like(weights), weights * v[..., None, :, :]).sum(-2)


MAX_DIMS = 5  # FASTOPS_MAX_DIMS


def require_float(op: str, name: str, t: Any, like: Tensor | None = None, of: str = "x") -> None:
    """A tensor of a floating-point dtype we know; with `like`, of its dtype and device."""
    require_tensor(op, name, t)
    if t.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} is {name_of(t.dtype)}, allowed: {', '.join(map(name_of, FLOATS))}")
    if like is not None and (t.dtype != like.dtype or t.device != like.device):
        raise TypeError(
            f"{op}: {name} is {name_of(t.dtype)} on {t.device}, "
            f"{of} {name_of(like.dtype)} on {like.device}; they must agree"
        )


def require_like(op: str, name: str, t: Any, x: Tensor, of: str = "x") -> None:
    """x's shape, dtype and device."""
    require_float(op, name, t, x, of)
    if t.shape != x.shape:
        raise ValueError(f"{op}: {name} has shape {list(t.shape)}, {of} {list(x.shape)}; they must agree")


def dense_rows(t: Tensor) -> Tensor:
    """t, copied only where its last dimension is not dense."""
    return t if t.dim() == 0 or t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def kernel_rows(t: Tensor) -> Tensor:
    """t as the kernels take it: a dense last dimension, at most five dimensions (a view where that can be)."""
    t = dense_rows(t)
    return t if t.dim() <= MAX_DIMS else t.reshape(-1, t.shape[-1])


def kernel_vector(t: Tensor | None, like: Tensor) -> Tensor | None:
    """A weight as the kernels take it: dense, like's dtype or fp32 (other float types become fp32; anything else is
    left for the kernel to refuse)."""
    if t is None or t.dtype == like.dtype or t.dtype == torch.float32 or not t.dtype.is_floating_point:
        return t if t is None else dense_rows(t)
    return dense_rows(t.float())


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype the reference computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_linear(op: str, x: Any, shape: torch.Size, device: torch.device, bias: Any, out: Tensor | None) -> None:
    """x [.., K] against a weight [N, K], and a bias [N] of any floating dtype."""
    n, k = shape
    require_tensor(op, "x", x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x is {name_of(x.dtype)}, allowed: {', '.join(map(name_of, FLOATS))}")
    if x.device != device:
        raise TypeError(f"{op}: x is on {x.device}, weight on {device}; they must agree")
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, its last dimension must be K = {k}")
    if bias is not None:
        require_tensor(op, "bias", bias)
        if list(bias.shape) != [n]:
            raise ValueError(f"{op}: bias has shape {list(bias.shape)}, must be [{n}]")
        if not bias.dtype.is_floating_point or bias.device != x.device:
            raise TypeError(f"{op}: bias is {name_of(bias.dtype)} on {bias.device}, must be floating on {x.device}")
    check_out(op, out, (*x.shape[:-1], n), x)


def any_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
