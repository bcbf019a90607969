"""Max pooling in plain PyTorch: the oracle of the kernels beside it.

    y[o] = max_t x[o stride - padding + t dilation]  over the taps t = (u, v) that lie inside
    position[o] = u kw + v of that maximum: the first of equal ones in the order of rows, the last
                  NaN where there is one, the first tap inside where all are -inf

as in torch.nn.functional.max_pool2d. y is linear in x once the positions are known: gather is that
map, scatter its transpose.

All tensors are (B, C, H, W), dense in NCHW or in channels_last; positions are uint8, in shape and
layout of y. Where a tensor lies otherwise than the positions that come with it, it is copied.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

TAPS = 256  # numbers that a byte has


@dataclasses.dataclass(frozen=True)
class Window:
    """Geometry of a pooling, in rows and columns.

    Raises:
        ValueError: more taps than a position can number, or sizes that no pooling has.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        if self.kernel[0] * self.kernel[1] > TAPS:
            raise ValueError(
                f"kernel: positions number at most {TAPS} elements of a window, got {self.kernel}"
            )
        for name in ("kernel", "stride", "dilation"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for padding, size, dilation in zip(self.padding, self.kernel, self.dilation, strict=True):
            if not 0 <= padding <= ((size - 1) * dilation + 1) // 2:
                raise ValueError(
                    f"padding: expected at most half of what a window spans, got {self.padding} "
                    f"for kernel {self.kernel} of dilation {self.dilation}"
                )

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of windows.

        Raises:
            ValueError: there are none, or one covers no pixel.
        """
        return _windows(self, 0, height), _windows(self, 1, width)

    @property
    def arguments(self) -> tuple[object, ...]:
        """What torch.max_pool2d takes behind the tensor."""
        return self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode


@functools.lru_cache(maxsize=1024)
def _windows(window: Window, axis: int, size: int) -> int:
    """Windows along one dimension, by PyTorch's rule."""
    kernel, stride = window.kernel[axis], window.stride[axis]
    padding, dilation = window.padding[axis], window.dilation[axis]
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (room + (stride - 1 if window.ceil_mode else 0)) // stride + 1
    if window.ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1  # the last window starts inside, or in the padding before
    if count < 1:
        raise ValueError(f"size: no window of {window} fits into {size} pixels")
    for start in range(-padding, count * stride - padding, stride):
        if not any(0 <= start + tap * dilation < size for tap in range(kernel)):
            raise ValueError(f"size: a window of {window} covers none of {size} pixels")
    return count


def is_channels_last(tensor: Tensor) -> bool:
    """Whether dense memory counts as channels_last; planes of one pixel say so by their strides."""
    channels = tensor.shape[1]
    return channels > 1 and tensor.stride(1) == 1 and tensor.stride(3) == channels


def layout_of(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(tensor) else torch.contiguous_format


def laid_as(tensor: Tensor, positions: Tensor) -> Tensor:
    """``tensor`` dense in the layout of ``positions``: itself, or a copy."""
    return tensor.resolve_neg().contiguous(memory_format=layout_of(positions))


def check_positions(
    positions: Tensor, window: Window, size: tuple[int, int], beside: Tensor
) -> None:
    """Raise where these are not the positions of windows over ``size`` pixels, of as many samples
    and channels as the tensor ``beside`` them has."""
    expected = (*beside.shape[:2], *window.output_size(*size))
    if positions.dtype != torch.uint8 or tuple(positions.shape) != expected:
        raise ValueError(
            f"positions: expected uint8 {expected} for {size[0]} x {size[1]} pixels, got "
            f"{positions.dtype} {tuple(positions.shape)}"
        )


def check_grad(grad: Tensor, positions: Tensor, window: Window, size: tuple[int, int]) -> None:
    check_positions(positions, window, size, grad)
    if grad.shape != positions.shape:
        raise ValueError(
            f"grad: expected the shape of the positions, {tuple(positions.shape)}, got "
            f"{tuple(grad.shape)}"
        )


def max_pool(x: Tensor, window: Window) -> Tensor:
    """y, differentiable by plain autograd."""
    return torch.max_pool2d(x, *window.arguments)  # type: ignore[arg-type]


def max_pool_fwd(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """y in dtype and layout of x, and the positions."""
    window.output_size(x.shape[2], x.shape[3])
    layout = layout_of(x)
    y, index = torch.ops.aten.max_pool2d_with_indices(x, *window.arguments)
    tops, lefts = _starts(index, window)
    u = (index // x.shape[3] - tops) // window.dilation[0]
    v = (index % x.shape[3] - lefts) // window.dilation[1]
    positions = (u * window.kernel[1] + v).to(torch.uint8)
    return y.contiguous(memory_format=layout), positions.contiguous(memory_format=layout)


def max_pool_gather(x: Tensor, positions: Tensor, window: Window) -> Tensor:
    """The values of x at the positions, in the layout of these."""
    size = (x.shape[2], x.shape[3])
    check_positions(positions, window, size, x)
    found = x.flatten(2).gather(2, _index(positions, window, size[1]).flatten(2))
    return found.view(positions.shape).contiguous(memory_format=layout_of(positions))


def max_pool_scatter(
    grad: Tensor, positions: Tensor, window: Window, size: tuple[int, int]
) -> Tensor:
    """grad_x (B, C, *size): at every pixel the sum over the windows whose maximum it is, taken in
    float32 (float64 for float64), in the layout of the positions."""
    check_grad(grad, positions, window, size)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    sums = torch.zeros((*grad.shape[:2], size[0] * size[1]), dtype=wide, device=grad.device)
    sums.scatter_add_(2, _index(positions, window, size[1]).flatten(2), grad.to(wide).flatten(2))
    shaped = sums.to(grad.dtype).view(*grad.shape[:2], *size)
    return shaped.contiguous(memory_format=layout_of(positions))


def _starts(pooled: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """First rows (h, 1) and columns (w,) of the windows."""
    tops, lefts = (
        torch.arange(count, device=pooled.device) * stride - padding
        for count, stride, padding in zip(
            pooled.shape[2:], window.stride, window.padding, strict=True
        )
    )
    return tops[:, None], lefts


def _index(positions: Tensor, window: Window, width: int) -> Tensor:
    """Of the maxima in their planes, int64."""
    tops, lefts = _starts(positions, window)
    code = positions.long()
    rows = tops + code // window.kernel[1] * window.dilation[0]
    return rows * width + lefts + code % window.kernel[1] * window.dilation[1]
