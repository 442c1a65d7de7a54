"""How close is close enough: at most twice what torch itself loses at the same precision."""

from __future__ import annotations

import torch
from torch import Tensor

# Room for results that torch happens to hit exactly: a few units in the last place of numbers around 1.
_FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}


def assert_matches(
    actual: Tensor, exact: Tensor, same_precision: Tensor, factor: float = 2.0, what: str = "", least: float = 1e-3
) -> None:
    """|actual - exact| <= factor * max |same_precision - exact| + floor, where `exact` is an fp64 result and
    `same_precision` the one torch computes in actual's dtype. NaN and inf must stand in the same places. The floor is
    some units in the last place of the largest result, or of `least` (1 for a logarithm, whose absolute error is the
    relative one of its argument).

    On failure names the worst coordinate and both values.
    """
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    if actual.numel() == 0:
        return
    a, e, s = actual.double(), exact.double(), same_precision.double()
    odd = ~torch.isfinite(e)
    if odd.any() or not torch.isfinite(a).all():
        same = torch.where(torch.isnan(e), torch.isnan(a), (a == e) | torch.isfinite(e) & torch.isfinite(a))
        if not same.all():
            at = tuple((~same).nonzero()[0].tolist())
            raise AssertionError(f"{what} at {at}: {a[at].item()}, expected {e[at].item()}")
    zero = torch.zeros_like(e)
    error = torch.where(odd, zero, (a - e).abs())
    theirs = torch.where(odd | ~torch.isfinite(s), zero, (s - e).abs()).max().item()
    size = torch.where(odd, zero, e.abs()).max().item()
    allowed = factor * theirs + _FLOOR[actual.dtype] * max(size, least)
    if error.max().item() > allowed:
        at = tuple(torch.unravel_index(error.argmax(), error.shape))
        index = tuple(int(i) for i in at)
        raise AssertionError(
            f"{what} at {index}: {a[index].item()}, expected {e[index].item()}; off by {error.max().item():.3g}, "
            f"allowed {allowed:.3g} (torch at this precision is off by {theirs:.3g})"
        )
