"""Maps of LayerCAM and HiResCAM in plain PyTorch: the oracle of the kernels beside it.

Shapes: activations A, gradients G (B, K, h, w); maps M (B, h, w).

    L = sum_k f(G_k) A_k,  f(g) = max(g, 0) (LayerCAM) or g (HiResCAM),  M = relu(L) or L

Source: Jiang et al., LayerCAM, eqs. 6 and 7; Draelos and Carin, HiResCAM, eq. 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from camkernels.ops.cam.reference import accumulate
from camkernels.ops.cam_weights.reference import laid_as


def cam_pixels_fwd(activations: Tensor, gradients: Tensor, positive: bool, relu: bool) -> Tensor:
    """M, float32 (float64 for float64), differentiable in both."""
    slopes = accumulate(gradients)
    maps = ((slopes.relu() if positive else slopes) * accumulate(activations)).sum(1)
    return maps.relu() if relu else maps


def cam_pixels_bwd(
    grad_maps: Tensor,
    activations: Tensor,
    gradients: Tensor,
    maps: Tensor | None,
    positive: bool,
    want_activations: bool,
    want_gradients: bool,
) -> tuple[Tensor, Tensor]:
    """Cotangents of A and G (empty where not wanted), in their dtypes and memory formats.

    With D = grad_maps 1[M > 0]: f(G) D and f'(G) A D.

    Args:
        maps: M, given where a ReLU was applied.
    """
    masked = grad_maps if maps is None else torch.where(maps <= 0, 0.0, grad_maps)
    masked = masked[:, None]
    slopes, values = accumulate(gradients), accumulate(activations)
    to_a = (slopes.relu() if positive else slopes) * masked
    to_g = values * masked
    if positive:
        to_g = torch.where(slopes <= 0, 0.0, to_g)
    return (
        laid_as(to_a.to(activations.dtype), activations)
        if want_activations
        else activations.new_empty(0),
        laid_as(to_g.to(gradients.dtype), gradients) if want_gradients else gradients.new_empty(0),
    )
