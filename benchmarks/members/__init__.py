"""The benchmarks, one file per op, one for training steps."""

from __future__ import annotations

from benchmarks.harness import Benchmark
from benchmarks.members import cam, cam_statistics, linearity, map_statistics, step_cam_entropy

MEMBERS: dict[str, Benchmark] = {
    member.name: member
    for member in (
        cam.BENCHMARK,
        map_statistics.BENCHMARK,
        cam_statistics.BENCHMARK,
        linearity.BENCHMARK,
        step_cam_entropy.BENCHMARK,
    )
}


def find(name: str) -> Benchmark:
    """The member of that name; ValueError names the others."""
    if name not in MEMBERS:
        raise ValueError(f"unknown benchmark {name!r}, there are {', '.join(MEMBERS)}")
    return MEMBERS[name]
