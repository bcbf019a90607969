"""What batch_norm_relu and conv_bn_act share: statistics, and the two orders of backward."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from camkernels.ops import _layout, _validate
from camkernels.ops._chain import implementation

THIRD_ORDER = (
    "a third derivative through {op} is not supported by its kernels; "
    "ck.backend('reference') is plain PyTorch and differentiates to any order"
)
GUIDED_TWICE = (
    "guided mode while a double backward runs: ck.guided() belongs around the backward that makes "
    "the guided signal, not around the one that differentiates the loss"
)


@dataclasses.dataclass(frozen=True)
class NormSpec:
    """How a call normalises. ``training``: by the statistics of the batch, over all processes of
    ``group`` if there is one."""

    training: bool
    eps: float
    relu: bool
    group: Any
    backend: str

    def run(self, kernel: str, *args: Any, **options: Any) -> Any:
        return implementation("batch_norm_relu", kernel, self.backend)(*args, **options)

    @property
    def shared(self) -> bool:
        return self.training and self.group is not None

    def per_channel(self, values: Tensor | None, z: Tensor) -> Tensor | None:
        """gamma or beta as kernels take it."""
        if values is None:
            return None
        return values.detach().to(_layout.accumulate_dtype(z.dtype)).contiguous()

    def total(self, sums: Tensor) -> Tensor:
        """Sums over all processes of the group."""
        if not self.shared:
            return sums
        sums = sums.clone()
        dist.all_reduce(sums, group=self.group)
        return sums


@dataclasses.dataclass
class Statistics:
    """mean, biased variance and rstd per channel, and the count they were taken over (0: constants
    of evaluation mode)."""

    mean: Tensor
    var: Tensor
    rstd: Tensor
    count: int

    @property
    def inv_count(self) -> float:
        return 1.0 / self.count if self.count else 0.0


def statistics(
    z: Tensor, running_mean: Tensor | None, running_var: Tensor | None, spec: NormSpec
) -> Statistics:
    dtype = _layout.accumulate_dtype(z.dtype)
    if not spec.training:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean.to(dtype, copy=True), running_var.to(dtype, copy=True)
        return Statistics(mean, var, (var + spec.eps).rsqrt(), 0)
    count = z.shape[0] * z.shape[2] * z.shape[3]
    mean, squares = spec.run("bn_stats", z)
    if spec.shared:
        mean, squares, count = _merge(mean, squares, count, spec.group)
    var = squares / max(count, 1)
    return Statistics(mean, var, (var + spec.eps).rsqrt(), count)


@torch.no_grad()
def update_running(
    running_mean: Tensor | None, running_var: Tensor | None, found: Statistics, momentum: float
) -> None:
    """Move the running statistics; the variance unbiased, as PyTorch keeps it."""
    if running_mean is None or running_var is None or found.count == 0:
        return
    unbiased = found.var * (found.count / max(found.count - 1, 1))
    running_mean.mul_(1 - momentum).add_(found.mean.to(running_mean.dtype), alpha=momentum)
    running_var.mul_(1 - momentum).add_(unbiased.to(running_var.dtype), alpha=momentum)


def _merge(mean: Tensor, squares: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, int]:
    """Chan's merge of the statistics of all processes, in the order of their ranks."""
    mine = torch.cat([mean, squares, mean.new_tensor([float(count)])])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    stacked = torch.stack(every)
    means, all_squares = stacked[:, :-1].unflatten(1, (2, -1)).unbind(1)
    counts = stacked[:, -1:]
    total = counts.sum().clamp(min=1)
    merged = (counts * means).sum(0) / total
    merged_squares = (all_squares + counts * (means - merged).square()).sum(0)
    return merged, merged_squares, int(total)


def conform(grad: Tensor, z: Tensor) -> Tensor:
    """``grad`` in dtype and layout of z: itself, or a copy."""
    layout = _layout.memory_format(_layout.is_channels_last(z))
    if grad.dtype == z.dtype and grad.is_contiguous(memory_format=layout) and not grad.is_neg():
        return grad
    return torch.empty_like(z, memory_format=layout).copy_(grad)


