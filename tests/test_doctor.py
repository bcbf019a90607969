"""The doctor runs each backend, and believes none that differs from the reference."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import torch

from camkernels import backends, doctor
from camkernels.ops import _chain


def test_report(python: str, subprocess_environment: dict[str, str]) -> None:
    done = subprocess.run(
        [python, "-m", "camkernels.doctor"],
        env={**subprocess_environment, "CAMKERNELS_BACKEND": "reference"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"torch  {torch.__version__}" in done.stdout
    assert "reference  works: plain PyTorch" in done.stdout
    for name in ("cpu", "triton", "cuda"):
        reason = backends.unavailable_reason(name)
        expected = f"{name}  works" if reason is None else f"{name}  does not work: "
        assert expected in done.stdout
    assert "CAMKERNELS_BACKEND=reference" in done.stdout


@pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None, reason="the C++ module is not built"
)
def test_a_wrong_kernel_does_not_count_as_working(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_backend("cpu")[0]
    right = _chain.implementation

    def wrong(op: str, kernel: str, backend: str) -> Any:
        found = right(op, kernel, backend)
        if not kernel.endswith("_bwd") or backend != "cpu":
            return found
        return lambda *args: tuple(1.01 * x for x in found(*args))

    monkeypatch.setattr(_chain, "implementation", wrong)
    works, line = doctor.check_backend("cpu")
    assert not works
    assert "differs from the reference" in line
