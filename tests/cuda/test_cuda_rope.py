"""The CUDA rope, with norms and into a paged cache, emulated on CPU tensors, against the reference."""

import pytest
import torch

import fastops
from fastops.ops.rope import _qk_reference, _rope_reference
from fastops.testing import assert_matches, guarded
from tests.cuda import capi
from tests.cuda.capi import op

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORCE = {"apply_rope": "cuda-emulated", "qk_norm_rope": "cuda-emulated"}


def wide(*tensors):
    return [None if t is None else t.double() if t.is_floating_point() else t for t in tensors]


def near(got, exact, same):
    for g, e, s, name in zip(got, exact, same, "qk", strict=True):
        if g is not None:
            assert_matches(g, e, s, factor=3, what=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("d", "r"), [(64, 64), (128, 128), (80, 80), (96, 32), (6, 6), (256, 256)])
def test_apply_rope(dtype, interleaved, d, r):
    """Sixteen bytes a thread, and element by element: whole and partial rotation, odd sizes."""
    q, k = torch.randn(2, 5, 3, d).to(dtype), torch.randn(2, 5, 1, d).to(dtype)
    cos, sin = torch.randn(5, r // 2), torch.randn(5, r // 2)
    with torch.no_grad(), fastops.override(**FORCE):
        got = fastops.apply_rope(q, k, cos, sin, interleaved=interleaved)
        only, none = fastops.apply_rope(q, None, cos, sin, interleaved=interleaved)
        in_place = q.clone()
        fastops.apply_rope(in_place, None, cos, sin, interleaved=interleaved, out=(in_place, None))
    exact = _rope_reference(*wide(q, k, cos, sin), interleaved=interleaved)
    near(got, exact, _rope_reference(q, k, cos, sin, interleaved=interleaved))
    assert torch.equal(only, got[0])
    assert none is None
    assert torch.equal(in_place, got[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 40])
def test_qk_norm_rope_with_positions_into_a_cache(dtype, d):
    q, k, v = torch.randn(6, 4, d).to(dtype), torch.randn(6, 2, d).to(dtype), torch.randn(6, 2, d + 8).to(dtype)
    qw, kw = torch.randn(d).to(dtype), torch.randn(d)
    cos, sin = torch.randn(9, d // 2).to(dtype), torch.randn(9, d // 2).to(dtype)
    positions = torch.tensor([8, 0, 3, 3, 1, 7])
    slots = torch.tensor([5, -1, 0, 15, 9, 2])
    caches = [[torch.full((4, 4, 2, n), 7.0).to(dtype) for n in (d, d + 8)] for _ in range(2)]
    options = {"eps": 1e-5, "weight_offset": 1.0, "positions": positions}
    with torch.no_grad(), fastops.override(**FORCE):
        got = fastops.qk_norm_rope(
            q, k, qw, kw, cos, sin, v=v, slots=slots, k_cache=caches[0][0], v_cache=caches[0][1], **options
        )
    exact = _qk_reference(*wide(q, k, qw, kw, cos, sin), **options)
    same = _qk_reference(q, k, qw, kw, cos, sin, **options)
    near(got, exact, same)
    flat_k, flat_v = (c.view(16, 2, -1) for c in caches[0])
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert torch.equal(flat_k[slot], got[1][token])
            assert torch.equal(flat_v[slot], v[token])
    untouched = [i for i in range(16) if i not in slots.tolist()]
    assert bool((flat_k[untouched] == 7).all())
    assert bool((flat_v[untouched] == 7).all())


def test_inverse_undoes_and_positions_outside_give_nan():
    q, cos_sin = torch.randn(4, 2, 64), torch.randn(4, 32)
    cos, sin = cos_sin.cos(), cos_sin.sin()
    turned, _ = op("apply_rope", q, None, cos, sin)
    back, _ = op("apply_rope", turned, None, cos, sin, inverse=True)
    torch.testing.assert_close(back, q)
    bad, _ = op("apply_rope", q, None, cos, sin, positions=torch.tensor([0, 99, -1, 3]))
    assert bool(torch.isnan(bad[1:3]).all())
    assert bool(torch.isfinite(bad[[0, 3]]).all())
    cache = guarded(torch.zeros(1, 4, 2, 64), True)  # a slot behind the cache goes nowhere
    capi.run("rope", capi.Rope(eps=1e-6), q=q, q_out=torch.empty_like(q), k=q, cos=cos, sin=sin, k_cache=cache,
             slots=torch.tensor([0, 4, 1 << 40, -5]))  # fmt: skip
    assert bool((cache[0, 1:] == 0).all())


@pytest.mark.parametrize("end", [True, False])
def test_guard_pages(end):
    for d in (64, 36):
        q, k, v = (guarded(torch.randn(3, h, d).half(), end) for h in (3, 2, 2))
        cos, sin, w = (guarded(t.half(), end) for t in (torch.randn(3, d // 2), torch.randn(3, d // 2), torch.randn(d)))
        caches = [guarded(torch.zeros(2, 2, 2, d).half(), end) for _ in range(2)]
        capi.run("rope", capi.Rope(eps=1e-6), q=q, k=k, cos=cos, sin=sin, q_weight=w, k_weight=w, v=v, k_cache=caches[0],
                 v_cache=caches[1], slots=guarded(torch.tensor([3, 0, -1]), end), q_out=guarded(torch.empty_like(q), end))  # fmt: skip
