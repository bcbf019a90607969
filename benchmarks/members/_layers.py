"""Inputs and sides of the ops inside a network: each pass of an op timed on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Options, Side

Shape = tuple[int, int, int, int]
# Two beyond the caches of any core, one as in a network's last layers.
SHAPES: tuple[Shape, ...] = ((32, 256, 56, 56), (8, 64, 96, 96), (8, 512, 7, 7))
# An odd width, so that rows of masks are padded.
QUICK_SHAPES: tuple[Shape, ...] = ((3, 8, 5, 7),)
LAYOUTS = ("nchw", "channels_last")
Function = Callable[..., Any]


def shapes(options: Options) -> tuple[Shape, ...]:
    return QUICK_SHAPES if options.quick else SHAPES


def text(shape: Sequence[int], layout: str) -> str:
    return f"{'x'.join(map(str, shape))} {layout}"


def mask_bytes(shape: Shape, layout: str) -> int:
    """Of a mask whose rows, planes or pixels, are padded to whole bytes."""
    n, c, h, w = shape
    rows, length = (n * h * w, c) if layout == "channels_last" else (n * c, h * w)
    return rows * ((length + 7) // 8)


def signed(shape: Shape, layout: str, options: Options, seed: int, mean: float = 0.0) -> Tensor:
    """Values around ``mean`` of magnitude 0.5 to 1.5 and certain sign: rounding on one side must
    not open a ReLU that is shut on another."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, generator=generator).add_(0.5)
    signs = torch.rand(shape, generator=generator) < 0.5
    values = torch.where(signs, -values, values).add_(mean)
    return place(values, layout, options)


def place(values: Tensor, layout: str, options: Options) -> Tensor:
    values = values.to(options.device, options.torch_dtype)
    if layout == "channels_last":
        values = values.contiguous(memory_format=torch.channels_last)
    return values


def channels(shape: Shape, low: float, high: float, options: Options, seed: int) -> Tensor:
    """(C,) between low and high, in float32 (float64 for float64)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(shape[1], generator=generator) * (high - low) + low
    wide = torch.float64 if options.dtype == "float64" else torch.float32
    return values.to(options.device, wide)


def forward_side(function: Function, inputs: Sequence[Tensor]) -> Side:
    """One call, its graph made and dropped."""
    return Side(lambda: (function(*inputs),))


def backward_side(
    function: Function,
    inputs: Sequence[Tensor],
    grad: Tensor,
    mode: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Side:
    """The backward alone, again and again over one graph."""
    output = function(*inputs)

    def run() -> tuple[Tensor, ...]:
        with mode():
            return torch.autograd.grad(output, tuple(inputs), grad, retain_graph=True)

    return Side(run)


def double_backward_side(
    function: Function,
    inputs: Sequence[Tensor],
    grad: Tensor,
    outer: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inner: Sequence[Tensor],
) -> Side:
    """The double backward alone: cotangents of the gradients of ``inner``, pulled back to the
    gradient of the output and to ``outer``."""
    grad = grad.detach().requires_grad_()
    gradients = torch.autograd.grad(function(*inputs), tuple(inner), grad, create_graph=True)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(gradients, (grad, *outer), tuple(cotangents), retain_graph=True)

    return Side(run)
