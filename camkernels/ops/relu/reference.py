"""ReLU with a guided backward in plain PyTorch: the oracle of the kernels beside it.

    v = max(u, 0) (NaN stays),  grad_u = 1[v > 0] grad_v,  guided: 1[v > 0] max(grad_v, 0)

As in PyTorch a NaN counts as positive in 1[v > 0], so that it stays visible.
What the backward keeps is v itself, or its mask: one bit per element in the order of memory of the
dense u, least significant bit first, uint8 (ceil(numel / 8),).

Source: Springenberg et al., Striving for Simplicity: The All Convolutional Net, sec. 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relu_fwd(u: Tensor, inplace: bool, want_mask: bool) -> tuple[Tensor, Tensor]:
    """v, dense as u is (u itself with ``inplace``), and the mask (empty unless wanted)."""
    v = u.relu_() if inplace else u.relu()
    if not want_mask:
        return v, v.new_empty(0, dtype=torch.uint8)
    flat = ~(in_memory_order(v) <= 0)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], device=v.device)
    return v, (padded.long() * weights).sum(1).to(torch.uint8)


def relu_bwd(grad: Tensor, kept: Tensor, guided: bool) -> Tensor:
    """grad_u, in dtype and strides of ``grad``.

    Args:
        grad: dense, with the strides that u had.
        kept: v, or the mask (uint8).
    """
    if kept.dtype == torch.uint8:
        shifts = torch.arange(8, device=kept.device)
        flat = ((kept[:, None].long() >> shifts) & 1).flatten()[: grad.numel()].bool()
        positive = torch.empty_strided(
            grad.shape, grad.stride(), dtype=torch.bool, device=grad.device
        )
        in_memory_order(positive).copy_(flat)
    else:
        positive = ~(kept <= 0)
    return torch.where(positive, grad.clamp(min=0) if guided else grad, 0.0)


def in_memory_order(dense: Tensor) -> Tensor:
    """A dense tensor of any strides as a flat view."""
    return dense.as_strided((dense.numel(),), (1,))
