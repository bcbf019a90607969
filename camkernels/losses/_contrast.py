"""The contrastive distance of CGC."""

from __future__ import annotations

import torch
from torch import Tensor


def contrast(warped: Tensor, others: Tensor, counted: Tensor, temperature: float) -> Tensor:
    """InfoNCE per sample, (B,): -log softmax_j(cos(u_i, v_j) / temperature) at j = i.

    Args:
        warped: u (B, H, W), the warped maps of the pictures.
        others: v (B, h, w), the maps of the views; enlarged to H x W.
        counted: (B,) bool; the others are no negatives.

    Source: Pillai et al., Consistent Explanations by Contrastive Learning, eq. 3.
    """
    enlarged = torch.nn.functional.interpolate(
        others[:, None], warped.shape[1:], mode="bilinear", align_corners=False
    )
    u = torch.nn.functional.normalize(warped.flatten(1), dim=1)
    v = torch.nn.functional.normalize(enlarged.flatten(1), dim=1)
    similarity = (u @ v.t() / temperature).masked_fill(~counted[None, :], float("-inf"))
    values = torch.logsumexp(similarity, 1) - (u * v).sum(1) / temperature
    return torch.where(counted, values, 0.0)
