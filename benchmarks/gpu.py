"""Everything that only a GPU can show, in stages: ``make gpu``, ``python -m benchmarks.gpu``.

    python -m benchmarks.gpu [--stage NAME ...] [--list] [--dry-run] [--budget SECONDS] [--again]

No stage takes more than eight minutes: it is stopped then, with all that it started. What a stage
ended with is written at once to build/gpu/state.json under the commit, so that the next call goes
on with those that have not run; those that failed come after them, and what has passed is left
out. What a stage leaves behind is copied at once into benchmarks/results/<GPU>/, with its log and
the table of all stages, gpu.md. Nothing needs a network. Exit status: 0 where every stage that ran
passed, 1 otherwise, 2 without a GPU.

On a machine lent for minutes: ``--budget 540`` starts nothing that the time left would cut short
within a minute, and cuts the last stage to it; build/gpu/state.json carries over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.gpu_stages import LIMIT, Stage, stages

ROOT = environment.ROOT
FOLDER = ROOT / "build" / "gpu"
RESULTS = ROOT / "benchmarks" / "results"
LEAST = 60
"""Seconds below which a budget starts nothing more."""
GRACE = 5
PASSED, FAILED, LATE, SKIPPED, CUT = "passed", "failed", "timed out", "skipped", "cut by --budget"
_SOURCES = ("*.py", "*.cu", "*.cuh", "*.h", "*.cpp", "*.toml")


# --- the state ----------------------------------------------------------------------------------


def commit() -> str:
    """What the state is kept under: the commit, with a digest of what differs from it; where there
    is no git, a digest of the sources."""
    head = environment._output("git", "rev-parse", "HEAD")
    changes = environment._output("git", "diff", "HEAD")
    if head is not None:
        return head if not changes else f"{head}+{hashlib.sha256(changes.encode()).hexdigest()[:8]}"
    digest = hashlib.sha256()
    for folder in ("camkernels", "csrc", "benchmarks", "tests"):
        for path in sorted(p for kind in _SOURCES for p in (ROOT / folder).rglob(kind)):
            digest.update(path.read_bytes())
    return f"files-{digest.hexdigest()[:16]}"


class State:
    """Outcomes of the stages by commit, on disk after every change."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.all: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.all = json.loads(path.read_text())

    @property
    def outcomes(self) -> dict[str, Any]:
        return self.all.setdefault(self.key, {})

    def enter(self, name: str, outcome: dict[str, Any]) -> None:
        self.outcomes[name] = outcome
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(self.all, indent=1) + "\n")
        temporary.replace(self.path)

    def status(self, name: str) -> str:
        return str(self.outcomes.get(name, {}).get("status", ""))


def todo(all_stages: Sequence[Stage], state: State, again: bool) -> list[Stage]:
    """Those that have not run, then those that did not pass; all with ``again``. A stage that
    others need comes first in any case."""
    if again:
        return list(all_stages)
    fresh = [s for s in all_stages if state.status(s.name) in ("", CUT) or s.always]
    tried = [s for s in all_stages if state.status(s.name) in (FAILED, LATE) and not s.always]
    return fresh + tried


# --- one stage ----------------------------------------------------------------------------------


def _end_group(process: subprocess.Popen[Any]) -> None:
    """The process and all that it started, which share its group: asked, then killed."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def execute(
    command: Sequence[str], limit: float, log: Path, settings: Mapping[str, str]
) -> tuple[str, int | None]:
    """Run in a process group of its own; the status and the exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **settings}, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return LATE, None
        finally:
            _end_group(process)  # also what a stage left running behind it
    return (PASSED if code == 0 else FAILED), code


def run_stage(stage: Stage, limit: float, folder: Path = FOLDER) -> dict[str, Any]:
    """What is entered in the state."""
    if stage.missing is not None:
        return {"status": SKIPPED, "reason": stage.missing, "seconds": 0.0}
    output = folder / "out" / stage.name
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    settings = {"CAMKERNELS_GPU_OUTPUT": str(output), **stage.environment}
    log, begun = folder / "logs" / f"{stage.name}.txt", time.monotonic()
    status, code = execute(stage.command(output), limit, log, settings)
    outcome = {"status": status, "seconds": round(time.monotonic() - begun, 1)}
    if status == FAILED:
        outcome["reason"] = f"exit {code}: {_last_line(log)}"
    if status == LATE and limit < stage.seconds:
        outcome["status"] = CUT
    if status == LATE:
        outcome["reason"] = f"stopped after {limit:.0f} s: {_last_line(log)}"
    return outcome


def _last_line(log: Path) -> str:
    lines = [li.strip() for li in log.read_text(errors="replace").splitlines() if li.strip()]
    return lines[-1][:200] if lines else "no output"


