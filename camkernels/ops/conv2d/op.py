"""Convolution closed under differentiation.

    y = conv(x, W),  grad_x = D(g, W),  grad_W = G(x, g)

are three functions, each linear in both arguments, and each differentiates into the other two: any
order runs the library's true forward, data-gradient and weight-gradient convolutions, never one
with batch and channels exchanged.

What a convolution keeps of its input is the input, or, where that is relu(bn(z)) made by
batch_norm_relu or conv_bn_act, the z that is kept anyway (see recipe.py).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from camkernels import modes
from camkernels.ops.batch_norm_relu.recipe import Recipe
from camkernels.ops.conv2d import few_channels, pointwise


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """Geometry of a 2d convolution."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@functools.cache
def _slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether PyTorch would run convolutions of this dtype by its slow path on this CPU. Then they
    are computed in float32 and rounded, which is what the fast path does inside."""
    try:
        if dtype == torch.bfloat16:
            return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if dtype == torch.float16:
            return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    except (AttributeError, RuntimeError):  # a PyTorch without these probes
        return False
    return False


def _widened(*tensors: Tensor | None) -> list[Tensor | None] | None:
    """The tensors in float32 where that is faster, else None."""
    first = tensors[0]
    assert first is not None
    if first.device.type != "cpu" or not _slow_on_cpu(first.dtype):
        return None
    return [None if t is None else t.float() for t in tensors]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    dtype = x.dtype
    wide = _widened(x, weight, bias)
    if wide is not None:
        x, weight, bias = wide  # type: ignore[assignment]
    y = pointwise.convolve(x, weight, bias, spec)
    if y is None:
        y = torch.ops.aten.convolution(
            x, weight, bias, spec.stride, spec.padding, spec.dilation, False, (0, 0), spec.groups
        )
    return y.to(dtype)


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, spec: ConvSpec, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """grad_x, grad_weight, grad_bias. Of x only the shape is read where grad_weight is not wanted,
    of weight where grad_x is not."""
    dtype = grad.dtype
    wide = _widened(grad)
    if wide is not None:
        grad = wide[0]  # type: ignore[assignment]
        x = x.float() if wanted[1] else Geometry.of(x).blank(grad)
        weight = weight.float() if wanted[0] else Geometry.of(weight).blank(grad)
    size = (x.shape[2], x.shape[3])
    to_x = to_weight = None
    if wanted[0] and few_channels.is_suited(grad, weight, spec):
        to_x = few_channels.data_gradient(grad, size, weight, spec)
    elif wanted[0]:
        to_x = pointwise.data_gradient(grad, size, weight, spec)
    if wanted[1]:
        to_weight = pointwise.weight_gradient(grad, x, weight, spec)
    library = (wanted[0] and to_x is None, wanted[1] and to_weight is None, wanted[2])
    found: tuple[Tensor | None, ...] = (None, None, None)
    if any(library):
        found = torch.ops.aten.convolution_backward(
            grad, x, weight, (weight.shape[0],), spec.stride, spec.padding, spec.dilation,
            False, (0, 0), spec.groups, library,
        )  # fmt: skip
    found = (found[0] if to_x is None else to_x, found[1] if to_weight is None else to_weight,
             found[2])  # fmt: skip
    return found if wide is None else tuple(None if f is None else f.to(dtype) for f in found)


def strided_gradient(grad: Tensor, weight: Tensor, spec: ConvSpec) -> Tensor | None:
    """grad_x of a strided 1 x 1 convolution at the pixels that it has read, every s-th; elsewhere
    it is zero. None for other convolutions, and where the library is faster."""
    if spec.stride == (1, 1) or _widened(grad) is not None:
        return None
    return pointwise.read_gradient(grad, weight, spec)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Shape and layout of a tensor that was not kept."""

    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Geometry:
        return cls(tensor.shape, tensor.stride())

    @property
    def size(self) -> tuple[int, int]:
        """Of a plane."""
        return self.shape[2], self.shape[3]

    def blank(self, like: Tensor) -> Tensor:
        """Memory that nobody reads, and so never touched, for calls that look at shapes only."""
        return torch.empty_strided(self.shape, self.stride, dtype=like.dtype, device=like.device)


class Conv2dDataGradFunction(torch.autograd.Function):
    """grad_x = D(grad, weight)."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, x: Geometry, spec: ConvSpec) -> Tensor:
        ctx.save_for_backward(grad, weight)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        grad_x = gradients(grad, x.blank(grad), weight, spec, (True, False, False))[0]
        assert grad_x is not None
        return grad_x

    @staticmethod
    def backward(ctx: Any, h: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad, weight = ctx.saved_tensors
        to_grad = to_weight = None
        if h is not None and ctx.needs_input_grad[0]:
            to_grad = Conv2dFunction.apply(h, weight, None, *NO_RECIPE, ctx.spec)
        if h is not None and ctx.needs_input_grad[1] and modes.weight_gradients_wanted():
            to_weight = Conv2dWeightGradFunction.apply(h, grad, Geometry.of(weight), ctx.spec)
        return to_grad, to_weight, None, None


class Conv2dWeightGradFunction(torch.autograd.Function):
    """grad_weight = G(x, grad)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor, weight: Geometry, spec: ConvSpec) -> Tensor:
        ctx.save_for_backward(x, grad)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        grad_weight = gradients(grad, x, weight.blank(grad), spec, (False, True, False))[1]
        assert grad_weight is not None
        return grad_weight

    @staticmethod
    def backward(ctx: Any, h: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, grad = ctx.saved_tensors
        to_x = to_grad = None
        if h is not None and ctx.needs_input_grad[0]:
            to_x = Conv2dDataGradFunction.apply(grad, h, Geometry.of(x), ctx.spec)
        if h is not None and ctx.needs_input_grad[1]:
            to_grad = Conv2dFunction.apply(x, h, None, *NO_RECIPE, ctx.spec)
        return to_x, to_grad, None, None


# What stands for (z, gamma, beta, recipe) where x itself is kept.
NO_RECIPE = (None, None, None, None)


class Conv2dFunction(torch.autograd.Function):
    """y = conv(x, weight) + bias; with a recipe x is not kept but made again from z."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        z: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        recipe: Recipe | None,
        spec: ConvSpec,
    ) -> Tensor:
        kept = None
        if ctx.needs_input_grad[1] and recipe is None:
            kept = x
        elif not ctx.needs_input_grad[1]:
            z = gamma = beta = recipe = None
        ctx.save_for_backward(kept, weight, z, gamma, beta)
        ctx.spec, ctx.recipe, ctx.x = spec, recipe, Geometry.of(x)
        ctx.set_materialize_grads(False)
        return convolve(x, weight, bias, spec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 8
        x, weight, z, gamma, beta = ctx.saved_tensors
        weights = modes.weight_gradients_wanted()
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = Conv2dDataGradFunction.apply(grad, weight, ctx.x, ctx.spec)
        if ctx.needs_input_grad[1] and weights:
            if ctx.recipe is not None:
                x = ctx.recipe.make(z, gamma, beta)
            to_weight = Conv2dWeightGradFunction.apply(x, grad, Geometry.of(weight), ctx.spec)
        if ctx.needs_input_grad[2] and weights:
            to_bias = grad.sum((0, 2, 3))
        return to_x, to_weight, to_bias, None, None, None, None, None


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    y: Tensor = Conv2dFunction.apply(x, weight, bias, *Recipe.arguments_of(x), spec)
    return y
