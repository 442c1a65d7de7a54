"""The CUDA half of the C API (csrc/include/fastops/fastops_cuda.h) from Python: libfastops_cuda on GPUs, and
libfastops_emulated, the same kernels with every thread run on the CPU (docs/design/007-cuda.md).

ctypes, so that a wheel built beside a torch without CUDA serves one with it. A call costs more on the host than a C++
binding would (its price on a GPU machine is not measured yet); kernels are only put on the stream.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastops import _cuda_structs as c
from fastops import _nvrtc, _ops
from fastops.dispatch.record import Call, Implementation
from fastops.errors import FallbackWarning, NotSupportedError
from fastops.ops import _common as common


class Library:
    """One of the two libraries. `missing` says why there is none."""

    def __init__(self, emulated: bool) -> None:
        self.emulated = emulated
        self.variant = ""
        path = Path(__file__).parent / "lib" / f"libfastops_{'emulated' if emulated else 'cuda'}.so"
        self.missing: str | None = None
        if not path.exists():
            self.missing = (
                "the library is not built"
                if emulated
                else "no CUDA code in this build (set FASTOPS_CUDA_ARCHS to build it)"
            )
            return
        try:
            self.lib = ctypes.CDLL(str(path))
        except OSError as error:
            self.missing = f"{path.name} does not load: {error}"
            return
        self.lib.fastops_cuda_archs.restype = ctypes.c_char_p

    def prepare(self, env: c.Env, device: torch.device) -> None:
        """What a call's environment says beside its workspace."""
        if self.emulated:
            env.seed = int(os.environ.get("FASTOPS_EMULATOR_SEED", "0"))
            env.arch = int(os.environ.get("FASTOPS_EMULATOR_ARCH", "80"))
        else:
            env.stream = torch.cuda.current_stream(device).cuda_stream

    def describe(self) -> str:
        """For `fastops info`: what there is, or why there is nothing."""
        archs = "" if self.missing else self.lib.fastops_cuda_archs().decode()
        return self.missing or (f"code for sm_{archs.replace(' ', ', sm_')}" if archs else "ready")

    def call(self, name: str, desc: ctypes.Structure, like: Tensor, workspace: bool = False) -> None:
        """Runs fastops_cuda_<name>. What it refuses is raised, with its sentence."""
        message = ctypes.create_string_buffer(c.MESSAGE)
        env = c.Env(struct_size=ctypes.sizeof(c.Env), message=ctypes.cast(message, ctypes.c_char_p))
        scratch = None  # kept until the launch: the stream's allocator reuses it only behind the kernel
        self.prepare(env, like.device)
        if workspace:
            need = ctypes.c_size_t()
            ask = getattr(self.lib, f"fastops_cuda_{name}_workspace")
            self._check(ask(ctypes.byref(desc), ctypes.byref(env), ctypes.byref(need)), message)
            if need.value:
                scratch = torch.empty(need.value, dtype=torch.uint8, device=like.device)
                env.workspace, env.workspace_size = scratch.data_ptr(), need.value
        run = getattr(self.lib, f"fastops_cuda_{name}{'_fwd' if name == 'attention' else ''}")
        self._check(run(ctypes.byref(desc), ctypes.byref(env)), message)
        self.variant = env.variant.decode() if env.variant else ""

    @staticmethod
    def _check(status: int, message: Any) -> None:
        if status == c.OK:
            return
        text = message.value.decode()
        kinds = {c.VALUE: ValueError, c.TYPE: TypeError, c.UNSUPPORTED: NotSupportedError}
        raise kinds.get(status, RuntimeError)(text)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        scale: float | None = None,
        window_left: int = -1,
        window_right: int = -1,
        softcap: float = 0.0,
        top_left: bool = False,
        return_lse: bool = False,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        k_bits: int = 0,
        v_bits: int = 0,
        **tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Any layout; `tensors` by their names in fastops_attention_desc and fastops_kv_quant. LSE is empty without
        return_lse."""
        rows = (*q.shape[:-1],)
        if out is None:
            out = q.new_empty((*rows, v.shape[-1] * 8 // v_bits if v_bits else v.shape[-1]))
        if lse is None and return_lse:
            shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
            lse = q.new_empty(shape, dtype=torch.float32)
        desc = c.describe_attention(q, causal, scale, window_left, window_right, softcap, top_left)
        quant = {name: t for name in c.KV_TENSORS if (t := tensors.pop(name, None)) is not None}
        if quant or k_bits or v_bits or k.dtype != q.dtype or v.dtype != q.dtype:
            kv = c.KVQuant(struct_size=ctypes.sizeof(c.KVQuant), k_bits=k_bits, v_bits=v_bits)
            desc.kv = ctypes.addressof(c.fill(kv, **quant))  # kv lives until the call below is over
        self.call("attention", c.fill(desc, q=q, k=k, v=v, out=out, lse=lse, **tensors), q, workspace=True)
        return out, q.new_empty((0,), dtype=torch.float32) if lse is None else lse

    def attention_backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        scale: float | None = None,
        window_left: int = -1,
        window_right: int = -1,
        softcap: float = 0.0,
        top_left: bool = False,
        sinks: Tensor | None = None,
        **tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Dense and ragged; dsinks is empty without sinks."""
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        dsinks = None if sinks is None else torch.empty_like(sinks)
        desc = c.AttentionBackward(struct_size=ctypes.sizeof(c.AttentionBackward))
        desc.fwd = c.describe_attention(q, causal, scale, window_left, window_right, softcap, top_left)
        c.fill(desc.fwd, q=q, k=k, v=v, out=out, lse=lse, sinks=sinks, **tensors)
        c.fill(desc, dout=dout, dlse=dlse, dq=dq, dk=dk, dv=dv, dsinks=dsinks)
        self.call("attention_bwd", desc, q, workspace=True)
        return dq, dk, dv, q.new_empty((0,), dtype=torch.float32) if dsinks is None else dsinks

    def merge_states(self, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        n, out, lse = len(outs), outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)
        states = [(c.TensorView * n)(*map(c.view, ts)) for ts in (outs, lses)]
        desc = c.MergeStates(struct_size=ctypes.sizeof(c.MergeStates), count=n, outs=states[0], lses=states[1])
        self.call("merge_states", c.fill(desc, out=out, lse=lse), outs[0])
        return out, lse

    def norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float = 1e-6,
        *,
        weight_offset: float = 0.0,
        layer: bool = False,
        quant: int = 0,
        stats: bool = False,
        out: Tensor | None = None,
        total: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """torch.ops.fastops.norm: (out, residual + x, scales, mean, rstd), empty where not asked for."""
        dtype = {0: x.dtype, 1: torch.int8, 2: torch.float8_e4m3fn}[quant]
        out = x.new_empty(x.shape, dtype=dtype) if out is None else out
        total = x.new_empty(x.shape) if residual is not None and total is None else total
        none, rows = x.new_empty((0,), dtype=torch.float32), x.shape[:-1].numel()
        numbers = [
            x.new_empty(rows, dtype=torch.float32) if given else None for given in (quant, stats and layer, stats)
        ]
        desc = c.Norm(struct_size=ctypes.sizeof(c.Norm), layer=int(layer), eps=eps, weight_offset=weight_offset)
        c.fill(desc, x=x, residual=residual, sum=total, weight=weight, bias=bias, out=out)
        self.call("norm", c.fill(desc, scales=numbers[0], mean=numbers[1], rstd=numbers[2]), x)
        scales, mean, rstd = (none if t is None else t for t in numbers)
        return out, x.new_empty((0,)) if total is None else total, scales, mean, rstd

    def norm_backward(
        self,
        dout: Tensor,
        dsum: Tensor | None,
        s: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        *,
        weight_offset: float = 0.0,
        layer: bool = False,
        dweight: bool = True,
        dbias: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """torch.ops.fastops.norm_backward; the sums are empty where not asked for."""
        none = s.new_empty((0,), dtype=torch.float32)
        ds = s.new_empty(s.shape)
        sums = [s.new_zeros(s.shape[-1], dtype=torch.float32) if given else None for given in (dweight, dbias)]
        desc = c.NormBackward(struct_size=ctypes.sizeof(c.NormBackward), layer=int(layer), weight_offset=weight_offset)
        c.fill(desc, dout=dout, s=s, dsum=dsum, weight=weight, mean=mean if layer else None, rstd=rstd, ds=ds)
        self.call("norm_bwd", c.fill(desc, dweight=sums[0], dbias=sums[1]), s, workspace=True)
        dw, db = (none if t is None else t for t in sums)
        return ds, dw, db

    def gated(self, gate: Tensor, up: Tensor, activation: int, out: Tensor | None = None) -> Tensor:
        out = gate.new_empty(gate.shape) if out is None else out
        desc = c.Gated(struct_size=ctypes.sizeof(c.Gated), activation=activation)
        self.call("gated", c.fill(desc, gate=gate, up=up, out=out), gate)
        return out

    def gated_backward(self, dout: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, Tensor]:
        dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
        desc = c.Gated(struct_size=ctypes.sizeof(c.Gated), activation=activation)
        self.call("gated", c.fill(desc, gate=gate, up=up, dout=dout, dgate=dgate, dup=dup), gate)
        return dgate, dup

    def int4_linear(
        self,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        n: int,
        zeros: Tensor | None = None,
        mins: Tensor | None = None,
        perm: Tensor | None = None,
        bias: Tensor | None = None,
        column_scales: Tensor | None = None,
        column_zeros: Tensor | None = None,
        *,
        int8: bool = False,
        eight: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """torch.ops.fastops.int4_linear; act-order gathers the columns of x first."""
        if perm is not None:
            x = x.index_select(1, perm.long())
        out = x.new_empty((x.shape[0], n)) if out is None else out
        desc = c.Int4Linear(struct_size=ctypes.sizeof(c.Int4Linear), int8=int(int8), eight=int(eight))
        c.fill(desc, x=x, out=out, codes=codes, scales=scales, zeros=zeros, mins=mins, bias=bias,
              column_scales=column_scales, column_zeros=column_zeros)  # fmt: skip
        self.call("int4_linear", desc, x, workspace=True)
        return out

    def rope(
        self,
        q: Tensor,
        k: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        *,
        interleaved: bool = False,
        inverse: bool = False,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
        q_out: Tensor | None = None,
        k_out: Tensor | None = None,
        **tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """apply_rope and qk_norm_rope: `tensors` by their names in fastops_rope_desc. Without k its result is empty."""
        q_out = q.new_empty(q.shape) if q_out is None else q_out
        if k is not None and k_out is None and tensors.get("slots") is None:
            k_out = k.new_empty(k.shape)
        desc = c.Rope(struct_size=ctypes.sizeof(c.Rope), interleaved=int(interleaved), inverse=int(inverse), eps=eps,
                     weight_offset=weight_offset)  # fmt: skip
        self.call("rope", c.fill(desc, q=q, q_out=q_out, k=k, k_out=k_out, cos=cos, sin=sin, **tensors), q)
        return q_out, q.new_empty((0,)) if k_out is None else k_out


class NvrtcLibrary(Library):
    """The host half of the emulated library, with kernels compiled by NVRTC (fastops/_nvrtc.py)."""

    def __init__(self, launcher: Any = None) -> None:
        super().__init__(True)
        self.emulated = False
        self.launcher = launcher or _nvrtc.Launcher()

    def describe(self) -> str:
        return self.missing or f"compiled by NVRTC on first use, kept in {_nvrtc.folder()}"

    def prepare(self, env: c.Env, device: torch.device) -> None:
        super().prepare(env, device)
        env.arch, env.sm_count = _nvrtc.device_facts(
            torch.cuda.current_device() if device.index is None else device.index
        )
        env.start = ctypes.cast(self.launcher.hook, ctypes.c_void_p)

    def call(self, name: str, desc: ctypes.Structure, like: Tensor, workspace: bool = False) -> None:
        try:
            super().call(name, desc, like, workspace)
        except NotSupportedError:
            error, self.launcher.error = self.launcher.error, None
            if error is not None:
                raise error from None
            raise


def _on_gpus() -> Library:
    """The library for CUDA tensors: compiled beforehand, or by NVRTC where there is a GPU and no such library."""
    compiled = Library(False)
    if compiled.missing and torch.cuda.is_available():
        why = _nvrtc.why_not()
        if why is None:
            return NvrtcLibrary()
        compiled.missing += f", and {why}"
    return compiled


# Loaded here, not at first use: a choice that torch.compile traces may only read constants.
_EMULATED, _CUDA = Library(True), _on_gpus()
_MISSING = (_CUDA.missing, _EMULATED.missing)


def library(emulated: bool) -> Library:
    return _EMULATED if emulated else _CUDA


def why_not(emulated: bool) -> Callable[[Call], str | None]:
    """Whether the element-wise kernels take a call."""

    def reason(call: Call) -> str | None:
        device = "cpu" if emulated else "cuda"
        if call.device != device:
            return f"device is {call.device} (needs {device})"
        if _MISSING[emulated]:
            return _MISSING[emulated]
        if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"dtype is {common.name_of(call.dtype)} (takes float32, float16, bfloat16)"
        if call.needs_reference_grad:
            return f"{call.needs_reference_grad} requires a gradient (the kernel gives none for it)"
        return None

    return reason


def why_not_attention(emulated: bool) -> Callable[[Call], str | None]:
    """Whether the attention kernels take a call."""
    general = why_not(emulated)

    def reason(call: Call) -> str | None:
        if call.dtype == torch.float32:
            return "dtype is float32 (takes float16, bfloat16)"
        why = general(call)
        if why is not None:
            return why
        if max(call.head_dim, call.head_dim_v) > common.MAX_HEAD_DIM:
            return f"head size is {max(call.head_dim, call.head_dim_v)} (takes up to {common.MAX_HEAD_DIM})"
        if call.dropout:
            return "dropout_p is not 0 (the kernel has no dropout)"
        return None

    return reason


_LAYOUTS = {
    "attention": ("q", "k", "v"),
    "attention_varlen": ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"),
    "attention_paged": ("q", "k", "v", "block_table", "seq_lens", "cu_seqlens_q"),
}
_BACKWARD = ("attention", "attention_varlen")
_ELSE = "the CUDA kernels do not take"


def run_attention(lib: Library, layout: str, *args: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """One of the three layouts, with the torch op's arguments. Raises NotSupportedError for what the kernels lack."""
    tensors: dict[str, Any] = dict(zip(_LAYOUTS[layout], args, strict=False))
    if options.pop("attn_mask", None) is not None:
        raise NotSupportedError(f"{layout}: {_ELSE} attn_mask")
    q, k, v = (tensors.pop(n) for n in "qkv")
    return lib.attention(q, k, v, **tensors, **options)


def run_attention_backward(
    lib: Library, layout: str, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Tensor,
    attn_mask: Tensor | None = None, **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The backward op of a layout, with the torch op's arguments."""
    if attn_mask is not None:
        raise NotSupportedError(f"{layout}_backward: {_ELSE} attn_mask")
    options.update(zip(_LAYOUTS[layout][3:], args[3:], strict=True))
    q, k, v = args[:3]
    return lib.attention_backward(dout, dlse, out, lse, q, k, v, **options)


def emulated(layout: str) -> Callable[..., Any]:
    """The `run` of a row that takes CPU tensors through the emulator."""

    def run(
        *args: Tensor, window: tuple[int, int] = (-1, -1), return_lse: bool = False, sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None, quant: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        if quant is not None:
            options |= {f.name: getattr(quant, f.name) for f in fields(quant)}
        options |= {
            "window_left": window[0], "window_right": window[1], "alibi_slopes": common.to_f32(alibi_slopes),
        }  # fmt: skip
        sinks = common.to_f32(sinks)
        if common.any_grad(*args[:3], sinks) and layout in _BACKWARD:
            value, lse = _EmulatedAttention.apply(layout, options, args[3:], *args[:3], sinks)
        else:
            value, lse = run_attention(library(True), layout, *args, sinks=sinks, return_lse=return_lse, **options)
        return (value, lse) if return_lse else value

    return run


class _EmulatedAttention(torch.autograd.Function):
    """Forward and backward by the emulator."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, layout: str, options: dict[str, Any], lens: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor,
        sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = run_attention(library(True), layout, q, k, v, *lens, sinks=sinks, return_lse=True, **options)
        ctx.save_for_backward(out, lse, q, k, v, *lens, sinks)
        ctx.layout, ctx.options = layout, {n: o for n, o in options.items() if n != "out"}
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:  # type: ignore[override]
        out, lse, *inputs, sinks = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        got = run_attention_backward(
            library(True), ctx.layout, dout, dlse, out, lse, *inputs, sinks=sinks, **ctx.options
        )
        return None, None, None, *got[:3], got[3] if sinks is not None else None


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those among an operator's arguments, which may be lists of them."""
    return [t for v in values for t in (v if isinstance(v, (list, tuple)) else (v,)) if isinstance(t, Tensor)]


def rows(
    op: str,
    cpp: Callable[..., Any],
    emulated_run: Callable[..., Any],
    reasons: Callable[[bool], Callable[[Call], str | None]] = why_not,
) -> list[Implementation]:
    """An operator's rows: `cpp` calls torch.ops.fastops, which runs our kernels on CUDA tensors as well."""
    source = "docs/design/007-cuda.md"

    def run(*args: Any, **options: Any) -> Any:
        if op not in _BACKWARD and common.any_grad(*_tensors((*args, *options.values()))):
            raise NotSupportedError(f"{op}: the emulated kernels give no gradients; use torch.no_grad()")
        return emulated_run(*args, **options)

    return [
        Implementation("cuda", cpp, reasons(False), 10, source=source),
        Implementation("cuda-emulated", run, reasons(True), -10, source=source),
    ]


def implement(name: str, run: Callable[..., Any]) -> None:
    """The torch op `name` on CUDA tensors: run(library, ...). What the kernels refuse goes to plain torch, said once.
    An operator that writes into `out` returns nothing."""
    if library(False).missing:
        return

    def op(*args: Any, **options: Any) -> Any:
        try:
            with torch.cuda.device(_tensors(args)[0].device):
                result = run(library(False), *args, **options)
        except NotSupportedError as error:
            _warn_once(str(error))
            result = _ops.plain[name](*args, **options)
        return None if name.endswith("_out") else result

    _ops.library.impl(name, op, "CUDA")


def implement_attention(layout: str) -> None:
    """The torch ops of a layout on CUDA tensors."""

    def run(lib: Library, *args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return run_attention(lib, layout, *args, **options)

    def run_out(lib: Library, *args: Tensor, lse: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        return run_attention(lib, layout, *args, lse=lse, return_lse=lse is not None, **options)

    implement(layout, run)
    implement(f"{layout}_out", run_out)
    if layout in _BACKWARD:
        implement(f"{layout}_backward", partial(_backward_op, layout))


def _backward_op(layout: str, lib: Library, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return run_attention_backward(lib, layout, *args, **options)


@cache
def _warn_once(text: str) -> None:
    warnings.warn(f"{text}; plain torch runs instead", FallbackWarning, stacklevel=4)
