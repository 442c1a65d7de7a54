"""attention_varlen: a ragged batch, sequences packed end to end. Each one is `attention` on its own rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastops import _cuda, _ops
from fastops.dispatch.record import Call, Implementation
from fastops.dispatch.select import Operator
from fastops.ops import _common as common
from fastops.ops.attention import _empty_gradients, dense_last, recompute_gradients


def validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> None:
    op = "attention_varlen"
    for name, t, dims in (("q", q, "T,Hq,D"), ("k", k, "Tk,Hkv,D"), ("v", v, "Tk,Hkv,Dv")):
        common.require_tensor(op, name, t)
        common.require_dims(op, name, t, dims)
    common.check_qkv(op, q, k, v, ("q", "k", "v"))
    common.require_index(op, "cu_seqlens_q", cu_seqlens_q, (None,), q)
    common.require_index(op, "cu_seqlens_k", cu_seqlens_k, (None,), q)
    if cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.shape[0] < 1:
        raise ValueError(
            f"{op}: cu_seqlens_q has {cu_seqlens_q.shape[0]} entries, cu_seqlens_k {cu_seqlens_k.shape[0]}; "
            "both must have B + 1"
        )
    common.check_options(
        op, q, scale=scale, window=window, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes,
        batch=cu_seqlens_q.shape[0] - 1,
    )  # fmt: skip
    common.check_out(op, out, (*q.shape[:2], v.shape[2]), q)
    if not is_compiling():
        common.check_cu(op, "cu_seqlens_q", cu_seqlens_q, q.shape[0], "q")
        common.check_cu(op, "cu_seqlens_k", cu_seqlens_k, k.shape[0], "k")


def describe(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Call:
    grad = "alibi_slopes" if common.any_grad(options.get("alibi_slopes")) else ""
    return Call(q.device.type, q.dtype, q.shape[-1], v.shape[-1], needs_reference_grad=grad)


def attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """The meaning: `attend` per sequence. Rows behind the last sequence are 0 with LSE -inf."""
    cu_q, cu_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    slopes = options.pop("alibi_slopes", None)
    outs, lses = [], []
    for b in range(len(cu_q) - 1):
        q_rows, k_rows = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        mine = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        out, lse = common.attend(q[None, q_rows], k[None, k_rows], v[None, k_rows], alibi_slopes=mine, **options)
        outs.append(out[0])
        lses.append(lse[0])
    left = q.shape[0] - cu_q[-1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    outs.append(q.new_zeros((left, q.shape[1], v.shape[-1])))
    lses.append(q.new_full((q.shape[1], left), float("-inf"), dtype=wide))
    return torch.cat(outs), torch.cat(lses, 1)


def _finish(result: tuple[Tensor, Tensor], return_lse: bool, out: Tensor | None) -> Any:
    value, lse = result
    if out is not None:
        value = out.copy_(value)
    return (value, lse) if return_lse else value


def reference(*args: Tensor, return_lse: bool = False, out: Tensor | None = None, **options: Any) -> Any:
    return _finish(attend(*args, **options), return_lse, out)


def run_cpp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Any:
    sinks, alibi_slopes = common.to_f32(sinks), common.to_f32(alibi_slopes)
    if common.any_grad(q, k, v, sinks):
        if is_compiling():  # Dynamo wants every tensor only once
            k, v, cu_seqlens_k = k.view_as(k), v.view_as(v), cu_seqlens_k.view_as(cu_seqlens_k)
        pair = AttentionVarlen.apply(
            q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, causal, scale, window, softcap
        )
        return _finish(pair, return_lse, out)
    options = {
        "causal": causal, "scale": scale, "window_left": window[0], "window_right": window[1],
        "softcap": softcap, "sinks": sinks, "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    if out is not None:
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32) if return_lse else None
        _ops.ops.attention_varlen_out(q, k, v, cu_seqlens_q, cu_seqlens_k, out=out, lse=lse, **options)
        return (out, lse) if return_lse else out
    pair = _op(q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=return_lse, **options)
    return pair if return_lse else pair[0]


_op, _direct = _ops.ops.attention_varlen.default, _ops.direct("attention_varlen")


class AttentionVarlen(torch.autograd.Function):
    """Forward and backward kernels."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sinks: Tensor | None,
        alibi: Tensor | None, causal: bool, scale: float | None, window: tuple[int, int], softcap: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.options = {
            "causal": causal, "scale": scale, "window_left": window[0], "window_right": window[1],
            "softcap": softcap,
        }  # fmt: skip
        out, lse = _op(q, k, v, cu_q, cu_k, sinks=sinks, alibi_slopes=alibi, return_lse=True, **ctx.options)
        ctx.save_for_backward(q, k, v, cu_q, cu_k, sinks, alibi, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:  # type: ignore[override]
        q, k, v, cu_q, cu_k, sinks, alibi, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dense_last(dout)
        dq, dk, dv, dsinks = _ops.ops.attention_varlen_backward(
            dout, dlse, out, lse, q, k, v, cu_q, cu_k, sinks=sinks, alibi_slopes=alibi, **ctx.options
        )
        return (dq, dk, dv, None, None, None if sinks is None else dsinks, *([None] * 5))


operator = Operator(
    "attention_varlen",
    [
        Implementation("cpp", run_cpp, common.cpp_why_not, 10, source="docs/design/003-cpu-attention.md"),
        *_cuda.rows(run_cpp, _cuda.why_not_attention),
        Implementation("reference", reference, common.always, 0, source="fastops/ops/attention_varlen.py"),
    ],
    validate,
    describe,
)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Any:
    """Attention over a ragged batch.

    Args:
        q: [T, Hq, D]: the queries of all sequences, one after another.
        k, v: [Tk, Hkv, D] and [Tk, Hkv, Dv].
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], sequence b owns rows cu[b] .. cu[b + 1]; from 0, never falling.
            Empty sequences are fine. Rows of q behind cu_seqlens_q[B] become 0 with LSE -inf.
        Others as in `fastops.attention`; LSE is [Hq, T].

    Returns:
        [T, Hq, Dv], or (that, lse).

    Raises:
        ValueError, TypeError, NotSupportedError: as `fastops.attention`; the values in cu_seqlens are checked.

    Example:
        >>> import torch, fastops
        >>> x = torch.randn(7, 4, 64); cu = torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> fastops.attention_varlen(x, x, x, cu, cu, causal=True).shape
        torch.Size([7, 4, 64])
    """
    if type(window) is tuple and len(window) == 2 and not is_compiling():
        left, right = window
        y = _direct(
            q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left, 0 if causal else right, softcap, sinks, alibi_slopes,
            out, return_lse,
        )  # fmt: skip
        if y is not None:
            return y
    common.require_tensor("attention_varlen", "q", q)
    key = (q.dtype, q.device, common.any_grad(alibi_slopes))
    return operator(
        key, q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, scale=scale, window=window, softcap=softcap,
        sinks=sinks, alibi_slopes=alibi_slopes, return_lse=return_lse, out=out,
    )  # fmt: skip


@torch.library.register_fake("fastops::attention_varlen")
def _fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, return_lse: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lse_shape = (q.shape[1], q.shape[0]) if return_lse else (0,)
    return q.new_empty((*q.shape[:2], v.shape[2])), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.register_fake("fastops::attention_varlen_out")
def _fake_out(*args: Any, **options: Any) -> None:
    return None


def _elsewhere(
    *args: Tensor, window_left: int = -1, window_right: int = -1, return_lse: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    out, lse = attend(*args, window=(window_left, window_right), **options)
    return out, lse if return_lse else out.new_empty((0,), dtype=torch.float32)


def _elsewhere_out(*args: Any, out: Tensor, lse: Tensor | None = None, **options: Any) -> None:
    value, sums = _elsewhere(*args, return_lse=True, **options)
    out.copy_(value)
    if lse is not None:
        lse.copy_(sums)


_ops.implement_elsewhere("attention_varlen", _elsewhere)
_ops.implement_elsewhere("attention_varlen_out", _elsewhere_out)


@torch.library.register_fake("fastops::attention_varlen_backward")
def _fake_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any,
    sinks: Tensor | None = None, **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_gradients(q, k, v, sinks)


def _elsewhere_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor,
    cu_k: Tensor, *, window_left: int = -1, window_right: int = -1, sinks: Tensor | None = None, **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    window = (window_left, window_right)
    return recompute_gradients(
        lambda q, k, v, s: attend(q, k, v, cu_q, cu_k, sinks=s, window=window, **options), dout, dlse, q, k, v, sinks
    )


_ops.implement_elsewhere("attention_varlen_backward", _elsewhere_backward)
