"""One module per room of operators, each with ``cases(shapes, dtypes) -> list[Case]``. docs/adding-an-op.md has the
steps."""

from __future__ import annotations

from importlib import import_module

from ..case import Case
from ..shapes import Shape

ROOMS = {
    "rms_norm": "norm",
    "fused_add_rms_norm": "norm",
    "silu_and_mul": "gated",
    "apply_rope": "rope",
    "qk_norm_rope": "rope",
}
NAMES = (
    "attention", "attention_varlen", "attention_paged", "kv_append", "merge_states", "sdpa", "int4_linear", *ROOMS,
    "lut_linear", "linear_cross_entropy", "scale_add",
)  # fmt: skip


def cases(name: str, shapes: list[Shape], dtypes: list[str]) -> list[Case]:
    """An operator's cases."""
    room = ROOMS.get(name)
    found: list[Case] = import_module(f"{__name__}.{room or name}").cases(shapes, dtypes)
    return [c for c in found if room is None or c.op == name]
