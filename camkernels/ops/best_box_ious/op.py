"""Which implementation finds the best boxes: C++ on the CPU, else the reference; no gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from camkernels import backends
from camkernels.ops import _chain


def best_box_ious(levels: Tensor, boxes: Tensor, thresholds: int) -> Tensor:
    """See reference.py."""
    chosen = backends.resolve(levels.device, torch.float32)
    if chosen == "triton":
        if backends.current_backend() != "auto":
            raise backends.BackendUnavailableError(
                "backend 'triton' was asked for by name: it has no kernel best_box_ious; 'auto' "
                "and 'reference' take the formula in plain PyTorch"
            )
        chosen = "reference"
    run = _chain.implementation("best_box_ious", "best_box_ious", chosen)
    found: Tensor = run(levels.detach(), boxes.detach(), thresholds)
    return found
