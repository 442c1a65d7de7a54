"""The CUDA kernels behind torch.ops.fastops: libfastops_cuda for GPUs, and libfastops_emulated, the same kernels with
every thread run on the CPU (docs/design/007-cuda.md). The operators' C++ (csrc/torch) calls them; here they are found
and loaded, and the dispatch rows are made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastops import _nvrtc, _ops
from fastops.dispatch.record import Call, Implementation
from fastops.errors import FallbackWarning, translate
from fastops.ops import _common as common


@dataclass(frozen=True)
class Kernels:
    """What was loaded for CUDA tensors, or for the emulator."""

    missing: str | None  # why there are none
    text: str = ""  # for `fastops info`
    launcher: _nvrtc.Launcher | None = None


def load(name: str, for_gpus: bool, launcher: _nvrtc.Launcher | None = None) -> str | None:
    """Takes a library into use; with a launcher, the emulated one's host code plans calls and the launcher starts the
    kernels. What is missing, or None."""
    path = _ops.FOLDER / f"lib{name}.so"
    if _ops.control is None:
        return _ops.missing
    if not path.exists():
        return f"{path.name} is not built"
    hooks = () if launcher is None else launcher.hooks
    return _ops.control.load_cuda(str(path), for_gpus, *hooks)  # type: ignore[no-any-return]


def _emulator() -> Kernels:
    missing = load("fastops_emulated", False)
    return Kernels(missing, "ready")


def _for_gpus() -> Kernels:
    """Compiled beforehand, or by NVRTC where there is a GPU and no such library."""
    missing = load("fastops_cuda", True)
    if missing is None:
        archs = _ops.control.cuda_archs(True)
        return Kernels(None, f"code for sm_{archs.replace(' ', ', sm_')}")
    if not (_ops.FOLDER / "libfastops_cuda.so").exists():
        missing = "no CUDA code in this build (set FASTOPS_CUDA_ARCHS to build it)"
    if not AVAILABLE:
        return Kernels(missing)
    launcher = _nvrtc.Launcher()
    why = _nvrtc.why_not() or load("fastops_emulated", True, launcher)
    if why is not None:
        return Kernels(f"{missing}, and {why}")
    return Kernels(None, f"compiled by NVRTC on first use, kept in {_nvrtc.folder()}", launcher)


AVAILABLE = torch.cuda.is_available()
# Loaded here, not at first use: a choice that torch.compile traces may only read constants.
EMULATOR, GPUS = _emulator(), _for_gpus()
_MISSING = (GPUS.missing, EMULATOR.missing)


def describe() -> dict[str, str]:
    """For `fastops info`: what there is, or why there is nothing."""
    return {"cuda": GPUS.missing or GPUS.text, "cuda-emulated": EMULATOR.missing or EMULATOR.text}


# How a thread's calls are taken (csrc/torch/libraries.h).
_set_mode = getattr(_ops.control, "set_mode", lambda mode: 0)
_EMULATE, _OR_REFUSE = (getattr(_ops.control, name, 0) for name in ("EMULATE", "OR_REFUSE"))


@contextmanager
def emulated() -> Iterator[None]:
    """torch.ops.fastops on CPU tensors by the emulated kernels, where there are any; refusals are errors."""
    before = _set_mode(_EMULATE | _OR_REFUSE)
    try:
        yield
    finally:
        _set_mode(before)


def why_not(emulated: bool) -> Callable[[Call], str | None]:
    """Whether the element-wise kernels take a call."""

    def reason(call: Call) -> str | None:
        device = "cpu" if emulated else "cuda"
        if call.device != device:
            return f"device is {call.device} (needs {device})"
        missing = _MISSING[1 if emulated else 0]  # torch 2.11 cannot trace a bool as the index
        if missing:
            return missing
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


class _Emulated(torch.autograd.Function):
    """Forward and backward of an operator by the emulator: the backward runs long after `emulated()` has ended."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[list[Any]], list[Tensor]], *leaves: Any) -> Any:  # type: ignore[override]
        ctx.inputs = [t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in leaves]
        with torch.enable_grad(), emulated():
            ctx.outputs = run(ctx.inputs)
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for t in ctx.outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
        asked = [isinstance(t, Tensor) and t.requires_grad for t in ctx.inputs]
        known = [(t, g) for t, g in zip(ctx.outputs, grads, strict=True) if g is not None and t.requires_grad]
        wanted = [t for t, yes in zip(ctx.inputs, asked, strict=True) if yes]
        with emulated():
            found = iter(torch.autograd.grad([t for t, _ in known], wanted, [g for _, g in known], allow_unused=True))
        return None, *(next(found) if yes else None for yes in asked)


def _with_gradients(run: Callable[..., Any], leaves: list[Any], spec: Any) -> Any:
    shape = []

    def flat(inputs: list[Any]) -> list[Tensor]:
        args, options = tree_unflatten(inputs, spec)
        outputs, result = tree_flatten(run(*args, **options))
        shape.append(result)
        return outputs

    outputs = _Emulated.apply(flat, *leaves)
    return tree_unflatten(outputs, shape[0])


def rows(
    run: Callable[..., Any], reasons: Callable[[bool], Callable[[Call], str | None]] = why_not
) -> list[Implementation]:
    """The rows of an operator whose `run` calls torch.ops.fastops: on CUDA tensors, and emulated on CPU tensors."""
    source = "docs/design/007-cuda.md"

    def on_cuda(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():  # refusals go to plain torch inside the operator
            return run(*args, **options)
        before = _set_mode(_OR_REFUSE)
        try:
            return run(*args, **options)
        except RuntimeError:
            error = _launch_error()
            if error is None:
                raise
            raise error from None
        finally:
            _set_mode(before)

    def on_emulator(*args: Any, **options: Any) -> Any:
        leaves, spec = tree_flatten((args, options))
        if common.any_grad(*(t for t in leaves if isinstance(t, Tensor))):
            return _with_gradients(run, leaves, spec)
        with emulated():
            return run(*args, **options)

    return [
        Implementation("cuda", on_cuda, reasons(False), 10, source=source),
        Implementation("cuda-emulated", on_emulator, reasons(True), -10, source=source),
    ]


def _launch_error() -> Exception | None:
    """What NVRTC or the driver said to the launch that failed."""
    if GPUS.launcher is None:
        return None
    error, GPUS.launcher.error = GPUS.launcher.error, None
    return error


# ---- plain torch for what the kernels refuse ------------------------------------------------------------------------

_library: torch.library.Library | None = None


def define_plain() -> None:
    """fastops_plain::*: what operators call for CUDA tensors that no kernel here takes."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("fastops_plain", "DEF")
    for name in _ops.plain:
        _library.define(str(getattr(_ops.ops, name).default._schema).removeprefix("fastops::"))
        _library.impl(name, partial(_plain, name), "CompositeExplicitAutograd")


def _plain(name: str, *args: Any, **options: Any) -> Any:
    _warn_once(str(_launch_error() or translate(RuntimeError(_ops.control.last_refusal()))))
    return _ops.plain[name](*args, **options)


@cache
def _warn_once(text: str) -> None:
    warnings.warn(f"{text}; plain torch runs instead", FallbackWarning, stacklevel=4)
