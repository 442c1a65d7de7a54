"""The CUDA kernels against torch's own, FlashInfer's and Liger's on the same GPU, in interleaved runs.

python bench/gpu.py [--json FILE] [--small | --dry-run]

--small: tiny shapes, once each (for compute-sanitizer). --dry-run: tiny shapes on CPU tensors through the emulator, no
times: shows on a machine without a GPU that this script works.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_rivals as rivals
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastops
from fastops import kv

Ways = dict[str, Callable[[], Any]]


def sdpa(q: Any, k: Any, v: Any, backend: SDPBackend, causal: bool) -> Callable[[], Any]:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))

    def run() -> Any:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)

    return run


def attention_cases(device: str, small: bool) -> list[tuple[str, float, float, Ways]]:
    """(name, flops, bytes, ways) of prefill and decode."""
    out = []
    for dtype in (torch.bfloat16, torch.float16):
        prefill = [(2, 2048, 32, 8, 128), (1, 8192, 32, 8, 128), (4, 4096, 16, 16, 64)]
        for b, s, hq, hkv, d in [(1, 40, 4, 2, 64)] if small else prefill:
            q, k, v = (torch.randn(b, s, h, d, device=device, dtype=dtype) for h in (hq, hkv, hkv))
            ways: Ways = {"fastops": lambda q=q, k=k, v=v: fastops.attention(q, k, v, causal=True)}
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
                ways[f"torch {backend.name.lower()}"] = sdpa(q, k, v, backend, True)
            ways |= rivals.prefill(q, k, v)
            name = f"prefill causal B{b} H{hq}/{hkv} S{s} D{d} {dtype}"
            out.append((name, 2.0 * b * hq * s * s * d, 2.0 * b * s * d * (2 * hq + 2 * hkv), ways))
        for b, s, hq, hkv, d in [(2, 70, 4, 2, 64)] if small else [(1, 8192, 32, 8, 128), (16, 8192, 32, 8, 128)]:
            page = 16
            q = torch.randn(b, hq, d, device=device, dtype=dtype)
            pages = -(-s // page)
            k, v = (torch.randn(b * pages, page, hkv, d, device=device, dtype=dtype) for _ in range(2))
            table = torch.arange(b * pages, dtype=torch.int32, device=device).view(b, pages)
            lens = torch.full((b,), s, dtype=torch.int32, device=device)
            dense = [t.view(b, -1, hkv, d)[:, :s] for t in (k, v)]
            ways = {
                "fastops": lambda q=q, k=k, v=v, t=table, n=lens: fastops.attention_paged(q, k, v, t, n),
                "torch sdpa": sdpa(q[:, None], *dense, SDPBackend.MATH if small else SDPBackend.FLASH_ATTENTION, False),
            }
            ways |= rivals.decode(q, k, v, table, lens)
            out.append(
                (f"decode B{b} H{hq}/{hkv} KV{s} D{d} {dtype}", 4.0 * b * hq * s * d, 4.0 * b * s * hkv * d, ways)
            )
    return out


def quantised_cases(device: str, small: bool) -> list[tuple[str, float, float, Ways]]:
    """Decode on quantised caches, against our own bf16 cache."""
    out = []
    b, s, hq, hkv, d, page = (2, 64, 4, 2, 64, 32) if small else (16, 8192, 32, 8, 128, 64)
    pages = -(-s // page)
    table = torch.arange(b * pages, dtype=torch.int32, device=device).view(b, pages)
    lens = torch.full((b,), s, dtype=torch.int32, device=device)
    q = torch.randn(b, hq, d, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(b * pages, page, hkv, d, device=device, dtype=torch.bfloat16) for _ in range(2))
    size = 4.0 * b * s * hkv * d
    for name, bits in (("fp8_token", 8), ("kv4", 4)):
        cache = kv.PagedCache(name, b * pages, page, hkv, d, dtype=torch.bfloat16, device=device)
        zero = torch.zeros(b, dtype=torch.int32, device=device)
        cu = torch.arange(b + 1, dtype=torch.int32, device=device) * s
        kv.append(
            cache, *(torch.randn(b * s, hkv, d, device=device, dtype=torch.bfloat16) for _ in range(2)), table, zero, cu
        )
        ways: Ways = {
            "fastops": lambda c=cache: fastops.attention_paged(q, c.k, c.v, table, lens, quant=c.quant),
            "fastops bf16": lambda: fastops.attention_paged(q, k, v, table, lens),
        }
        out.append((f"decode {name} B{b} H{hq}/{hkv} KV{s} D{d}", 4.0 * b * hq * s * d, size * bits / 16, ways))
    return out


def backward_cases(device: str, small: bool) -> list[tuple[str, float, float, Ways]]:
    """Forward and backward of attention, by autograd."""
    out = []
    for b, s, hq, hkv, d in [(1, 40, 4, 2, 64)] if small else [(2, 4096, 32, 8, 128), (4, 4096, 16, 16, 64)]:
        q, k, v = (
            torch.randn(b, s, h, d, device=device, dtype=torch.bfloat16, requires_grad=True) for h in (hq, hkv, hkv)
        )

        def run(f: Callable[[], Any], leaves: Any = (q, k, v)) -> Any:
            with torch.enable_grad():
                return torch.autograd.grad(f().sum(), leaves)

        ours = lambda q=q, k=k, v=v: fastops.attention(q, k, v, causal=True)  # noqa: E731
        ways: Ways = {"fastops": lambda f=ours, r=run: r(f)}
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            theirs = sdpa(q, k, v, backend, True)
            ways[f"torch {backend.name.lower()}"] = lambda f=theirs, r=run: r(f)
        name = f"forward and backward causal B{b} H{hq}/{hkv} S{s} D{d}"
        out.append((name, 7.0 * b * hq * s * s * d, 2.0 * b * s * d * (6 * hq + 6 * hkv), ways))
    return out


def int4_cases(device: str, small: bool) -> list[tuple[str, float, float, Ways]]:
    out = []
    for n, k in [(136, 256)] if small else [(4096, 4096), (14336, 4096), (4096, 14336)]:
        dense = torch.randn(n, k, device=device, dtype=torch.float16)
        weight = fastops.int4.quantize(dense.float().cpu(), group_size=128).to(device)
        for m in (1, 20) if small else (1, 8, 16, 32, 64, 128, 1024, 4096):
            x = torch.randn(m, k, device=device, dtype=torch.float16)
            ways: Ways = {
                "fastops": lambda x=x, w=weight: fastops.int4_linear(x, w),
                "cublas fp16": lambda x=x, w=dense: F.linear(x, w),
            }
            ways["fastops int8"] = lambda x=x, w=weight: fastops.int4_linear(x, w, activations="int8")
            out.append((f"int4_linear M{m} N{n} K{k}", 2.0 * m * n * k, n * k / 2 + 2.0 * m * (n + k), ways))
    return out


def fused_cases(device: str, small: bool) -> list[tuple[str, float, float, Ways]]:
    out = []
    for rows, n in [(3, 256)] if small else [(32, 4096), (8192, 4096), (4096, 14336)]:
        x, r = (torch.randn(rows, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        w = torch.randn(n, device=device, dtype=torch.bfloat16)
        y = torch.empty_like(x)
        half = torch.empty(rows, n // 2, device=device, dtype=torch.bfloat16)
        norm = torch.compile(lambda x, w: F.rms_norm(x, (x.shape[-1],), w)) if not small else None
        gate = torch.compile(lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]) if not small else None
        ways: Ways = {
            "fastops": lambda x=x, w=w, y=y: fastops.rms_norm(x, w, out=y),
            "copy": lambda x=x, y=y: y.copy_(x),
        }
        if norm is not None:
            ways["torch.compile"] = lambda x=x, w=w, f=norm: f(x, w)
        ways |= rivals.rms_norm(x, w, y)
        out.append((f"rms_norm {rows}x{n}", 0.0, 4.0 * rows * n, ways))
        ways = {"fastops": lambda x=x, r=r, w=w: fastops.fused_add_rms_norm(x, r, w)}
        ways |= rivals.fused_add_rms_norm(x, r, w)
        out.append((f"fused_add_rms_norm {rows}x{n}", 0.0, 8.0 * rows * n, ways))
        ways = {"fastops": lambda x=x, h=half: fastops.silu_and_mul(x, out=h)}
        if gate is not None:
            ways["torch.compile"] = lambda x=x, f=gate: f(x)
        ways |= rivals.silu_and_mul(x, half)
        out.append((f"silu_and_mul {rows}x{n}", 0.0, 3.0 * rows * n, ways))
    return out


def milliseconds(run: Callable[[], Any], flush: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()  # nothing of the inputs is left in L2
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure(ways: Ways, repeats: int) -> dict[str, float]:
    """Median milliseconds of each way, interleaved; ways that cannot run are left out."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    able: Ways = {}
    for name, run in ways.items():
        try:
            run()
            torch.cuda.synchronize()
            able[name] = run
        except Exception as error:  # a rival may raise what it likes
            if name == "fastops":
                raise
            print(f"    {name} cannot run: {type(error).__name__}: {(str(error) or ' ').splitlines()[0]}")
    times: dict[str, list[float]] = {name: [] for name in able}
    for _ in range(repeats):
        for name, run in able.items():
            times[name].append(milliseconds(run, flush))
    return {name: statistics.median(t) for name, t in times.items()}


