"""Time and memory of whole epochs of ``camtrain fit``: ``python -m benchmarks.epochs --root VOC``.

Recipe baseline against entropy, and against interpretable with the engine, fast and lean. Each run
is a process of its own; within a round the sides take turns, every other round in reverse order,
and ratios are taken within a round.

- Time: the median of ``train_seconds`` in ``metrics.csv`` over all epochs but the first, which
  warms up. It holds what an epoch of training does: loading, steps, measures of the maps, logging;
  not the test at its end. malloc keeps freed memory (``benchmarks/memory.py``).
- Peak memory: the largest ``peak_rss_mib`` of the same epochs (VmHWM, reset when the epoch
  starts) less VmRSS when the first epoch starts, with data and model loaded; in runs of their own
  whose malloc gives freed memory back at once. So gradients and the optimizer's state count, on all
  sides alike. ``step_bytes`` in the JSON is the peak less VmRSS when the same epoch starts, which
  leaves them out, as the benchmarks of steps do. Loader processes are not counted.

Threads are those of the environment (``OMP_NUM_THREADS``). Writes ``epochs.json`` and
``epochs.md`` into the machine's folder of results after each round.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment, memory, results
from benchmarks.harness import Options
from benchmarks.runner import SCHEMA, WorkerFailedError, torchvision_path
from benchmarks.timing import quantiles

BASELINE = "baseline"
_INTERPRETABLE = ("--recipe", "interpretable", "--engine")
SIDES: dict[str, tuple[str, ...]] = {
    BASELINE: ("--recipe", "baseline"),
    "entropy": ("--recipe", "entropy", "--beta", "0.1", "--warmup-epochs", "0"),
    "interpretable fast": (*_INTERPRETABLE, "fast"),
    "interpretable lean": (*_INTERPRETABLE, "lean"),
}
TARGETS = {
    "entropy": {"time": 1.05},
    "interpretable fast": {"time": 2.7, "memory": 1.25},
    "interpretable lean": {"memory": 1.1},
}
"""Of the ratio to the baseline, at most."""
MEMORY_ROUNDS = 2
_CAVEATS = (
    "the baseline measures the same maps as the recipe entropy, at their cost",
    "time: median of train_seconds of all epochs but the first; quantiles are over rounds",
    "peak: largest peak_rss_mib of those epochs less VmRSS when the first begins",
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all sides share."""

    data: str
    root: str | None
    arch: str
    image_size: int
    batch_size: int
    limit_train: int | None
    limit_test: int
    epochs: int
    workers: int | None

    @property
    def name(self) -> str:
        size = self.image_size
        return f"{self.arch} {self.batch_size}x{size}x{size} {self.data}"

    def flags(self) -> list[str]:
        """For ``camtrain fit``."""
        found = ["--weights", "none", "--accelerator", "cpu", "--no-progress"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                found += [f"--{field.name.replace('_', '-')}", str(value)]
        return found


def _fit(
    setting: Setting, side: str, malloc: dict[str, str], path: str, folder: Path
) -> dict[str, Any]:
    """One process to its end, and what it measured."""
    levels = folder / "levels.json"
    program = ["camtrain", "fit"]
    if malloc is memory.PEAK_MALLOC:
        program = ["benchmarks.epochs", "levels", str(levels), "fit"]
    out = folder / "run"
    command = [*program, *SIDES[side], *setting.flags(), "--out", str(out)]
    search = [path, str(environment.ROOT / "python")]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=environment.ROOT,
        env=memory.process_environment(malloc, ":".join(filter(None, search))),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = "\n".join(done.stdout.strip().splitlines()[-15:])
        raise WorkerFailedError(f"{side}: {lines}")
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {
        **_measured(rows, json.loads(levels.read_text()) if levels.is_file() else None),
        "head": json.loads((out / "summary.json").read_text())["head"],
        "threads": json.loads((out / "environment.json").read_text())["torch_threads"],
    }
    if not math.isfinite(float(rows[-1].get("train/loss", "nan"))):
        raise WorkerFailedError(f"{side}: the training loss is not finite")
    return found


def _measured(rows: Sequence[dict[str, str]], levels: Sequence[int] | None) -> dict[str, Any]:
    """Of the rows of ``metrics.csv``; ``levels``: bytes of VmRSS when each epoch began."""
    seconds = [float(row["train_seconds"]) for row in rows]
    found: dict[str, Any] = {
        "epoch_seconds": seconds,
        "seconds": statistics.median(seconds[1:]),
        "steps": int(rows[-1]["step"]),
    }
    if levels is not None:
        peaks = [int(float(row["peak_rss_mib"]) * 2**20) for row in rows]
        found |= {
            "levels": list(levels),
            "peak_bytes": max(peaks[1:]) - levels[0],
            "step_bytes": max(a - b for a, b in zip(peaks[1:], levels[1:], strict=True)),
        }
    return found


def _levels(output: Path, argv: list[str]) -> int:
    """``camtrain`` with ``argv``; writes how much memory it holds when each epoch begins."""
    from camtrain import cli, recorder

    held: list[int] = []
    start = recorder.PeakMemory.start

    def started(self: recorder.PeakMemory) -> None:
        start(self)
        held.append(memory._resident("VmRSS"))
        output.write_text(json.dumps(held))

    recorder.PeakMemory.start = started
    return cli.main(argv)


def measure(
    setting: Setting,
    sides: Sequence[str],
    rounds: int,
    say: Callable[[str], None],
    save: Callable[[list[dict[str, Any]]], object] = lambda runs: None,
) -> list[dict[str, Any]]:
    """All runs, each with its round, side and kind, ``time`` or ``peak``.

    Args:
        save: takes the runs so far after each round, so that a run that is cut off loses one.

    Raises:
        WorkerFailedError: a run failed, or sides took different numbers of steps.
    """
    path = torchvision_path()
    kinds = {"time": (memory.TIMING_MALLOC, rounds)}
    kinds["peak"] = memory.PEAK_MALLOC, min(rounds, MEMORY_ROUNDS)
    runs: list[dict[str, Any]] = []
    for number in range(rounds):
        for kind, (malloc, count) in kinds.items():
            if number >= count:
                continue
            for side in sides if number % 2 == 0 else sides[::-1]:
                with tempfile.TemporaryDirectory() as folder:
                    found = _fit(setting, side, malloc, path, Path(folder))
                runs.append({"round": number, "kind": kind, "side": side, **found})
                say(f"round {number + 1} of {rounds}, {kind}, {side}: {_told(found, kind)}")
        if len({run["steps"] for run in runs}) != 1:
            raise WorkerFailedError(f"sides took different numbers of steps: {runs}")
        save(runs)
    return runs


def _told(found: dict[str, Any], kind: str) -> str:
    if kind == "time":
        return f"{found['seconds']:.2f} s"
    return f"{found['peak_bytes'] / 2**20:.0f} MiB"


def _ratios(runs: Sequence[dict[str, Any]], kind: str, key: str) -> dict[str, dict[str, float]]:
    """Per side the quantiles of its ratio to the baseline of the same round."""
    found: dict[str, list[float]] = {}
    base = {r["round"]: r[key] for r in runs if r["kind"] == kind and r["side"] == BASELINE}
    for run in runs:
        if run["kind"] == kind and run["round"] in base:
            found.setdefault(run["side"], []).append(run[key] / base[run["round"]])
    return {side: quantiles(values) for side, values in found.items()}


def result_of(
    setting: Setting, runs: Sequence[dict[str, Any]], command: str, quick: bool = False
) -> dict[str, Any]:
    """As it is written to JSON; ``benchmarks.results`` says what a result holds."""
    sides: dict[str, Any] = {}
    times = _ratios(runs, "time", "seconds")
    peaks, steps = (_ratios(runs, "peak", key) for key in ("peak_bytes", "step_bytes"))
    for side in dict.fromkeys(run["side"] for run in runs):
        mine = [run for run in runs if run["side"] == side]
        seconds = [run["seconds"] for run in mine if run["kind"] == "time"]
        held = [run for run in mine if run["kind"] == "peak"]
        milliseconds = {k: 1e3 * v for k, v in quantiles(seconds).items()}
        sides[side] = {
            "milliseconds": milliseconds,  # of an epoch
            "host_milliseconds": milliseconds,
            "page_faults_per_run": None,
            "rounds": len(seconds),
            "ratio_to": {} if side == BASELINE else {BASELINE: times[side]},
            "peak_bytes": statistics.median(run["peak_bytes"] for run in held),
            "step_bytes": statistics.median(run["step_bytes"] for run in held),
            "peak_ratio": peaks[side],
            "step_bytes_ratio": steps[side],
            "targets": TARGETS.get(side, {}),
            "head": mine[0]["head"],
        }
    facts = environment.describe("cpu")
    facts |= {"threads": runs[0]["threads"], "malloc": memory.TIMING_MALLOC}
    return {
        "schema": SCHEMA,
        "benchmark": "epochs",
        "about": "an epoch of training through camtrain fit",
        "baseline": BASELINE,
        "caveats": list(_CAVEATS),
        "options": {
            **dataclasses.asdict(Options(quick=quick)),
            **dataclasses.asdict(setting),
            # the place of the data is the user's own
            "root": None if setting.root is None else Path(setting.root).name,
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "host_kind": environment.host_kind("cpu"),
        "environment": facts,
        "peak_malloc": memory.PEAK_MALLOC,
        "cases": {setting.name: {"sides": sides, "unavailable": {}, "runs": list(runs)}},
    }


def _cell(ratio: dict[str, float], target: float | None) -> str:
    text = f"{ratio['q50']:.3f} [{ratio['q20']:.3f}, {ratio['q80']:.3f}]"
    if target is None:
        return text
    verdict = "met" if ratio["q50"] <= target else "missed"
    return f"{text}, target {target:g} {verdict}"


def table(result: dict[str, Any]) -> str:
    """Markdown: one row per side."""
    ((name, case),) = result["cases"].items()
    options, facts = result["options"], result["environment"]
    workers = "camtrain's default" if options["workers"] is None else options["workers"]
    rows = [
        f"Epochs of `camtrain fit`, {name}, at most {options['limit_train']} training samples, "
        f"{options['epochs']} epochs, loader processes: {workers}. {results.conditions(result)}; "
        f"Python {facts['python']}, torchvision {facts['torchvision']}. `{result['command']}`",
        "",
        "| side | s per epoch | time / baseline [q20, q80] | peak MiB "
        "| peak / baseline [q20, q80] | above the epoch's start / baseline |",
        "|---|---|---|---|---|---|",
    ]
    for side, figures in case["sides"].items():
        targets, base = figures["targets"], side == BASELINE
        cells = [
            side,
            f"{figures['milliseconds']['q50'] / 1e3:.2f}",
            "1" if base else _cell(figures["ratio_to"][BASELINE], targets.get("time")),
            f"{figures['peak_bytes'] / 2**20:.0f}",
            "1" if base else _cell(figures["peak_ratio"], targets.get("memory")),
            "1" if base else f"{figures['step_bytes_ratio']['q50']:.3f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    counts = {
        k: len({r["round"] for r in case["runs"] if r["kind"] == k}) for k in ("time", "peak")
    }
    rows += [
        "",
        f"Rounds: {counts['time']} for time, {counts['peak']} for memory. Targets are for the "
        "median.",
        "",
        *(f"- {caveat}" for caveat in result["caveats"]),
    ]
    return "\n".join(rows) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.epochs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", default="voc", help="as camtrain names it")
    parser.add_argument("--root", help="folder that holds the data, as of camtrain fit")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--limit-train", type=int, default=160, help="training samples")
    parser.add_argument("--limit-test", type=int, default=16, help="the test is not timed")
    parser.add_argument("--epochs", type=int, default=3, help="the first warms up")
    parser.add_argument("--workers", type=int, help="loader processes; default camtrain's")
    parser.add_argument("--side", action="append", choices=list(SIDES)[1:], help="only these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="tiny inputs, one round: figures without meaning"
    )
    parser.add_argument(
        "--output", type=Path, help="folder; benchmarks/results, or with --quick or --side nowhere"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["levels"]:
        return _levels(Path(argv[1]), argv[2:])
    arguments = _parser().parse_args(argv)
    if arguments.epochs < 2 or arguments.rounds < 1:
        _parser().error("at least 2 epochs and 1 round")
    names = [field.name for field in dataclasses.fields(Setting)]
    values = {name: getattr(arguments, name) for name in names}
    rounds = arguments.rounds
    if arguments.quick:
        rounds, tiny = 1, {"image_size": 48, "batch_size": 4, "limit_train": 12, "limit_test": 4}
        values |= {**tiny, "workers": 0}
    if values["root"] is not None:
        values["root"] = str(Path(values["root"]).resolve())  # runs begin in the repository
    setting = Setting(**values)
    command = shlex.join(["python", "-m", "benchmarks.epochs", *argv])
    # must not replace a full result
    partial = arguments.quick or arguments.side
    folder = arguments.output or (None if partial else results.FOLDER)

    def save(runs: list[dict[str, Any]]) -> dict[str, Any]:
        result = result_of(setting, runs, command, arguments.quick)
        if folder is not None:
            path = results.write(result, folder)
            path.with_suffix(".md").write_text(table(result))
        return result

    try:
        sides = [BASELINE, *(arguments.side or list(SIDES)[1:])]
        runs = measure(setting, sides, rounds, lambda s: print(s, flush=True), save)
    except WorkerFailedError as error:
        print(f"epochs: a run failed. {error}", file=sys.stderr)
        return 1
    print("\n" + table(save(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
