"""The kernels on the host build: every one is run, in several orders of threads and blocks; each of
their barriers and fences is needed, and missed where it is removed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cuda_host import build
from cuda_host.exercise import calls, exercise

import camkernels as ck
from camkernels import backends
from camkernels.ops import _cuda_launch

pytestmark = pytest.mark.skipif(
    not backends.cuda_on_host(), reason="the CUDA kernels are not built for the host here"
)


def test_results_do_not_depend_on_the_order_of_threads_and_blocks() -> None:
    assert exercise(_cuda_launch.module()) == []


def test_no_cuda_kernel_is_left_out_of_the_exercise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are noted and not made."""
    module = _cuda_launch.module()
    launched: set[str] = set()
    rectified: set[tuple[bool, bool]] = set()

    def run(kernel: str, operands: Any, *arguments: Any) -> None:
        launched.add(kernel)
        if kernel == "relu_bwd":
            _, mask, *_, guided = arguments
            rectified.add((mask != 0, guided))

    monkeypatch.setattr(_cuda_launch, "run", run)
    with ck.backend("cuda"):
        for _, call in calls():
            call()
    assert launched == {name for name in dir(module) if name.endswith(("_fwd", "_bwd"))}
    assert len(rectified) == 4  # by the mask and by the output, plain and guided


BARRIER = "__syncthreads();"
TEXTS = {"barrier": BARRIER, "fence": "__threadfence();"}
SEEN = ("race on shared memory", "result", "arrives before", "without a fence")


def spots() -> list[Any]:
    """File, text and number of each barrier and fence in the kernels."""
    return [
        pytest.param(file, what, i, id=f"{file}-{name}-{i}")
        for path in sorted(build.CSRC.glob("*/*.cu*"))
        for file in [path.relative_to(build.CSRC).as_posix()]
        for name, what in TEXTS.items()
        for i in range(path.read_text(encoding="utf-8").count(what))
    ]


def without(text: str, what: str, index: int) -> str:
    start = [m.start() for m in re.finditer(re.escape(what), text)][index]
    return text[:start] + ";" + text[start + len(what) :]


def seen_to_fail(folder: Path, file: str, what: str, index: int) -> str:
    """What the kernels' exercise says of a copy without one barrier, or fence."""
    copy = folder / "csrc"
    shutil.copytree(build.CSRC, copy)
    path = copy / file
    path.write_text(without(path.read_text(encoding="utf-8"), what, index), encoding="utf-8")
    built = build.build(folder / "build", copy)
    run = subprocess.run(
        [sys.executable, str(build.HERE / "exercise.py"), str(built)],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert run.returncode in (0, 1), run.stderr[-2000:]
    return run.stdout


def test_a_removed_barrier_is_caught(tmp_path: Path) -> None:
    """One in CI; all of them in the slow test below."""
    file = "cam/channels.cuh"
    assert "race on shared memory" in seen_to_fail(tmp_path, file, BARRIER, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "what", "index"), spots())
def test_every_removed_barrier_and_fence_is_caught(
    tmp_path: Path, file: str, what: str, index: int
) -> None:
    found = seen_to_fail(tmp_path, file, what, index)
    assert any(text in found for text in SEEN), "not needed, or not watched"
