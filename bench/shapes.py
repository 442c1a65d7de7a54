"""Shapes of real models, and the named sets ``--shapes`` takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Model:
    """Attention geometry of a model, from its published config."""

    hq: int
    hkv: int
    d: int
    window: int = -1


MODELS = {
    "llama3-8b": Model(32, 8, 128),
    "qwen3-8b": Model(32, 8, 128),
    "qwen3-0.6b": Model(16, 8, 128),
    "gemma3-270m": Model(4, 1, 256, window=512),
    "gemma3-4b": Model(8, 4, 256, window=1024),
    "mistral-7b": Model(32, 8, 128, window=4096),
    "qwen3-235b": Model(64, 4, 128),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """batch, queries and keys per sequence, heads, head size; `phase` is one of PHASES, or call."""

    b: int
    sq: int
    sk: int
    hq: int
    hkv: int
    d: int
    phase: str
    window: int = -1

    @property
    def name(self) -> str:
        window = f" w{self.window}" if self.window >= 0 else ""
        return f"{self.phase} B{self.b} H{self.hq}/{self.hkv} S{self.sq}x{self.sk} D{self.d}{window}"


def of_model(m: Model, phase: str) -> list[Shape]:
    if phase == "prefill":
        return [Shape(1, s, s, m.hq, m.hkv, m.d, phase, m.window) for s in (512, 2048)]
    if phase == "decode":
        return [Shape(b, 1, 4096, m.hq, m.hkv, m.d, phase) for b in (1, 8)]
    if phase == "verify":  # tokens that a smaller model drafted
        return [Shape(1, s, 4096, m.hq, m.hkv, m.d, phase) for s in (4, 8)]
    return [Shape(4, 64, 2048, m.hq, m.hkv, m.d, phase)]


PHASES = ("prefill", "decode", "verify", "mixed")
BARS = [
    Shape(1, 1024, 1024, 32, 8, 128, "prefill"),
    Shape(1, 2048, 2048, 16, 16, 64, "prefill"),
    Shape(1, 512, 512, 4, 1, 256, "prefill"),
    Shape(1, 1, 4096, 32, 8, 128, "decode"),
    Shape(8, 1, 4096, 32, 8, 128, "decode"),
    Shape(32, 1, 1024, 8, 8, 64, "decode"),
    Shape(1, 1, 16, 32, 8, 64, "call"),
]
QUICK = [Shape(1, 512, 512, 8, 2, 64, "prefill"), Shape(1, 1, 2048, 8, 2, 64, "decode"), BARS[-1]]
TINY = [Shape(1, 16, 16, 2, 1, 16, "prefill"), Shape(2, 1, 32, 2, 1, 16, "decode"), Shape(1, 1, 8, 2, 1, 16, "call")]


def named(text: str) -> list[Shape]:
    """The shapes of "bars", "quick", "tiny", a model, or model:phase; several joined by commas.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    out: list[Shape] = []
    for part in text.split(","):
        name, _, phase = part.strip().partition(":")
        if name in ("bars", "quick", "tiny"):
            out += {"bars": BARS, "quick": QUICK, "tiny": TINY}[name]
        elif name in MODELS and phase in ("", *PHASES):
            for p in (phase,) if phase else PHASES:
                out += of_model(MODELS[name], p)
        else:
            known = ", ".join(["bars", "quick", "tiny", *MODELS])
            raise ValueError(f"--shapes: unknown {part.strip()!r}; known: {known}, and MODEL:{'|'.join(PHASES)}")
    return list(dict.fromkeys(out))


def rows_of(shapes: list[Shape]) -> list[tuple[int, int]]:
    """Rows and columns for operators that work along rows: a decoding batch and a prefill of a model 4096 wide."""
    if shapes and shapes[0].d == 16:
        return [(3, 32)]
    return [(32, 4096), (4096, 4096)] if any(s in BARS[:-1] for s in shapes) else [(32, 4096), (1024, 4096)]
