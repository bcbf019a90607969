"""The staged runner of `make gpu`, on a CPU with stages that are made up."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_stages, largest
from benchmarks.gpu_stages import LIMIT, OUTPUT, Stage
from benchmarks.harness import Options

ROOT = Path(__file__).resolve().parents[2]
WRITES = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); (p / 'x.json').write_text('7')"


def python(code: str, *words: str) -> list[str]:
    return [sys.executable, "-S", "-c", code, *words]


class Runner:
    """gpu.run in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.target = folder / "gpu", folder / "results"

    def state(self, key: str = "abc") -> gpu.State:
        return gpu.State(self.folder / "state.json", key)

    def run(self, stages: list[Stage], key: str = "abc", **options: Any) -> int:
        state = self.state(key)
        order = gpu.todo(stages, state, options.pop("again", False))
        return gpu.run(stages, order, state, self.target, folder=self.folder, **options)

    def statuses(self, key: str = "abc") -> dict[str, str]:
        return {name: o["status"] for name, o in self.state(key).outcomes.items()}


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def test_a_failing_stage_is_entered_and_the_rest_goes_on(runner: Runner) -> None:
    stages = [
        Stage("first", "", python("print('all is lost'); raise SystemExit(3)")),
        Stage("second", "", python(WRITES, OUTPUT)),
        Stage("third", "", python(""), missing="the tool is not here"),
    ]
    assert runner.run(stages) == 1
    assert runner.statuses() == {"first": "failed", "second": "passed", "third": "skipped"}
    assert runner.state().outcomes["first"]["reason"] == "exit 3: all is lost"
    assert (runner.target / "x.json").read_text() == "7"
    assert "all is lost" in (runner.target / "logs" / "first.txt").read_text()
    table = (runner.target / "gpu.md").read_text()
    assert "| first |  | failed |" in table
    assert "the tool is not here" in table


