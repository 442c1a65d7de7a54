"""apply_rope and qk_norm_rope: rotary embedding of q and k, after an RMS norm of each head, into a paged cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastops import _cuda, _ops
from fastops.dispatch.record import Call, Implementation
from fastops.dispatch.select import Operator
from fastops.ops import _common as common
from fastops.ops.norm import reference_norm

MAX_DIM = 1024


# ---- the semantics --------------------------------------------------------------------------------------------------


def _angles(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin broadcast over x's heads: [..., 1, R / 2]."""
    wide = common.wide_of(x.dtype)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    return cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, positions: Tensor | None = None) -> Tensor:
    """One tensor's rotation in fp32 (fp64), not rounded."""
    c, s = _angles(x, cos, sin, positions)
    r = 2 * c.shape[-1]
    w = x.to(common.wide_of(x.dtype))
    head, rest = w[..., :r], w[..., r:]
    if interleaved:
        a, b = head[..., 0::2], head[..., 1::2]
        turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = head.chunk(2, -1)
        turned = torch.cat((a * c - b * s, b * c + a * s), -1)
    return torch.cat((turned, rest), -1)


def _rope_reference(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *, interleaved: bool = False,
    positions: Tensor | None = None, out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    q_new = turn(q, cos, sin, interleaved, positions).to(q.dtype)
    k_new = None if k is None else turn(k, cos, sin, interleaved, positions).to(q.dtype)
    return _into(out, q_new, k_new)


def _into(out: Any, q: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if out is None:
        return q, k
    return out[0].copy_(q), None if k is None or out[1] is None else out[1].copy_(k)


def _normed(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """In fp32, for the rotation that follows."""
    if weight is None:
        return x.to(common.wide_of(x.dtype))
    return reference_norm(x.to(common.wide_of(x.dtype)), None, weight, None, eps, weight_offset=offset)[0]


def _qk_reference(
    q: Tensor, k: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, *,
    eps: float = 1e-6, weight_offset: float = 0.0, interleaved: bool = False, positions: Tensor | None = None,
    v: Tensor | None = None, k_cache: Tensor | None = None, v_cache: Tensor | None = None,
    slots: Tensor | None = None, out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    q_new = turn(_normed(q, q_weight, eps, weight_offset), cos, sin, interleaved, positions).to(q.dtype)
    k_new = None
    if k is not None:
        k_new = turn(_normed(k, k_weight, eps, weight_offset), cos, sin, interleaved, positions).to(q.dtype)
    if slots is not None:
        for cache, new in ((k_cache, k_new), (v_cache, v)):
            if cache is None or new is None:
                continue
            keep = slots >= 0
            at, page = slots[keep], cache.shape[1]
            cache[at // page, at % page] = new.reshape(-1, *new.shape[-2:])[keep].to(cache.dtype)
    return _into(out, q_new, k_new)


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check(
    op: str,
    q: Any,
    k: Any,
    cos: Any,
    sin: Any,
    positions: Any,
    out: Any,
    weights: tuple[Any, Any] = (None, None),
    cached: bool = False,
) -> None:
    common.require_float(op, "q", q)
    if q.dim() not in (3, 4):
        raise ValueError(f"{op}: q has shape {list(q.shape)}, must be [B,S,H,D] or [T,H,D]")
    d, lead = q.shape[-1], list(q.shape[:-2])
    if not 1 <= d <= MAX_DIM:
        raise ValueError(f"{op}: the head size is {d}, allowed: 1 to {MAX_DIM}")
    if k is not None:
        common.require_float(op, "k", k, q, "q")
        if k.dim() != q.dim() or list(k.shape[:-2]) != lead or k.shape[-1] != d:
            raise ValueError(f"{op}: k has shape {list(k.shape)}, must be {[*lead, 'Hkv', d]}")
    for name, t in (("cos", cos), ("sin", sin)):
        common.require_float(op, name, t)
        if t.device != q.device:
            raise TypeError(f"{op}: {name} is on {t.device}, q on {q.device}")
    if cos.shape != sin.shape:
        raise ValueError(f"{op}: sin has shape {list(sin.shape)}, cos {list(cos.shape)}; they must agree")
    rows = [lead] if len(lead) == 1 else [lead, lead[1:]]
    places = " or ".join(str([*r, "R/2"]) for r in rows)
    if cos.dim() and 2 * cos.shape[-1] > d:
        raise ValueError(
            f"{op}: cos has {cos.shape[-1]} angles, the head size {d} has room for {d // 2}. "
            "Hint: one angle for each pair; of transformers' doubled cos and sin pass the first half."
        )
    if positions is not None:
        common.require_tensor(op, "positions", positions)
        if positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: positions must be int32 or int64, got {common.name_of(positions.dtype)}")
        if positions.device != q.device:
            raise TypeError(f"{op}: positions is on {positions.device}, q on {q.device}")
        if list(positions.shape) not in rows:
            raise ValueError(
                f"{op}: positions has shape {list(positions.shape)}, must be {' or '.join(map(str, rows))}"
            )
        if cos.dim() != 2:
            raise ValueError(f"{op}: with positions, cos must be [P, R/2], got shape {list(cos.shape)}")
        if positions.numel():
            low, high = int(positions.min()), int(positions.max())
            if low < 0 or high >= cos.shape[0]:
                raise ValueError(f"{op}: positions run from {low} to {high}, cos has rows 0 to {cos.shape[0] - 1}")
    elif cos.dim() == 0 or list(cos.shape[:-1]) not in rows:
        raise ValueError(f"{op}: cos has shape {list(cos.shape)}, must be {places}")
    for name, w in zip(("q_weight", "k_weight"), weights, strict=True):
        if w is None:
            continue
        common.require_float(op, name, w)
        if w.device != q.device:
            raise TypeError(f"{op}: {name} is on {w.device}, q on {q.device}")
        if list(w.shape) != [d]:
            raise ValueError(f"{op}: {name} has shape {list(w.shape)}, must be {[d]}")
    if out is not None:
        if len(out) != 2:
            raise ValueError(f"{op}: out must be (q_out, k_out)")
        common.require_like(op, "out[0]", out[0], q, "q")
        if k is not None and not (cached and out[1] is None):
            common.require_like(op, "out[1]", out[1], k, "k")


def _check_cache(op: str, q: Tensor, k: Any, v: Any, k_cache: Any, v_cache: Any, slots: Any) -> None:
    if slots is None:
        if any(t is not None for t in (v, k_cache, v_cache)):
            raise ValueError(f"{op}: v, k_cache and v_cache need slots")
        return
    if k is None or k_cache is None:
        raise ValueError(f"{op}: slots need k and k_cache")
    if (v is None) != (v_cache is None):
        raise ValueError(f"{op}: v and v_cache go together")
    tokens = q.shape[:-2].numel()
    common.require_tensor(op, "slots", slots)
    if slots.dtype != torch.int64:
        raise TypeError(f"{op}: slots must be int64, got {common.name_of(slots.dtype)}")
    if list(slots.shape) != [tokens]:
        raise ValueError(f"{op}: slots has shape {list(slots.shape)}, must be {[tokens]}")
    for name, cache, t in (("k_cache", k_cache, k), ("v_cache", v_cache, v)):
        if t is None:
            continue
        common.require_float(op, name, cache, q, "q")
        common.require_float(op, name[0], t, q, "q")
        if t.shape[:-2] != q.shape[:-2]:
            raise ValueError(f"{op}: {name[0]} has shape {list(t.shape)}, q {list(q.shape)}")
        if cache.dim() != 4 or cache.shape[2:] != t.shape[-2:] or cache.shape[:2] != k_cache.shape[:2]:
            raise ValueError(
                f"{op}: {name} has shape {list(cache.shape)}, must be ['pages', 'page', {t.shape[-2]}, {t.shape[-1]}]"
            )
        if cache.shape[-1] > 1 and cache.stride(-1) != 1:
            raise ValueError(f"{op}: the last dimension of {name} must be contiguous")
    room = k_cache.shape[0] * k_cache.shape[1]
    if slots.numel() and int(slots.max()) >= room:
        raise ValueError(f"{op}: slots go up to {int(slots.max())}, the cache has {room}")


# ---- kernels --------------------------------------------------------------------------------------------------------


def _angle_rows(t: Tensor) -> Tensor:
    return common.dense_rows(t.float() if t.dtype == torch.float64 else t)


class Rope(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, positions: Tensor | None
    ) -> Any:
        ctx.save_for_backward(cos, sin, positions)
        ctx.options = (interleaved, k is not None)
        q_new, k_new = _ops.ops.apply_rope(q, k, cos, sin, interleaved=interleaved, positions=positions)
        return (q_new, k_new) if k is not None else q_new

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor | None = None) -> Any:  # type: ignore[override]
        cos, sin, positions = ctx.saved_tensors
        interleaved, two = ctx.options
        dk = None if dk is None else common.dense_rows(dk)
        gq, gk = _ops.ops.apply_rope(
            common.dense_rows(dq), dk, cos, sin, interleaved=interleaved, positions=positions, inverse=True
        )
        return gq, gk if two else None, None, None, None, None


def _rope_cpp(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *, interleaved: bool = False,
    positions: Tensor | None = None, out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    rows, more = common.dense_rows(q), None if k is None else common.dense_rows(k)
    c, s = _angle_rows(cos), _angle_rows(sin)
    positions = None if positions is None else common.dense_rows(positions)
    if common.any_grad(q, k):
        new = Rope.apply(rows, more, c, s, interleaved, positions)
        return _into(out, *(new if k is not None else (new, None)))
    if out is not None and all(t is None or common.dense_rows(t) is t for t in out):
        k_out = None if k is None else out[1]
        _ops.ops.apply_rope_out(
            rows, more, c, s, interleaved=interleaved, positions=positions, q_out=out[0], k_out=k_out
        )
        return out[0], k_out
    q_new, k_new = _ops.ops.apply_rope.default(rows, more, c, s, interleaved=interleaved, positions=positions)
    return _into(out, q_new, None if k is None else k_new)


def _qk_cpp(
    q: Tensor, k: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, *,
    eps: float = 1e-6, weight_offset: float = 0.0, interleaved: bool = False, positions: Tensor | None = None,
    v: Tensor | None = None, k_cache: Tensor | None = None, v_cache: Tensor | None = None,
    slots: Tensor | None = None, out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if common.any_grad(q, k, q_weight, k_weight) and slots is None:
        from fastops.ops.norm import Norm

        def normed(x: Any, w: Any) -> Any:
            return x if x is None or w is None else Norm.apply(x, None, w, None, eps, weight_offset, False)

        return _rope_cpp(
            normed(q, q_weight), normed(k, k_weight), cos, sin, interleaved=interleaved, positions=positions, out=out
        )
    rows, more = common.dense_rows(q), None if k is None else common.dense_rows(k)
    qw, kw, c, s = (
        common.kernel_vector(q_weight, q),
        common.kernel_vector(k_weight, q),
        _angle_rows(cos),
        _angle_rows(sin),
    )
    positions = None if positions is None else common.dense_rows(positions)
    options: dict[str, Any] = {"eps": eps, "weight_offset": weight_offset, "interleaved": interleaved}
    if out is None and all(t is None for t in (slots, v, k_cache, v_cache)):
        q_new, k_new = _ops.ops.qk_norm_rope.default(rows, more, qw, kw, c, s, positions=positions, **options)
        return q_new, None if k is None else k_new
    direct = out is None or all(t is None or common.dense_rows(t) is t for t in out)
    q_out = torch.empty_like(q) if out is None or not direct else out[0]
    k_out = None
    if k is not None and (out is None or out[1] is not None):
        k_out = torch.empty_like(k) if out is None or not direct else out[1]
    _ops.ops.qk_norm_rope_out(
        rows, more, qw, kw, c, s, positions=positions, v=None if v is None else common.dense_rows(v), slots=slots,
        q_out=q_out, k_out=k_out, k_cache=k_cache, v_cache=v_cache, **options,
    )  # fmt: skip
    return (q_out, k_out) if direct else _into(out, q_out, k_out)


# ---- operators ------------------------------------------------------------------------------------------------------


_rope_direct, _qk_direct = _ops.direct("apply_rope"), _ops.direct("qk_norm_rope")


def _wanted(out: Any) -> tuple[Any, Any] | None:
    """(q_out, k_out) as the direct calls take them, None for one to make and False for none; None: out is no pair."""
    if out is None:
        return None, None
    if type(out) is not tuple or len(out) != 2:
        return None
    return out[0], False if out[1] is None else out[1]


def _describe(q: Tensor, *args: Any, cos: Any = None, **kwargs: Any) -> Call:
    return Call(q.device.type, q.dtype)


def _rope_validate(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *, interleaved: bool = False,
    positions: Tensor | None = None, out: Any = None,
) -> None:  # fmt: skip
    _check("apply_rope", q, k, cos, sin, positions, out)


def _qk_validate(
    q: Tensor, k: Tensor | None, q_weight: Any, k_weight: Any, cos: Tensor, sin: Tensor, *, eps: float = 1e-6,
    weight_offset: float = 0.0, interleaved: bool = False, positions: Any = None, v: Any = None, k_cache: Any = None,
    v_cache: Any = None, slots: Any = None, out: Any = None,
) -> None:  # fmt: skip
    op = "qk_norm_rope"
    _check(op, q, k, cos, sin, positions, out, (q_weight, k_weight), cached=slots is not None)
    if not eps >= 0.0:
        raise ValueError(f"{op}: eps is {eps}, must not be negative")
    _check_cache(op, q, k, v, k_cache, v_cache, slots)
    if slots is not None and common.any_grad(q, k, q_weight, k_weight):
        raise ValueError(f"{op}: writing into a cache is not differentiable; use torch.no_grad()")


_rope = Operator(
    "apply_rope",
    [
        Implementation("cpp", _rope_cpp, common.cpp_why_not, 10, source="csrc/cpu/rope"),
        *_cuda.rows(_rope_cpp),
        Implementation("reference", _rope_reference, common.always, 0, source="fastops/ops/rope.py"),
    ],
    _rope_validate,
    _describe,
)
_qk = Operator(
    "qk_norm_rope",
    [
        Implementation("cpp", _qk_cpp, common.cpp_why_not, 10, source="csrc/cpu/rope"),
        *_cuda.rows(_qk_cpp),
        Implementation("reference", _qk_reference, common.always, 0, source="fastops/ops/rope.py"),
    ],
    _qk_validate,
    _describe,
)


def apply_rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rotary position embedding of q and k: each pair (a, b) of a head becomes (a cos - b sin, b cos + a sin).

    Args:
        q: [B,S,Hq,D] or [T,Hq,D], fp32, fp16 or bf16 (fp64: reference only), any strides with a dense last dimension.
        k: the same with Hkv heads, or None.
        cos, sin: [S,R/2] or [B,S,R/2], or [T,R/2]; any floating dtype. R <= D elements of a head turn, the rest stays
            (partial rotary). With positions: the table [P,R/2].
        interleaved: pairs are (2i, 2i+1) (GPT-J, Llama's original weights) instead of (i, i+R/2) (GPT-NeoX, Hugging
            Face).
        positions: int32 or int64, [S], [B,S] or [T]: the row of cos and sin for each token.
        out: (q_out, k_out), like q and k; may be q and k themselves.

    Returns:
        (q, k) turned, contiguous, or out. Differentiable in q and k.

    Raises:
        ValueError: shapes, a position outside the table. TypeError: dtypes, devices.

    Numerics: fp32 inside, one rounding.
    Source: Su et al., RoFormer, arXiv:2104.09864, equation 34.

    Example:
        >>> import torch, fastops
        >>> q = torch.tensor([1.0, 0.0]).view(1, 1, 2)
        >>> fastops.apply_rope(q, None, torch.zeros(1, 1), torch.ones(1, 1))[0].flatten()
        tensor([0., 1.])
    """
    results = None if is_compiling() else _wanted(out)
    if results is not None:
        q_out, k_out = results
        y = _rope_direct(q, k, cos, sin, positions, interleaved, q_out, k_out)
        if y is not None:
            return y
    common.require_tensor("apply_rope", "q", q)
    return _rope((q.dtype, q.device), q, k, cos, sin, interleaved=interleaved, positions=positions, out=out)


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    interleaved: bool = False,
    positions: Tensor | None = None,
    v: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    slots: Tensor | None = None,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """RMS norm of each head of q and k (Qwen3, Gemma 3), then `apply_rope`, in one pass; and into a paged cache.

    Args:
        q, k, cos, sin, interleaved, positions, out: as in `apply_rope`; with slots k_out may be None: k goes into the
            cache alone.
        q_weight, k_weight: [D] or None for no norm at all. weight_offset, eps: as in `rms_norm`.
        slots: int64 [B*S] or [T]: token t's k is written to k_cache.view(-1, Hkv, D)[slots[t]] (page = slot // page
            size), v to v_cache; negative: nowhere. Slots must differ from one another. Not differentiable.
        k_cache: [P,page,Hkv,D], v_cache: [P,page,Hkv,Dv], v: [B,S,Hkv,Dv] or [T,Hkv,Dv]; q's dtype.

    Returns:
        (q, k) as `apply_rope`.

    Raises:
        ValueError, TypeError: as `apply_rope`; a slot outside the cache.
    """
    results = None if is_compiling() else _wanted(out)
    if results is not None:
        q_out, k_out = results
        y = _qk_direct(
            q, k, q_weight, k_weight, cos, sin, eps, weight_offset, positions, interleaved, v, slots, k_cache, v_cache,
            q_out, k_out,
        )  # fmt: skip
        if y is not None:
            return y
    common.require_tensor("qk_norm_rope", "q", q)
    return _qk(
        (q.dtype, q.device), q, k, q_weight, k_weight, cos, sin, eps=eps, weight_offset=weight_offset,
        interleaved=interleaved, positions=positions, v=v, k_cache=k_cache, v_cache=v_cache, slots=slots, out=out,
    )  # fmt: skip


# ---- torch.ops: fake kernels, and the reference for other devices ---------------------------------------------------


def _empty_pair(q: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape)


@torch.library.register_fake("fastops::apply_rope")
def _fake_rope(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return _empty_pair(q, k)


@torch.library.register_fake("fastops::qk_norm_rope")
def _fake_qk(
    q: Tensor, k: Tensor | None, q_weight: Any, k_weight: Any, cos: Tensor, sin: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    return _empty_pair(q, k)


@torch.library.register_fake("fastops::apply_rope_out")
@torch.library.register_fake("fastops::qk_norm_rope_out")
def _fake_nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _elsewhere(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *, inverse: bool = False, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    q_new, k_new = _rope_reference(q, k, cos, -sin if inverse else sin, **kwargs)
    return q_new, q.new_empty(0) if k_new is None else k_new


def _elsewhere_out(*args: Any, q_out: Tensor, k_out: Tensor | None = None, **kwargs: Any) -> None:
    q, k = _elsewhere(*args, **kwargs)
    _into((q_out, k_out), q, None if k_out is None else k)


def _elsewhere_qk(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    q, k = _qk_reference(*args, **kwargs)
    return q, q.new_empty(0) if k is None else k


def _elsewhere_qk_out(*args: Any, q_out: Tensor, k_out: Tensor | None = None, **kwargs: Any) -> None:
    q, k = _qk_reference(*args, **kwargs)
    _into((q_out, k_out), q, None if k_out is None else k)


_ops.implement_elsewhere("apply_rope", _elsewhere)
_ops.implement_elsewhere("apply_rope_out", _elsewhere_out)
_ops.implement_elsewhere("qk_norm_rope", _elsewhere_qk)
_ops.implement_elsewhere("qk_norm_rope_out", _elsewhere_qk_out)
