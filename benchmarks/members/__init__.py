"""The benchmarks, one file per op and per training step."""

from __future__ import annotations

from benchmarks.harness import Benchmark
from benchmarks.members import (
    batch_norm_relu,
    batch_norm_relu_kernels,
    cam,
    cam_statistics,
    consistency,
    gradient_error,
    insertion,
    linearity,
    map_ops,
    map_statistics,
    relu,
    score_cam,
    step_cam_entropy,
    step_consistency,
    step_engine,
    step_explainers,
    step_interpretable,
)

MEMBERS: dict[str, Benchmark] = {
    member.name: member
    for member in (
        cam.BENCHMARK,
        map_statistics.BENCHMARK,
        cam_statistics.BENCHMARK,
        linearity.BENCHMARK,
        relu.BENCHMARK,
        batch_norm_relu.BENCHMARK,
        batch_norm_relu_kernels.BENCHMARK,
        gradient_error.BENCHMARK,
        consistency.BENCHMARK,
        map_ops.BENCHMARK,
        step_cam_entropy.BENCHMARK,
        step_consistency.BENCHMARK,
        step_interpretable.BENCHMARK,
        step_interpretable.BFLOAT16,
        step_engine.BENCHMARK,
        step_engine.BFLOAT16,
        step_explainers.BENCHMARK,
        insertion.BENCHMARK,
        score_cam.BENCHMARK,
    )
}


def find(name: str) -> Benchmark:
    """The member of that name; ValueError names the others."""
    if name not in MEMBERS:
        raise ValueError(f"unknown benchmark {name!r}, there are {', '.join(MEMBERS)}")
    return MEMBERS[name]
