"""The exerciser that memory checkers watch: it runs every kernel, and sees a wrong result."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
from gpu import exercise
from gpu.steps import needs_cuda

import camkernels as ck
from camkernels import backends


def test_a_wrong_result_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if backends.unavailable_reason("cpu") is not None:
        pytest.skip("the C++ kernels are not here")
    few = [next(iter(exercise.public_calls(small=True)))]
    monkeypatch.setattr(exercise, "public_calls", lambda small: iter(few))
    monkeypatch.setattr(exercise, "network_calls", lambda: iter(()))
    assert exercise.exercise("cpu", "cpu", small=True) == []
    statistics = ck.cam_statistics

    def halved(*args: Any, **kwargs: Any) -> Any:
        found, maps = statistics(*args, **kwargs)
        return found, maps / 2 if ck.current_backend() == "cpu" else maps

    monkeypatch.setattr(ck, "cam_statistics", halved)
    (fault,) = exercise.exercise("cpu", "cpu", small=True)
    assert "result 0 is off by" in fault


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_no_triton_kernel_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from camkernels.ops import _triton_launch as host

    launched: set[str] = set()

    def launch(kernel: Any, *args: Any, **constants: Any) -> None:
        launched.add(getattr(kernel, "__name__", "") or kernel.fn.__name__)

    monkeypatch.setattr(host, "launch", launch)
    monkeypatch.setattr(host, "multiprocessors", lambda device: 132)
    for _, raw in exercise.raw_calls("cpu"):
        raw()
    triton_aot = importlib.import_module("triton_aot")
    assert launched == set(triton_aot.kernels())


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_every_kernel_on_the_gpu(backend: str) -> None:
    reason = backends.unavailable_reason(backend)
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    assert exercise.exercise("cuda", backend, small=False) == []
