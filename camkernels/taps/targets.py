"""Checks of logits and class indices."""

from __future__ import annotations

import torch
from torch import Tensor


def check_logits(logits: object) -> None:
    """Raise unless ``logits`` is a floating-point tensor (B, C)."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a tensor (B, C), got {type(logits).__name__}")
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits: expected floating-point (B, C), got {logits.dtype} {tuple(logits.shape)}"
        )


def check_device(logits: Tensor, device: torch.device) -> None:
    """Raise unless ``logits`` lie where the model ran."""
    if logits.device != device:
        raise ValueError(
            f"logits: expected on {device}, where the model ran, got {logits.device}; "
            "call criterion(model(x), y) with what the model returned"
        )


def class_indices(logits: Tensor, targets: Tensor, ignore_index: int | None = None) -> Tensor:
    """Class per sample (B,) int64, 0 where ignored.

    Raises:
        TypeError: not integers. ValueError: another shape or device.
        IndexError: out of range (on the CPU, where looking costs nothing; on a GPU
            ``gather`` asserts on the device).
    """
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: expected a tensor (B,) of class indices, got {type(targets)}")
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.is_complex():
        raise TypeError(
            f"targets: expected class indices (B,) of an integer dtype, got {targets.dtype} "
            f"{tuple(targets.shape)}; with class probabilities pass target='predicted'"
        )
    if targets.shape != logits.shape[:1]:
        raise ValueError(
            f"targets: expected shape {tuple(logits.shape[:1])} to go with logits "
            f"{tuple(logits.shape)}, got {tuple(targets.shape)}"
        )
    if targets.device != logits.device:
        raise ValueError(f"targets: expected on {logits.device}, got {targets.device}")
    classes = targets.long()
    if ignore_index is not None:
        classes = torch.where(classes == ignore_index, 0, classes)
    if classes.device.type == "cpu" and classes.numel() > 0:
        low, high = (int(v) for v in classes.aminmax())
        if low < 0 or high >= logits.shape[1]:
            raise IndexError(
                f"targets: class {low if low < 0 else high} is out of range for "
                f"{logits.shape[1]} classes"
            )
    return classes
