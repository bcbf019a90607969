"""What runs in a rewritten forward: a group as one op, or its modules one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor, nn

from camkernels import modes
from camkernels.nn import functional as F
from camkernels.nn import modules
from camkernels.nn._kinds import target_of

Step = Callable[[Tensor, Tensor | None], Tensor]


def relu(input: Any, inplace: bool = False, save: str = "mask") -> Any:
    """A functional ReLU of a rewritten forward."""
    if not modules.is_plain_tensor(input) or not input.is_floating_point():
        return torch_functional.relu(input, inplace)
    return F.relu(input, inplace, save)


def module_step(module: nn.Module) -> Step:
    """One module of a group, called as the forward does."""
    return lambda x, residual: module(x)


def relu_step(inplace: bool) -> Step:
    """A functional ReLU at the end of a group."""
    return lambda x, residual: relu(x, inplace)


def sum_step(add: Any, residual_first: bool) -> Step:
    """The sum of a group as the forward wrote it."""

    def step(x: Tensor, residual: Tensor | None) -> Tensor:
        first, second = (residual, x) if residual_first else (x, residual)
        if isinstance(add, str):
            return getattr(first, add)(second)
        return add(first, second)

    return step


@dataclass(eq=False)
class FusedGroup:
    """Callable that stands for a group in the generated forward.

    It runs the group as one op where that is the same as running its modules, and else its modules:
    where one has hooks or a patched forward, or is of another class than it was.
    """

    conv: Any
    bn: Any
    others: list[nn.Module]
    """ReLU and identities."""
    steps: list[Step]
    adds: bool
    relu: bool

    def __post_init__(self) -> None:
        # torch.fx names the callable in the generated source after these.
        self.__module__ = "camkernels.nn"
        self.__name__ = "fused_group"
        self._modules = [m for m in (self.conv, self.bn, *self.others) if m is not None]
        act = [self.bn.drop, self.bn.act] if hasattr(self.bn, "drop") else []
        self._modules += act
        self._classes = [target_of(m) or type(m) for m in self._modules]

    def runs_only_forwards(self) -> bool:
        """Whether nobody could tell the fused run from one of the modules."""
        if modules.global_hooks_exist():
            return False
        return all(
            type(m) is kind and modules.runs_only_its_forward(m)
            for m, kind in zip(self._modules, self._classes, strict=True)
        )

    def __call__(self, input: Any, residual: Any = None) -> Any:
        if self._can_fuse(input, residual):
            return self._fused(input, residual)
        x = input
        for step in self.steps:
            x = step(x, residual)
        return x

    def _can_fuse(self, input: Any, residual: Any) -> bool:
        if not isinstance(input, Tensor) or input.dim() != 4 or not self.runs_only_forwards():
            return False
        shape: tuple[int, ...] | None = input.shape
        if self.conv is not None:
            shape = _output_shape(self.conv, input)
        if shape is None or (self.adds and not isinstance(residual, Tensor)):
            return False
        return not self.adds or (
            residual.shape == shape
            and residual.device == input.device
            and (self.conv is not None or residual.dtype == input.dtype)
            and (self.conv is None or residual.dtype == _output_dtype(self.conv, input))
        )

    def _fused(self, input: Tensor, residual: Tensor | None) -> Tensor:
        arguments = modules.normalization_arguments(self.bn)
        conv = self.conv
        if conv is None:
            return F.batch_norm_relu(input, residual=residual, relu=self.relu, **arguments)
        padding = modules.symmetric_padding(conv)
        assert padding is not None  # _can_fuse asked
        return F.conv_bn_act(
            input, conv.weight, conv.bias, stride=conv.stride, padding=padding,
            dilation=conv.dilation, groups=conv.groups, residual=residual, relu=self.relu,
            **arguments,
        )  # fmt: skip


def _output_shape(conv: nn.Conv2d, input: Tensor) -> tuple[int, ...] | None:
    padding = modules.symmetric_padding(conv)
    if padding is None:
        return None
    sides = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip(
            input.shape[2:], padding, conv.dilation, conv.kernel_size, conv.stride, strict=True
        )
    ]
    return (input.shape[0], conv.out_channels, *sides)


def _output_dtype(conv: nn.Conv2d, input: Tensor) -> torch.dtype:
    wide = torch.float64 in (input.dtype, conv.weight.dtype)
    dtype = modes.autocast_dtype(input.device)
    return conv.weight.dtype if dtype is None or wide else dtype
