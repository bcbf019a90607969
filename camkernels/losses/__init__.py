"""Losses: each is a criterion, ``criterion(logits, targets)``."""

from camkernels.losses.cam_entropy import CAMEntropyLoss
from camkernels.losses.interpretable_gradient import InterpretableGradientLoss

__all__ = ["CAMEntropyLoss", "InterpretableGradientLoss"]
