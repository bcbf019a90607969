"""Losses: each is a criterion, ``criterion(logits, targets)``."""

from camkernels.losses.cam_entropy import CAMEntropyLoss

__all__ = ["CAMEntropyLoss"]
