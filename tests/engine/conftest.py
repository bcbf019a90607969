"""One thread: sizes here are small, and threads that wait on a busy machine cost a hundredfold."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_same_state_for_every_test: None) -> None:
    torch.set_num_threads(1)
