"""Shared fixtures: the native library must be there in CI, and a forced variant must be the one that ran."""

import os

import pytest
import torch

import fastops
from fastops import _ops
from fastops.info import isas


def pytest_configure(config):
    torch.manual_seed(0)
    if _ops.missing and os.environ.get("FASTOPS_REQUIRE_NATIVE"):
        raise pytest.UsageError(f"FASTOPS_REQUIRE_NATIVE is set and {_ops.missing}")


@pytest.fixture(params=isas() or ["not-built"])
def isa(request):
    """Each instruction-set variant this machine can run. Fails a test in which another one ran.

    A module's SERVED_BY names the variants an operator has no code of its own for, and what serves them.
    """
    if request.param == "not-built":
        pytest.skip(_ops.missing or "no variant")
    with fastops.use_isa(request.param):
        yield request.param
        ran = _ops.control.last_variant()
    want = getattr(request.module, "SERVED_BY", {}).get(request.param, request.param)
    assert ran == want, f"asked for {want}, but {ran or 'nothing'} ran"


@pytest.fixture
def many_cores():
    """Plans for 64 cores: small calls are cut into many pieces."""
    _ops.control.cores_set(64)
    yield
    _ops.control.cores_set(0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
