"""The operations that a stage runs, each in its directions.

    forward   y = f(x)
    again     the same once more, with the statistics, masks and positions of the first time
    reverse   cotangents of x from that of y: one of the two input gradients, or the last backward,
              where the parameters get theirs
    tangent   the double backward: it runs forward. h, the cotangent of the input gradient, goes
              through the network as a tangent would, and on its way leaves at every convolution
              the second-order gradient of the weight, and at every BatchNorm a cotangent of z that
              waits for the last backward

Here the ones without parameters; ``conv_norm.py`` has convolution and BatchNorm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from camkernels.ops.batch_norm_relu import norm
from camkernels.ops.conv2d import pointwise
from camkernels.ops.conv2d.op import Geometry
from camkernels.ops.max_pool.reference import Window, max_pool

if TYPE_CHECKING:
    from camkernels.engine.conv_norm import Conv, Norm
    from camkernels.engine.passes import Run
    from camkernels.engine.trace import Op

aten = torch.ops.aten


@dataclass
class Spread:
    """The cotangent of what a strided 1 x 1 convolution reads: zero but at every s-th pixel. Added
    to another where it is, so that no zeros are written and read."""

    read: Tensor
    size: tuple[int, int]
    stride: tuple[int, int]

    def dense(self) -> Tensor:
        return pointwise.spread(self.read, self.size, self.stride, memory_format_of(self.read))

    def add_to(self, grad: Tensor) -> Tensor:
        grad[:, :, :: self.stride[0], :: self.stride[1]].add_(self.read)
        return grad


Cotangents = tuple[Tensor | None, ...]
Given = tuple[Tensor | Spread | None, ...]
"""What a unit of a reverse pass gives its inputs."""


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
    of_filters: dict[Conv, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    """Gradients of weights in the dtype of the stage, and gamma rstd that they lack still."""
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

    def learns_from_input(self) -> bool:
        """Whether a gradient of its parameters reads its input."""
        return False

    def forward(self, run: Run, *xs: Tensor) -> Tensor:
        raise NotImplementedError

    def again(self, run: Run, *xs: Tensor) -> Tensor:
        return self.forward(run, *xs)

    def outline(self, *xs: Tensor) -> Tensor:
        """The output's shape, from tensors on the meta device."""
        return xs[0]

    def reverse(self, run: Run, grad: Tensor | None, stream: Stream, private: bool) -> Given:
        """``private``: ``grad`` is nobody else's, and may be written over."""
        raise NotImplementedError

    def tangent(
        self, run: Run, record: Record, second: Second, hs: Cotangents, private: bool
    ) -> Tensor | None:
        """``private``: the first of ``hs`` is nobody else's."""
        raise NotImplementedError


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

    def reverse(self, run: Run, grad: Tensor | None, stream: Stream, private: bool) -> Cotangents:
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

    def reverse(self, run: Run, grad: Tensor | None, stream: Stream, private: bool) -> Cotangents:
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

    def reverse(self, run: Run, grad: Tensor | None, stream: Stream, private: bool) -> Cotangents:
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
    """Of the maxima in their windows, (B, C, h, w) uint8."""


class MaxPool(Unit):
    """The maximum of each window; the positions are kept.

    Raises:
        ValueError: a window has more elements than a position can number.
    """

    def __init__(self, op: Op) -> None:
        super().__init__(op)
        try:
            self.window = Window(*op.options["arguments"])
        except ValueError as error:
            raise ValueError(
                f"{self.name}: the engine cannot run this max_pool2d: {error}"
            ) from None

    def forward(self, run: Run, *xs: Tensor) -> Tensor:
        (x,) = xs
        y: Tensor
        y, positions = run.kernel("max_pool", "max_pool_fwd")(x, self.window)
        run.state[self] = PoolState(Geometry.of(x), positions)
        return y

    def outline(self, *xs: Tensor) -> Tensor:
        return max_pool(xs[0], self.window)

    def again(self, run: Run, *xs: Tensor) -> Tensor:
        positions = run.state[self].positions
        y: Tensor = run.kernel("max_pool", "max_pool_gather")(xs[0], positions, self.window)
        return y

    def reverse(self, run: Run, grad: Tensor | None, stream: Stream, private: bool) -> Cotangents:
        if grad is None:
            return (None,)
        state: PoolState = run.state[self]
        size = (state.geometry.shape[2], state.geometry.shape[3])
        scatter = run.kernel("max_pool", "max_pool_scatter")
        return (scatter(grad, state.positions, self.window, size),)

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

    def reverse(self, run: Run, grad: Tensor | None, stream: Stream, private: bool) -> Cotangents:
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
