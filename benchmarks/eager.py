"""What a careful user writes in eager PyTorch, the fair other side: one bmm, no big temporaries.

The map by ``bmm`` and not by ``(alpha * A).sum(1)``, which would store a product the size of A.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """relu(sum_k alpha_k A_k) (B, h, w); gradients (B, K, h, w), or weights (B, K)."""
    alpha = gradients.mean((2, 3)) if gradients.dim() == 4 else gradients
    b, _, h, w = activations.shape
    maps = torch.bmm(alpha.to(activations.dtype).unsqueeze(1), activations.flatten(2)).view(b, h, w)
    return (maps if maps.dtype == torch.float64 else maps.float()).relu()


def _tiny(maps: Tensor) -> float:
    return torch.finfo(maps.dtype).tiny


def _normalised(maps: Tensor) -> Tensor:
    return maps / maps.sum((1, 2), keepdim=True).clamp_min(_tiny(maps))


def entropy(maps: Tensor) -> Tensor:
    """-sum p ln p (B,), finite gradients where p = 0."""
    p = _normalised(maps)
    return -(p * p.clamp_min(_tiny(maps)).log()).sum((1, 2))


def area(maps: Tensor) -> Tensor:
    """sqrt(det C) (B,), C the covariance of the pixel coordinates."""
    p = _normalised(maps)
    y = torch.arange(maps.shape[1], dtype=maps.dtype, device=maps.device)
    x = torch.arange(maps.shape[2], dtype=maps.dtype, device=maps.device)
    rows, columns = p.sum(2), p.sum(1)
    dy = y - (rows * y).sum(1, keepdim=True)
    dx = x - (columns * x).sum(1, keepdim=True)
    yx = (p * dy[:, :, None] * dx[:, None, :]).sum((1, 2))
    determinant = (rows * dy * dy).sum(1) * (columns * dx * dx).sum(1) - yx * yx
    return determinant.clamp_min(_tiny(maps)).sqrt()


def dispersion(maps: Tensor) -> Tensor:
    """variance / mean^2 (B,)."""
    variance, mean = torch.var_mean(maps, (1, 2), correction=0)
    return variance / mean.square().clamp_min(_tiny(maps))
