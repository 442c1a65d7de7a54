"""What a call costs before any work: the ladder from the operator to the public function, at one query and 16 keys.

python -m fastops.bench.overhead
"""

from __future__ import annotations

import torch

import fastops

from .protocol import measure


def main() -> None:
    q, k = torch.randn(1, 1, 32, 64), torch.randn(1, 16, 8, 64)
    op = torch.ops.fastops.attention.default
    ways = {
        "torch.ops.fastops.attention": lambda x: op(q, k, k),
        "fastops.attention": lambda x: fastops.attention(q, k, k),
        "torch sdpa": lambda x: torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2), enable_gqa=True
        ),
    }
    with torch.inference_mode():
        for name, t in measure(ways, [None], 3.0).items():
            print(f"{name:<30}{t.median * 1e6:6.2f} us (+- {t.spread:.0%})")


if __name__ == "__main__":
    main()
