"""The benchmark's own promises: right ratios, honest words, bars that fail, results that can be read back."""

import json
import time

import pytest
import torch
from fastops.bench import ops, protocol, run
from fastops.bench.bars import Bar
from fastops.bench.case import DTYPES, Case
from fastops.bench.ceilings import Ceilings
from fastops.bench.protocol import Timing, copies_for, last_level_cache, measure, ratio
from fastops.bench.run import Result
from fastops.bench.shapes import named


def test_measure_finds_a_known_ratio(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: now[0])

    def busy(seconds):
        def wait(_):
            now[0] += seconds

        return wait

    timings = measure({"a": busy(1e-3), "b": busy(2e-3)}, [None], 0.2)
    r = ratio(timings["a"], timings["b"])
    assert (r.low, r.median) == pytest.approx((2.0, 2.0))
    assert r.verdict == "faster"
    assert ratio(timings["b"], timings["a"]).verdict == "slower"
    assert timings["a"].median == pytest.approx(1e-3)


@pytest.mark.parametrize(("pairs", "verdict"), [
    ([2.0] * 9, "faster"),
    ([0.5] * 9, "slower"),
    ([1.0] * 9, "within noise"),
    ([1.02] * 9, "within noise"),  # certain, but too small to be called a difference
    ([0.7, 0.8, 0.9, 1.1, 1.3, 1.4, 1.5, 1.6, 1.7], "within noise"),  # large, but not certain
    ([1.5, 1.6], "faster"),
])  # fmt: skip
def test_verdict(pairs, verdict):
    ours, theirs = Timing((1.0,) * len(pairs)), Timing(tuple(pairs))
    assert ratio(ours, theirs).verdict == verdict


def test_samples_are_paired_by_round():
    """A slow phase of the machine that hits both sides of a round leaves the ratio alone."""
    ours, theirs = Timing((1.0, 10.0, 1.0, 5.0, 2.0)), Timing((2.0, 20.0, 2.0, 10.0, 4.0))
    r = ratio(ours, theirs)
    assert (r.low, r.median, r.high) == (2.0, 2.0, 2.0)


def test_memory_cases_rotate_over_more_than_the_cache():
    size = 1 << 20
    assert copies_for(size, "memory") * size >= min(4 * last_level_cache(), 64 * size)
    assert copies_for(size, "compute") == 1
    assert copies_for(1e12, "memory") == 2


def test_input_sets_fit_the_memory(monkeypatch):
    left = iter([100, 80, 60, 49, 0])
    monkeypatch.setattr(protocol, "memory_left", lambda: next(left))
    assert protocol.input_sets(lambda: 1, 1e3, "memory") == [1] * 4  # the second is made whatever is left
    monkeypatch.setattr(protocol, "memory_left", lambda: 0)
    assert protocol.input_sets(lambda: 1, 1e3, "memory") == [1] * 2
    assert protocol.input_sets(lambda: 1, 1e3, "compute") == [1]
    left = iter([100, 80, 60, 49, 0])
    monkeypatch.setattr(protocol, "memory_left", lambda: next(left))
    assert protocol.input_sets(lambda: 1, 1e3, "memory", lambda one: one + 1) == [1, 2, 2, 2]
    monkeypatch.undo()
    assert 0 < protocol.memory_left() < 1 << 50


@pytest.mark.parametrize(("kind", "asked"), [("compute", True), ("memory", False), ("copy", False)])
def test_results_of_compute_bound_cases_stay_in_memory_that_is_there(monkeypatch, kind, asked):
    class Libc:
        def mallopt(self, what, value):
            set_to[what] = value

        def malloc_trim(self, left):
            trimmed.append(left)

    set_to, trimmed = {}, []
    monkeypatch.setattr(protocol.ctypes, "CDLL", lambda name: Libc())
    with protocol.results_kept(kind):
        assert (set_to.get(protocol.M_TRIM_THRESHOLD, 0) > 500 << 20) is asked
        assert not trimmed
    assert (protocol.M_MMAP_THRESHOLD in set_to) is asked
    assert set_to.get(protocol.M_TRIM_THRESHOLD, 0) < 100 << 20
    assert bool(trimmed) is asked


