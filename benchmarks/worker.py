"""Run in processes of their own, with malloc set: ``python -m benchmarks.worker JOB OUTPUT``.

A job is JSON: ``{"kind": "time" | "peak", "benchmark", "cases", "side", "options"}``.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, memory, timing
from benchmarks.harness import COPY, Benchmark, Case, Options, Side, build_sides, verify
from benchmarks.members import find


def time_case(benchmark: Benchmark, case: Case, options: Options) -> dict[str, Any]:
    """Verify a case, then time its sides in turn and count what they save and launch."""
    sides, reasons = build_sides(case, options)
    verify(case, sides, benchmark.baseline, options)
    timer = timing.CudaTimer() if options.device == "cuda" else timing.host_timer
    seconds = options.seconds or (0.05 if options.quick else benchmark.seconds)
    rounds = (3, 5) if options.quick else case.rounds
    timings = timing.measure({n: s.step for n, s in sides.items()}, timer, seconds, rounds)
    figures = timing.summary(timings)
    for name, side in sides.items():
        if name != COPY:
            figures[name].update(_counts(case, side, figures[name], options))
        elif case.ideal_bytes is not None:
            figures[name]["gigabytes_per_second"] = _rate(case.ideal_bytes, figures[name])
        if side.close is not None:
            side.close()
    return {
        "ideal_bytes": case.ideal_bytes,
        "operations": case.operations,
        **case.facts,
        "warm_up_rounds": timings.warm_up_rounds,
        "sides": figures,
        "unavailable": reasons,
    }


def _rate(amount: int, figures: dict[str, Any]) -> float:
    return amount / figures["milliseconds"]["q50"] / 1e6


def _counts(case: Case, side: Side, figures: dict[str, Any], options: Options) -> dict[str, Any]:
    out: dict[str, Any] = {
        "saved_bytes": memory.saved_bytes(side),
        "launches": memory.launches(side.step, options.device),
    }
    if case.ideal_bytes is not None:
        out["gigabytes_per_second"] = _rate(case.ideal_bytes, figures)
    if case.operations is not None:
        out["gigaflops"] = _rate(case.operations, figures)
    return out


def peak_of_side(case: Case, name: str, options: Options) -> int | None:
    """Peak of one side's step above the level before it; None where the side cannot run."""
    sides, _ = build_sides(case, options, only=name)
    if not sides:
        return None
    side = sides[name]
    bytes_ = memory.peak(side.step, options.device)
    if side.close is not None:
        side.close()
    del side, sides
    gc.collect()
    return bytes_


def main(job: dict[str, Any]) -> dict[str, Any]:
    options = Options(**job["options"])
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    benchmark = find(job["benchmark"])
    cases = [c for c in benchmark.cases(options) if job["cases"] is None or c.name in job["cases"]]
    described = environment.describe(options.device)
    out: dict[str, Any] = {}
    for case in cases:
        if job["kind"] == "time":
            out[case.name] = time_case(benchmark, case, options)
        else:
            out[case.name] = peak_of_side(case, job["side"], options)
    return {"cases": out, "environment": described}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(sys.argv[1]))))
