"""Losses: each is a criterion, ``criterion(logits, targets)``."""

from camkernels.losses.cam_consistency import CAMConsistencyLoss
from camkernels.losses.cam_entropy import CAMEntropyLoss
from camkernels.losses.combined import CombinedLoss
from camkernels.losses.interpretable_gradient import InterpretableGradientLoss

__all__ = ["CAMConsistencyLoss", "CAMEntropyLoss", "CombinedLoss", "InterpretableGradientLoss"]