def dense(z: Tensor) -> Tensor:
    """z itself if it is contiguous or channels_last, otherwise a contiguous copy."""
    if z.is_neg():
        z = z.resolve_neg()
    if z.is_contiguous() or z.is_contiguous(memory_format=torch.channels_last):
        return z
    return z.contiguous()


def relaid(z: Tensor, channels_last: bool) -> Tensor:
    """A saved z in the layout it was saved in, which that of the mask beside it follows; hooks that
    carry saved tensors elsewhere (save_on_cpu with pinned memory) bring them back contiguous."""
    if _layout.is_channels_last(z) == channels_last:
        return z
    return z.contiguous(memory_format=_layout.memory_format(channels_last))


def check_count(z: Tensor, group: Any) -> None:
    if group is None and z.shape[0] * z.shape[2] * z.shape[3] == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {z.shape}"
        )


def check_residual(residual: Tensor | None, like: Tensor) -> None:
    if residual is None:
        return
    if residual.shape != like.shape:
        raise ValueError(
            f"residual: expected shape {tuple(like.shape)}, got {tuple(residual.shape)}"
        )
    _validate.same_device("residual", residual, "input", like)


@dataclasses.dataclass
class Saved:
    """z and what belongs to it; gamma and beta as kernels take them."""

    z: Tensor
    mean: Tensor
    rstd: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    mask: Tensor | None

    @property
    def scale(self) -> Tensor:
        """gamma rstd."""
        return self.rstd if self.gamma is None else self.gamma * self.rstd

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.z, self.mean, self.rstd, self.gamma, self.beta, self.mask


def first_order(
    grad: Tensor,
    saved: Saved,
    spec: NormSpec,
    inv_count: float,
    *,
    guided: bool,
    scaled: bool,
    addend: Tensor | None,
    want_residual: bool,
    want_sums: bool,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The cotangent of z (or g', see reference.py), that of the residual, and the sums S_g and S_gz
    of this process and of all. In evaluation mode the sums are left out where nobody wants them.
    ``inplace``: grad is nobody else's and may be overwritten."""
    if spec.training or want_sums:
        sums = spec.run("bn_bwd_reduce", grad, *saved.arguments, spec.relu, guided)
    else:
        sums = saved.mean.new_zeros((2, saved.mean.shape[0]))
    # In evaluation mode nothing ties samples together: no sum may carry a NaN from one to another.
    total = spec.total(sums) if spec.training else torch.zeros_like(sums)
    to_z, to_residual = spec.run(
        "bn_bwd", grad, *saved.arguments, total, inv_count, spec.relu, guided, scaled, addend,
        want_residual, inplace=inplace,
    )  # fmt: skip
    return to_z, to_residual, sums, total


def second_order(
    h: Tensor | None,
    h_residual: Tensor | None,
    grad_prime: Tensor,
    saved: Saved,
    spec: NormSpec,
    inv_count: float,
    sums: Tensor,
    c_gamma: Tensor | None,
    c_beta: Tensor | None,
    *,
    inplace: bool,
    want_gamma: bool,
    reuse_prime: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cotangents of grad, z and gamma. ``inplace``: h is nobody else's and may be overwritten, and
    with ``reuse_prime`` so may g', by the cotangent of z."""
    if c_gamma is not None and spec.shared:
        raise NotImplementedError(
            "a cotangent of dgamma (a penalty on parameter gradients) through statistics that "
            "processes share is not supported"
        )
    if h is None:
        h, inplace = torch.zeros_like(saved.z), True
    h_sums = saved.mean.new_zeros((3, saved.mean.shape[0]))
    if spec.training or want_gamma:
        h_sums = spec.run("bn_bwd_bwd_reduce", h, grad_prime, saved.z, saved.mean, saved.rstd)
    total = spec.total(h_sums) if spec.training else torch.zeros_like(h_sums)
    to_grad, to_z = spec.run(
        "bn_bwd_bwd", h, h_residual, grad_prime, *saved.arguments, sums, total, inv_count,
        c_gamma, c_beta, spec.relu, inplace, reuse_prime,
    )  # fmt: skip
    constant = not spec.training and c_gamma is None  # evaluation mode is linear
    to_gamma = saved.rstd * h_sums[2] if want_gamma else None
    return to_grad, None if constant else to_z, to_gamma