CASES = (attention_cases, quantised_cases, backward_cases, int4_cases, fused_cases)


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--json", help="keep the results in this file")
    p.add_argument("--small", action="store_true", help="tiny shapes, once each")
    p.add_argument("--dry-run", action="store_true", help="tiny shapes on CPU tensors through the emulator")
    p.add_argument("--repeats", type=int, default=20)
    args = p.parse_args()
    small, device = args.small or args.dry_run, "cpu" if args.dry_run else "cuda"
    provider = "cuda-emulated" if args.dry_run else "cuda"
    names = ("attention", "attention_paged", "int4_linear", "rms_norm", "fused_add_rms_norm", "silu_and_mul")
    results = []
    with torch.no_grad(), fastops.override(**dict.fromkeys(names, provider)):
        for name, flops, size, ways in (c for f in CASES for c in f(device, small)):
            print(name)
            if small:
                for way, run in ways.items():
                    if way.startswith("fastops"):
                        run()
                if not args.dry_run:
                    torch.cuda.synchronize()
                continue
            times = measure(ways, args.repeats)
            for way, ms in times.items():
                rate = f"{flops / ms / 1e9:8.1f} TFLOP/s" if flops > size * 100 else f"{size / ms / 1e6:8.1f} GB/s"
                print(f"    {way:24} {ms:9.4f} ms  {rate}  {ms / times['fastops']:5.2f}x of fastops' time")
            results.append({"case": name, "flops": flops, "bytes": size, "milliseconds": times})
    if args.json and not small:
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "fastops": fastops.__version__}
        Path(args.json).write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
