"""Other kernel libraries as candidates of bench/gpu.py, where their wheels were carried to the machine: FlashInfer and
Liger. A library that is not there or does not load is named once and left out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
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
    lib = library("flashinfer")
    if lib is None or not q.is_cuda:
        return {}
    b, s, hq, d = q.shape
    wrapper = lib.BatchPrefillWithRaggedKVCacheWrapper(
        torch.zeros(256 << 20, dtype=torch.uint8, device=q.device), "NHD"
    )
    starts = torch.arange(b + 1, dtype=torch.int32, device=q.device) * s
    wrapper.plan(starts, starts, hq, k.shape[2], d, causal=True, q_data_type=q.dtype)
    rows = [t.flatten(0, 1) for t in (q, k, v)]
    return {"flashinfer": lambda: wrapper.run(*rows)}


def decode(q: Any, k: Any, v: Any, table: Any, lens: Any) -> Ways:
    """One query [B, H, D] of each sequence on a paged cache [P, page, Hkv, D] whose pages lie in order."""
    lib = library("flashinfer")
    if lib is None or not q.is_cuda:
        return {}
    page, hkv = k.shape[1], k.shape[2]
    pages = (lens + page - 1) // page
    starts = torch.cat((pages.new_zeros(1), pages.cumsum(0))).int()
    wrapper = lib.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(256 << 20, dtype=torch.uint8, device=q.device), "NHD", use_tensor_cores=q.shape[1] // hkv > 2
    )
    wrapper.plan(starts, table.flatten(), (lens - 1) % page + 1, q.shape[1], hkv, q.shape[2], page, q_data_type=q.dtype)
    return {"flashinfer": lambda: wrapper.run(q, (k, v))}


def rms_norm(x: Any, w: Any, y: Any) -> Ways:
    ways: Ways = {}
    if not x.is_cuda:
        return ways
    if (lib := library("flashinfer")) is not None:
        ways["flashinfer"] = lambda: lib.norm.rmsnorm(x, w, out=y)
    if (liger := library("liger_kernel.transformers.functional")) is not None:
        ways["liger"] = lambda: liger.liger_rms_norm(x, w, 1e-6, 0.0, "llama", False)
    return ways


def fused_add_rms_norm(x: Any, residual: Any, w: Any) -> Ways:
    ways: Ways = {}
    if not x.is_cuda:
        return ways
    if (lib := library("flashinfer")) is not None:
        ways["flashinfer"] = lambda: lib.norm.fused_add_rmsnorm(x, residual, w)
    if (liger := library("liger_kernel.transformers.functional")) is not None:
        ways["liger"] = lambda: liger.liger_fused_add_rms_norm(x, residual, w, 1e-6, 0.0, "llama", False)
    return ways


def silu_and_mul(x: Any, out: Any) -> Ways:
    ways: Ways = {}
    if not x.is_cuda:
        return ways
    if (lib := library("flashinfer")) is not None:
        ways["flashinfer"] = lambda: lib.activation.silu_and_mul(x, out)
    if (liger := library("liger_kernel.transformers.functional")) is not None:
        gate, up = (t.contiguous() for t in x.chunk(2, -1))  # it takes two tensors: the same bytes
        ways["liger"] = lambda: liger.liger_swiglu(gate, up)
    return ways
