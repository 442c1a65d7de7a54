"""The ratios the project promises (2 threads, an AVX-512 machine), checked by ``fastops bench --check``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bar:
    """`measure` of a case must reach `least`: "share" (of the binding ceiling), "vs:NAME" (times faster than a rival),
    "vs-fp32" (a 16-bit case against the same one in fp32) or "microseconds" (at most, here)."""

    tag: str
    measure: str
    least: float


BARS = [
    Bar("attention-prefill", "vs:torch", 1.4),
    Bar("attention-prefill", "share", 0.80),
    Bar("attention-prefill", "vs-fp32", 1.0),
    Bar("attention-decode", "share", 0.85),
    Bar("paged-decode", "vs:dense", 0.95),
    Bar("paged-decode-shuffled", "vs:dense", 0.75),  # the read itself is that much slower
    Bar("kv-kv4", "vs:bf16", 2.5),
    Bar("int4-float-stream", "share", 0.88),
    Bar("int4-float-stream", "vs:torch", 1.0),
    Bar("int4-float-stream", "vs:onnxruntime", 1.0),
    Bar("int4-int8-stream", "share", 0.88),
    Bar("int4-int8-stream", "vs:onnxruntime", 1.0),
    Bar("int4-float-panel", "share", 0.80),
    Bar("int4-float-panel", "vs:torch", 1.0),
    Bar("int4-float-panel-fp32", "vs:dense", 1.0),
    Bar("int4-float-panel", "vs:onnxruntime", 1.0),
    Bar("int4-int8-panel", "share", 1.7),
    Bar("int4-int8-panel", "vs:onnxruntime", 1.0),
    Bar("fused", "share", 0.85),
    Bar("fused", "vs:torch-compile", 1.0),
    Bar("fused-brief", "vs:copy", 0.85),  # of a copy of as many bytes: 0.5 MiB is too little for a large copy's speed
    Bar("fused-brief", "vs:torch-compile", 1.0),
    Bar("attention-call", "microseconds", 8.0),
]
