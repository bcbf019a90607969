"""Convolution and BatchNorm as units of a stage: where the passes spend their time.

Formulas: ``ops/batch_norm_relu/reference.py``; ``ops/conv_bn_act/op.py`` says why gamma rstd is
folded into the weight.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from camkernels.engine.units import (
    Cotangents,
    Given,
    Record,
    Second,
    Spread,
    Stream,
    Unit,
    accumulate,
)
from camkernels.nn import modules
from camkernels.ops.batch_norm_relu import norm
from camkernels.ops.batch_norm_relu.norm import NormSpec, Saved
from camkernels.ops.conv2d import filters
from camkernels.ops.conv2d.filters import per_filter
from camkernels.ops.conv2d.op import ConvSpec, Geometry, convolve, gradients, strided_gradient

if TYPE_CHECKING:
    from camkernels.engine.passes import Run
    from camkernels.engine.trace import Op


@dataclass
class ConvState:
    """What the forward of a convolution leaves."""

    spec: ConvSpec
    x: Geometry


class Conv(Unit):
    """z = conv(x, W) + b."""

    dear = True

    def __init__(self, op: Op) -> None:
        super().__init__(op)
        self.conv: Any = op.module
        self.padding = op.options["padding"]
        self.norm: Norm | None = None
        """The BatchNorm that alone reads z: g' comes from it, and gamma rstd goes into W."""
        self.reads_for_weights = self.inputs

    def modules(self) -> list[nn.Module]:
        return [self.conv]

    def learns_from_input(self) -> bool:
        return bool(self.conv.weight.requires_grad)

    @property
    def spec(self) -> ConvSpec:
        conv = self.conv
        return ConvSpec(conv.stride, self.padding, conv.dilation, conv.groups)

    def forward(self, run: Run, *xs: Tensor) -> Tensor:
        run.state[self] = ConvState(self.spec, Geometry.of(xs[0]))
        return self.again(run, *xs)

    def again(self, run: Run, *xs: Tensor) -> Tensor:
        weight, bias = run.cast(self.conv.weight), self.conv.bias
        spec = run.state[self].spec
        return convolve(xs[0], weight, None if bias is None else run.cast(bias), spec)

    def outline(self, *xs: Tensor) -> Tensor:
        weight = torch.empty(self.conv.weight.shape, device="meta")
        return convolve(xs[0], weight, None, self.spec)

    def reverse(self, run: Run, grad: Tensor | None, stream: Stream, private: bool) -> Given:
        parameter, bias = self.conv.weight, self.conv.bias
        pending = None if stream.second is None else stream.second.of_filters.pop(self, None)
        if grad is None:
            if pending is not None:
                self._collect(run, stream, parameter, None, None, pending)
            return (None,)
        want_x, want_weight = run.leads(self.inputs[0], stream), stream.wants(parameter)
        weight, scale = run.cast(parameter), None
        if stream.record is not None:
            if self.norm is None:
                stream.record.grads[self] = grad
            else:  # the gradient is g', which lacks gamma rstd
                scale = run.scale(self.norm)
        if scale is not None and grad.numel() < weight.numel():
            grad, scale = grad * scale.to(grad.dtype).view(1, -1, 1, 1), None
        elif scale is not None and want_x:
            weight = weight * per_filter(scale, weight)
        state: ConvState = run.state[self]
        to_x, to_weight = self._gradients(run, state, grad, weight, (want_x, want_weight))
        if to_weight is not None:
            self._collect(run, stream, parameter, to_weight, scale, pending)
        if stream.wants(bias):
            self._collect(run, stream, bias, grad.sum((0, 2, 3)), scale)
        return (to_x,)

    def _gradients(
        self,
        run: Run,
        state: ConvState,
        grad: Tensor,
        weight: Tensor,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | Spread | None, Tensor | None]:
        want_x, want_weight = wanted
        read = strided_gradient(grad, weight, state.spec) if want_x else None
        to_x = None if read is None else Spread(read, state.x.size, state.spec.stride)
        if to_x is not None and not want_weight:
            return to_x, None
        x = run.value(self.inputs[0]) if want_weight else state.x.blank(grad)
        left = want_x and to_x is None, want_weight, False
        found = gradients(grad, x, weight, state.spec, left)
        return found[0] if to_x is None else to_x, found[1]

    def _collect(
        self,
        run: Run,
        stream: Stream,
        parameter: nn.Parameter,
        value: Tensor | None,
        scale: Tensor | None,
        pending: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        """``pending``: what ``Second.of_filters`` holds."""
        assert stream.gradients is not None
        if value is not None and scale is not None:
            value.mul_(per_filter(scale, value))
        if pending is not None:
            value = filters.add_scaled(value, *pending, parameter.dtype, run.backend)
        assert value is not None
        accumulate(stream.gradients, parameter, value.to(parameter.dtype))

    def tangent(
        self, run: Run, record: Record, second: Second, hs: Cotangents, private: bool
    ) -> Tensor | None:
        (h,) = hs
        folds = self.norm is not None
        grad = run.prime(record, self.norm) if folds else run.take(record.grads, self)
        if h is None or grad is None:
            return None
        weight, spec = run.cast(self.conv.weight), run.state[self].spec
        if run.weights_wanted and self.conv.weight.requires_grad:
            to_weight = gradients(grad, h, weight, spec, (False, True, False))[1]
            assert to_weight is not None
            if self in second.of_filters:
                second.of_filters[self][0].add_(to_weight)
            else:
                scale = None if self.norm is None else run.scale(self.norm)
                second.of_filters[self] = to_weight, scale
        return convolve(h, weight, None, spec)


@dataclass
class NormState:
    """What the forward of a BatchNorm leaves."""

    spec: NormSpec
    mean: Tensor
    rstd: Tensor
    inv_count: float
    gamma: Tensor | None
    beta: Tensor | None
    """As kernels take them."""
    mask: Tensor | None = None

    @functools.cached_property
    def scale(self) -> Tensor:
        """gamma rstd."""
        return self.rstd if self.gamma is None else self.gamma * self.rstd


class Norm(Unit):
    """a = relu(bn(z) + s), sum and ReLU where they follow."""

    def __init__(self, parts: list[Op], residual: Op | None, relu: bool) -> None:
        super().__init__(parts[-1])
        self.parts, self.residual, self.relu = parts, residual, relu
        self.bn: Any = parts[0].module
        self.z = parts[0].inputs[0]
        self.inputs = (self.z,) if residual is None else (self.z, residual)
        self.reads = (self.z,)
        self.conv: Conv | None = None

    def shortened(self, parts: list[Op]) -> Norm:
        """The same without the operations that another BatchNorm has taken."""
        if parts == self.parts:
            return self
        kinds = [part.kind for part in parts]
        residual = self.residual if "add" in kinds else None
        return Norm(parts, residual, parts[0].options["relu"] or "relu" in kinds)

    @property
    def name(self) -> str:
        return self.parts[0].name

    def modules(self) -> list[nn.Module]:
        return [self.bn]

    def _state(self, run: Run, z: Tensor, residual: Tensor | None) -> NormState:
        arguments = modules.normalization_arguments(self.bn)
        running = arguments["running_mean"], arguments["running_var"]
        spec = NormSpec(
            arguments["training"], arguments["eps"], self.relu, arguments["process_group"],
            run.backend,
        )  # fmt: skip
        if spec.training:
            norm.check_count(z, spec.group)
        norm.check_residual(residual, z)
        found = norm.statistics(z, *running, spec)
        if spec.training:
            norm.update_running(*running, found, arguments["momentum"])
        gamma, beta = spec.per_channel(self.bn.weight, z), spec.per_channel(self.bn.bias, z)
        return NormState(spec, found.mean, found.rstd, found.inv_count, gamma, beta)

    def _forward(self, run: Run, state: NormState, xs: tuple[Tensor, ...], mask: bool) -> Any:
        z = xs[0]
        residual = norm.conform(xs[1], z) if len(xs) > 1 else None
        return state.spec.run(
            "bn_fwd", z, state.mean, state.rstd, state.gamma, state.beta, residual, self.relu, mask
        )

    def forward(self, run: Run, *xs: Tensor) -> Tensor:
        residual = xs[1] if len(xs) > 1 else None
        state = self._state(run, xs[0], residual)
        masked = self.relu and residual is not None and run.recording
        output: Tensor
        output, mask = self._forward(run, state, xs, masked)
        state.mask = mask if masked else None
        run.state[self] = state
        return output

    def again(self, run: Run, *xs: Tensor) -> Tensor:
        output: Tensor = self._forward(run, run.state[self], xs, False)[0]
        return output

    def _saved(self, run: Run) -> tuple[Saved, NormState]:
        state: NormState = run.state[self]
        z, mask = run.value(self.z), state.mask
        return Saved(z, state.mean, state.rstd, state.gamma, state.beta, mask), state

    def reverse(self, run: Run, grad: Tensor | None, stream: Stream, private: bool) -> Given:
        nothing = (None,) * len(self.inputs)
        waiting = None if stream.second is None else stream.second.of_z.pop(self, None)
        saved, state = self._saved(run)
        if waiting is not None:
            waiting = norm.conform(waiting, saved.z)
        if grad is None:
            return (waiting, *nothing[1:])
        record, spec = stream.record, state.spec
        want_residual = self.residual is not None and run.leads(self.residual, stream)
        weights = stream.wants(self.bn.weight) or stream.wants(self.bn.bias)
        laid = norm.conform(grad, saved.z)
        to_z, to_residual, sums, total = norm.first_order(
            laid, saved, spec, state.inv_count, inplace=private or laid is not grad,
            guided=stream.guided and self.relu, scaled=record is None, addend=waiting,
            want_residual=want_residual, want_sums=weights,
        )  # fmt: skip
        for parameter, value in ((self.bn.weight, sums[1]), (self.bn.bias, sums[0])):
            if stream.wants(parameter):
                assert stream.gradients is not None
                accumulate(stream.gradients, parameter, value.to(parameter.dtype, copy=True))
        if record is not None:
            record.primes[self] = to_z.to(run.stored_dtype)
            record.sums[self] = total
            if self.conv is None:
                to_z = to_z * state.scale.to(to_z.dtype).view(1, -1, 1, 1)
        return (to_z, *((to_residual if want_residual else None,) if self.residual else ()))

    def tangent(
        self, run: Run, record: Record, second: Second, hs: Cotangents, private: bool
    ) -> Tensor | None:
        h, h_residual = hs if len(hs) > 1 else (hs[0], None)
        prime = run.prime(record, self)
        if prime is None or (h is None and h_residual is None):
            return None
        saved, state = self._saved(run)
        z, gamma = saved.z, self.bn.weight
        if h is not None:
            laid = norm.conform(h, z)
            h = laid if private or laid is not h else h.clone()
        reuse = not run.keeps_graph and prime.dtype == run.stored_dtype
        to_output, to_z, to_gamma = norm.second_order(
            h, None if h_residual is None else norm.conform(h_residual, z),
            norm.conform(prime, z), saved, state.spec, state.inv_count, record.sums[self], None,
            None, inplace=True, reuse_prime=reuse,
            want_gamma=run.weights_wanted and gamma is not None and gamma.requires_grad,
        )  # fmt: skip
        run.take(record.primes, self)
        if to_gamma is not None:
            accumulate(second.of_parameters, gamma, to_gamma.to(gamma.dtype))
        if to_z is not None:
            accumulate(second.of_z, self, to_z.to(run.stored_dtype))
        return to_output
