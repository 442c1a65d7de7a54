"""attention: dense scaled dot-product attention, [B, S, H, D] layout.

    out[b,i,h] = sum_j softmax_j(cap(scale q_i k_j) + bias_ij - slope |p_i - j|) v_j,   p_i = i + Sk - Sq

Algorithm: FlashAttention-2 (arXiv 2307.08691, algorithm 1) with the conditional rescaling and polynomial exp of
FlashAttention-4. Design: docs/design/003-cpu-attention.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastops import _cuda, _ops
from fastops.dispatch.record import Call, Implementation
from fastops.dispatch.select import Operator
from fastops.ops import _common as common


def validate(
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
    return_lse: bool = False,
    out: Tensor | None = None,
) -> None:
    op = "attention"
    for name, t, dims in (("q", q, "B,Sq,Hq,D"), ("k", k, "B,Sk,Hkv,D"), ("v", v, "B,Sk,Hkv,Dv")):
        common.require_tensor(op, name, t)
        common.require_dims(op, name, t, dims)
    common.check_qkv(op, q, k, v, ("q", "k", "v"))
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"{op}: q has batch size {q.shape[0]}, k has {k.shape[0]}; they must agree")
    b, sq, hq, _ = q.shape
    common.check_options(
        op, q, scale=scale, window=window, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, batch=b
    )
    check_mask(op, attn_mask, (b, hq, sq, k.shape[1]), q)
    common.check_out(op, out, (b, sq, hq, v.shape[3]), q)


def check_mask(op: str, mask: Tensor | None, shape: tuple[int, ...], q: Tensor) -> None:
    if mask is None:
        return
    common.require_tensor(op, "attn_mask", mask)
    if mask.dtype not in (torch.bool, *common.FLOATS):
        raise TypeError(f"{op}: attn_mask is {common.name_of(mask.dtype)}, must be bool or floating point")
    if mask.device != q.device:
        raise TypeError(f"{op}: attn_mask is on {mask.device}, q on {q.device}")
    got = list(mask.shape)
    fits = 2 <= len(got) <= len(shape) and all(
        g in (1, w) for g, w in zip(reversed(got), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{op}: attn_mask has shape {got}, must broadcast to {list(shape)}")


def describe(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Call:
    grad = ""
    for name in ("alibi_slopes", "attn_mask"):
        if common.any_grad(options.get(name)):
            grad = name
    return Call(q.device.type, q.dtype, q.shape[-1], v.shape[-1], needs_reference_grad=grad)


def _finish(result: tuple[Tensor, Tensor], return_lse: bool, out: Tensor | None) -> Any:
    value, lse = result
    if out is not None:
        value = out.copy_(value)
    return (value, lse) if return_lse else value


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, out: Tensor | None = None, **options: Any
) -> Any:
    """Plain torch; see `fastops.ops._common.attend`."""
    return _finish(common.attend(q, k, v, **options), return_lse, out)


def run_cpp(
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
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Any:
    if sinks is not None or alibi_slopes is not None:
        sinks, alibi_slopes = common.to_f32(sinks), common.to_f32(alibi_slopes)
    if attn_mask is not None and attn_mask.dtype == torch.float64:
        attn_mask = attn_mask.float()
    flags = (causal, scale, window[0], window[1], softcap)
    if common.any_grad(q, k, v, sinks):
        if is_compiling():  # Dynamo wants every tensor only once, and q, k, v may be one
            k, v = k.view_as(k), v.view_as(v)
        value, lse = Attention.apply(q, k, v, sinks, alibi_slopes, attn_mask, top_left, *flags)
        return _finish((value, lse), return_lse, out)
    if out is not None:
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32) if return_lse else None
        _ops.ops.attention_out(
            q, k, v, causal=causal, scale=scale, window_left=window[0], window_right=window[1], softcap=softcap,
            sinks=sinks, alibi_slopes=alibi_slopes, attn_mask=attn_mask, top_left=top_left, out=out, lse=lse,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    pair = _op(
        q, k, v, causal=causal, scale=scale, window_left=window[0], window_right=window[1], softcap=softcap,
        sinks=sinks, alibi_slopes=alibi_slopes, attn_mask=attn_mask, top_left=top_left, return_lse=return_lse,
    )  # fmt: skip
    return pair if return_lse else pair[0]


_op, _direct = _ops.ops.attention.default, _ops.direct("attention")


class Attention(torch.autograd.Function):
    """Forward and backward kernels; no memory that grows with Sq * Sk in either."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, alibi: Tensor | None, mask: Tensor | None,
        top_left: bool, causal: bool, scale: float | None, left: int, right: int, softcap: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.options = {
            "causal": causal, "scale": scale, "window_left": left, "window_right": right, "softcap": softcap,
            "top_left": top_left,
        }  # fmt: skip
        out, lse = _op(q, k, v, sinks=sinks, alibi_slopes=alibi, attn_mask=mask, return_lse=True, **ctx.options)
        ctx.save_for_backward(q, k, v, sinks, alibi, mask, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:  # type: ignore[override]
        q, k, v, sinks, alibi, mask, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dense_last(dout)
        dq, dk, dv, dsinks = _ops.ops.attention_backward(
            dout, dlse, out, lse, q, k, v, sinks=sinks, alibi_slopes=alibi, attn_mask=mask, **ctx.options
        )
        return (dq, dk, dv, None if sinks is None else dsinks, *([None] * 8))


def dense_last(t: Tensor) -> Tensor:
    """`t`, copied only if its last dimension is not contiguous (gradients of reductions are expanded scalars)."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


operator = Operator(
    "attention",
    [
        Implementation("cpp", run_cpp, common.cpp_why_not, 10, source="docs/design/003-cpu-attention.md"),
        *_cuda.rows(run_cpp, _cuda.why_not_attention),
        Implementation("reference", reference, common.always, 0, source="fastops/ops/_common.py"),
    ],
    validate,
    describe,
)


def attention(
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
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Any:
    """Dense attention, causal and window aligned to the bottom right.

    Args:
        q: [B, Sq, Hq, D], fp32, fp16 or bf16 (fp64: reference only); any strides with a contiguous last dimension.
        k: [B, Sk, Hkv, D], same dtype; Hq % Hkv == 0, query head h reads KV head h // (Hq // Hkv).
        v: [B, Sk, Hkv, Dv]. D and Dv: multiples of 8 up to 256.
        causal: query i sees keys up to i + Sk - Sq.
        scale: multiplies q k^T; default 1 / sqrt(D).
        window: (left, right): a query at position p sees keys p - left .. p + right, both inclusive; -1 is unbounded.
        softcap: > 0 replaces a scaled score s by softcap * tanh(s / softcap).
        sinks: [Hq], one more logit per head in the denominator and in the LSE, without a value.
        alibi_slopes: [Hq] or [B, Hq], adds -slope * |p - j|.
        attn_mask: broadcasts to [B, Hq, Sq, Sk]; bool (True attends) or added to the scores.
        return_lse: also return the log-sum-exp [B, Hq, Sq], fp32, natural log.
        out: [B, Sq, Hq, Dv], written instead of a new tensor (q's dtype, or fp32).

    Returns:
        [B, Sq, Hq, Dv] in q's dtype, or (that, lse). A row that sees no key is 0, its LSE -inf.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
        NotSupportedError: an override forces an implementation that cannot run the call.

    Numerics: scores, softmax and sums in fp32, one rounding at the end (with native bf16 products, probabilities are
    rounded to bf16 as flash-attention does). Same bits whatever the number of threads.
    Cost: 2 (D + Dv) flops per visible (query, key) pair and head; no memory that grows with Sq * Sk.

    Example:
        >>> import torch, fastops
        >>> q = torch.randn(1, 5, 8, 64); k = torch.randn(1, 9, 2, 64)
        >>> fastops.attention(q, k, k, causal=True).shape
        torch.Size([1, 5, 8, 64])
    """
    if type(window) is tuple and len(window) == 2 and not is_compiling():
        left, right = window
        right = 0 if causal else right
        y = _direct(q, k, v, attn_mask, scale, left, right, softcap, sinks, alibi_slopes, out, return_lse)
        if y is not None:
            return y
    plain = sinks is None and alibi_slopes is None and attn_mask is None and out is None and not return_lse
    common.require_tensor("attention", "q", q)
    key = (q.dtype, q.device, common.any_grad(attn_mask, alibi_slopes))
    options: dict[str, Any] = {"causal": causal, "scale": scale, "window": window, "softcap": softcap}
    if not plain:
        options |= {
            "sinks": sinks, "alibi_slopes": alibi_slopes, "attn_mask": attn_mask, "return_lse": return_lse, "out": out,
        }  # fmt: skip
    return operator(key, q, k, v, **options)


@torch.library.register_fake("fastops::attention")
def _fake(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, window_left: int = -1,
    window_right: int = -1, softcap: float = 0.0, sinks: Tensor | None = None, alibi_slopes: Tensor | None = None,
    attn_mask: Tensor | None = None, top_left: bool = False, return_lse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    b, sq, hq, _ = q.shape
    lse_shape = (b, hq, sq) if return_lse else (0,)
    return q.new_empty((b, sq, hq, v.shape[3])), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.register_fake("fastops::attention_out")
def _fake_out(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    return None


def _elsewhere(
    q: Tensor, k: Tensor, v: Tensor, *, window_left: int = -1, window_right: int = -1, return_lse: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = common.attend(q, k, v, window=(window_left, window_right), **options)
    return out.contiguous(), lse if return_lse else q.new_empty((0,), dtype=torch.float32)


def _elsewhere_out(*args: Any, out: Tensor, lse: Tensor | None = None, **options: Any) -> None:
    value, sums = _elsewhere(*args, return_lse=True, **options)
    out.copy_(value)
    if lse is not None:
        lse.copy_(sums)


_ops.implement_elsewhere("attention", _elsewhere)
_ops.implement_elsewhere("attention_out", _elsewhere_out)


@torch.library.register_fake("fastops::attention_backward")
def _fake_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *,
    sinks: Tensor | None = None, **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_gradients(q, k, v, sinks)


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty((0 if sinks is None else sinks.shape[0],), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def recompute_gradients(
    attend: Any, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by differentiating the reference: for devices without a backward kernel."""
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in (q, k, v, sinks)]
        out, lse = attend(*leaves[:3], leaves[3])
        wanted = [t for t in leaves if t is not None]
        values, grads = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
        got = torch.autograd.grad(values, wanted, grads)
    dsinks = got[3] if sinks is not None else q.new_empty((0,), dtype=torch.float32)
    return got[0].contiguous(), got[1].contiguous(), got[2].contiguous(), dsinks


def _elsewhere_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *,
    window_left: int = -1, window_right: int = -1, sinks: Tensor | None = None, **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    window = (window_left, window_right)
    return recompute_gradients(
        lambda q, k, v, s: common.attend(q, k, v, sinks=s, window=window, **options), dout, dlse, q, k, v, sinks
    )


_ops.implement_elsewhere("attention_backward", _elsewhere_backward)
