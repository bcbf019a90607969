"""The operations that a stage runs, each in its directions.

    forward   y = f(x)
    again     the same once more, with the statistics, masks and positions of the first time
    reverse   cotangents of x from that of y: one of the two input gradients, or the last backward,
              where the parameters get theirs
    tangent   the double backward: it runs forward. h, the cotangent of the input gradient, goes
              through the network as a tangent would, and on its way leaves at every convolution
              the second-order gradient of the weight, and at every BatchNorm a cotangent of z that
              waits for the last backward

Formulas: ``ops/batch_norm_relu/reference.py``, and what ``ops/conv_bn_act/op.py`` says of folding
gamma rstd into the weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from camkernels.nn import modules
from camkernels.ops.batch_norm_relu import norm
from camkernels.ops.batch_norm_relu.norm import NormSpec, Saved
from camkernels.ops.conv2d.op import ConvSpec, Geometry, convolve, gradients
from camkernels.ops.conv_bn_act.op import per_filter

if TYPE_CHECKING:
    from camkernels.engine.passes import Run
    from camkernels.engine.trace import Op

aten = torch.ops.aten
Cotangents = tuple[Tensor | None, ...]


@dataclass
class Record:
    """What an input gradient leaves for the tangent pass."""

    primes: dict[Norm, Tensor] = field(default_factory=dict)
    """g' of every BatchNorm."""
    sums: dict[Norm, Tensor] = field(default_factory=dict)
    grads: dict[Conv, Tensor] = field(default_factory=dict)
    """Cotangents of the outputs of convolutions without a BatchNorm of their own."""


@dataclass
class Second:
    """What a tangent pass leaves for the last backward."""

    of_z: dict[Norm, Tensor] = field(default_factory=dict)
    of_parameters: dict[nn.Parameter, Tensor] = field(default_factory=dict)


@dataclass
class Stream:
    """One reverse pass over a stage; several may go side by side.

    Attributes:
        guided: by the guided rule.
        record: keep what a tangent pass needs.
        gradients: collect the parameters' gradients here; None: nobody wants them.
        second: what tangent passes have left.
    """

    guided: bool = False
    record: Record | None = None
    gradients: dict[nn.Parameter, Tensor] | None = None
    second: Second | None = None

    def wants(self, parameter: Tensor | None) -> bool:
        return self.gradients is not None and parameter is not None and parameter.requires_grad


