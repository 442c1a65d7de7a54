"""Selection, overrides, explanations and the environment variables."""

import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import fastops
from fastops.dispatch import Call, Implementation, operators
from fastops.dispatch.select import Operator

Q, K = torch.randn(1, 4, 4, 64), torch.randn(1, 6, 2, 64)


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )


def test_explain_lists_every_provider():
    e = fastops.explain("attention", Q, K, K, causal=True)
    assert e.chosen == "cpp"
    assert set(e.reasons) == {"cpp", "cuda", "cuda-emulated", "triton", "torch", "reference"}
    text = str(e)
    assert "attention [1,4,4,64] [1,6,2,64] [1,6,2,64] float32 cpu -> cpp / " in text
    assert "attention has no triton implementation yet" in text
    assert "  cuda-emulated dtype is float32 (takes float16, bfloat16)" in text


def test_explain_refuses_what_the_operator_refuses():
    with pytest.raises(ValueError, match="unknown operator 'atention', known: add_rms_norm"):
        fastops.explain("atention", Q)
    with pytest.raises(ValueError, match="head size 32"):
        fastops.explain("attention", Q, K[..., :32], K)


def test_forced_row_never_falls_through():
    with (
        fastops.override(attention="cuda"),
        pytest.raises(fastops.NotSupportedError, match="override 'cuda' cannot run"),
    ):
        fastops.attention(Q, K, K)
    x = Q.double()
    with fastops.override(attention="cpp"), pytest.raises(fastops.NotSupportedError, match="dtype is float64"):
        fastops.attention(x, x, x)


def test_override_nests_and_names_are_checked():
    with fastops.override(attention="reference"):
        with fastops.override(merge_states="reference"):
            assert fastops.explain("attention", Q, K, K).chosen == "reference"
            with fastops.override(attention="cpp"):
                assert fastops.explain("attention", Q, K, K).chosen == "cpp"
        assert fastops.explain("attention", Q, K, K).forced
    assert not fastops.explain("attention", Q, K, K).forced
    with pytest.raises(ValueError, match="unknown operator 'nope'"), fastops.override(nope="cpp"):
        pass
    words = "unknown implementation 'fast' for attention, known: cpp"
    with pytest.raises(ValueError, match=words), fastops.override(attention="fast"):
        pass


def test_override_is_local_to_the_thread():
    seen = []
    with fastops.override(attention="reference"):
        t = threading.Thread(target=lambda: seen.append(fastops.explain("attention", Q, K, K).chosen))
        t.start()
        t.join()
    assert seen == ["cpp"]


def test_fallback_warns_once():
    code = """
import warnings, torch, fastops
x = torch.randn(1, 2, 2, 64, dtype=torch.float64)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    fastops.attention(x, x, x); fastops.attention(x, x, x)
print(len(seen), seen[0].category.__name__, seen[0].filename)
"""
    r = run(code)
    assert r.stdout.split()[:2] == ["1", "FallbackWarning"], r.stderr
    assert r.stdout.split()[2] == "<string>"  # it points at the caller


def test_strict_refuses_the_fallback():
    code = "import torch, fastops; x = torch.randn(1, 2, 2, 64).double(); fastops.attention(x, x, x)"
    r = run(code, FASTOPS_STRICT="1")
    assert r.returncode != 0
    assert "NotSupportedError: attention: only the reference can run this call" in r.stderr


def test_fastops_impl():
    code = "import torch, fastops; x = torch.randn(1, 2, 2, 64); print(fastops.explain('attention', x, x, x).chosen)"
    assert run(code, FASTOPS_IMPL="attention=reference").stdout.strip() == "reference"
    assert "unknown operator 'attn'" in run(code, FASTOPS_IMPL="attn=cpp").stderr
    assert "not of the form operator=implementation" in run(code, FASTOPS_IMPL="attention").stderr


def test_fastops_isa():
    code = "import torch, fastops; x = torch.randn(1, 2, 2, 64); fastops.attention(x, x, x); print(fastops._ops.control.last_variant())"
    assert run(code, FASTOPS_ISA="scalar").stdout.strip() == "scalar"
    assert "FASTOPS_ISA is 'sse9', known: auto" in run(code, FASTOPS_ISA="sse9").stderr
    missing = [n for n in fastops._ops.control.isa_names() if n not in fastops.info.__globals__["isas"]()]
    for name in missing:
        assert f"FASTOPS_ISA is '{name}', which this machine lacks" in run(code, FASTOPS_ISA=name).stderr


def test_fastops_cores():
    code = "import fastops; print(fastops.info())"
    assert "plans are made for 77 cores" in run(code, FASTOPS_CORES="77").stdout
    assert "plans are made for" not in run(code, FASTOPS_CORES="auto").stdout
    for bad in ("many", "0", "-2", "3x", "99999999999999999999"):
        assert f"FASTOPS_CORES is '{bad}', can be auto or 1 to 65536" in run(code, FASTOPS_CORES=bad).stderr
    with pytest.raises(ValueError, match="cores_set: -1 cores, can be 1 to 65536, or 0 for the machine's"):
        fastops._ops.control.cores_set(-1)


def test_set_isa_refuses():
    with pytest.raises(ValueError, match="'sse9' is unknown, known: auto"):
        fastops.set_isa("sse9")


def test_implementation_checks_its_name():
    with pytest.raises(ValueError, match="name is 'fast', known: cpp"):
        Implementation("fast", print, lambda c: None, 1)


def test_cost_decides_where_rows_compete():
    rows = [
        Implementation("cpp", lambda: "cpp", lambda c: None, 1, cost=lambda c: 5.0),
        Implementation("cuda", lambda: "cuda", lambda c: None, 2, cost=lambda c: 9.0),
    ]
    try:
        op = Operator("probe", rows, lambda: None, lambda: Call("cpu", torch.float32))
        assert op("key") == "cpp"
    finally:
        operators.pop("probe", None)


def test_hot_path_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastops.attention(Q, K, K)
        fastops.scaled_dot_product_attention(Q, Q, Q)


def test_info_prints():
    text = str(fastops.info())
    assert "fastops 0.1.0, torch" in text
    assert "active" in text
    assert "attention: cpp, reference" in text
