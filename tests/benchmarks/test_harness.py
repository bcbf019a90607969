"""The benchmark harness: it must refuse, count and measure rightly before its figures mean much."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, memory, plot, results, runner, timing
from benchmarks.__main__ import main
from benchmarks.harness import COPY, Benchmark, Case, Options, Side
from benchmarks.members import MEMBERS

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


class FakeMachine:
    """A clock and timer: each side has its cost in ms, times a drift that grows with every run."""

    def __init__(self, costs: dict[str, float], faults: Iterator[int]) -> None:
        # milliseconds, or the harness would collect garbage after every round
        self.costs = {name: cost / 1e3 for name, cost in costs.items()}
        self.faults, self.now, self.runs = faults, 0.0, 0
        self.order: list[str] = []

    def timer(self, step: Callable[[], str]) -> timing.Sample:
        name = step()
        self.order.append(name)
        self.runs += 1
        seconds = self.costs[name] * 1.01**self.runs
        self.now += seconds
        return timing.Sample(seconds, seconds / 2, next(self.faults))

    def measure(self, seconds: float, rounds: tuple[int, int]) -> timing.Timings:
        steps = {name: (lambda n=name: n) for name in self.costs}
        return timing.measure(steps, self.timer, seconds, rounds, clock=lambda: self.now)


def endless(*first: int) -> Iterator[int]:
    yield from first
    while True:
        yield 0


def test_paired_ratio_withstands_drift() -> None:
    machine = FakeMachine({"a": 2.0, "b": 1.0}, endless())
    timings = machine.measure(seconds=0, rounds=(40, 40))
    assert len(timings.rounds["a"]) == 40
    # the medians of each side drift by 1.01^80 = 2.2; the paired ratio stays within one run's drift
    assert timings.rounds["a"][-1] / timings.rounds["a"][0] > 2
    ratio = timings.ratio("a", "b")
    assert 2 / 1.011 < ratio["q20"] <= ratio["q50"] <= ratio["q80"] < 2 * 1.011
    figures = timing.summary(timings)
    assert figures["a"]["ratio_to"]["b"] == ratio
    assert figures["b"]["ratio_to"]["a"]["q50"] == pytest.approx(0.5, rel=0.02)


def test_sides_take_turns_in_alternating_order() -> None:
    machine = FakeMachine({"a": 1.0, "b": 1.0, "c": 1.0}, endless())
    timings = machine.measure(seconds=0, rounds=(2, 2))
    timed = machine.order[3 * timings.warm_up_rounds :]
    assert timed == ["a", "b", "c", "c", "b", "a"]


def test_warm_up_lasts_until_the_heap_has_settled() -> None:
    faults = endless(*[5000] * 10)  # two sides: page faults during the first five rounds
    timings = FakeMachine({"a": 1.0, "b": 1.0}, faults).measure(seconds=1e6, rounds=(3, 3))
    assert timings.warm_up_rounds == 6
    assert max(timings.faults["a"]) == 0


def test_rounds_are_bounded_by_time() -> None:
    machine = FakeMachine({"a": 1.0}, endless())
    assert 5 <= len(machine.measure(seconds=0.01, rounds=(5, 101)).rounds["a"]) <= 10


def test_quantiles_are_linear_between_neighbours() -> None:
    assert timing.quantiles([5, 1, 4, 2, 3, 0]) == pytest.approx({"q20": 1, "q50": 2.5, "q80": 4})
    assert timing.quantiles([7.0]) == {"q20": 7, "q50": 7, "q80": 7}


def _case(*values: float) -> Case:
    sides = {f"side{i}": _constant(v) for i, v in enumerate(values)}
    return Case("case", build=lambda: dict(sides), ideal_bytes=64)


def _constant(value: float) -> Callable[[], Side]:
    return lambda: Side(lambda: (torch.full((3,), value),))


@pytest.mark.parametrize("wrong", [1.001, float("nan"), float("inf")])
def test_disagreeing_sides_are_refused(wrong: float) -> None:
    options = Options()
    case = _case(1.0, wrong)
    sides, _ = harness.build_sides(case, options)
    with pytest.raises(harness.SidesDisagreeError, match="side1 disagrees with side0"):
        harness.verify(case, sides, "side0", options)
    case = _case(1.0, 1.0 + 1e-6)
    sides, reasons = harness.build_sides(case, options)
    assert COPY in sides
    assert not reasons
    harness.verify(case, sides, "side0", options)


def test_sides_of_other_shape_or_number_are_refused() -> None:
    one, two = torch.ones(3), torch.ones(1, 3)
    with pytest.raises(harness.SidesDisagreeError):
        harness.require_agreement({"a": [one], "b": [two]}, "a", "float32")
    with pytest.raises(harness.SidesDisagreeError, match="gave 2 tensors"):
        harness.require_agreement({"a": [one], "b": [one, one]}, "a", "float32")


def test_a_disagreement_reports_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Down to the command: no file, exit status 1 (the worker is run in this process)."""
    from benchmarks import worker

    member = Benchmark("wrong", "", lambda options: [_case(1.0, 2.0)], "side0")
    monkeypatch.setitem(MEMBERS, "wrong", member)

    def in_process(job: dict[str, Any], malloc: dict[str, str], path: str) -> dict[str, Any]:
        try:
            return worker.main(job)
        except harness.SidesDisagreeError as error:
            raise runner.WorkerFailedError(str(error)) from error

    monkeypatch.setattr(runner, "_worker", in_process)
    assert main(["run", "wrong", "--quick", "--output", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())
    assert "nothing is reported" in capsys.readouterr().err


def test_a_worker_error_reaches_the_caller() -> None:
    job = {"kind": "time", "benchmark": "nonesuch", "cases": None, "side": None, "options": {}}
    with pytest.raises(runner.WorkerFailedError, match="unknown benchmark 'nonesuch'"):
        runner._worker(job, memory.TIMING_MALLOC, "")


def test_copy_moves_the_ideal_bytes() -> None:
    side = harness.copy_side(8000, "cpu")
    (destination,) = side.step()
    assert 2 * destination.nbytes == 8000
    assert destination.eq(1).all()


def test_saved_bytes_of_a_known_graph() -> None:
    weight = torch.rand(16, 16, requires_grad=True)
    x = torch.rand(8, 16, requires_grad=True)

    def forward() -> torch.Tensor:
        y = (x @ weight).sigmoid()  # saves x (512 B) and weight; sigmoid saves y (512 B)
        return (y * y.view(8, 16)).sum()  # saves y again, under another view

    side = Side(forward, lambda loss: torch.autograd.grad(loss, (x, weight)), (weight,))
    assert memory.saved_bytes(side) == 2 * 8 * 16 * 4
    side.parameters = ()
    assert memory.saved_bytes(side) == 2 * 8 * 16 * 4 + 16 * 16 * 4


def test_saved_bytes_forget_a_graph_that_was_freed() -> None:
    x = torch.rand(1000, requires_grad=True)

    def forward() -> torch.Tensor:
        torch.autograd.grad((x.sigmoid() * 2).sum(), x)  # saved and freed before the end
        return (x * x).sum()

    assert memory.saved_bytes(Side(forward)) == 4000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_sees_scratch_inside_a_library_call() -> None:
    """64 MiB that no torch dispatch mode could see, freed before the step returns."""
    script = """
        import numpy
        from benchmarks.memory import host_peak
        def step():
            numpy.ones(64 * 2**20, dtype=numpy.uint8)
        print(host_peak(step), host_peak(lambda: None))
    """
    environment = memory.process_environment(memory.PEAK_MALLOC)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    scratch, nothing = map(int, done.stdout.split())
    assert abs(scratch - 64 * MIB) < MIB
    assert nothing < MIB


def test_peak_refuses_a_process_with_other_malloc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    with pytest.raises(RuntimeError, match="MALLOC_MMAP_THRESHOLD_=65536"):
        memory.host_peak(lambda: None)


def test_environment_of_a_worker_replaces_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    environment = memory.process_environment(memory.PEAK_MALLOC, "first")
    found = {k: v for k, v in environment.items() if "MALLOC" in k or "TUNABLES" in k}
    assert found == memory.PEAK_MALLOC
    assert environment["PYTHONPATH"].split(":") == ["first", "elsewhere"]


@pytest.fixture(scope="module")
def quick_result() -> dict[str, Any]:
    """A real run in real processes, of one case."""
    options = Options(quick=True, threads=1)
    only = ["cam_statistics B"]
    return runner.run(MEMBERS["linearity"], options, only, say=lambda text: None)


def test_result_is_complete(quick_result: dict[str, Any], tmp_path: Path) -> None:
    path = results.write(quick_result, tmp_path)
    (loaded,) = [r for p, r in results.load_all(tmp_path) if p == path]
    assert loaded["cases"].keys() == {"cam_statistics B x1", "cam_statistics B x2"}
    environment = loaded["environment"]
    for key in ("python", "torch", "numpy", "camkernels", "commit", "compiler", "cpu", "backend"):
        assert environment[key], key
    assert environment["threads"] == 1
    assert environment["malloc"] == memory.TIMING_MALLOC
    assert loaded["command"].startswith("python -m benchmarks run linearity --device cpu --quick")
    for case in loaded["cases"].values():
        ours = case["sides"]["ours"]
        assert ours["saved_bytes"] > 0
        rate = case["ideal_bytes"] / ours["milliseconds"]["q50"] / 1e6
        assert ours["gigabytes_per_second"] == pytest.approx(rate, rel=1e-3)
    assert "Exponents of ours: cam_statistics B:" in results.table(loaded)
    by_cuda = {**quick_result, "environment": {**environment, "backend": "cuda"}}
    assert results.write(by_cuda, tmp_path).name == "linearity-cuda.json"


def test_incomplete_result_is_refused(quick_result: dict[str, Any]) -> None:
    results.validate(quick_result)
    with pytest.raises(ValueError, match="'environment' must be dict"):
        results.validate({**quick_result, "environment": None})
    with pytest.raises(ValueError, match="has no side 'absent'"):
        results.validate({**quick_result, "baseline": "absent"})
    broken = json.loads(json.dumps(quick_result))
    del broken["cases"]["cam_statistics B x1"]["sides"]["ours"]["ratio_to"]
    with pytest.raises(ValueError, match="lacks ratio_to"):
        results.validate(broken)


def test_exponent_of_a_known_curve() -> None:
    def case(factor: int) -> dict[str, Any]:
        sides = {"ours": {"milliseconds": {"q50": 3.0 * factor**1.5}}}
        return {"op": "cam", "axis": "B", "factor": factor, "sides": sides}

    fitted = results.exponents({"cases": {str(f): case(f) for f in (1, 2, 4)}}, "ours")
    assert fitted == pytest.approx({"cam B": 1.5})


def test_plots(quick_result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bars = {**quick_result, "benchmark": "any"}
    kernels = {**quick_result, "benchmark": "batch_norm_relu_kernels"}
    for name, result in (("lines", quick_result), ("bars", bars), ("kernels", kernels)):
        assert plot.plot(result, tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_chosen_sides_and_the_baseline_alone() -> None:
    options = Options(quick=True, threads=1, sides=["ours"])
    result = runner.run(MEMBERS["relu"], options, ["guided save=output"], say=lambda text: None)
    ((name, case),) = result["cases"].items()
    assert name == "guided save=output 3x8x5x7 nchw"
    assert list(case["sides"]) == ["eager", "ours", COPY]
    assert result["command"].endswith("--case 'guided save=output' --side ours")
    with pytest.raises(ValueError, match="no side nonesuch; this case has eager, copy"):
        runner.run(
            MEMBERS["relu"],
            dataclasses.replace(options, sides=["nonesuch"]),
            ["guided save=output"],
            say=lambda text: None,
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_runs(name: str, tmp_path: Path) -> None:
    assert main(["run", name, "--quick", "--output", str(tmp_path)]) == 0
    assert main(["plot", "--results", str(tmp_path)]) == 0


def test_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["list"]) == 0
    assert all(name in capsys.readouterr().out for name in [*MEMBERS][:1])
    assert main(["table", "--results", str(tmp_path)]) == 1