def test_every_candidate_sees_every_input_before_the_clock_starts(monkeypatch):
    seen, at_first = [], []
    clock = time.perf_counter

    def read():
        at_first.append(len(seen))
        return clock()

    monkeypatch.setattr(protocol.time, "perf_counter", read)
    measure({"a": seen.append}, [1, 2, 3, 4], 0.01)
    assert seen[: at_first[0]] == [1, 2, 3, 4]


def result(samples, kind="compute", tag="t", rivals=(), ceiling=(1e9,), dtype="fp32"):
    case = Case("attention", "shape", dtype, kind, 1e9, 1e9, lambda: None, {}, frozenset({tag}))
    return Result(case, {"fastops": Timing(tuple(samples)), **{n: Timing(tuple(s)) for n, s in rivals}}, ceiling)


@pytest.mark.parametrize(("bar", "found", "words"), [
    (Bar("t", "share", 0.8), result([2.0] * 5), "50% of the ceiling, the bar is 80%"),
    (Bar("t", "share", 0.8), result([1.1] * 5), None),
    (Bar("t", "share", 0.8), result([2.0] * 5, tag="other"), None),
    (Bar("t", "share", 0.8), result([2.0] * 3, "memory", ceiling=(5e8, 5e8, 1e9)), None),  # the ceiling of each round
    (Bar("t", "vs:torch", 1.4), result([1.0] * 5, rivals=[("torch", [1.2] * 5)]), "1.20x of torch, the bar is 1.4x"),
    (Bar("t", "vs:torch", 1.4), result([1.0] * 5, rivals=[("torch", [1.5] * 5)]), None),
    (Bar("t", "vs:torch", 1.4), result([1.0] * 5), None),  # not compared: nothing to say
    (Bar("t", "microseconds", 8.0), result([9e-6] * 5, "latency"), "9.0 us a call, the bar is 8 us"),
    (Bar("t", "microseconds", 8.0), result([7e-6] * 5, "latency"), None),
])  # fmt: skip
def test_check(monkeypatch, bar, found, words):
    monkeypatch.setattr(run, "BARS", [bar])
    misses = run.check([found])
    assert [m.split(": ", 1)[1] for m in misses] == ([words] if words else [])


def test_check_against_fp32(monkeypatch):
    monkeypatch.setattr(run, "BARS", [Bar("t", "vs-fp32", 1.0)])
    wide, narrow = result([1.0] * 5), result([1.5] * 5, dtype="bf16")
    assert run.check([wide, narrow]) == ["attention shape bf16: 0.67x of fp32, the bar is 1x"]
    assert run.check([wide, result([0.9] * 5, dtype="bf16")]) == []


def like(x, shape):
    """A rival's output in our layout."""
    if x.shape != shape and x.dim() == 4 and x.transpose(1, 2).shape == shape:
        x = x.transpose(1, 2)
    return x.reshape(shape).float()


@pytest.mark.parametrize(
    "case", [c for n in ops.NAMES for c in ops.cases(n, named("tiny"), list(DTYPES))], ids=lambda c: c.label
)
def test_candidates_compute_the_same(case):
    def fresh():
        torch.manual_seed(1)
        return case.make()

    inputs = fresh()
    with torch.inference_mode():
        want = case.run["fastops"](inputs)
        for name, fn in case.run.items():
            if name in ("fastops", "torch-compile", "copy"):
                continue
            if case.op == "fused_add_rms_norm":  # overwrites its inputs
                inputs = fresh()
            got, ours = fn(inputs), want
            if isinstance(ours, tuple):
                ours, got = ours[0], got[0]
            if case.op == "attention_varlen":  # torch's batch is padded
                rows = torch.arange(16)[None] < torch.tensor([16, 8, 4, 2])[:, None]
                got = got.transpose(1, 2)[rows]
            tolerance = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2}[case.dtype]
            if case.op == "int4_linear":  # torch's dense linear has the weight before quantisation; int8 rounds rows
                if name == "dense":
                    continue
                tolerance = max(tolerance, 5e-2 if "int8" in case.name else 1e-4)
            torch.testing.assert_close(like(got, ours.shape), ours.float(), atol=tolerance, rtol=tolerance, msg=name)


