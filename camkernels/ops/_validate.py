"""Checks of arguments. Shape, dtype, device and layout errors raise at once; none reads data."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ALLOWED = "float32, bfloat16, float16 or float64"


def floating(name: str, value: object, shape: str = "of any shape") -> Tensor:
    """``value`` if it is a strided floating-point tensor.

    Raises:
        TypeError: not a tensor, another layout, or a dtype without a kernel.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected {_ALLOWED}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    return value


def floating_tensor(name: str, value: object, rank: int, shape: str) -> Tensor:
    """``value`` if it is a floating-point tensor of this rank.

    Raises:
        TypeError: not a tensor, or a dtype without a kernel.
        ValueError: another rank, or an empty spatial or channel dimension.
    """
    value = floating(name, value, shape)
    if value.dim() != rank:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
    if 0 in value.shape[1:]:
        raise ValueError(f"{name}: only the batch may be empty, got shape {tuple(value.shape)}")
    return value


def same_device(name: str, value: Tensor, leader_name: str, leader: Tensor) -> None:
    if value.device != leader.device:
        raise ValueError(
            f"{name}: expected on the device of {leader_name}, {leader.device}, got {value.device}"
        )


def same_precision(name: str, value: Tensor, leader_name: str, leader: Tensor) -> None:
    """float64 goes with float64 only; the three others mix (autocast makes such pairs)."""
    if (value.dtype == torch.float64) != (leader.dtype == torch.float64):
        raise TypeError(
            f"{name}: float64 goes with float64 only, got {value.dtype} "
            f"beside {leader_name} of {leader.dtype}"
        )


def activations_and_gradients(activations: object, gradients: object) -> tuple[Tensor, Tensor]:
    """Check A (B, K, h, w) with G (B, K, h, w)."""
    a = floating_tensor("activations", activations, 4, "(B, K, h, w)")
    g = floating_tensor("gradients", gradients, 4, "(B, K, h, w)")
    if a.shape != g.shape:
        raise ValueError(
            f"gradients: expected the shape of activations, {tuple(a.shape)}, got {tuple(g.shape)}"
        )
    same_device("gradients", g, "activations", a)
    same_precision("gradients", g, "activations", a)
    return a, g


def activations_and_weights(activations: object, weights: object) -> tuple[Tensor, Tensor]:
    """Check A (B, K, h, w) with weights (B, K)."""
    a = floating_tensor("activations", activations, 4, "(B, K, h, w)")
    w = floating_tensor("weights", weights, 2, "(B, K)")
    if a.shape[:2] != w.shape:
        raise ValueError(
            f"weights: expected (B, K) = {tuple(a.shape[:2])} of activations, got {tuple(w.shape)}"
        )
    same_device("weights", w, "activations", a)
    same_precision("weights", w, "activations", a)
    return a, w


def gradient_pair(gradients: object, guided_gradients: object) -> tuple[Tensor, Tensor]:
    """Check d (B, ...) with the guided gradients g of the same shape, a constant."""
    d = floating("gradients", gradients, "(B, ...)")
    if d.dim() < 2:
        raise ValueError(f"gradients: expected shape (B, ...), got {tuple(d.shape)}")
    if 0 in d.shape[1:]:
        raise ValueError(f"gradients: only the batch may be empty, got shape {tuple(d.shape)}")
    g = floating("guided_gradients", guided_gradients, "(B, ...)")
    if g.shape != d.shape:
        raise ValueError(
            f"guided_gradients: expected the shape of gradients, {tuple(d.shape)}, "
            f"got {tuple(g.shape)}"
        )
    if g.requires_grad:
        raise ValueError(
            "guided_gradients: expected a constant, got a tensor that requires grad; the guided "
            "gradient is no derivative and has none: detach it"
        )
    same_device("guided_gradients", g, "gradients", d)
    same_precision("guided_gradients", g, "gradients", d)
    return d, g
