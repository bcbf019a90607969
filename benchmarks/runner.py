"""Starts the measuring processes of a benchmark and gathers their figures."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import environment, memory
from benchmarks.harness import COPY, Benchmark, Options
from camkernels import backends

SCHEMA = 1
DECLARE_TORCHVISION = str(environment.ROOT / "tests" / "_sitecustomize")


class WorkerFailedError(RuntimeError):
    """A measuring process ended with an error; the message holds its last lines."""


def _worker(job: dict[str, Any], malloc: dict[str, str], python_path: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "benchmarks.worker", json.dumps(job), str(output)]
        done = subprocess.run(
            command,
            cwd=environment.ROOT,
            env=memory.process_environment(malloc, python_path),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            lines = "\n".join(done.stderr.strip().splitlines()[-15:])
            raise WorkerFailedError(f"{job['benchmark']} ({job['kind']}): {lines}")
        figures: dict[str, Any] = json.loads(output.read_text())
        return figures


def torchvision_path() -> str:
    """What PYTHONPATH needs for torchvision's models to import: usually nothing.

    Beside a torch build that torchvision's binary was not made for, the tests' declaration of its
    operators' schemas; results say so (``torchvision_schemas_declared``).
    """
    probe = [sys.executable, "-c", "import torchvision"]
    works = subprocess.run(probe, capture_output=True, check=False).returncode == 0
    return "" if works else DECLARE_TORCHVISION


def run(
    benchmark: Benchmark,
    options: Options,
    only: list[str] | None = None,
    say: Callable[[str], None] = print,
    save: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """All figures of a benchmark, as they are written to JSON.

    Args:
        save: takes the result so far after each case, so that a run that is cut off loses one.

    Raises:
        WorkerFailedError: a process failed, among other reasons because two sides disagree.
    """
    if os.getloadavg()[0] > 0.5:  # an OpenMP barrier waits a scheduler tick for a preempted thread
        say(f"warning: load average {os.getloadavg()[0]:.1f}, the machine is not quiet")
    path = torchvision_path() if benchmark.needs_torchvision else ""
    names = [c.name for c in benchmark.cases(options)]
    if only is not None:
        names = [n for n in names if any(text in n for text in only)]
    if not names:
        raise ValueError(f"no case of {benchmark.name} matches {only}")
    if options.sides is not None:
        options = dataclasses.replace(options, sides=[benchmark.baseline, *options.sides])
    job = {"benchmark": benchmark.name, "options": dataclasses.asdict(options), "side": None}
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "benchmark": benchmark.name,
        "about": benchmark.about,
        "baseline": benchmark.baseline,
        "caveats": list(benchmark.caveats),
        "options": dataclasses.asdict(options),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(benchmark, options, only),
        "host_kind": environment.host_kind(options.device),
        "environment": {},
        "peak_malloc": memory.PEAK_MALLOC,
        "cases": {},
    }
    for name in names:
        say(f"{benchmark.name}: timing {name}")
        done = _worker({**job, "kind": "time", "cases": [name]}, memory.TIMING_MALLOC, path)
        if not result["environment"]:
            result["environment"] = done["environment"]
            if path:
                result["environment"]["torchvision_schemas_declared"] = True
        _require_sides(options, done["cases"][name])
        if benchmark.measures_memory and benchmark.isolate:
            _add_peaks(benchmark, job, done["cases"], path, say)
        result["cases"].update(done["cases"])
        save(result)
    if benchmark.measures_memory and not benchmark.isolate:
        _add_peaks(benchmark, job, result["cases"], path, say)
    return result


def _require_sides(options: Options, case: dict[str, Any]) -> None:
    known = [*case["sides"], *case["unavailable"]]
    missing = [side for side in options.sides or () if side not in known]
    if missing:
        raise ValueError(f"no side {', '.join(missing)}; this case has {', '.join(known)}")


def _add_peaks(
    benchmark: Benchmark,
    job: dict[str, Any],
    cases: dict[str, Any],
    path: str,
    say: Callable[[str], None],
) -> None:
    groups = [[name] for name in cases] if benchmark.isolate else [list(cases)]
    for group in groups:
        sides = {side: None for name in group for side in cases[name]["sides"] if side != COPY}
        for side in sides:
            holders = [name for name in group if side in cases[name]["sides"]]
            say(f"{benchmark.name}: peak memory of {side}")
            peak_job = {**job, "kind": "peak", "cases": holders, "side": side}
            for name, value in _worker(peak_job, memory.PEAK_MALLOC, path)["cases"].items():
                cases[name]["sides"][side]["peak_bytes"] = value


def command_line(benchmark: Benchmark, options: Options, only: list[str] | None) -> str:
    """The command that repeats the run."""
    chosen = os.environ.get(backends.ENVIRONMENT_VARIABLE)
    words = [f"{backends.ENVIRONMENT_VARIABLE}={chosen}"] if chosen else []
    words += ["python -m benchmarks run", benchmark.name, f"--device {options.device}"]
    words += [f"--dtype {options.dtype}"] if options.dtype != "float32" else []
    words += ["--quick"] if options.quick else []
    words += [f"--seconds {options.seconds:g}"] if options.seconds is not None else []
    words += [f"--threads {options.threads}"] if options.threads is not None else []
    words += [f"--case '{text}'" if " " in text else f"--case {text}" for text in only or ()]
    words += [f"--side {s}" for s in options.sides or () if s != benchmark.baseline]
    return " ".join(words)
