"""The CUDA half of the C API from outside, by ctypes: every tensor of a call can be placed, results and gradients too
(between guard pages), and torch's operators run emulated."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch
from torch import Tensor

from fastops import _cuda, _ops
from fastops.errors import translate
from tests.cuda import both

MAX_DIMS = 5
MESSAGE = 512
DTYPES = {
    torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.int32: 4, torch.int64: 5, torch.bool: 6,
    torch.float64: 7, torch.uint8: 8, torch.int8: 9, torch.float8_e4m3fn: 10,
}  # fmt: skip


class TensorView(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("size", ctypes.c_int64 * MAX_DIMS), ("stride", ctypes.c_int64 * MAX_DIMS),
        ("ndim", ctypes.c_int32), ("dtype", ctypes.c_int32),
    )  # fmt: skip


class Env(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32), ("arch", ctypes.c_int32), ("sm_count", ctypes.c_int32),
        ("reserved", ctypes.c_int32), ("stream", ctypes.c_void_p), ("workspace", ctypes.c_void_p),
        ("workspace_size", ctypes.c_size_t), ("message", ctypes.c_char_p), ("variant", ctypes.c_char_p),
        ("seed", ctypes.c_uint64), ("start", ctypes.c_void_p),
    )  # fmt: skip


ATTENTION_TENSORS = (
    "q", "k", "v", "out", "lse", "cu_seqlens_q", "cu_seqlens_k", "block_table", "seq_lens", "bias", "sinks",
    "alibi_slopes",
)  # fmt: skip


class Attention(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32), ("align", ctypes.c_int32), *((n, TensorView) for n in ATTENTION_TENSORS),
        ("scale", ctypes.c_float), ("softcap", ctypes.c_float), ("window_left", ctypes.c_int64),
        ("window_right", ctypes.c_int64), ("kv", ctypes.c_void_p),
    )  # fmt: skip


KV_TENSORS = (
    "k_scale", "k_zero", "k_min", "v_scale", "v_zero", "v_min", "k_recent", "v_recent", "packed_lens",
)  # fmt: skip


class KVQuant(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32), ("k_bits", ctypes.c_int32), ("v_bits", ctypes.c_int32),
        ("reserved", ctypes.c_int32), *((n, TensorView) for n in KV_TENSORS),
    )  # fmt: skip


class AttentionBackward(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32), ("reserved", ctypes.c_int32), ("fwd", Attention),
        *((n, TensorView) for n in ("dout", "dlse", "dq", "dk", "dv", "dsinks")),
    )  # fmt: skip


class Norm(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32), ("layer", ctypes.c_int32),
        *((n, TensorView) for n in ("x", "residual", "sum", "weight", "bias", "out", "scales", "mean", "rstd")),
        ("eps", ctypes.c_float), ("weight_offset", ctypes.c_float),
    )  # fmt: skip


class NormBackward(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32), ("layer", ctypes.c_int32),
        *((n, TensorView) for n in ("dout", "s", "dsum", "weight", "mean", "rstd", "ds", "dweight", "dbias")),
        ("weight_offset", ctypes.c_float),
    )  # fmt: skip


class Gated(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32), ("activation", ctypes.c_int32),
        *((n, TensorView) for n in ("gate", "up", "out", "dout", "dgate", "dup")),
    )  # fmt: skip


class Rope(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32), ("interleaved", ctypes.c_int32), ("inverse", ctypes.c_int32),
        *((n, TensorView) for n in ("q", "q_out", "k", "k_out", "cos", "sin", "positions", "q_weight", "k_weight", "v",
                                 "k_cache", "v_cache", "slots")),
        ("eps", ctypes.c_float), ("weight_offset", ctypes.c_float),
    )  # fmt: skip


def attention(q: Tensor, **numbers: Any) -> Attention:
    """A descriptor without its tensors."""
    numbers = {"scale": q.shape[-1] ** -0.5, "window_left": -1, "window_right": -1} | numbers
    return Attention(struct_size=ctypes.sizeof(Attention), **numbers)


def fill(desc: Any, **tensors: Tensor | None) -> Any:
    for name, t in tensors.items():
        setattr(desc, name, view(t))
    return desc


def view(t: Tensor | None) -> TensorView:
    r = TensorView()
    if t is None:
        return r
    if t.dim() > MAX_DIMS:
        raise ValueError(f"a tensor has {t.dim()} dimensions, at most {MAX_DIMS} are known")
    r.data, r.ndim, r.dtype = t.data_ptr(), t.dim(), DTYPES.get(t.dtype, 0)
    for i, (n, s) in enumerate(zip(t.shape, t.stride(), strict=True)):
        r.size[i], r.stride[i] = n, s
    return r


def run(name: str, desc: ctypes.Structure, workspace: bool = False, **tensors: Tensor | None) -> None:
    """fastops_cuda_<name> of the emulated library. A workspace of exactly the bytes asked for."""
    lib = ctypes.CDLL(str(_ops.FOLDER / "libfastops_emulated.so"))
    message = ctypes.create_string_buffer(MESSAGE)
    env = Env(struct_size=ctypes.sizeof(Env), message=ctypes.cast(message, ctypes.c_char_p),
              arch=int(os.environ.get("FASTOPS_EMULATOR_ARCH", "80")))  # fmt: skip
    desc.struct_size = ctypes.sizeof(desc)
    fill(desc, **tensors)
    if workspace:
        need = ctypes.c_size_t()
        ask = getattr(lib, f"fastops_cuda_{name.removesuffix('_fwd')}_workspace")
        assert ask(ctypes.byref(desc), ctypes.byref(env), ctypes.byref(need)) == 0, message.value
        scratch = torch.empty(need.value, dtype=torch.uint8)
        env.workspace, env.workspace_size = scratch.data_ptr(), need.value
    status = getattr(lib, f"fastops_cuda_{name}")(ctypes.byref(desc), ctypes.byref(env))
    assert status == 0, message.value


def op(name: str, *args: Any, **options: Any) -> Any:
    """torch.ops.fastops.<name> on CPU tensors, emulated; what it refuses as the exception that callers see."""
    function = getattr(torch.ops.fastops, name)

    def emulated(*args: Any, **options: Any) -> Any:
        with _cuda.emulated():
            return function(*args, **options)

    try:
        return both.run(name, emulated, function, args, options)
    except RuntimeError as error:
        raise translate(error) from None


def variant() -> str:
    """The kernel that ran last."""
    return _ops.control.last_variant()
