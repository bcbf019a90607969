"""Grad-CAM weighted sums in plain PyTorch: the oracle of the kernels beside it.

Shapes: activations A (B, K, h, w); gradients G (B, K, h, w), or channel weights (B, K) in their
place; maps M (B, h, w); Z = h w.

    alpha_k = 1/Z sum_ij G_kij                (the weights themselves where weights are given)
    L       = sum_k alpha_k A_k,   M = relu(L) or L

Source: Selvaraju et al., Grad-CAM, eqs. 1 and 2; Zhou et al., CAM, eq. 2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate(x: Tensor) -> Tensor:
    """``x`` in the dtype of sums: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def channel_weights(gradients: Tensor) -> Tensor:
    """alpha (B, K) of gradients (B, K, h, w) by global average pooling; weights (B, K) as is."""
    values = accumulate(gradients)
    return values.mean((2, 3)) if values.dim() == 4 else values


def weighted_sum(activations: Tensor, alpha: Tensor) -> Tensor:
    """L (B, h, w) = sum_k alpha_k A_k, before any ReLU."""
    values = accumulate(activations)
    return torch.bmm(alpha.to(values.dtype).unsqueeze(1), values.flatten(2)).view(
        values.shape[0], *values.shape[2:]
    )


def cam(activations: Tensor, gradients: Tensor, relu: bool) -> Tensor:
    """Maps (B, h, w) of activations and gradients (B, K, h, w) or weights (B, K)."""
    maps = weighted_sum(activations, channel_weights(gradients))
    return maps.relu() if relu else maps


def cam_fwd(activations: Tensor, gradients: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """Maps (B, h, w), and alpha (B, K) where gradients were given (else a placeholder)."""
    alpha = channel_weights(gradients)
    maps = weighted_sum(activations, alpha)
    given = gradients.dim() == 2
    return maps.relu() if relu else maps, alpha.new_empty(0) if given else alpha


def cam_bwd(
    grad_maps: Tensor,
    activations: Tensor | None,
    alpha: Tensor | None,
    maps: Tensor | None,
    channels_last: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Cotangents of A and of alpha, D = grad_maps 1[M > 0]: alpha_k D and sum_ij D A_k.

    Args:
        activations: given where the cotangent of alpha is wanted.
        alpha: given where the cotangent of the activations is wanted.
        maps: M, given where a ReLU was applied.
        channels_last, dtype: layout and dtype of the cotangent of the activations.
    """
    masked = grad_maps if maps is None else torch.where(maps <= 0, 0.0, grad_maps)
    grad_activations = grad_alpha = masked.new_empty(0)
    if alpha is not None:
        grad_activations = (accumulate(alpha)[:, :, None, None] * masked[:, None]).to(dtype)
        # An elementwise product follows its operands' strides; the layout is promised instead.
        layout = torch.channels_last if channels_last else torch.contiguous_format
        grad_activations = grad_activations.contiguous(memory_format=layout)
    if activations is not None:
        values = accumulate(activations)
        grad_alpha = torch.bmm(values.flatten(2), masked.flatten(1).unsqueeze(2)).squeeze(2)
    return grad_activations, grad_alpha
