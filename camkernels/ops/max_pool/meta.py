"""What the kernels of max_pool allocate: unwritten outputs on the device of the input. On the meta
device these are predictions of memory. Signatures: reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from camkernels.ops.max_pool.reference import Window, check_grad, check_positions, layout_of


def max_pool_fwd(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:2], *window.output_size(x.shape[2], x.shape[3]))
    y, positions = (
        torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout_of(x))
        for dtype in (x.dtype, torch.uint8)
    )
    return y, positions


def max_pool_gather(x: Tensor, positions: Tensor, window: Window) -> Tensor:
    check_positions(positions, window, (x.shape[2], x.shape[3]), x)
    return torch.empty(
        positions.shape, dtype=x.dtype, device=x.device, memory_format=layout_of(positions)
    )


def max_pool_scatter(
    grad: Tensor, positions: Tensor, window: Window, size: tuple[int, int]
) -> Tensor:
    check_grad(grad, positions, window, size)
    shape = (*positions.shape[:2], *size)
    return torch.empty(
        shape, dtype=grad.dtype, device=grad.device, memory_format=layout_of(positions)
    )
