"""What the tests of warp, ssim and warped_ssim share: views, the formulas a user would write, and
both sides of a comparison."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from ops.base import device_of, has_double
from torch import Tensor

import camkernels as ck
from camkernels import backends

DOUBLE = torch.float64
# The interpreter takes a second per call; test_ssim_kernels.py has more.
SLOW = backends.triton_interpreted()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def views(seed: int, batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Boxes, among them the whole picture, and flips."""
    g = generator(seed)
    h = torch.randint(1, height + 1, (batch,), generator=g)
    w = torch.randint(1, width + 1, (batch,), generator=g)
    if batch > 2:
        h[0], w[0] = height, width
    top = (torch.rand(batch, generator=g) * (height - h + 1)).long()
    left = (torch.rand(batch, generator=g) * (width - w + 1)).long()
    return torch.stack([top, left, h, w], 1), torch.rand(batch, generator=g) < 0.5


def crops(images: Tensor, boxes: Tensor, flips: Tensor, via: Any, size: Any) -> Tensor:
    """What a user writes: one image at a time."""
    if via is not None and tuple(images.shape[2:]) != tuple(via):
        images = F.interpolate(images, via, mode="bilinear")
    found = []
    for image, (t, left, h, w), flip in zip(images, boxes.tolist(), flips.tolist(), strict=True):
        crop = F.interpolate(image[None, :, t : t + h, left : left + w], size, mode="bilinear")[0]
        found.append(crop.flip(-1) if flip else crop)
    return torch.stack(found)


def both(
    function: Any, truth: Any, tensors: list[Tensor], backend: str, seed: int = 7
) -> list[tuple[str, Tensor, Tensor]]:
    """Values and gradients of both sides, ours on its device, the truth in float64."""
    ours = [t.to(device_of(backend)).detach().requires_grad_() for t in tensors]
    theirs = [t.double().detach().requires_grad_() for t in tensors]
    with ck.backend(backend):
        value = function(*ours)
        expected = truth(*theirs)
        cotangent = torch.randn(expected.shape, generator=generator(seed), dtype=DOUBLE)
        given = cotangent.to(value.device, value.dtype)
        found = torch.autograd.grad(value, ours, given)
    wanted = torch.autograd.grad(expected, theirs, cotangent)
    pairs = [("value", value.detach().cpu(), expected.detach())]
    return pairs + [
        (f"gradient {i}", f.cpu(), w) for i, (f, w) in enumerate(zip(found, wanted, strict=True))
    ]


def compare(pairs: list[tuple[str, Tensor, Tensor]], tolerance: float, floor: float = 1e-6) -> None:
    """Within ``tolerance`` of the largest value and ``floor``."""
    for label, found, expected in pairs:
        assert found.shape == expected.shape, label
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        error = float((found.double() - expected).abs().max()) if expected.numel() else 0.0
        rounding = 2 * torch.finfo(found.dtype).eps
        assert error <= (tolerance + rounding) * (scale + floor), f"{label}: {error} of {scale}"


def dtypes(backend: str) -> list[torch.dtype]:
    floats = [torch.float32] if SLOW else [torch.float32, torch.bfloat16, torch.float16]
    return [*floats, DOUBLE] if has_double(backend) else floats


def plain_ssim(x: Tensor, y: Tensor, weights: Any, pad: Any, c1: float, c2: float) -> Tensor:
    """The formula once more, with one two-dimensional window."""
    window = (weights[0][:, None] * weights[1][None, :]).double()[None, None]

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values[:, None], window, padding=pad)

    mu, nu = mean(x), mean(y)
    xx, yy, xy = mean(x * x) - mu * mu, mean(y * y) - nu * nu, mean(x * y) - mu * nu
    found = (2 * mu * nu + c1) * (2 * xy + c2) / ((mu * mu + nu * nu + c1) * (xx + yy + c2))
    return found.flatten(1).mean(1)


def weights_of(length: int, options: dict[str, Any]) -> Tensor:
    n = min(options.get("window_size", 11), length if length % 2 else max(length - 1, 1))
    if options.get("window") == "uniform":
        return torch.full((n,), 1 / n, dtype=DOUBLE)
    offset = torch.arange(n, dtype=DOUBLE) - n // 2
    g = torch.exp(-(offset**2) / (2 * options.get("sigma", 1.5) ** 2))
    return g / g.sum()
