"""The data gradient of a strided convolution of images, as a forward convolution.

With stride s the pixels of the image fall into s x s phases, and the gradient of each phase is a
dense convolution of the output's gradient with every s-th weight. All phases are one convolution to
(C s s) channels, which a pixel shuffle puts in their places. oneDNN's own data gradient of a
strided convolution of few channels is far slower than its other convolutions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from camkernels.ops.conv2d import pointwise

if TYPE_CHECKING:
    from camkernels.ops.conv2d.op import ConvSpec

_MOST_CHANNELS = 4


def is_suited(grad: Tensor, weight: Tensor, spec: ConvSpec) -> bool:
    """Where it pays: the first convolution of a network, on the CPU."""
    return (
        pointwise.runs_on_cpu(grad)
        and weight.shape[1] <= _MOST_CHANNELS
        and spec.stride[0] == spec.stride[1] > 1
        and spec.groups == 1
        and spec.dilation == (1, 1)
        and grad.numel() > 0
    )


def data_gradient(grad: Tensor, size: tuple[int, int], weight: Tensor, spec: ConvSpec) -> Tensor:
    """grad_x (B, C, H, W).

    Args:
        grad: (B, K, h, w). size: H, W. weight: (K, C, kh, kw).
    """
    s, (top, left) = spec.stride[0], spec.padding
    filters, channels, kh, kw = weight.shape
    rows, columns = -(-kh // s), -(-kw // s)  # taps of a phase
    # row u = s m + a of a filter belongs to phase a, and meets the gradient m rows further up
    taps = F.pad(weight, (0, columns * s - kw, 0, rows * s - kh))
    taps = taps.view(filters, channels, rows, s, columns, s).permute(1, 3, 5, 0, 2, 4)
    taps = taps.reshape(channels * s * s, filters, rows, columns).flip(2, 3)
    phases = F.conv2d(grad, taps, padding=(rows - 1, columns - 1))
    whole = F.pixel_shuffle(phases, s)[:, :, top : top + size[0], left : left + size[1]]
    # rows and columns behind the last window
    rest = size[0] - whole.shape[2], size[1] - whole.shape[3]
    return F.pad(whole, (0, rest[1], 0, rest[0])) if any(rest) else whole.contiguous()
