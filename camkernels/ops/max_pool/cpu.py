"""max_pool by the C++ kernels of csrc/max_pool. Signatures: reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from camkernels import _cpu
from camkernels.ops import _cpu_view, _native
from camkernels.ops.max_pool import meta
from camkernels.ops.max_pool.reference import Window, is_channels_last, laid_as


def _run(kernel: str, source: Tensor, positions: Tensor, out: Tensor, window: Window) -> None:
    """``source`` and ``out``: one is pooled, as the positions are, the other has the pixels."""
    pixels = source if kernel != "max_pool_scatter" else out
    rows, columns = (
        (
            pixels.shape[2 + i], positions.shape[2 + i],
            window.kernel[i], window.stride[i], window.padding[i], window.dilation[i],
        )
        for i in (0, 1)
    )  # fmt: skip
    threads, channels_last = _cpu_view.threads(pixels.numel()), is_channels_last(positions)
    summed = kernel == "max_pool_scatter" and out.itemsize == 2 and not channels_last
    plane = pixels.shape[2] * pixels.shape[3]
    scratch = out.new_empty(threads * plane if summed else 0, dtype=torch.float32)
    getattr(_cpu, kernel)(
        source.data_ptr(),
        positions.data_ptr(),
        out.data_ptr(),
        scratch.data_ptr(),
        *positions.shape[:2],
        rows,
        columns,
        _native.DTYPE_CODES[source.dtype],
        channels_last,
        threads,
    )


def max_pool_fwd(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    y, positions = meta.max_pool_fwd(x, window)
    _run("max_pool_fwd", laid_as(x, positions), positions, y, window)
    return y, positions


def max_pool_gather(x: Tensor, positions: Tensor, window: Window) -> Tensor:
    y = meta.max_pool_gather(x, positions, window)
    _run("max_pool_gather", laid_as(x, positions), positions, y, window)
    return y


def max_pool_scatter(
    grad: Tensor, positions: Tensor, window: Window, size: tuple[int, int]
) -> Tensor:
    grad_x = meta.max_pool_scatter(grad, positions, window, size)
    _run("max_pool_scatter", laid_as(grad, positions), positions, grad_x, window)
    return grad_x