def test_it_goes_on_where_it_was(runner: Runner, tmp_path: Path) -> None:
    """What passed is left out; what failed comes after what has not run; another commit starts
    anew."""
    trace = tmp_path / "trace"
    code = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); sys.exit(int(sys.argv[3]))"
    stages = [
        Stage(name, "", python(code, str(trace), name, str(code_))) for name, code_ in
        (("a", 0), ("b", 1), ("c", 0))
    ]  # fmt: skip
    runner.run(stages[:2])
    assert runner.run(stages) == 1
    assert trace.read_text() == "abcb"
    runner.run(stages[:1], key="def")
    assert trace.read_text() == "abcba"
    assert set(runner.state().all) == {"abc", "def"}
    runner.run(stages[:1], again=True)
    assert trace.read_text() == "abcbaa"


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("stubborn", [False, True])
def test_out_of_time_the_whole_group_is_ended(
    runner: Runner, tmp_path: Path, stubborn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a child that ignores being asked, and what the stage wrote until then is kept."""
    monkeypatch.setattr(gpu, "GRACE", 0.3)
    pid = tmp_path / "pid"
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" if stubborn else ""
    child = f"{ignore}import os, time; open({str(pid)!r}, 'w').write(str(os.getpid()));"
    code = (
        f"import subprocess, sys, time; {ignore} {WRITES};"
        f"subprocess.Popen([sys.executable, '-S', '-c', {child + 'time.sleep(60)'!r}]);"
        "time.sleep(60)"
    )
    begun = time.monotonic()
    assert runner.run([Stage("long", "", python(code, OUTPUT), 1.5)]) == 1
    assert time.monotonic() - begun < 15
    assert runner.statuses() == {"long": "timed out"}
    assert (runner.target / "x-partial.json").exists()
    number = int(pid.read_text())
    for _ in range(40):
        if not alive(number):
            break
        time.sleep(0.05)
    assert not alive(number)


def test_what_a_stage_leaves_running_is_ended(runner: Runner, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        f"import os, subprocess, sys, time\nwords = [sys.executable, '-S', '-c', {child!r}]"
        "\nsubprocess.Popen(words)"
        f"\nwhile not os.path.exists({str(pid)!r}): time.sleep(0.02)\ntime.sleep(0.1)"
    )
    assert runner.run([Stage("untidy", "", python(code))]) == 0
    for _ in range(40):
        if not alive(int(pid.read_text())):
            break
        time.sleep(0.05)
    assert not alive(int(pid.read_text()))


def test_a_budget_cuts_the_last_stage_and_it_runs_again(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LEAST", 0.2)
    monkeypatch.setattr(gpu, "GRACE", 0.3)
    sleeps = [Stage("one", "", python("import time; time.sleep(30)")), Stage("two", "", python(""))]
    assert runner.run(sleeps, budget=0.6) == 0
    assert runner.statuses() == {"one": gpu.CUT}
    assert [s.name for s in gpu.todo(sleeps, runner.state(), False)] == ["one", "two"]


def test_nothing_runs_where_the_build_fails(runner: Runner) -> None:
    stages = [
        Stage("build", "", python("raise SystemExit(1)"), always=True),
        Stage("next", "", python("")),
    ]
    assert runner.run(stages) == 1
    assert runner.statuses() == {"build": "failed"}


# ---- the real stages ----


def test_every_stage_is_short_and_named_once() -> None:
    stages = gpu_stages.stages()
    names = [s.name for s in stages]
    assert len(set(names)) == len(names)
    assert all(s.seconds <= LIMIT <= 480 for s in stages)
    assert names[:2] == ["build", "doctor"]
    from benchmarks.members import MEMBERS

    assert {f"bench-{name}" for name in MEMBERS} <= set(names)
    assert {f"bench-{name}-cuda" for name in gpu_stages.CUDA_MEMBERS} <= set(names)
    for wanted in ("gpu-graph_capture", "gpu-same_bits", "memcheck-cuda", "racecheck-triton",
                   "largest-11", "largest-24", "ops-cam", "cuda-kernels"):  # fmt: skip
        assert wanted in names
    for name, stage in ((s.name, s) for s in stages if s.environment.get("CAMKERNELS_BACKEND")):
        assert name.startswith("bench-")
        assert name.endswith("-cuda")
        (op,) = {n for n in MEMBERS if n in stage.words}
        chosen = [case for flag, case in itertools.pairwise(stage.words) if flag == "--case"]
        every = [case.name for case in MEMBERS[op].cases(Options())]
        assert all(any(text in case for case in every) for text in chosen), name
    for stage in stages:  # files that commands name are there
        for word in stage.words:
            if word.startswith("tests/"):
                assert (ROOT / word).exists(), word


def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "run", lambda *arguments: pytest.fail("it ran"))
    assert gpu.main([]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert told.err.startswith("make gpu: no GPU here: ")


def test_a_dry_run_lists_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run", "--stage", "bench-relu", "--stage", "build"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(li.startswith("build:") and "--no-build-isolation --no-deps" in li for li in lines)
    assert any("-m benchmarks run relu --device cuda" in li for li in lines)
    assert gpu.main(["--dry-run", "--stage", "nonsense"]) == 2


def test_the_state_survives_being_cut_off(tmp_path: Path) -> None:
    state = gpu.State(tmp_path / "state.json", "k")
    state.enter("a", {"status": "passed"})
    assert json.loads((tmp_path / "state.json").read_text()) == {"k": {"a": {"status": "passed"}}}
    assert gpu.State(tmp_path / "state.json", "k").status("a") == "passed"


# ---- the search for the largest batch ----


@pytest.mark.parametrize(
    ("truth", "guess"), [(100, 100), (100, 40), (40, 100), (1, 50), (1, 1), (700, 90), (3, 2)]
)
def test_the_search_finds_the_largest_batch_in_few_trials(truth: int, guess: int) -> None:
    tried: list[int] = []

    def runs(batch: int) -> bool:
        tried.append(batch)
        return batch <= truth

    found = largest.search(runs, guess)
    assert found <= truth
    assert truth - found <= max(1, 0.011 * truth)
    assert len(tried) < 20
    if guess == truth:
        assert len(tried) <= 5


def test_the_search_gives_up_at_one_picture() -> None:
    assert largest.search(lambda batch: False, 64) == 0


def test_predictions_are_read_from_the_committed_table() -> None:
    for size in gpu_stages.GIGABYTES:
        found = largest.predicted(size)
        assert set(largest.SIDES) <= set(found)
        assert found["interpretable, engine lean"] > found["interpretable, eager"]


def test_a_trial_steps_and_survives_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision", reason="make test installs it")
    trial = largest.Trial("CAM entropy at layer4, eager", "cpu", "resnet18", 32)
    assert trial.runs(2)

    def full(batch: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trial, "steps", full)
    assert not trial.runs(4)
    assert trial.tried == {2: True, 4: False}
    trial.close()
