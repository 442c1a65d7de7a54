"""The operators' C++ on its way to CUDA kernels: refusals, plain torch behind them, gradients, and what a thread asked for.

There is no GPU to dispatch to here, so CPU tensors are sent to the kernels that torch holds for CUDA tensors.
"""

import copy
import threading
import warnings
from functools import partial

import pytest
import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._pytree import tree_flatten

import fastops
from fastops import _cuda, _ops, int4
from fastops.testing import ROWS_SERVED_BY, assert_matches
from tests.cuda import both
from tests.cuda.capi import op, variant
from tests.cuda.test_cuda_nvrtc import recording

CUDA = DispatchKeySet(DispatchKey.CUDA)


def sent(name, *args, **options):
    """The operator's kernel for CUDA tensors."""
    _cuda.define_plain()
    return getattr(torch.ops.fastops, name).default.redispatch(CUDA, *args, **options)


@pytest.fixture
def emulator_for_refusals():
    """Emulated, and refusals go to plain torch as they do for CUDA tensors."""
    _cuda._warn_once.cache_clear()
    before = _ops.control.set_mode(_ops.control.EMULATE)
    yield
    _ops.control.set_mode(before)


def test_every_operator_with_a_cuda_kernel_is_registered():
    have = {n for n in _ops.plain if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastops::{n}", "CUDA")}
    assert have == {
        "attention", "attention_out", "attention_varlen", "attention_varlen_out", "attention_paged", "attention_paged_out",
        "attention_backward", "attention_varlen_backward", "merge_states", "int4_linear", "int4_linear_out", "rms_norm",
        "rms_norm_out", "fused_add_rms_norm", "layer_norm", "layer_norm_out", "norm", "norm_backward", "silu_and_mul",
        "silu_and_mul_out", "gelu_and_mul", "gelu_and_mul_out", "swiglu", "swiglu_out", "geglu", "geglu_out",
        "gated_backward", "and_mul_backward", "apply_rope", "apply_rope_out", "qk_norm_rope", "qk_norm_rope_out",
    }  # fmt: skip


@pytest.mark.usefixtures("emulator_for_refusals")
def test_refusals_run_plain_torch_and_say_so_once():
    q, mask = torch.randn(1, 5, 2, 64).half(), torch.ones(5, 5).tril().bool()
    want = fastops.dispatch.operators["attention"].row("reference").run(q, q, q, attn_mask=mask, return_lse=True)
    with pytest.warns(fastops.FallbackWarning, match="attn_mask.*plain torch runs instead"):
        got = sent("attention", q, q, q, attn_mask=mask, return_lse=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = sent("attention", q, q, q, attn_mask=mask, return_lse=True)
    for g, a, w in zip(got, again, want, strict=True):
        assert torch.equal(g, w)
        assert torch.equal(a, w)
    sent("attention", q, q, q)
    assert variant() == "sm80"  # what the kernels take is theirs


def operator_calls():
    """Every kind of argument and result: tensors, lists of them, absent ones, numbers, flags, strings; one, many, none."""
    x, y, w, cos = torch.randn(3, 2, 64), torch.randn(3, 2, 64), torch.randn(64), torch.randn(3, 32)
    half = x[None].half()
    packed = int4.quantize(torch.randn(16, 64), 32).packed()
    return [
        ("rms_norm", (x, w), {"eps": 1e-3, "weight_offset": 1.0}), ("layer_norm", (x,), {}),
        ("norm", (x, y, w, None), {"quant": 1, "stats": True}), ("norm_backward", (x, None, y, w, x[..., 0], x[..., 0].abs()), {}),
        ("fused_add_rms_norm", (x.clone(), y.clone(), w), {}), ("rms_norm_out", (x, w), {"out": torch.zeros_like(x)}),
        ("gelu_and_mul", (x,), {"approximate": "none"}), ("swiglu", (x, y), {}), ("gated_backward", (x, y, x, 1), {}),
        ("apply_rope", (x, None, cos, cos), {"interleaved": True}), ("qk_norm_rope", (x, y, w, None, cos, cos), {}),
        ("merge_states", ([x, y], [torch.randn(2, 3)] * 2), {}),
        ("attention", (half, half, half), {"causal": True, "scale": 0.3, "return_lse": True}),
        ("attention_out", (half, half, half), {"out": torch.zeros_like(half), "lse": torch.zeros(1, 2, 3)}),
        ("int4_linear", (x[0].half(), packed.codes, packed.scales, 16), {"activations": 1}),
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::fastops.FallbackWarning")
@pytest.mark.parametrize("case", operator_calls(), ids=lambda c: c[0])
def test_plain_torch_gets_the_same_call(case):
    name, args, options = case

    def run(function):
        made = copy.deepcopy((args, options))
        got = function(*made[0], **made[1])
        return tree_flatten((got, made))[0]  # what was written into arguments counts as well

    want = run(getattr(torch.ops.fastops, name))
    with recording() as recorder:
        recorder.launch = lambda *a: (_ for _ in ()).throw(RuntimeError("no such symbol"))
        before = _ops.control.set_mode(_ops.control.EMULATE)
        try:
            got = run(partial(sent, name))
        finally:
            _ops.control.set_mode(before)
    for g, e in zip(got, want, strict=True):
        if isinstance(e, torch.Tensor):
            torch.testing.assert_close(g.float(), e.float(), rtol=5e-3, atol=1.0 if e.dtype == torch.int8 else 5e-3)


def test_other_errors_are_errors():
    with pytest.raises(RuntimeError, match="ValueError: gelu: approximate is 'erf'"):
        sent("gelu_and_mul", torch.randn(2, 8), approximate="erf")
    with pytest.raises(TypeError, match="k must be float16, got bfloat16"):
        op("attention", torch.randn(1, 2, 2, 64).half(), *(torch.randn(1, 2, 2, 64).bfloat16(),) * 2)


def test_the_mode_is_the_threads_own_and_ends():
    x, seen = torch.randn(4, 64), []

    def elsewhere():
        torch.ops.fastops.silu_and_mul(x)
        seen.append(variant())

    with _cuda.emulated():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError):
            torch.ops.fastops.silu_and_mul(x[:, :63])
        torch.ops.fastops.silu_and_mul(x)
        inside = variant()
    elsewhere()
    active = _ops.control.isa_active()
    # silu_and_mul has no code of its own for these.
    served = ROWS_SERVED_BY.get(active, active)
    assert seen == [served] * 2
    assert inside not in _ops.control.isa_names()


def calls():
    """Differentiable operators: (name, tensors that want gradients, other arguments)."""
    x, y, w, cos = torch.randn(6, 4, 64), torch.randn(6, 4, 64), torch.randn(64), torch.randn(6, 32)
    half = [t.half() for t in (x, y)]
    return [
        ("rms_norm", (x, w), ()), ("layer_norm", (x, w, w.clone()), ()), ("add_rms_norm", (x, y, w), ()),
        ("silu_and_mul", (x,), ()), ("gelu_and_mul", (x,), ()), ("swiglu", (x, y), ()), ("geglu", (x, y), ()),
        ("apply_rope", (x, y), (cos, cos)), ("int4_linear", (half[0],), (int4.quantize(torch.randn(16, 64), 32),)),
    ]  # fmt: skip


@pytest.mark.parametrize("case", calls(), ids=lambda c: c[0])
def test_gradients_by_the_emulator(case):
    """Through autograd, long after the override has ended: by the emulated backward, not the CPU's."""
    name, wanted, rest = case

    def run(provider, dtype=None):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in wanted]
        more = [t.to(dtype) if dtype and isinstance(t, torch.Tensor) else t for t in rest]
        with fastops.override(**{name: provider}):
            got = getattr(fastops, name)(*leaves, *more)
        got = got if isinstance(got, tuple) else (got,)
        torch.manual_seed(0)
        grads = [torch.randn(g.shape).to(g.dtype) for g in got]
        torch.ops.fastops.scale_add(torch.ones(1), torch.ones(1))  # on the CPU: what ran last is known again
        found = torch.autograd.grad(got, leaves, grads)
        return [*got, *found], variant()

    got, ran = run("cuda-emulated")
    if name != "int4_linear":  # whose gradient is torch's product
        assert ran not in _ops.control.isa_names()
    exact, same = run("reference", torch.float64)[0], run("reference")[0]
    for g, e, s in zip(got, exact, same, strict=True):
        assert_matches(g, e, s, factor=4, what=name)


def test_results_that_nobody_differentiates():
    """Only one of two results has a gradient; inputs without one get none; lists of tensors are seen."""
    x, w = torch.randn(3, 64, requires_grad=True), torch.randn(64)
    with fastops.override(add_rms_norm="cuda-emulated"):
        y, total = fastops.add_rms_norm(x, torch.randn(3, 64), w)
    assert y.requires_grad
    (dx,) = torch.autograd.grad(total.sum(), x)
    torch.testing.assert_close(dx, torch.ones(3, 64))
    assert w.grad is None


def test_calls_are_compared_where_there_is_a_gpu():
    """The tests' own mechanism, with the CPU's kernels in the part of the GPU's."""
    weight, x = int4.quantize(torch.randn(16, 64), 32), torch.randn(3, 64).half()
    with both.every_row("cpu", "cpp"), torch.no_grad(), fastops.override(int4_linear="cuda-emulated"):
        fastops.int4_linear(x, weight)
    a, b = torch.randn(4, 64), torch.randn(4, 64)

    def wrong(x, residual, w):
        torch.ops.fastops.fused_add_rms_norm(x, residual, w)
        residual[3, 5] += 0.01

    for other, fails in ((torch.ops.fastops.fused_add_rms_norm, False), (wrong, True)):
        args = a.clone(), b.clone(), torch.ones(64)
        call = partial(both.run, "norm", partial(op, "fused_add_rms_norm"), other, args, {}, "cpu")
        if fails:
            with pytest.raises(AssertionError, match="norm on the GPU"):
                call()
        else:
            call()
        assert not torch.equal(args[0], a)  # written in place once
