"""Other kernel libraries as candidates of bench/gpu.py, where their wheels were carried to the machine: FlashInfer and
Liger. A library that is not there or does not load is named once and left out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

Ways = dict[str, Callable[[], Any]]


@cache
def library(name: str) -> Any:
    """The module, or None; says why not."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a foreign library may raise on its way up
        print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return None


def prefill(q: Any, k: Any, v: Any) -> Ways:
    """Causal attention of [B, S, H, D]; FlashInfer's ragged wrapper, planned once."""
    lib = library("flashinfer") if q.is_cuda else None
    if lib is None:
        return {}
    b, s, hq, d = q.shape
    wrapper = lib.BatchPrefillWithRaggedKVCacheWrapper(_workspace(q), "NHD")
    starts = torch.arange(b + 1, dtype=torch.int32, device=q.device) * s
    wrapper.plan(starts, starts, hq, k.shape[2], d, causal=True, q_data_type=q.dtype)
    rows = [t.flatten(0, 1) for t in (q, k, v)]
    return {"flashinfer": lambda: wrapper.run(*rows)}


def decode(q: Any, k: Any, v: Any, table: Any, lens: Any) -> Ways:
    """One query [B, H, D] of each sequence on a paged cache [P, page, Hkv, D] whose pages lie in order."""
    lib = library("flashinfer") if q.is_cuda else None
    if lib is None:
        return {}
    page, hkv = k.shape[1], k.shape[2]
    pages = (lens + page - 1) // page
    starts = torch.cat((pages.new_zeros(1), pages.cumsum(0))).int()
    wrapper = lib.BatchDecodeWithPagedKVCacheWrapper(_workspace(q), "NHD", use_tensor_cores=q.shape[1] // hkv > 2)
    wrapper.plan(starts, table.flatten(), (lens - 1) % page + 1, q.shape[1], hkv, q.shape[2], page, q_data_type=q.dtype)
    return {"flashinfer": lambda: wrapper.run(q, (k, v))}


def _workspace(q: Any) -> torch.Tensor:
    return torch.zeros(256 << 20, dtype=torch.uint8, device=q.device)


def _both(x: Any, flashinfer: Callable[[Any], Any], liger: Callable[[Any], Any]) -> Ways:
    """Both libraries' ways, each a function of the library, for tensors on a GPU."""
    ways: Ways = {}
    if x.is_cuda:
        for name, module, run in (
            ("flashinfer", "flashinfer", flashinfer), ("liger", "liger_kernel.transformers.functional", liger),
        ):  # fmt: skip
            if (lib := library(module)) is not None:
                ways[name] = partial(run, lib)
    return ways


def rms_norm(x: Any, w: Any, y: Any) -> Ways:
    return _both(
        x, lambda lib: lib.norm.rmsnorm(x, w, out=y), lambda lib: lib.liger_rms_norm(x, w, 1e-6, 0.0, "llama", False)
    )


def fused_add_rms_norm(x: Any, residual: Any, w: Any) -> Ways:
    return _both(
        x,
        lambda lib: lib.norm.fused_add_rmsnorm(x, residual, w),
        lambda lib: lib.liger_fused_add_rms_norm(x, residual, w, 1e-6, 0.0, "llama", False),
    )


def silu_and_mul(x: Any, out: Any) -> Ways:
    """Liger takes gate and up as two tensors: the same bytes."""
    gate, up = (t.contiguous() for t in x.chunk(2, -1))
    return _both(x, lambda lib: lib.activation.silu_and_mul(x, out), lambda lib: lib.liger_swiglu(gate, up))
