"""Where there is a GPU, every emulated call of these tests runs on it as well, and the results are compared."""

import dataclasses
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_leaves, tree_map

from fastops import Int4Weight, _cuda, dispatch

GPU = "cuda" if torch.cuda.is_available() and not _cuda.GPUS.missing else None

paused = False  # where no kernel runs, emulated or not


def to(device):
    """Copies there: tensors (one twice among the arguments stays one), and what holds tensors."""
    copies = {}

    def copy(x):
        if isinstance(x, torch.Tensor):
            if id(x) not in copies:
                copies[id(x)] = x.detach().to(device, copy=True)
            return copies[id(x)]
        if isinstance(x, Int4Weight):
            return x.to(device)
        if dataclasses.is_dataclass(x):
            return dataclasses.replace(x, **{f.name: copy(getattr(x, f.name)) for f in dataclasses.fields(x)})
        return x

    return copy


def near(got, want, what):
    """Two machines that round and sum in other orders."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    if not want.numel():
        return
    if want.dtype == torch.int8:
        relative, step = 0.0, 1.0
    elif want.dtype == torch.float8_e4m3fn:  # one code
        relative, step = 0.126, 2.0**-9
    elif want.is_floating_point():
        relative = max(4 * torch.finfo(want.dtype).eps, 1e-4)
        step = relative * max(1.0, float(want.float().nan_to_num(0.0, 0.0, 0.0).abs().max()))
    else:
        relative = step = 0.0
    torch.testing.assert_close(
        got.cpu().float(), want.float(), rtol=relative, atol=step, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def run(name, emulated, on_gpu, args, options, device=GPU):
    """emulated(*args, **options), compared with on_gpu(...) there, and what both wrote into their arguments."""
    if device is None or paused:
        return emulated(*args, **options)
    there, options_there = tree_map(to(device), (args, options))
    with torch.no_grad():  # first, so that tests see which kernel was emulated
        other = on_gpu(*there, **options_there)
    got = emulated(*args, **options)
    ours, theirs = (tree_leaves(x) for x in ((got, args, options), (other, there, options_there)))
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, torch.Tensor):
            near(b, a.detach(), f"{name} on the GPU")
    return got


@contextmanager
def every_row(device=GPU, provider="cuda"):
    """Each operator's emulated row does that."""
    if device is None:
        yield
        return
    saved = {op: op.rows for op in dispatch.operators.values()}
    for op in saved:
        row, other = op.row("cuda-emulated"), op.row(provider)
        if row is None:
            continue

        def both(*args, _name=op.name, _ours=row.run, _theirs=other.run, **options):
            return run(_name, _ours, _theirs, args, options, device)

        op.rows = [dataclasses.replace(r, run=both) if r is row else r for r in op.rows]
        op._cache.clear()
    try:
        yield
    finally:
        for op, rows in saved.items():
            op.rows = rows
            op._cache.clear()
