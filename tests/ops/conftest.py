"""Which tests of the ops that compare views run in Triton's interpreter in CI: a call of theirs
takes a second or more there, and whole files would take minutes each. The others are slow ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from camkernels import backends

_FILES = tuple(
    f"test_{n}.py"
    for n in ("warp", "ssim", "warped_ssim", "warp_triton", "ssim_kernels", "lp_norm", "min_max")
)
_KEPT = ("values_and_two_orders", "of_any_sizes", "bad_boxes", "nan_stays", "empty_batch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not backends.triton_interpreted():
        return
    for item in items:
        if Path(str(item.fspath)).name in _FILES and not any(k in item.name for k in _KEPT):
            item.add_marker(pytest.mark.slow)
