"""Float32 means float32, and convolutions that sum in one order, in every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _exact_convolutions() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        yield
    matmul.allow_tf32 = before
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what a test left failing fails here, not in the next
