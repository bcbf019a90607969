"""Which implementation runs: ck.backend, CAMKERNELS_BACKEND, errors of named backends."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import camkernels as ck
from camkernels import backends
from camkernels.ops import _chain

interpreted = backends.triton_interpreted()
needs_cpu = pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None,
    reason=f"backend cpu: {backends.unavailable_reason('cpu')}",
)
A = torch.rand(2, 3, 4, 5)
G = torch.rand(2, 3, 4, 5)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(kernel, backend) of every call of the chain, in order."""
    seen: list[tuple[str, str]] = []
    original = _chain.implementation

    def spy(op: str, kernel: str, backend: str) -> Callable[..., Any]:
        seen.append((kernel, backend))
        return original(op, kernel, backend)

    monkeypatch.setattr(_chain, "implementation", spy)
    return seen


def test_as_a_function_it_holds_until_the_next_switch() -> None:
    ck.backend("reference")
    assert ck.current_backend() == "reference"
    ck.backend("auto")
    assert ck.current_backend() == "auto"


def test_as_a_context_manager_it_nests_and_switches_back() -> None:
    with ck.backend("reference"):
        with ck.backend("auto"):
            assert ck.current_backend() == "auto"
        assert ck.current_backend() == "reference"
    assert ck.current_backend() == "auto"


def test_it_switches_back_after_an_exception() -> None:
    with pytest.raises(KeyError), ck.backend("reference"):
        raise KeyError
    assert ck.current_backend() == "auto"


def test_one_object_can_be_entered_again() -> None:
    choice = ck.backend("reference")
    for _ in range(2):
        with choice:
            assert ck.current_backend() == "reference"
        assert ck.current_backend() == "auto"


def test_an_unknown_name_is_refused() -> None:
    allowed = "auto, reference, cpu, triton, cuda"
    with pytest.raises(ValueError, match=rf"unknown backend 'metal'.*{allowed}"):
        ck.backend("metal")  # type: ignore[arg-type]
    assert ck.current_backend() == "auto"


def test_the_environment_sets_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMKERNELS_BACKEND", "reference")
    assert ck.current_backend() == "reference"
    with ck.backend("auto"):
        assert ck.current_backend() == "auto"
    monkeypatch.setenv("CAMKERNELS_BACKEND", "")
    assert ck.current_backend() == "auto"


def test_an_invalid_environment_raises_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMKERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="CAMKERNELS_BACKEND: unknown backend 'fast'"):
        ck.grad_cam(A, G)


def test_a_thread_does_not_see_the_choice_of_another() -> None:
    seen: list[str] = []

    def worker() -> None:
        seen.append(ck.current_backend())
        with ck.backend("auto"):
            seen.append(ck.current_backend())

    with ck.backend("reference"):
        thread = threading.Thread(target=worker)
        thread.start()
        thread.join()
        assert ck.current_backend() == "reference"
    assert seen == ["auto", "auto"]


@pytest.mark.skipif(interpreted or torch.cuda.is_available(), reason="triton works here")
def test_triton_without_a_device_raises_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "no CUDA device|triton does not import"
    with pytest.raises(ck.BackendUnavailableError, match=reason):
        ck.backend("triton")
    assert ck.current_backend() == "auto"
    monkeypatch.setenv("CAMKERNELS_BACKEND", "triton")
    with pytest.raises(ck.BackendUnavailableError, match=reason):
        ck.grad_cam(A, G)


def test_triton_refuses_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "unavailable_reason", lambda name: None)
    with (
        ck.backend("triton"),
        pytest.raises(ck.BackendUnavailableError, match=r"'triton'.*got float64"),
    ):
        ck.grad_cam(A.double(), G.double())


def test_triton_refuses_tensors_of_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "unavailable_reason", lambda name: None)
    other = A.to("meta") if interpreted else A
    with ck.backend("triton"), pytest.raises(ck.BackendUnavailableError, match="tensors, got"):
        ck.grad_cam(other, other)


@needs_cpu
def test_cpu_refuses_tensors_of_another_device() -> None:
    with (
        ck.backend("cpu"),
        pytest.raises(ck.BackendUnavailableError, match="CPU tensors, got meta"),
    ):
        ck.map_statistics(torch.empty(1, 2, 2, device="meta"))


BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path, target=None):
        if name == "camkernels._cpu":
            raise ImportError("blocked by the test")

sys.meta_path.insert(0, Block())
import torch, camkernels as ck
a = torch.rand(1, 2, 3, 3)
print(ck.grad_cam(a, a).shape)  # auto takes the reference
try:
    ck.backend("cpu")
except ck.BackendUnavailableError as error:
    print("refused:", error)
"""


def test_without_the_module_cpu_is_refused_and_auto_works(
    python: str, subprocess_environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [python, "-c", BLOCKED],
        env=subprocess_environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 3, 3])" in done.stdout
    assert "refused: backend 'cpu' cannot work here" in done.stdout
    assert "blocked by the test" in done.stdout


@needs_cpu
def test_auto_takes_cpp_on_the_cpu(kernels: list[tuple[str, str]]) -> None:
    a = A.clone().requires_grad_()
    ck.grad_cam(a, G).sum().backward()
    assert kernels == [("cam_fwd", "cpu"), ("cam_bwd", "cpu")]
    assert backends.resolve(torch.device("cpu"), torch.float64) == "cpu"
    assert backends.resolve(torch.device("meta"), torch.float32) == "reference"


def test_reference_by_name_calls_no_kernel(kernels: list[tuple[str, str]]) -> None:
    with ck.backend("reference"):
        ck.grad_cam(A.clone().requires_grad_(), G).sum().backward()
    assert not kernels


@needs_cpu
def test_the_backward_stays_with_the_forwards_backend(kernels: list[tuple[str, str]]) -> None:
    a = A.clone().requires_grad_()
    with ck.backend("cpu"):
        area = ck.cam_statistics(a, G).area.sum()
    with ck.backend("reference"):
        area.backward()
    assert kernels == [("cam_statistics_fwd", "cpu"), ("cam_statistics_bwd", "cpu")]


@needs_cpu
def test_a_backward_on_another_thread_keeps_the_backend(kernels: list[tuple[str, str]]) -> None:
    a = A.clone().requires_grad_()
    with ck.backend("cpu"):
        entropy = ck.cam_statistics(a, G).entropy.sum()
    thread = threading.Thread(target=entropy.backward)
    thread.start()
    thread.join()
    assert kernels[-1] == ("cam_statistics_bwd", "cpu")
    assert a.grad is not None
    assert bool(a.grad.any())


class TestCudaReasons:
    """Why the CUDA backend cannot work here: a module, driver and device of the test's making."""

    def reason(self, monkeypatch: pytest.MonkeyPatch, **facts: Any) -> str | None:
        facts = {
            "archs": "sm_80, sm_90 and PTX",
            "versions": lambda: (13000, 13000),
            "device_status": lambda: 0,
            "error_name": lambda status: "cudaErrorNoKernelImageForDevice",
            **facts,
        }
        monkeypatch.setitem(sys.modules, "camkernels._cuda", SimpleNamespace(**facts))
        return backends._cuda_reason.__wrapped__()

    @pytest.fixture(autouse=True)
    def _device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))

    def test_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.reason(monkeypatch) is None

    def test_not_built(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "camkernels._cuda", None)
        found = backends._cuda_reason.__wrapped__()
        assert found is not None
        assert "does not import" in found
        assert "CAMKERNELS_CUDA=1" in found

    def test_no_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.reason(monkeypatch, versions=lambda: (0, 13000))
        assert found == "no NVIDIA driver is installed"

    def test_a_driver_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.reason(monkeypatch, versions=lambda: (12080, 13000))
        assert found is not None
        assert "supports CUDA 12.8" in found
        assert "built with CUDA 13.0" in found
        # within a major version drivers and runtimes go together
        assert self.reason(monkeypatch, versions=lambda: (13000, 13010)) is None

    def test_no_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        found = self.reason(monkeypatch)
        assert found in ("torch is a CPU build", "torch finds no CUDA device")

    def test_an_architecture_that_was_not_built(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.reason(monkeypatch, device_status=lambda: 209)
        assert found is not None
        for part in ("sm_61", "cudaErrorNoKernelImageForDevice", "sm_80, sm_90 and PTX"):
            assert part in found
