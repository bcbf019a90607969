"""The Functions of batch_norm_relu: forward, backward (plain or guided), double backward.

Kept for the first backward: z, which the op before has made, and per-channel numbers; a residual
adds one bit per element. A backward whose graph is kept saves g' (reference.py) beside them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camkernels import modes
from camkernels.ops import _layout
from camkernels.ops.batch_norm_relu import norm
from camkernels.ops.batch_norm_relu.norm import NormSpec, Saved


class BatchNormReLUBackwardFunction(torch.autograd.Function):
    """(grad, z, gamma) to the cotangents of z, residual, gamma and beta."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        z: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        mask: Tensor | None,
        inv_count: float,
        want_residual: bool,
        spec: NormSpec,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide_gamma, wide_beta = spec.per_channel(gamma, z), spec.per_channel(beta, z)
        saved = Saved(z.detach(), mean, rstd, wide_gamma, wide_beta, mask)
        grad_prime, to_residual, sums, total = norm.first_order(
            norm.conform(grad, z), saved, spec, inv_count, guided=False, scaled=False, addend=None,
            want_residual=want_residual, want_sums=True,
        )  # fmt: skip
        ctx.save_for_backward(z, gamma, beta, mean, rstd, mask, grad_prime, total)
        ctx.inv_count, ctx.spec = inv_count, spec
        ctx.channels_last = _layout.is_channels_last(z)
        ctx.set_materialize_grads(False)
        to_z = grad_prime * saved.scale.to(grad_prime.dtype).view(1, -1, 1, 1)
        return to_z, to_residual, sums[1], sums[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(norm.THIRD_ORDER.format(op="batch_norm_relu"))
        if modes.guided_now():
            raise RuntimeError(norm.GUIDED_TWICE)
        h, h_residual, c_gamma, c_beta = cotangents
        z, gamma, beta, mean, rstd, mask, grad_prime, total = ctx.saved_tensors
        z = norm.relaid(z, ctx.channels_last)
        grad_prime = norm.conform(grad_prime, z)
        spec: NormSpec = ctx.spec
        saved = Saved(
            z, mean, rstd, spec.per_channel(gamma, z), spec.per_channel(beta, z), mask
        )  # fmt: skip
        to_grad, to_z, to_gamma = norm.second_order(
            None if h is None else norm.conform(h, z),
            None if h_residual is None else norm.conform(h_residual, z),
            grad_prime, saved, spec, ctx.inv_count, total, c_gamma, c_beta,
            inplace=False, want_gamma=ctx.needs_input_grad[2] and modes.weight_gradients_wanted(),
        )  # fmt: skip
        if to_gamma is not None:
            assert gamma is not None
            to_gamma = to_gamma.to(gamma.dtype)
        return (to_grad, to_z, to_gamma, *(None,) * 7)


class BatchNormReLUFunction(torch.autograd.Function):
    """a, and the mean, biased variance and count of the statistics that were used."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        spec: NormSpec,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        found = norm.statistics(z, running_mean, running_var, spec)
        masked = spec.relu and residual is not None
        output, mask = spec.run(
            "bn_fwd", z, found.mean, found.rstd, spec.per_channel(gamma, z),
            spec.per_channel(beta, z), None if residual is None else norm.conform(residual, z),
            spec.relu, masked and any(ctx.needs_input_grad),
        )  # fmt: skip
        ctx.save_for_backward(z, gamma, beta, found.mean, found.rstd, mask if masked else None)
        ctx.spec, ctx.relu, ctx.inv_count = spec, spec.relu, found.inv_count
        ctx.channels_last = _layout.is_channels_last(z)
        ctx.mark_non_differentiable(found.mean, found.var, found.rstd)
        ctx.set_materialize_grads(False)
        return output, found.mean, found.var, found.rstd, found.count

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        guided, weights = modes.guided_now(), modes.weight_gradients_wanted()
        if grad is None:
            return (None,) * 7
        z, gamma, beta, mean, rstd, mask = ctx.saved_tensors
        z = norm.relaid(z, ctx.channels_last)
        need_z, need_gamma, need_beta, need_residual = ctx.needs_input_grad[:4]
        need_gamma, need_beta = need_gamma and weights, need_beta and weights
        to_z: Any
        if torch.is_grad_enabled():
            to_z, to_residual, to_gamma, to_beta = BatchNormReLUBackwardFunction.apply(
                grad, z, gamma, beta, mean, rstd, mask, ctx.inv_count, need_residual, ctx.spec
            )
        else:
            spec: NormSpec = ctx.spec
            saved = Saved(
                z, mean, rstd, spec.per_channel(gamma, z), spec.per_channel(beta, z), mask
            )  # fmt: skip
            to_z, to_residual, sums, _total = norm.first_order(
                norm.conform(grad, z), saved, spec, ctx.inv_count, guided=guided and spec.relu,
                scaled=True, addend=None, want_residual=need_residual,
                want_sums=need_gamma or need_beta,
            )  # fmt: skip
            to_gamma, to_beta = sums[1], sums[0]
        return (
            to_z if need_z else None,
            to_gamma.to(gamma.dtype) if need_gamma else None,
            to_beta.to(beta.dtype) if need_beta else None,
            to_residual if need_residual else None,
            None,
            None,
            None,
        )
