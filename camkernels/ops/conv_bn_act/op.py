"""Convolution, BatchNorm, residual add and ReLU as one op with two orders of backward.

    z = conv(x, W),  a = relu(bn(z) + residual)

The unit of fusion that keeps least where the graph of a backward is kept. BatchNorm and convolution
alone would each keep a gradient for the double backward, g' and gamma rstd g'. Together they keep
g' alone, with gamma rstd folded into the weight, and never divide by gamma:

    grad_x = D(g', W gamma rstd),  grad_W = gamma rstd G(x, g')
    double backward, h_x the cotangent of grad_x:  h = conv(h_x, W),  W gets gamma rstd G(h_x, g')

z is an output of the forward (that only autograd sees): the double backward sends its cotangent of
z there, where it meets that of the final backward, so that one data-gradient and one
weight-gradient convolution serve both. x is kept as in conv2d: itself, or by its recipe.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camkernels import modes
from camkernels.ops import _layout
from camkernels.ops.batch_norm_relu import norm
from camkernels.ops.batch_norm_relu.norm import NormSpec, Saved
from camkernels.ops.batch_norm_relu.recipe import Recipe
from camkernels.ops.conv2d.filters import per_filter
from camkernels.ops.conv2d.op import ConvSpec, Geometry, convolve, gradients


class ConvBNActBackwardFunction(torch.autograd.Function):
    """(grad, x, z, weight, gamma) to the cotangents of x, residual, weight, bias, gamma, beta."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        x: Tensor | None,
        z: Tensor,
        weight: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        mask: Tensor | None,
        geometry: Geometry,
        inv_count: float,
        wanted: tuple[bool, bool, bool, bool],
        conv: ConvSpec,
        spec: NormSpec,
    ) -> tuple[Tensor | None, ...]:
        want_x, want_residual, want_weight, want_bias = wanted
        saved = Saved(
            z.detach(), mean, rstd, spec.per_channel(gamma, z), spec.per_channel(beta, z), mask
        )  # fmt: skip
        grad_prime, to_residual, sums, total = norm.first_order(
            norm.conform(grad, z), saved, spec, inv_count, guided=False, scaled=False, addend=None,
            want_residual=want_residual, want_sums=True,
        )  # fmt: skip
        like_x = geometry.blank(z) if x is None else x
        folded = weight * per_filter(saved.scale, weight) if want_x else weight
        to_x, to_weight, _ = gradients(
            grad_prime, like_x, folded, conv, (want_x, want_weight, False)
        )
        if to_weight is not None:
            to_weight.mul_(per_filter(saved.scale, to_weight))
        to_bias = grad_prime.sum((0, 2, 3)) * saved.scale.to(z.dtype) if want_bias else None
        ctx.save_for_backward(
            x if want_weight else None, z, weight, gamma, beta, mean, rstd, mask, grad_prime, total
        )
        ctx.geometry, ctx.inv_count, ctx.conv, ctx.spec = geometry, inv_count, conv, spec
        ctx.channels_last = _layout.is_channels_last(z)
        ctx.set_materialize_grads(False)
        residual = to_residual if want_residual else None
        return to_x, residual, to_weight, to_bias, sums[1], sums[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(norm.THIRD_ORDER.format(op="conv_bn_act"))
        if modes.guided_now():
            raise RuntimeError(norm.GUIDED_TWICE)
        h_x, h_residual, h_weight, h_bias, c_gamma, c_beta = cotangents
        x, z, weight, gamma, beta, mean, rstd, mask, grad_prime, total = ctx.saved_tensors
        z = norm.relaid(z, ctx.channels_last)
        grad_prime = norm.conform(grad_prime, z)
        spec: NormSpec = ctx.spec
        saved = Saved(
            z, mean, rstd, spec.per_channel(gamma, z), spec.per_channel(beta, z), mask
        )  # fmt: skip
        weights = modes.weight_gradients_wanted()
        h = _cotangent_of_z_gradient(h_x, h_weight, h_bias, x, weight, z, ctx.conv)
        to_weight = to_x = None
        if h_x is not None and weights and ctx.needs_input_grad[3]:
            to_weight = gradients(grad_prime, h_x, weight, ctx.conv, (False, True, False))[1]
            assert to_weight is not None
            to_weight.mul_(per_filter(saved.scale, to_weight))
        if h_weight is not None and ctx.needs_input_grad[1]:
            folded = h_weight * per_filter(saved.scale, h_weight)
            blank = ctx.geometry.blank(z)
            to_x = gradients(grad_prime, blank, folded, ctx.conv, (True, False, False))[0]
        to_grad, to_z, to_gamma = norm.second_order(
            h, None if h_residual is None else norm.conform(h_residual, z), grad_prime, saved, spec,
            ctx.inv_count, total, c_gamma, c_beta,
            inplace=True, want_gamma=weights and ctx.needs_input_grad[4],
        )  # fmt: skip
        if to_gamma is not None:
            assert gamma is not None
            to_gamma = to_gamma.to(gamma.dtype)
        return (to_grad, to_x, to_z, to_weight, to_gamma, *(None,) * 9)


def _cotangent_of_z_gradient(
    h_x: Tensor | None,
    h_weight: Tensor | None,
    h_bias: Tensor | None,
    x: Tensor | None,
    weight: Tensor,
    z: Tensor,
    conv: ConvSpec,
) -> Tensor | None:
    """h, in memory of its own. The last two parts exist only where gradients of parameters were
    differentiated."""
    parts = []
    if h_x is not None:
        parts.append(convolve(h_x, weight, None, conv))
    if h_weight is not None:
        assert x is not None
        parts.append(convolve(x, h_weight, None, conv))
    if h_bias is not None:
        parts.append(h_bias.view(1, -1, 1, 1).expand_as(z).contiguous())
    if not parts:
        return None
    h = parts[0]
    for part in parts[1:]:
        h = h.add_(part)
    return norm.conform(h, z)


class ConvBNActFunction(torch.autograd.Function):
    """a, z, and the mean, biased variance, rstd and count of the statistics that were used."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        x_z: Tensor | None,
        x_gamma: Tensor | None,
        x_beta: Tensor | None,
        recipe: Recipe | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        conv: ConvSpec,
        spec: NormSpec,
    ) -> tuple[Any, ...]:
        z = norm.dense(convolve(x, weight, bias, conv))
        if spec.training:
            norm.check_count(z, spec.group)
        norm.check_residual(residual, z)
        found = norm.statistics(z, running_mean, running_var, spec)
        masked = spec.relu and residual is not None
        output, mask = spec.run(
            "bn_fwd", z, found.mean, found.rstd, spec.per_channel(gamma, z),
            spec.per_channel(beta, z), None if residual is None else norm.conform(residual, z),
            spec.relu, masked and any(ctx.needs_input_grad),
        )  # fmt: skip
        keep_x = ctx.needs_input_grad[1]
        if not keep_x:
            x_z = x_gamma = x_beta = recipe = None
        ctx.save_for_backward(
            x if keep_x and recipe is None else None, weight, gamma, beta, x_z, x_gamma, x_beta,
            z, found.mean, found.rstd, mask if masked else None,
        )  # fmt: skip
        ctx.conv, ctx.spec, ctx.relu, ctx.recipe = conv, spec, spec.relu, recipe
        ctx.x, ctx.inv_count = Geometry.of(x), found.inv_count
        ctx.channels_last = _layout.is_channels_last(z)
        ctx.mark_non_differentiable(found.mean, found.var, found.rstd)
        ctx.set_materialize_grads(False)
        return output, z, found.mean, found.var, found.rstd, found.count

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_z: Tensor | None, *_: Any) -> tuple[Any, ...]:
        guided, weights = modes.guided_now(), modes.weight_gradients_wanted()
        if grad is None and grad_z is None:
            return (None,) * 14
        need = [
            n and (weights or i in (0, 5)) for i, n in enumerate(ctx.needs_input_grad[:6])
        ]  # weight, bias, gamma and beta are weights; x and residual are not
        if torch.is_grad_enabled():
            if grad_z is not None:
                raise RuntimeError(norm.THIRD_ORDER.format(op="conv_bn_act"))
            found = _connected(ctx, grad, need)
        else:
            found = _final(ctx, grad, grad_z, need, guided)
        return (*(f if n else None for f, n in zip(found, need, strict=True)), *(None,) * 8)


def _input(ctx: Any, x: Tensor | None, source: tuple[Tensor | None, ...]) -> Tensor:
    """The input, kept or made again."""
    if ctx.recipe is not None:
        assert source[0] is not None
        made: Tensor = ctx.recipe.make(*source)
        return made
    assert x is not None
    return x


def _connected(ctx: Any, grad: Tensor | None, need: list[bool]) -> tuple[Any, ...]:
    """A backward whose own graph is kept."""
    x, weight, gamma, beta, x_z, x_gamma, x_beta, z, mean, rstd, mask = ctx.saved_tensors
    z = norm.relaid(z, ctx.channels_last)
    to_x, to_residual, to_weight, to_bias, to_gamma, to_beta = ConvBNActBackwardFunction.apply(
        grad, _input(ctx, x, (x_z, x_gamma, x_beta)) if need[1] else None, z, weight, gamma, beta,
        mean, rstd, mask, ctx.x, ctx.inv_count, (need[0], need[5], need[1], need[2]),
        ctx.conv, ctx.spec,
    )  # fmt: skip
    if gamma is not None:
        to_gamma, to_beta = to_gamma.to(gamma.dtype), to_beta.to(gamma.dtype)
    return to_x, to_weight, to_bias, to_gamma, to_beta, to_residual


def _final(
    ctx: Any, grad: Tensor | None, grad_z: Tensor | None, need: list[bool], guided: bool
) -> tuple[Any, ...]:
    """A backward without a graph: guided, or the last one, where the cotangent of z that the
    double backward has left joins in."""
    x, weight, gamma, beta, x_z, x_gamma, x_beta, z, mean, rstd, mask = ctx.saved_tensors
    z = norm.relaid(z, ctx.channels_last)
    spec: NormSpec = ctx.spec
    to_residual = to_gamma = to_beta = None
    if grad_z is not None:
        grad_z = norm.conform(grad_z, z)
    if grad is not None:
        saved = Saved(
            z, mean, rstd, spec.per_channel(gamma, z), spec.per_channel(beta, z), mask
        )  # fmt: skip
        grad_z, to_residual, sums, _ = norm.first_order(
            norm.conform(grad, z), saved, spec, ctx.inv_count, guided=guided and spec.relu,
            scaled=True, addend=grad_z, want_residual=need[5], want_sums=need[3] or need[4],
        )  # fmt: skip
        if gamma is not None:
            to_gamma, to_beta = sums[1].to(gamma.dtype), sums[0].to(gamma.dtype)
    assert grad_z is not None
    like_x = _input(ctx, x, (x_z, x_gamma, x_beta)) if need[1] else ctx.x.blank(z)
    to_x, to_weight, to_bias = gradients(
        grad_z, like_x, weight, ctx.conv, (need[0], need[1], need[2])
    )
    return to_x, to_weight, to_bias, to_gamma, to_beta, to_residual
