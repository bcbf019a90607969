"""Activations and gradients (or weights) straight to the statistics of the map: the oracle.

The composition of the rooms ``cam`` and ``map_statistics``; see their formulas. Besides, the
forward returns ``total`` = sum_ij L_ij before any ReLU: for a head of pooling and a linear layer
(alpha = W[c] / Z) it equals logit_c - b_c, which guards the closed form of the channel weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camkernels.ops.cam import reference as cam_reference
from camkernels.ops.map_statistics import reference as statistics_reference
from camkernels.ops.map_statistics.reference import Statistics

COUNT = len(Statistics._fields)


def cam_statistics_fwd(activations: Tensor, gradients: Tensor, relu: bool) -> tuple[Tensor, ...]:
    """maps (B, h, w), alpha (B, K) or a placeholder, total (B,), then the seven statistics."""
    alpha = cam_reference.channel_weights(gradients)
    plain = cam_reference.weighted_sum(activations, alpha)
    maps = plain.relu() if relu else plain
    kept = alpha if gradients.dim() == 4 else alpha.new_empty(0)
    total = plain.detach().sum((1, 2))
    return maps, kept, total, *statistics_reference.map_statistics(maps)


def cam_statistics_bwd(
    maps: Tensor,
    activations: Tensor | None,
    alpha: Tensor | None,
    grad_maps: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Cotangents of A and of alpha, as ``cam_bwd`` returns them, in one kernel.

    Arguments, flat as the kernels take them: maps, activations (where the cotangent of alpha is
    wanted), alpha (where that of the activations is), the cotangent of the maps, the seven
    statistics, the cotangent of each (None where not used), relu, channels_last, dtype.
    """
    statistics, grads = arguments[:COUNT], arguments[COUNT : 2 * COUNT]
    relu, channels_last, dtype = arguments[2 * COUNT :]
    combined = torch.zeros_like(maps) if grad_maps is None else grad_maps
    if any(grad is not None for grad in grads):
        combined = combined + statistics_reference.map_statistics_bwd(
            maps, *statistics, *grads, False
        )
    return cam_reference.cam_bwd(
        combined, activations, alpha, maps if relu else None, channels_last, dtype
    )
