"""Modules of the network ops.

Each is a subclass of PyTorch's with the same parameters, buffers and constructor and without
attributes of its own, so that ``camkernels.swap_in`` can put it in place by assigning
``__class__``: hooks, identity, optimizer references and state_dict keys stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from camkernels.nn import functional as F
from camkernels.ops.max_pool.op import window_of
from camkernels.ops.max_pool.reference import Window


def is_plain_tensor(value: object) -> bool:
    """Whether our functions may take ``value``; under torch.jit.trace PyTorch's own run.

    Raises:
        TypeError: a proxy of torch.fx.
    """
    if isinstance(value, torch.fx.Proxy):
        raise TypeError(
            "torch.fx cannot trace a network after ck.swap_in: trace first, or ck.swap_out(model)"
        )
    return isinstance(value, Tensor) and torch._C._get_tracing_state() is None


class ReLU(nn.ReLU):
    """ReLU whose backward can be guided.

        v = max(u, 0)

    Args:
        inplace: change the input, as ``nn.ReLU``.
        save: what to keep for the backward: ``"mask"``, one bit per element, or ``"output"``, which
            costs nothing where the next layer keeps its input anyway.

    Source: Springenberg et al., Striving for Simplicity: The All Convolutional Net, sec. 3.4.

    Example:
        >>> import torch, camkernels as ck
        >>> ck.nn.ReLU()(torch.tensor([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """

    save = "mask"

    def __init__(self, inplace: bool = False, save: str = "mask") -> None:
        super().__init__(inplace)
        if save not in ("mask", "output"):
            raise ValueError(f"save: expected 'mask' or 'output', got {save!r}")
        if save != type(self).save:
            self.save = save

    def forward(self, input: Tensor) -> Tensor:
        if not is_plain_tensor(input) or not input.is_floating_point():
            return super().forward(input)
        return F.relu(input, inplace=self.inplace, save=self.save)


def symmetric_padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Zeros on each side, in rows and columns; None where another padding is asked for."""
    if conv.padding_mode != "zeros":
        return None
    padding: Any = conv.padding
    if not isinstance(padding, str):
        return (int(padding[0]), int(padding[1]))
    if padding == "valid":
        return (0, 0)
    totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(total % 2 for total in totals):
        return None  # "same" with an even kernel pads one side more
    return (totals[0] // 2, totals[1] // 2)


class Conv2d(nn.Conv2d):
    """2D convolution that is cheap to differentiate twice.

    The arguments are those of ``nn.Conv2d``. Padding other than zeros, the same number on both
    sides, takes PyTorch's convolution.

    Example:
        >>> import torch, camkernels as ck
        >>> ck.nn.Conv2d(3, 8, 3, padding=1)(torch.rand(2, 3, 9, 9)).shape
        torch.Size([2, 8, 9, 9])
    """

    def forward(self, input: Tensor) -> Tensor:
        padding = symmetric_padding(self)
        if padding is None or not is_plain_tensor(input) or input.dim() != 4:
            return super().forward(input)
        return F.conv2d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )


def pooling_window(pool: nn.MaxPool2d) -> Window | None:
    """Of a module whose windows our kernels take; else None."""
    if pool.return_indices:
        return None
    kernel, stride, padding, dilation = (
        (value, value) if isinstance(value, int) else (value[0], value[1])
        for value in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    )
    try:
        return window_of(kernel, stride, padding, dilation, bool(pool.ceil_mode))
    except ValueError:
        return None


class MaxPool2d(nn.MaxPool2d):
    """Max pooling that keeps one byte per window, and not its input.

    The arguments are those of ``nn.MaxPool2d``. With ``return_indices``, windows of more than 256
    elements or beside all pixels, inputs that are not (B, C, H, W) or not floating: PyTorch's.

    Example:
        >>> import torch, camkernels as ck
        >>> ck.nn.MaxPool2d(2)(torch.rand(2, 3, 9, 9)).shape
        torch.Size([2, 3, 4, 4])
    """

    def forward(self, input: Tensor) -> Any:
        window = pooling_window(self)
        if window is None or not is_plain_tensor(input) or not _poolable(input, window):
            return super().forward(input)
        steps = window.stride, window.padding, window.dilation, window.ceil_mode
        return F.max_pool2d(input, window.kernel, *steps)


def _poolable(input: Tensor, window: Window) -> bool:
    if input.dim() != 4 or not input.is_floating_point() or 0 in input.shape[1:]:
        return False
    try:
        window.output_size(input.shape[2], input.shape[3])
    except ValueError:
        return False
    return True


def normalization_arguments(bn: Any) -> dict[str, Any]:
    """What ``batch_norm_relu`` is told by a BatchNorm module, which counts this batch.

    As ``nn.BatchNorm2d.forward``: ``momentum=None`` is the cumulative average, and a module in
    evaluation without running statistics normalises with those of the batch.
    """
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    keeps = not bn.training or bn.track_running_stats
    training = bn.training or (bn.running_mean is None and bn.running_var is None)
    return {
        "running_mean": bn.running_mean if keeps else None,
        "running_var": bn.running_var if keeps else None,
        "weight": bn.weight,
        "bias": bn.bias,
        "training": training,
        "momentum": momentum,
        "eps": bn.eps,
        "process_group": _group_to_synchronize(bn) if bn.training else None,
    }


def _group_to_synchronize(bn: nn.Module) -> Any:
    if not isinstance(bn, nn.SyncBatchNorm):
        return None
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    group = bn.process_group or torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None


def _normalize(bn: Any, input: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    bn._check_input_dim(input)
    return F.batch_norm_relu(input, residual=residual, relu=relu, **normalization_arguments(bn))


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over (B, C, H, W) that is cheap to differentiate twice.

    The arguments are those of ``nn.BatchNorm2d``.

    Example:
        >>> import torch, camkernels as ck
        >>> ck.nn.BatchNorm2d(3)(torch.rand(4, 3, 5, 5)).shape
        torch.Size([4, 3, 5, 5])
    """

    def forward(self, input: Tensor) -> Tensor:
        if not is_plain_tensor(input):
            return super().forward(input)
        return _normalize(self, input, None, relu=False)


class SyncBatchNorm(nn.SyncBatchNorm):
    """BatchNorm over the batches of all processes that is cheap to differentiate twice.

    The arguments are those of ``nn.SyncBatchNorm``. It runs on the CPU as well (gloo). Inputs that
    are not (B, C, H, W) take PyTorch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not is_plain_tensor(input) or input.dim() != 4:
            return super().forward(input)
        self._check_non_zero_input_channels(input)
        return _normalize(self, input, None, relu=False)


class BatchNormReLU2d(BatchNorm2d):
    """BatchNorm, then the sum with a residual where one is given, then ReLU, as one operation.

        u = gamma (z - mu) / sqrt(sigma^2 + eps) + beta + s,    a = max(u, 0)

    It saves its input and per-channel statistics, and recomputes all else in the backward.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as ``nn.BatchNorm2d``.
        relu: False leaves the ReLU out.

    Source: He et al., Deep Residual Learning, fig. 2, for the sum; guided backward as
    :class:`ReLU`.

    Example:
        >>> import torch, camkernels as ck
        >>> norm = ck.nn.BatchNormReLU2d(3)
        >>> float(norm(torch.rand(4, 3, 5, 5), residual=torch.rand(4, 3, 5, 5)).min())
        0.0
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        relu: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.relu = relu

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if not is_plain_tensor(input):
            output = nn.BatchNorm2d.forward(self, input)
            output = output if residual is None else output + residual
            return output.relu() if self.relu else output
        return _normalize(self, input, residual, self.relu)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu={self.relu}"


def runs_only_its_forward(module: nn.Module) -> bool:
    """Whether calling ``module`` is running its class's forward: no hooks and nothing patched.

    Hooks of a tap that examines the head are there during one forward only, and need nothing of
    what is fused: a checkpoint around it must save the same at its recomputation, without them.
    """
    hooks = module._forward_hooks.values()
    return not (
        any(getattr(hook, "engine_needs", "all") != "nothing" for hook in hooks)
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module.__dict__.get("_compiled_call_impl") is not None
    )


_GLOBAL_HOOKS: tuple[dict[int, Callable[..., Any]], ...] = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_backward_hooks,
    nn.modules.module._global_backward_pre_hooks,
)


def global_hooks_exist() -> bool:
    """Whether hooks are registered for all modules."""
    return any(_GLOBAL_HOOKS)
