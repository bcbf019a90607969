"""Channel weights of Grad-CAM++ and XGrad-CAM in plain PyTorch: the oracle of the kernels here.

Shapes: activations A, gradients G (B, K, h, w); weights w (B, K). With S_k = sum_ij A_kij:

    "gradcam++"   w_k = sum_ij max(G, 0)^3 / (2 G^2 + S_k G^3 + eps)
                      = sum over G > 0 of G / (2 + S_k G + eps / G^2)
    "xgradcam"    w_k = sum_ij A G / (S_k + eps)

In Grad-CAM++ pixels with G <= 0 are skipped: relu drops them, and there the denominator may vanish.
With eps > 0 so are those whose G^2 is not above 0. NaN counts as positive, so that it stays.

Source: Chattopadhay et al., Grad-CAM++, eqs. 5 and 19; Fu et al., Axiom-based Grad-CAM, eq. 7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from camkernels.ops import _layout
from camkernels.ops.cam.reference import accumulate

METHODS = ("gradcam++", "xgradcam")


def _open(gradients: Tensor, eps: float) -> Tensor:
    """Pixels that count in Grad-CAM++."""
    if eps == 0:
        return ~(gradients <= 0)
    return ~(gradients <= 0) & ~(gradients * gradients <= 0)


def cam_weights(activations: Tensor, gradients: Tensor, method: str, eps: float) -> Tensor:
    """w (B, K), float32 (float64 for float64), differentiable in both."""
    values, slopes = accumulate(activations), accumulate(gradients)
    total = values.sum((2, 3))
    if method == "xgradcam":
        return (values * slopes).sum((2, 3)) / (total + eps)
    counted = _open(slopes.detach(), eps)
    g = torch.where(counted, slopes, 1.0)
    below = 2 + total[:, :, None, None] * g
    if eps != 0:
        below = below + eps / (g * g)
    visible = (total - total).detach()  # NaN where a value is not finite
    return torch.where(counted, g / below, 0.0).sum((2, 3)) + visible


def cam_weights_fwd(activations: Tensor, gradients: Tensor, method: str, eps: float) -> Tensor:
    return cam_weights(activations, gradients, method, eps)


def cam_weights_bwd(
    grad: Tensor,
    activations: Tensor,
    gradients: Tensor,
    method: str,
    eps: float,
    want_activations: bool,
    want_gradients: bool,
) -> tuple[Tensor, Tensor]:
    """Cotangents of A and G (empty where not wanted), in their dtypes and memory formats."""

    def formula(a: Tensor, g: Tensor) -> Tensor:
        return cam_weights(a, g, method, eps)

    _, pull, *_ = torch.func.vjp(formula, activations, gradients)
    to_a, to_g = pull(grad)
    return (
        laid_as(to_a, activations) if want_activations else activations.new_empty(0),
        laid_as(to_g, gradients) if want_gradients else gradients.new_empty(0),
    )


def laid_as(found: Tensor, like: Tensor) -> Tensor:
    """Dense: channels_last where ``like`` has its channels side by side, else contiguous."""
    return found.contiguous(memory_format=_layout.memory_format(_layout.is_channels_last(like)))
