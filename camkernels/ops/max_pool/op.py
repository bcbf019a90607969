"""Max pooling that keeps one byte per window: where its maximum is, not the int64 index and the
input that PyTorch keeps.

Given the positions it is linear, so its derivatives of every order are scatter and gather.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from camkernels import backends
from camkernels.ops import _chain, _validate
from camkernels.ops.max_pool.reference import Window


@functools.lru_cache(maxsize=1024)
def window_of(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> Window:
    """Built once: a network asks at every step."""
    return Window(kernel, stride, padding, dilation, ceil_mode)


def _kernel(name: str, backend: str) -> Callable[..., Any]:
    """Where a dispatch mode traces, tensors may hold no data, and no kernel may read them."""
    traced = _chain._is_traced() and backend != "meta"
    return _chain.implementation("max_pool", name, "reference" if traced else backend)


class GatherFunction(torch.autograd.Function):
    """x (B, C, H, W) to its values at the positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, window: Window, backend: str) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.window, ctx.size, ctx.backend = window, (x.shape[2], x.shape[3]), backend
        ctx.set_materialize_grads(False)
        y: Tensor = _kernel("max_pool_gather", backend)(x, positions, window)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (positions,) = ctx.saved_tensors
        return _scattered(grad, positions, ctx.window, ctx.size, ctx.backend), None, None, None


class ScatterFunction(torch.autograd.Function):
    """Gradients of the windows, summed at their maxima."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        positions: Tensor,
        window: Window,
        size: tuple[int, int],
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.window, ctx.backend = window, backend
        ctx.set_materialize_grads(False)
        grad_x: Tensor = _kernel("max_pool_scatter", backend)(grad, positions, window, size)
        return grad_x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        (positions,) = ctx.saved_tensors
        if grad is not None:
            grad = GatherFunction.apply(grad, positions, ctx.window, ctx.backend)
        return grad, None, None, None, None


def _scattered(
    grad: Tensor | None, positions: Tensor, window: Window, size: tuple[int, int], backend: str
) -> Tensor | None:
    if grad is None:
        return None
    grad_x: Tensor = ScatterFunction.apply(grad, positions, window, size, backend)
    return grad_x


class MaxPoolFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window, backend: str) -> Tensor:
        y: Tensor
        y, positions = _kernel("max_pool_fwd", backend)(x, window)
        ctx.save_for_backward(positions)
        ctx.window, ctx.size, ctx.backend = window, (x.shape[2], x.shape[3]), backend
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        (positions,) = ctx.saved_tensors
        return _scattered(grad, positions, ctx.window, ctx.size, ctx.backend), None, None


def max_pool2d(input: Tensor, window: Window) -> Tensor:
    """See camkernels.nn.functional.max_pool2d."""
    x = _validate.floating_tensor("input", input, 4, "(B, C, H, W)")
    window.output_size(x.shape[2], x.shape[3])
    backend = backends.resolve_network(x.device, x.dtype)
    y: Tensor = MaxPoolFunction.apply(x, window, backend)
    return y
