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


def crop_resize_flip(images: Tensor, boxes: Tensor, flips: Tensor, size: tuple[int, int]) -> Tensor:
    """All crops of a batch (B, C, H, W) in one ``grid_sample``, each resized by itself: positions
    are kept within the box."""

    def positions(begin: Tensor, length: Tensor, source: int, count: int) -> Tensor:
        index = torch.arange(count, device=images.device, dtype=images.dtype) + 0.5
        begin, length = (t[:, None].to(images.dtype) for t in (begin, length))
        position = (begin + index * (length / count) - 0.5).clamp(begin, begin + length - 1)
        return (2 * position + 1) / source - 1

    top, left, height, width = boxes.unbind(1)
    y = positions(top, height, images.shape[2], size[0])
    x = positions(left, width, images.shape[3], size[1])
    x = torch.where(flips[:, None], x.flip(1), x)
    batch = (images.shape[0], *size)
    grid = torch.stack([x[:, None, :].expand(batch), y[:, :, None].expand(batch)], 3)
    return torch.nn.functional.grid_sample(images, grid, "bilinear", align_corners=False)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """pytorch-msssim's formula (window 11, sigma 1.5), all five means in one convolution each way;
    x, y (B, 1, H, W) in [0, 1]."""
    index = torch.arange(11, dtype=x.dtype, device=x.device) - 5
    window = torch.exp(-(index**2) / (2 * 1.5**2))
    window = (window / window.sum()).view(1, 1, -1, 1)
    stacked = torch.cat([x, y, x * x, y * y, x * y])
    means = torch.nn.functional.conv2d(stacked, window)
    means = torch.nn.functional.conv2d(means, window.transpose(2, 3))
    mu, nu, xx, yy, xy = means.split(x.shape[0])
    squares, both = mu * mu + nu * nu, mu * nu
    structure = (2 * (xy - both) + 9e-4) / (xx + yy - squares + 9e-4)
    return (structure * (2 * both + 1e-4) / (squares + 1e-4)).flatten(1).mean(1)


def consistency(
    maps: Tensor, others: Tensor, boxes: Tensor, flips: Tensor, size: tuple[int, int]
) -> Tensor:
    """SSIM of the warped and enlarged maps with the enlarged others, (B,)."""
    resize = torch.nn.functional.interpolate
    enlarged = resize(maps[:, None], size, mode="bilinear", align_corners=False)
    warped = crop_resize_flip(enlarged, boxes, flips, size)
    return ssim(warped, resize(others[:, None], size, mode="bilinear", align_corners=False))