def test_command(tmp_path, capsys):
    out, picture = tmp_path / "r.json", tmp_path / "r.png"
    argv = ["--shapes", "tiny", "--dtype", "fp32", "--time", "0.02", "--json", str(out), "--plot", str(picture)]
    assert run.main(["attention", "attention_paged", *argv]) == 0
    shown = capsys.readouterr().out
    assert "best square fp32 matmul" in shown
    assert "torch (" in shown
    read = json.loads(out.read_text())
    assert {"cpu", "threads", "isa", "torch", "fastops", "commit", "date"} <= read["machine"].keys()
    assert read["ceilings"]["flops"] > 0
    assert read["ceilings"]["bandwidth"] > 0
    first = read["results"][0]
    assert first["op"] == "attention"
    assert first["candidates"].keys() == {"fastops", "torch"}
    assert first["ratios"]["torch"]["verdict"] in ("faster", "slower", "within noise")
    assert first["candidates"]["fastops"]["median_s"] > 0
    paged = next(r for r in read["results"] if r["op"] == "attention_paged")
    assert paged["candidates"].keys() == {"fastops", "torch", "dense"}
    assert paged["candidates"]["fastops"]["share"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_check_makes_the_command_fail(monkeypatch, capsys):
    monkeypatch.setattr(run, "BARS", [Bar("attention-call", "microseconds", 1e-3)])
    argv = ["attention", "--shapes", "tiny", "--dtype", "fp32", "--time", "0.02", "--compare", "", "--check"]
    assert run.main(argv) == 1
    assert "UNDER THE BAR  attention call" in capsys.readouterr().out
    monkeypatch.setattr(run, "BARS", [])
    assert run.main(argv) == 0
    assert "every bar holds" in capsys.readouterr().out


def test_forced_implementations_and_instruction_sets():
    case = ops.cases("attention", named("tiny"), ["fp32"])[0]
    ways = run.candidates(case, ["cpp", "reference"], [], ["torch"])
    assert list(ways) == ["cpp", "reference", "torch"]
    inputs = case.make()
    torch.testing.assert_close(ways["cpp"](inputs), ways["reference"](inputs), atol=1e-5, rtol=1e-5)
    assert list(run.candidates(case, [], ["scalar"], [])) == ["scalar"]


@pytest.mark.parametrize(("argv", "words"), [
    (["nope"], "unknown operator 'nope'; known: attention"),
    (["--shapes", "gpt9"], "unknown 'gpt9'; known: bars, quick, tiny, llama3-8b"),
    (["--shapes", "llama3-8b:train"], "unknown 'llama3-8b:train'"),
    (["--dtype", "fp8"], "--dtype: unknown 'fp8'; known: fp32, bf16, fp16"),
    (["--isa", "mmx"], "--isa: unknown 'mmx'; known: amx"),
])  # fmt: skip
def test_wrong_words(argv, words, capsys):
    assert run.main(argv) == 2
    assert words in capsys.readouterr().err


def test_list_names_cases_without_timing(capsys):
    assert run.main(["--shapes", "llama3-8b:decode,gemma3-270m", "--dtype", "bf16", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "attention decode B8 H32/8 S1x4096 D128 bf16   [memory]   rivals: torch, torch-compile" in lines
    assert any("w512" in line for line in lines)
    assert run.main(["int4_linear", "--shapes", "bars", "--only", "M1 ,int8 M16 N4096", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("M1 " in line or "int8 M16 N4096" in line for line in lines)
    assert {"M1 " in line for line in lines} == {True, False}
    assert run.main(["int4_linear", "--only", "nothing like it", "--list"]) == 2
    assert "--only: no case holds 'nothing like it'" in capsys.readouterr().err


def test_read_ceiling_walks_through_its_block():
    c = Ceilings()
    c.measure(quick=True)
    read, size = c.reader()
    assert size * 8 == c._block.numel() * 4
    assert float(read(None)) in (1.0, float(size / 4))