def accumulate(into: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    """Add to a dictionary of sums that nobody else holds."""
    held = into.get(key)
    if held is None:
        into[key] = value
    else:
        held.add_(value)


class Unit:
    """See the module.

    Attributes:
        output: the value it makes. inputs: those it reads.
        reads: values that each of its backward passes reads.
        reads_for_weights: those that a weight gradient reads beside them.
        dear: whether its output is dear to make again.
        shares: whether its cotangents are the tensor it was given.
    """

    reads: tuple[Op, ...] = ()
    reads_for_weights: tuple[Op, ...] = ()
    dear = False
    shares = False

    def __init__(self, op: Op) -> None:
        self.output, self.inputs = op, op.inputs

    @property
    def name(self) -> str:
        return self.output.name

    def modules(self) -> list[nn.Module]:
        return []

    def forward(self, run: Run, *xs: Tensor) -> Tensor:
        raise NotImplementedError

    def again(self, run: Run, *xs: Tensor) -> Tensor:
        return self.forward(run, *xs)

    def outline(self, *xs: Tensor) -> Tensor:
        """The output's shape, from tensors on the meta device."""
        return xs[0]

    def reverse(self, run: Run, grad: Tensor | None, stream: Stream) -> Cotangents:
        raise NotImplementedError

    def tangent(
        self, run: Run, record: Record, second: Second, hs: Cotangents, private: bool
    ) -> Tensor | None:
        """``private``: the first of ``hs`` is nobody else's."""
        raise NotImplementedError


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

    @property
    def spec(self) -> ConvSpec:
        conv = self.conv
        return ConvSpec(conv.stride, self.padding, conv.dilation, conv.groups)

    def forward(self, run: Run, *xs: Tensor) -> Tensor:
        (x,) = xs
        weight, bias = run.cast(self.conv.weight), self.conv.bias
        run.state[self] = Geometry.of(x)
        return convolve(x, weight, None if bias is None else run.cast(bias), self.spec)

    def outline(self, *xs: Tensor) -> Tensor:
        weight = torch.empty(self.conv.weight.shape, device="meta")
        return convolve(xs[0], weight, None, self.spec)

    def reverse(self, run: Run, grad: Tensor | None, stream: Stream) -> Cotangents:
        if grad is None:
            return (None,)
        record, conv = stream.record, self.conv
        scale = None
        if record is not None:
            if self.norm is None:
                record.grads[self] = grad
            else:
                scale = run.scale(self.norm)
        want_x, want_weight = run.leads(self.inputs[0], stream), stream.wants(conv.weight)
        weight = run.cast(conv.weight)
        folded = weight if scale is None or not want_x else weight * per_filter(scale, weight)
        x = run.value(self.inputs[0]) if want_weight else run.state[self].blank(grad)
        to_x, to_weight, _ = gradients(grad, x, folded, self.spec, (want_x, want_weight, False))
        if to_weight is not None:
            self._collect(stream, conv.weight, to_weight, scale)
        if stream.wants(conv.bias):
            to_bias = grad.sum((0, 2, 3))
            self._collect(stream, conv.bias, to_bias, scale)
        return (to_x,)

    def _collect(
        self, stream: Stream, parameter: nn.Parameter, value: Tensor, scale: Tensor | None
    ) -> None:
        assert stream.gradients is not None
        if scale is not None:
            value.mul_(scale.to(value.dtype).view(-1, *(1,) * (value.dim() - 1)))
        accumulate(stream.gradients, parameter, value.to(parameter.dtype))

    def tangent(
        self, run: Run, record: Record, second: Second, hs: Cotangents, private: bool
    ) -> Tensor | None:
        (h,) = hs
        folds = self.norm is not None
        grad = run.prime(record, self.norm) if folds else run.take(record.grads, self)
        if h is None or grad is None:
            return None
        weight = run.cast(self.conv.weight)
        if run.weights_wanted and self.conv.weight.requires_grad:
            to_weight = gradients(grad, h, weight, self.spec, (False, True, False))[1]
            assert to_weight is not None
            if self.norm is not None:
                to_weight.mul_(per_filter(run.scale(self.norm), to_weight))
            wide = to_weight.to(self.conv.weight.dtype)
            accumulate(second.of_parameters, self.conv.weight, wide)
        return convolve(h, weight, None, self.spec)


@dataclass
class NormState:
    """What the forward of a BatchNorm leaves."""

    spec: NormSpec
    mean: Tensor
    rstd: Tensor
    inv_count: float
    mask: Tensor | None


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
        return NormState(spec, found.mean, found.rstd, found.inv_count, None)

    def _forward(self, run: Run, state: NormState, xs: tuple[Tensor, ...], mask: bool) -> Any:
        z = xs[0]
        residual = norm.conform(xs[1], z) if len(xs) > 1 else None
        spec = state.spec
        return spec.run(
            "bn_fwd", z, state.mean, state.rstd, spec.per_channel(self.bn.weight, z),
            spec.per_channel(self.bn.bias, z), residual, self.relu, mask,
        )  # fmt: skip

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
        z = run.value(self.z)
        gamma = state.spec.per_channel(self.bn.weight, z)
        beta = state.spec.per_channel(self.bn.bias, z)
        return Saved(z, state.mean, state.rstd, gamma, beta, state.mask), state

    def reverse(self, run: Run, grad: Tensor | None, stream: Stream) -> Cotangents:
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
        to_z, to_residual, sums, total = norm.first_order(
            norm.conform(grad, saved.z), saved, spec, state.inv_count,
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
                to_z = to_z * saved.scale.to(to_z.dtype).view(1, -1, 1, 1)
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


class ReLU(Unit):
    """v = max(u, 0)."""

    relu = True

    def __init__(self, op: Op) -> None:
        super().__init__(op)
        self.reads = self.inputs

    def forward(self, run: Run, *xs: Tensor) -> Tensor:
        v: Tensor = run.kernel("relu", "relu_fwd")(xs[0], False, False)[0]
        return v

    def _backward(self, run: Run, grad: Tensor | None, guided: bool) -> Tensor | None:
        if grad is None:
            return None
        u = run.value(self.inputs[0])  # u > 0 where v > 0
        to_u: Tensor = run.kernel("relu", "relu_bwd")(norm.conform(grad, u), u, guided)
        return to_u

    def reverse(self, run: Run, grad: Tensor | None, stream: Stream) -> Cotangents:
        return (self._backward(run, grad, stream.guided),)

    def tangent(
        self, run: Run, record: Record, second: Second, hs: Cotangents, private: bool
    ) -> Tensor | None:
        return self._backward(run, hs[0], False)


class Add(Unit):
    """y = a + b, of equal shapes."""

    dear = True
    shares = True

    def forward(self, run: Run, *xs: Tensor) -> Tensor:
        a, b = xs
        if a.shape != b.shape:
            raise ValueError(
                f"{self.name}: the engine adds tensors of one shape, got {tuple(a.shape)} and "
                f"{tuple(b.shape)}"
            )
        return a + b

    def reverse(self, run: Run, grad: Tensor | None, stream: Stream) -> Cotangents:
        return grad, grad

    def tangent(
        self, run: Run, record: Record, second: Second, hs: Cotangents, private: bool
    ) -> Tensor | None:
        a, b = hs
        if a is None or b is None:
            one = a if b is None else b
            return None if one is None else one.clone()
        return a + b


class Cat(Unit):
    """y = (a, b, ...) one behind the other in the channels."""

    def forward(self, run: Run, *xs: Tensor) -> Tensor:
        run.state[self] = [Geometry.of(x) for x in xs]
        return torch.cat(xs, 1)

    def outline(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, 1)

    def reverse(self, run: Run, grad: Tensor | None, stream: Stream) -> Cotangents:
        if grad is None:
            return (None,) * len(self.inputs)
        sizes = [geometry.shape[1] for geometry in run.state[self]]
        layout = memory_format_of(grad)
        parts = grad.split(sizes, 1)
        return tuple(p.clone(memory_format=layout) for p in parts)

    def tangent(
        self, run: Run, record: Record, second: Second, hs: Cotangents, private: bool
    ) -> Tensor | None:
        like = next((h for h in hs if h is not None), None)
        if like is None:
            return None
        geometries = run.state[self]
        parts = [
            geometry.blank(like).zero_() if h is None else h
            for h, geometry in zip(hs, geometries, strict=True)
        ]
        return torch.cat(parts, 1)


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


@dataclass
class PoolState:
    geometry: Geometry
    positions: Tensor
    """Of the maxima in their planes, (B, C, h, w) int32."""


class MaxPool(Unit):
    """The maximum of each window; the positions are kept."""

    def __init__(self, op: Op) -> None:
        super().__init__(op)
        self.arguments = op.options["arguments"]

    def forward(self, run: Run, *xs: Tensor) -> Tensor:
        (x,) = xs
        y: Tensor
        y, positions = aten.max_pool2d_with_indices(x, *self.arguments)
        run.state[self] = PoolState(Geometry.of(x), positions.to(torch.int32))
        return y

    def outline(self, *xs: Tensor) -> Tensor:
        y: Tensor = aten.max_pool2d_with_indices(xs[0], *self.arguments)[0]
        return y

    def again(self, run: Run, *xs: Tensor) -> Tensor:
        positions = run.state[self].positions
        gathered = xs[0].flatten(2).gather(2, positions.long().flatten(2))
        return gathered.view(positions.shape).contiguous(memory_format=memory_format_of(positions))

    def reverse(self, run: Run, grad: Tensor | None, stream: Stream) -> Cotangents:
        if grad is None:
            return (None,)
        state: PoolState = run.state[self]
        to_x: Tensor = aten.max_pool2d_with_indices_backward(
            grad, state.geometry.blank(grad), *self.arguments, state.positions.long()
        )
        return (to_x,)

    def tangent(
        self, run: Run, record: Record, second: Second, hs: Cotangents, private: bool
    ) -> Tensor | None:
        (h,) = hs
        return None if h is None else self.again(run, h)


class AvgPool(Unit):
    """The mean of each window."""

    dear = True  # smaller than what it was made of

    def __init__(self, op: Op) -> None:
        super().__init__(op)
        self.arguments = op.options["arguments"]

    def forward(self, run: Run, *xs: Tensor) -> Tensor:
        run.state[self] = Geometry.of(xs[0])
        return self.outline(*xs)

    def outline(self, *xs: Tensor) -> Tensor:
        y: Tensor = aten.avg_pool2d(xs[0], *self.arguments)
        return y

    def reverse(self, run: Run, grad: Tensor | None, stream: Stream) -> Cotangents:
        if grad is None:
            return (None,)
        blank = run.state[self].blank(grad)
        to_x: Tensor = aten.avg_pool2d_backward(grad, blank, *self.arguments)
        return (to_x,)

    def tangent(
        self, run: Run, record: Record, second: Second, hs: Cotangents, private: bool
    ) -> Tensor | None:
        (h,) = hs
        if h is None:
            return None
        y: Tensor = aten.avg_pool2d(h, *self.arguments)
        return y
