"""Runs that are killed again and again end as an undisturbed one, bit for bit."""

from __future__ import annotations

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from camtrain import cli
from camtrain.config import FitConfig
from camtrain.fit import fit
from camtrain.recorder import CHECKPOINT, checkpoint_epoch
from PIL import Image

Tiny = Callable[..., FitConfig]
HERE = Path(__file__).resolve().parent
CLOCK = ("train_seconds", "test_seconds", "peak_rss_mib", "peak_cuda_mib")
EPOCHS = 30
"""So many that the kills before the finish never find the run done: each uses up a few."""
KILLS = 10
PATIENCE = 180
"""Seconds that a start, or an epoch, may take on a busy machine."""
DROPOUT = ("--arch", "dropout_network:make", "--layer", "layer3")
CASES = {
    "entropy": ("--recipe", "entropy"),
    "consistency": ("--recipe", "consistency", "--insertion-steps", "4"),
    # three steps in an epoch: the error is taken at others of them in every second epoch
    "interpretable": ("--recipe", "interpretable", "--every", "2", "--gradient-weight", "0.2"),
    "workers": ("--recipe", "entropy", "--beta", "0.1", "--data", "folder", "--workers", "2",
                "--augment", *DROPOUT),
}  # fmt: skip


@pytest.mark.slow
def test_dropout_and_order_repeat_after_a_resume(tiny: Tiny, tmp_path: Path) -> None:
    """Whatever the loader draws, and however early its workers begin with an epoch."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"arch": "dropout_network:make", "layer": "layer3"}
    fit(tiny(**options, epochs=3, out=str(whole)), quiet=True)
    fit(tiny(**options, epochs=1, out=str(cut)), quiet=True)
    for workers in (0, 2):
        resumed = tmp_path / f"resumed with {workers}"
        shutil.copytree(cut, resumed)
        config = tiny(**options, epochs=3, workers=workers, out=str(resumed))
        fit(config, resume=True, quiet=True)
        assert bits(resumed / "model.pt") == bits(whole / "model.pt"), workers


class FinishedError(Exception):
    """The run ended before the moment to kill it came."""


@dataclass
class Pace:
    """Seconds that parts of a run take, by a run that was watched."""

    begun: float = 0.0
    """From the start of the process to the run folder."""
    first_row: float = 0.0
    """To the end of the first epoch."""
    epoch: float = 0.0


@dataclass
class Killed:
    """One kill, for the report that ``pytest -s`` shows."""

    moment: str
    signal: str
    status: int
    rows: int
    partial: list[str] = field(default_factory=list)


class Runs:
    """Processes of ``camtrain fit`` with one set of options and one run folder."""

    def __init__(self, out: Path, options: tuple[str, ...], environment: dict[str, str]) -> None:
        self.out = out
        self.command = [sys.executable, "-m", "camtrain", "fit", "--image-size", "32",
                        "--limit-train", "60", "--limit-test", "30", "--batch-size", "20",
                        "--accelerator", "cpu", "--epochs", str(EPOCHS), *options,
                        "--out", str(out)]  # fmt: skip
        self.environment = environment
        self.log = out.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """From the start, or with ``--resume`` where something was begun."""
        begun = (self.out / "config.yaml").is_file()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, *["--resume"] * begun],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # a job in a shell's background has it ignored
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def wait_until(self, happened: Callable[[], bool], what: str) -> None:
        """Poll; an end of the process, or a long time without what is waited for, raises."""
        assert self.process is not None
        deadline = time.monotonic() + PATIENCE
        while not happened():
            if self.process.poll() is not None:
                raise FinishedError(what)
            if time.monotonic() > deadline:
                pytest.fail(f"no {what} within {PATIENCE} s\n{self.tail()}")
            time.sleep(0.002)

    def pause(self, seconds: float) -> None:
        """Sleep; an end of the process raises."""
        begun = time.monotonic()
        self.wait_until(lambda: time.monotonic() >= begun + seconds, "pause")

    def end(self) -> int:
        """The exit status."""
        assert self.process is not None
        return self.process.wait(PATIENCE)

    def stop(self) -> None:
        """Leave no process behind."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def send(self, number: signal.Signals) -> int:
        """Send a signal, and SIGKILL to one that takes long to wind up; the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(20)
        self.process.kill()
        return self.process.wait()

    def rows(self) -> int:
        """Epochs in ``metrics.csv``."""
        return len(table(self.out)) if (self.out / "metrics.csv").is_file() else 0

    def partial(self) -> list[str]:
        """Files that a write has begun."""
        return sorted(path.name for path in self.out.rglob("*.partial"))

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


def table(folder: Path) -> list[dict[str, str]]:
    """Rows of ``metrics.csv`` without times and memory."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in r.items() if k not in CLOCK} for r in csv.DictReader(file)]


