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


def _norm(values: Tensor, order: int) -> Tensor:
    return values.norm(order, dim=1).clamp_min(torch.finfo(values.dtype).tiny)


def gradient_error(gradients: Tensor, guided_gradients: Tensor, error: str) -> Tensor:
    """E(delta, delta_G) (B,), eqs. 11 to 14 of the paper; ``histogram`` normalises each side."""
    a, b = gradients.flatten(1), guided_gradients.flatten(1)
    if error == "sigmoid":
        return -(b * a.sigmoid()).sum(1)
    if error == "centered_sigmoid":
        return -(b * (a - a.mean(1, keepdim=True)).sigmoid()).sum(1)
    if error == "cosine":
        return -(a * b).sum(1) / (_norm(a, 2) * _norm(b, 2))
    norms = _norm(a, 1), _norm(b, 1)
    if error == "histogram_paper":
        return -torch.minimum(a.abs(), b.abs()).sum(1) / (norms[0] * norms[1])
    shares = a.abs() / norms[0][:, None], b.abs() / norms[1][:, None]
    return -torch.minimum(*shares).sum(1)


def batch_norm_relu(
    z: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Training BatchNorm, the residual added in place, ReLU in place."""
    u = torch.nn.functional.batch_norm(z, None, None, gamma, beta, training=True)
    return (u if residual is None else u.add_(residual)).relu_()