def copy_results(stage: Stage, status: str, target: Path, folder: Path = FOLDER) -> list[Path]:
    """What the stage wrote, and the end of its log. A benchmark's own folder named after the
    machine is left out of the path; what a stage that did not pass wrote is marked as a part."""
    copied = []
    output = folder / "out" / stage.name
    for path in sorted(p for p in output.rglob("*") if p.is_file()):
        name = path.name if status == PASSED else f"{path.stem}-partial{path.suffix}"
        target.mkdir(parents=True, exist_ok=True)
        copied.append(Path(shutil.copy2(path, target / name)))
    log = folder / "logs" / f"{stage.name}.txt"
    if log.exists() and status != SKIPPED:
        (target / "logs").mkdir(parents=True, exist_ok=True)
        end = log.read_text(errors="replace")[-40000:]
        (target / "logs" / log.name).write_text(end)
        copied.append(target / "logs" / log.name)
    return copied


# --- all ----------------------------------------------------------------------------------------


def summary(all_stages: Sequence[Stage], state: State) -> str:
    """Markdown."""
    rows = [
        f"Stages of `make gpu`, commit {state.key[:18]}.",
        "",
        "| stage | what | outcome | seconds | |",
        "|---|---|---|---|---|",
    ]
    for stage in all_stages:
        outcome = state.outcomes.get(stage.name, {"status": "not run", "seconds": ""})
        reason = str(outcome.get("reason", "")).replace("|", "/")
        rows.append(
            f"| {stage.name} | {stage.about} | {outcome['status']} | {outcome['seconds']} "
            f"| {reason} |"
        )
    return "\n".join(rows) + "\n"


def run(
    all_stages: Sequence[Stage],
    chosen: Sequence[Stage],
    state: State,
    target: Path,
    budget: float | None = None,
    folder: Path = FOLDER,
) -> int:
    """The stages in order; one that fails is entered and the rest goes on. The exit status."""
    begun, bad = time.monotonic(), 0
    for stage in chosen:
        left = float("inf") if budget is None else budget - (time.monotonic() - begun)
        if left < LEAST and budget is not None:
            print(f"{left:.0f} s of the budget are left: stopping before {stage.name}")
            break
        print(f"{stage.name}: {stage.about}", flush=True)
        outcome = run_stage(stage, min(stage.seconds, LIMIT, left), folder)
        state.enter(stage.name, outcome)
        copied = copy_results(stage, outcome["status"], target, folder)
        bad += outcome["status"] in (FAILED, LATE)
        told = f" ({outcome['reason']})" if "reason" in outcome else ""
        print(f"  {outcome['status']} in {outcome['seconds']:.0f} s{told}; {len(copied)} files",
              flush=True)  # fmt: skip
        target.mkdir(parents=True, exist_ok=True)
        (target / "gpu.md").write_text(summary(all_stages, state))
        if stage.always and outcome["status"] != PASSED:
            print(f"{stage.name} is what all others stand on: stopping")
            break
    return 1 if bad else 0


def no_gpu() -> str | None:
    """Why there is no GPU to run on, in one line."""
    try:
        import torch
    except ImportError as error:
        return f"{sys.executable} has no PyTorch ({error}); GPU_PYTHON= names another Python"
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} of {sys.executable} is a build without CUDA"
    return f"torch {torch.__version__} finds no CUDA device"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--stage", action="append", help="only stages whose name begins so")
    parser.add_argument("--list", action="store_true", help="names and what they are")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--budget", type=float, help="seconds for this call")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    arguments = parser.parse_args(argv)
    reason = no_gpu()
    if reason is not None and not (arguments.list or arguments.dry_run):
        print(f"make gpu: no GPU here: {reason}", file=sys.stderr)
        return 2
    everything = stages()
    wanted = arguments.stage
    chosen = [s for s in everything if wanted is None or s.name.startswith(tuple(wanted))]
    if not chosen:
        print(f"no stage begins with {', '.join(wanted)}; --list names them", file=sys.stderr)
        return 2
    state = State(FOLDER / "state.json", commit())
    for stage in chosen if arguments.list else ():
        print(f"{stage.name:32} {state.status(stage.name) or 'not run':12} {stage.about}")
    for stage in chosen if arguments.dry_run else ():
        told = [f"{k}={v}" for k, v in stage.environment.items()]
        words = stage.command(FOLDER / "out" / stage.name)
        print(" ".join([f"{stage.name}:", *told, shlex.join(words)]))
        if stage.missing is not None:
            print(f"  would be skipped: {stage.missing}")
    if arguments.list or arguments.dry_run:
        return 0
    order = todo(chosen, state, arguments.again or wanted is not None)
    target = RESULTS / environment.host_kind("cuda")
    return run(everything, order, state, target, arguments.budget)


if __name__ == "__main__":
    sys.exit(main())
