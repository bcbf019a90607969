"""What the weights of the regularisers are at a step: warm-up, ramp and gradient-norm balance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from camtrain.config import FitConfig


def scheduled(config: FitConfig, position: float) -> float:
    """The share of their weights that the regularisers have.

    0 for ``warmup_epochs``, then rising to 1 over ``ramp_epochs``, in a line or along half a
    cosine.

    Args:
        config: of the run. position: epochs since the start of the training, the step among them.
    """
    since = position - config.warmup_epochs
    if since <= 0:
        return 0.0
    if since >= config.ramp_epochs:
        return 1.0
    share = since / config.ramp_epochs
    return share if config.ramp == "linear" else (1 - math.cos(math.pi * share)) / 2


class Balance(nn.Module):
    """A common scale of the regularisers' weights, such that

        scale x |d R / d parameters| = balance x |d L_CE / d parameters|

    with R the weighted regularisers at their full weights. Measured at the first step that has
    one and at every ``every``-th after it, by a backward pass of each; between measurements the
    scale stands, and a new one is the geometric mean of the old and of what was measured.

    Where either gradient is zero or not finite (dead maps) the scale stays as it was.
    """

    def __init__(self, balance: float, every: int) -> None:
        super().__init__()
        self.balance, self.every = balance, every
        # numbers and not buffers: reading those at each step would stall a GPU
        self.scale: float = 1.0
        self.known = False
        self.last: int | None = None

    def get_extra_state(self) -> dict[str, Any]:
        """What travels in the checkpoint."""
        return {"scale": self.scale, "known": self.known, "last": self.last}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.scale, self.known, self.last = state["scale"], state["known"], state["last"]

    def due(self, step: int) -> bool:
        """Whether ``step`` measures."""
        return self.last is None or step - self.last >= self.every

    def measure(
        self,
        parts: tuple[Tensor, Tensor],
        parameters: Sequence[Tensor],
        share: float,
        step: int,
        mean: Callable[[Tensor], Tensor],
    ) -> float:
        """Set the scale.

        Args:
            parts: cross-entropy and weighted regularisers, whose graph stays.
            parameters: of the model. share: of :func:`scheduled`, that the weights have now.
            step: number of the step. mean: over processes.

        Returns:
            by what the regularisers of this step are to be multiplied.
        """
        norms = torch.stack([norm_of_gradient(part, parameters) for part in parts])
        cross_entropy, regularizer = mean(norms).tolist()
        self.last, old = step, self.scale
        full = regularizer / (share * old)
        if not all(math.isfinite(norm) and norm > 0 for norm in (cross_entropy, full)):
            return 1.0
        wanted = self.balance * cross_entropy / full
        self.scale = math.sqrt(old * wanted) if self.known else wanted
        self.known = True
        return self.scale / old


def norm_of_gradient(part: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """2-norm of the gradient, in float64; ``.grad`` is left alone."""
    found = torch.autograd.grad(part, list(parameters), retain_graph=True, allow_unused=True)
    squares = [g.detach().double().square().sum() for g in found if g is not None]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)
