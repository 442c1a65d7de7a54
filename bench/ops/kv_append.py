"""kv_append: new tokens of 8 heads of 128 into a paged cache, as numbers and as codes, against the same in torch's
operators (an indexed assignment; for codes fastops' own plain-torch reference)."""

from __future__ import annotations

from typing import Any

import torch

import fastops
from fastops import kv
from fastops.ops.kv_append import reference

from ..case import DTYPES, Case
from ..shapes import Shape, rows_of

H, D, PAGE = 8, 128, 32
FORMATS = ("plain", "int8", "fp8", "kv4", "kivi2")


def cases(shapes: list[Shape], dtypes: list[str]) -> list[Case]:
    tokens = sorted({1, *(m for m, _ in rows_of(shapes))})
    return [
        case(m, name, form) for m in tokens for name in dtypes for form in FORMATS if name == "bf16" or form == "plain"
    ]


def case(m: int, name: str, form: str) -> Case:
    dtype = DTYPES[name]
    size = torch.empty(0, dtype=dtype).element_size()
    pages = -(-m // PAGE) + 1
    bits = 8 * size if form == "plain" else kv.FORMATS[form].k.bits
    traffic = 2.0 * m * H * D * (size + bits / 8)
    table, lens = torch.arange(pages, dtype=torch.int32)[None], torch.zeros(1, dtype=torch.int32)

    def make() -> Any:
        k, v = (torch.randn(m, H, D).to(dtype) for _ in range(2))
        if form == "plain":
            return k, v, *(torch.zeros(pages, PAGE, H, D, dtype=dtype) for _ in range(2)), None
        cache = kv.PagedCache(form, pages, PAGE, H, D, dtype=dtype, recent=32)
        return k, v, cache.k, cache.v, cache.quant

    def start(x: Any) -> Any:  # KIVI's window remembers how much it has packed
        if x[4] is not None and x[4].packed_lens is not None:
            x[4].packed_lens.zero_()
        return x

    def assigned(x: Any) -> Any:
        k, v, k_cache, v_cache, quant = start(x)
        if quant is not None:
            return reference(k, v, k_cache, v_cache, table, lens, quant=quant)
        at = torch.arange(m)
        page, slot = table[0, at // PAGE].long(), at % PAGE
        k_cache[page, slot], v_cache[page, slot] = k, v
        return lens + m

    run = {
        "fastops": lambda x: fastops.kv_append(*start(x)[:4], table, lens, quant=x[4]),
        "torch": assigned,
    }
    kind = "latency" if m == 1 else "copy"
    return Case("kv_append", f"{m} tokens H{H} D{D} {form}", name, kind, 0.0, traffic, make, run)
