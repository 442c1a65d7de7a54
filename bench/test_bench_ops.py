"""pytest-benchmark over the same cases: ``pytest bench`` (not part of the test suite)."""

import pytest
from fastops.bench import ops
from fastops.bench.shapes import named

CASES = [c for n in ops.NAMES for c in ops.cases(n, named("quick"), ["fp32", "bf16"])]


@pytest.mark.parametrize("who", ["fastops", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_case(benchmark, case, who):
    if who not in case.run:
        pytest.skip(f"{case.op} has no {who} candidate")
    inputs = case.make()
    benchmark.group = case.label
    benchmark(case.run[who], inputs)
