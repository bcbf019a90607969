"""How smooth an input gradient is: how much it varies, and how near it is to SmoothGrad's."""

from __future__ import annotations

import torch
from torch import Tensor


def total_variation(gradients: Tensor) -> Tensor:
    """Variation of a gradient between neighbouring pixels, in units of its size.

    With d the gradient, i and j rows and columns, c channels::

        (sum |d_c,i+1,j - d_c,i,j| + sum |d_c,i,j+1 - d_c,i,j|) / sum |d_c,i,j|

    0 for a constant gradient, 4 at most; of white noise about 2 sqrt(2) away from borders. It does
    not depend on the scale of the gradient.

    Args:
        gradients: (B, C, H, W), floating-point, as :class:`camkernels.InputGradient` makes them.

    Returns:
        (B,) float32 (float64 for float64); 0 for a gradient that is zero, which takes part in no
        mean of :class:`camkernels.metrics.GradientSmoothness`. NaN where it is not finite.

    Raises:
        ValueError: another shape or dtype.

    Source: the claim of A Learning Paradigm for Interpretable Gradients, section 5, that its
    gradients are smoother; the paper names no measure. Total variation: Rudin et al., Nonlinear
    total variation based noise removal algorithms, in its anisotropic form.
    """
    wide = _wide(gradients)
    rows = wide.diff(dim=2).abs().flatten(1).sum(1)
    columns = wide.diff(dim=3).abs().flatten(1).sum(1)
    size = wide.abs().flatten(1).sum(1)
    return torch.where(size == 0, 0.0, (rows + columns) / torch.where(size == 0, 1.0, size))


def gradient_agreement(gradients: Tensor, smooth_gradients: Tensor) -> Tensor:
    """Cosine of the angle between a gradient and a smoother one, SmoothGrad's say: 1 at best.

    Args:
        gradients: (B, C, H, W), floating-point.
        smooth_gradients: (B, C, H, W), as :class:`camkernels.SmoothGrad` makes them of the same
            pictures and classes.

    Returns:
        (B,) float32 (float64 for float64); 0 where one of them is zero. NaN where it is not finite.

    Raises:
        ValueError: another shape or dtype.

    Source: as :func:`total_variation`; section 4.2, SmoothGrad.
    """
    one = _wide(gradients)
    if smooth_gradients.shape != one.shape or not smooth_gradients.is_floating_point():
        raise ValueError(
            f"smooth_gradients: expected floating-point {tuple(one.shape)}, got "
            f"{smooth_gradients.dtype} {tuple(smooth_gradients.shape)}"
        )
    # In float64 the squares of small gradients do not vanish.
    a, b = gradients.double().flatten(1), smooth_gradients.double().flatten(1)
    sizes = a.square().sum(1).sqrt() * b.square().sum(1).sqrt()
    cosine = (a * b).sum(1) / torch.where(sizes == 0, 1.0, sizes)
    return torch.where(sizes == 0, 0.0, cosine).to(one.dtype)


def _wide(gradients: Tensor) -> Tensor:
    if gradients.dim() != 4 or not gradients.is_floating_point():
        raise ValueError(
            "gradients: expected floating-point (B, C, H, W), got "
            f"{gradients.dtype} {tuple(gradients.shape)}"
        )
    return gradients if gradients.dtype == torch.float64 else gradients.float()
