"""attention_paged on quantised caches by the CUDA kernel, emulated (and on a GPU where there is one)."""

import ctypes
import dataclasses

import pytest
import torch

import fastops
from fastops import kv
from fastops.testing import assert_matches, guarded
from tests.cuda import capi
from tests.cuda.capi import op
from tests.cuda.test_cuda_attention import DTYPES, PROVIDERS
from tests.ops.test_attention_kv import exact, filled, same


@pytest.fixture(params=PROVIDERS)
def run(request):
    device = "cuda" if request.param == "cuda" else "cpu"

    def there(x):
        return x.to(device) if isinstance(x, torch.Tensor) else x

    def call(q, cache, *index, **options):
        quant = dataclasses.replace(
            cache.quant, **{f.name: there(getattr(cache.quant, f.name)) for f in dataclasses.fields(cache.quant)}
        )
        with torch.no_grad(), fastops.override(attention_paged=request.param):
            out = fastops.attention_paged(
                *map(there, (q, cache.k, cache.v, *index)), quant=quant, return_lse=True,
                **{n: there(x) for n, x in options.items()},
            )  # fmt: skip
        return tuple(t.cpu() for t in out)

    return call


@pytest.mark.parametrize("name", kv.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lens", "queries"), [([1, 300, 33], [1, 1, 1]), ([50, 120, 9, 0], [50, 1, 4, 0])])
def test_matches_what_the_codes_stand_for(run, name, dtype, lens, queries):
    cache, table, have = filled(name, lens, dtype=dtype, chunks=(0.4, 1.0))
    q = torch.randn(sum(queries), 4, 64).to(dtype)
    cu = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    for options in ({"causal": True}, {"causal": True, "window": (40, -1), "sinks": torch.randn(4)}):
        got = run(q, cache, table, have, cu, **options)
        want, near = exact(q, cache, table, have, cu, **options), same(q, cache, table, have, cu, **options)
        for g, e, s, what in zip(got, want, near, ("out", "lse"), strict=True):
            assert_matches(g, e, s, factor=4, what=f"{what} {name} {options}")


@pytest.mark.parametrize("name", ["fp8", "kv4", "kivi2"])
@pytest.mark.parametrize(("d", "dv", "page"), [(8, 8, 32), (72, 40, 64), (256, 128, 32)])
def test_shapes(run, name, d, dv, page):
    if name == "kivi2" and dv % 32:
        dv = 64
    cache, table, have = filled(name, [100, 40], page=page, d=d, dv=dv, dtype=torch.float16)
    q = torch.randn(2, 6, d).half()
    want, near = exact(q, cache, table, have, None), same(q, cache, table, have, None)
    for g, e, s in zip(run(q, cache, table, have), want, near, strict=True):
        assert_matches(g, e, s, factor=4, what=name)


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("name", ["int8", "kv4", "kivi2"])
def test_guard_pages_and_bad_indices(name, end):
    cache, table, have = filled(name, [70, 45], dtype=torch.float16)
    q = guarded(torch.randn(2, 4, 64).half(), end)

    def call(table, **changed):
        tensors = {f.name: getattr(cache.quant, f.name) for f in dataclasses.fields(cache.quant)} | changed
        tensors = {n: guarded(t, end) if isinstance(t, torch.Tensor) else t for n, t in tensors.items()}
        kv, out = (
            capi.KVQuant(k_bits=tensors.pop("k_bits"), v_bits=tensors.pop("v_bits")),
            guarded(torch.zeros_like(q), end),
        )
        kv.struct_size = ctypes.sizeof(kv)
        desc = capi.attention(q, kv=ctypes.addressof(capi.fill(kv, **tensors)))
        capi.run("attention_fwd", desc, True, q=q, k=guarded(cache.k, end), v=guarded(cache.v, end), out=out,
                 block_table=guarded(table, end), seq_lens=guarded(have, end))  # fmt: skip
        return out

    good = call(table)
    broken = table.clone()
    broken[0, 1] = 999
    got = call(broken)
    if name != "kivi2":  # a page behind packed_lens is never looked up
        assert bool(torch.isnan(got[0]).all())
    assert torch.equal(got[1], good[1])
    if cache.quant.packed_lens is not None:
        wrong = cache.quant.packed_lens.clone()
        wrong[1] = 1000
        got = call(table, packed_lens=wrong)
        assert torch.equal(got[0], good[0])
        assert bool(torch.isnan(got[1]).all())


def test_scales_of_a_plain_cache_are_refused():
    q, cache = torch.randn(1, 2, 64).half(), torch.randn(2, 16, 2, 64).half()
    index = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="k_scale is given, but k has q's dtype"):
        op("attention_paged", q, cache, cache, *index, k_scale=torch.ones(1))
