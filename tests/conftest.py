"""Fixtures and settings that all tests share.

Environment:
    HYPOTHESIS_PROFILE: ci (default) or thorough.
    CAMKERNELS_REQUIRE: backends, by commas, whose absence is an error and not a skip.
    TRITON_INTERPRET=1: ``pytest tests/ops`` runs the Triton kernels in the interpreter, and only
        these; it is read when Triton is imported, hence a process of its own.
    CAMKERNELS_CUDA_HOST=1: the same for the CUDA kernels, built for the host (tests/cuda_host), of
        the files in CUDA_FILES.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from camkernels import backends

HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location(
    "_declare_before_torchvision", HERE / "_sitecustomize" / "sitecustomize.py"
)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)
pytest.register_assert_rewrite("ops.base", "ops.oracle")

CUDA_FILES = (
    "test_cam.py",
    "test_cam_statistics.py",
    "test_map_statistics.py",
    "test_relu.py",
    "test_ssim.py",
    "test_ssim_kernels.py",
    "test_warped_ssim.py",
)
"""Tests of ops that have CUDA kernels."""
if os.environ.get("CAMKERNELS_CUDA_HOST") == "1":
    sys.path.insert(0, str(HERE))
    from cuda_host.build import load

    load()

# Seconds each in the interpreter, and their like are run there: marked slow in that process only.
INTERPRETED_SLOWLY = (
    "test_bad_values_are_seen_where_the_reference_sees_them[inf-",
    "test_bad_values_are_seen_where_the_reference_sees_them[-inf-",
    "test_warped_ssim_of_bad_boxes[",
    "test_ssim_nan_stays_in_its_sample[",
    "test_one_launch_forward_and_one_backward[64]",
    "test_shapes[shape3-",
    "test_shapes[shape5-False-",
    "test_named_cases[256 taps-",
    "test_extremes_of_each_statistic_alone[",
)
# The reference against the reference in float64.
COMPARED_WITH_ITSELF = ("::test_extremes[reference]",)

_COMMON: dict[str, Any] = {
    "deadline": None,
    # one property on the base class runs for every op that inherits it
    "suppress_health_check": [
        hypothesis.HealthCheck.differing_executors,
        hypothesis.HealthCheck.too_slow,
    ],
}
hypothesis.settings.register_profile(
    "ci",
    max_examples=4 if backends.triton_interpreted() else 10,
    derandomize=True,
    database=None,
    **_COMMON,
)
hypothesis.settings.register_profile("thorough", max_examples=300, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    for name in filter(None, os.environ.get("CAMKERNELS_REQUIRE", "").split(",")):
        reason = backends.unavailable_reason(name)
        if name not in backends.NAMES or reason is not None:
            raise pytest.UsageError(
                f"CAMKERNELS_REQUIRE asks for {name!r}: {reason or 'no such backend'}"
            )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every op is tested on every backend, but CUDA has kernels for some ops only; tests/gpu asks
    for those by itself."""

    def wanted(item: pytest.Item) -> bool:
        call = getattr(item, "callspec", None)
        backend = None if call is None else call.params.get("backend")
        return backend != "cuda" or item.path.name in CUDA_FILES or item.path.parent.name == "gpu"

    items[:] = [item for item in items if wanted(item)]
    slow = INTERPRETED_SLOWLY if backends.triton_interpreted() else COMPARED_WITH_ITSELF
    for item in items:
        if any(part in item.nodeid for part in slow):
            item.add_marker(pytest.mark.slow)


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = []
    for name in ("cpu", "triton", "cuda"):
        reason = backends.unavailable_reason(name)
        lines.append(f"camkernels backend {name}: {'works' if reason is None else reason}")
    return lines


@pytest.fixture(autouse=True)
def _same_state_for_every_test() -> Iterator[None]:
    """Seed before, and the thread count and the chosen backend put back after."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    token = backends._selected.set(None)
    yield
    backends._selected.reset(token)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository."""
    folder = HERE.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data not found: no folder ../shared/data beside the repository")
    return folder


@pytest.fixture
def subprocess_environment() -> dict[str, str]:
    """Environment for a Python process that a test starts: ours, and torchvision imports there."""
    environment = dict(os.environ)
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE / "_sitecustomize"), *([inherited] if inherited else [])]
    )
    return environment


@pytest.fixture
def python() -> str:
    """The interpreter, for processes that a test starts."""
    return sys.executable


@pytest.fixture
def two_processes(
    tmp_path: Path, subprocess_environment: dict[str, str], python: str
) -> Callable[[str], None]:
    """Runs a program as two processes to their ends: ``program RANK 2 tmp_path``."""

    def run(program: str) -> None:
        running = [
            subprocess.Popen(
                [python, program, str(rank), "2", str(tmp_path)], env=subprocess_environment,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            for started in running:
                output, _ = started.communicate(timeout=400)
                assert started.returncode == 0, output
        finally:
            for started in running:
                started.kill()

    return run


def _poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() and tensor.device.type != "meta":
            with torch.no_grad():
                tensor.fill_(math.nan)
        return tensor

    return wrapper


@pytest.fixture
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised floating-point memory reads NaN, so that an unwritten output shows."""
    for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