def bits(path: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    """Of the tensors of a state_dict."""
    state = torch.load(path, weights_only=True)
    return {name: (value.dtype, value.numpy().tobytes()) for name, value in state.items()}


def stamp(path: Path) -> int:
    """Changes with each write."""
    return path.stat().st_mtime_ns if path.is_file() else 0


def undisturbed(runs: Runs) -> Pace:
    """A run to its end, watched."""
    pace, begun = Pace(), time.monotonic()
    runs.start()
    runs.wait_until(lambda: (runs.out / "config.yaml").is_file(), "run folder")
    pace.begun = time.monotonic() - begun
    runs.wait_until(lambda: runs.rows() >= 1, "epoch")
    pace.first_row = time.monotonic() - begun
    runs.wait_until(lambda: runs.rows() >= 11, "epoch")
    pace.epoch = (time.monotonic() - begun - pace.first_row) / 10
    assert runs.end() == 0, runs.tail()
    return pace


Moment = Callable[[Runs, Pace, random.Random], None]
"""Returns at the moment to kill."""


def in_start_up(runs: Runs, pace: Pace, rng: random.Random) -> None:
    runs.pause(rng.uniform(0, 0.8) * pace.begun)


def in_set_up(runs: Runs, pace: Pace, rng: random.Random) -> None:
    """Between the process's first file and its first epoch."""
    before = stamp(runs.out / "config.yaml")
    runs.wait_until(lambda: stamp(runs.out / "config.yaml") != before, "run folder")
    runs.pause(rng.uniform(0, 1) * (pace.first_row - pace.begun))


def _next_row(runs: Runs) -> None:
    before = runs.rows()
    runs.wait_until(lambda: runs.rows() > before, "epoch")


def in_epoch(runs: Runs, pace: Pace, rng: random.Random) -> None:
    _next_row(runs)
    runs.pause(rng.uniform(0, 2) * pace.epoch)


def after_row(runs: Runs, pace: Pace, rng: random.Random) -> None:
    """Between the row of an epoch and its checkpoint, or in this."""
    _next_row(runs)
    runs.pause(rng.uniform(0, 0.03))


def in_checkpoint(runs: Runs, pace: Pace, rng: random.Random) -> None:
    _next_row(runs)  # a run that was killed here before left its partial file until it starts
    folder = (runs.out / CHECKPOINT).parent

    def writing() -> bool:
        return folder.is_dir() and any(n.endswith(".partial") for n in os.listdir(folder))

    runs.wait_until(writing, "checkpoint that is being written")


def in_finish(runs: Runs, pace: Pace, rng: random.Random) -> None:
    """After the last row, or after one of the files that are written at the end."""
    last = rng.choice(("metrics.csv", "model.pt", "curves.png", "overlays.png"))
    before = stamp(runs.out / last)
    runs.wait_until(lambda: runs.rows() == EPOCHS, "last epoch")
    if last != "metrics.csv":
        runs.wait_until(lambda: stamp(runs.out / last) != before, last)
    runs.pause(rng.uniform(0, 0.1))


def plan(rng: random.Random) -> Iterator[tuple[Moment, signal.Signals]]:
    """The first begin nothing, the last come when all epochs are done; any more are in the end."""
    yield in_start_up, signal.SIGKILL
    yield in_set_up, signal.SIGKILL
    middle = [
        (in_epoch, signal.SIGKILL),
        (in_epoch, signal.SIGTERM),
        (in_epoch, signal.SIGINT),
        (after_row, signal.SIGKILL),
        (in_checkpoint, signal.SIGKILL),
        (rng.choice((in_start_up, in_set_up)), signal.SIGKILL),
    ]
    yield from rng.sample(middle, len(middle))
    while True:
        yield in_finish, signal.SIGKILL


def disturb(runs: Runs, pace: Pace, rng: random.Random) -> list[Killed]:
    """Ten kills; what was left by each must be something to go on from."""
    kills: list[Killed] = []
    for _, (moment, number) in zip(range(3 * KILLS), plan(rng), strict=False):
        if not (runs.out / "config.yaml").is_file():
            assert cli.main(["fit", "--resume", "--out", str(runs.out)]) == 1  # nothing begun
        runs.start()
        try:
            moment(runs, pace, rng)
            status = runs.send(number)
        except FinishedError:
            status = runs.end()
        if status == 0:  # a kill in the finish may come late, and the finish can be had again
            assert moment is in_finish, f"done before {moment.__name__}: too few EPOCHS"
            continue
        if number is signal.SIGKILL:
            assert status == -signal.SIGKILL, runs.tail()
        rows, partial = runs.rows(), runs.partial()
        saved = runs.out / CHECKPOINT
        done = checkpoint_epoch(saved) if saved.is_file() else 0  # it can be read
        assert done <= rows <= done + 1
        kills.append(Killed(moment.__name__, number.name, status, rows, partial))
        if len(kills) == KILLS:
            return kills
    pytest.fail(f"only {len(kills)} kills came in time: {kills}")


def pictures(root: Path) -> None:
    """A folder of noise in three classes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 10)):
        for name in ("ant", "bee", "cow"):
            place = root / part / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (40, 44, 3), np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("case", CASES)
def test_ten_kills(case: str, tmp_path: Path, subprocess_environment: dict[str, str]) -> None:
    root = HERE.parents[1]
    search = [str(root), str(root / "python"), str(HERE), subprocess_environment["PYTHONPATH"]]
    environment = {
        **subprocess_environment,
        "PYTHONPATH": os.pathsep.join(search),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    options = CASES[case]
    if case == "workers":
        pictures(tmp_path / "pictures")
        options = (*options, "--root", str(tmp_path / "pictures"))
    whole, cut = (Runs(tmp_path / name, options, environment) for name in ("whole", "cut"))
    try:
        pace = undisturbed(whole)
        kills = disturb(cut, pace, random.Random(f"kills of {case}"))
        cut.start()
        assert cut.end() == 0, cut.tail()
    finally:
        whole.stop()
        cut.stop()
    print(f"\n{case}: {pace}")
    for kill in kills:
        print(f"  {kill}")
    assert bits(cut.out / "model.pt") == bits(whole.out / "model.pt")
    assert table(cut.out) == table(whole.out)
    assert [int(row["epoch"]) for row in table(cut.out)] == list(range(1, EPOCHS + 1))
    assert cut.partial() == []
    left = [{p.name for p in runs.out.iterdir()} for runs in (whole, cut)]
    assert left[0] == left[1]
    if case == "consistency":
        scores = [(runs.out / "consistency_scores.csv").read_bytes() for runs in (whole, cut)]
        assert scores[0] == scores[1]
