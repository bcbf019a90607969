"""Inputs of the six kernels of batch_norm_relu, and their comparison with the reference in float64.

The bound of a value is 4 x the largest error that the reference itself makes in the dtype of the
kernels, plus 32 roundings of the terms that the value is summed from, plus one of the output's
dtype. Where u is within rounding of 0 nobody can say what 1[u > 0] is: there cotangents are 0.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from ops.base import device_of
from torch import Tensor

from camkernels.ops import _layout
from camkernels.ops._chain import implementation
from camkernels.ops.batch_norm_relu import reference
from camkernels.ops.batch_norm_relu.reference import channelwise

EPS = 1e-3  # of the variance


@dataclasses.dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int] = (2, 5, 3, 7)
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    affine: str = "normal"  # none, normal, zero, negative, gamma, beta
    residual: bool = False
    relu: bool = True
    guided: bool = False
    training: bool = True
    scaled: bool = True
    addend: bool = False
    cotangents: bool = False  # c_gamma and c_beta
    inplace: bool = False
    reuse_prime: bool = False
    offset: float = 0.0
    seed: int = 0


@dataclasses.dataclass
class Inputs:
    case: Case
    z: Tensor
    mean: Tensor
    rstd: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    residual: Tensor | None
    grad: Tensor
    addend: Tensor | None
    grad_grad: Tensor
    grad_grad_residual: Tensor | None
    grad_prime: Tensor
    sums: Tensor
    grad_sums: Tensor
    c_gamma: Tensor | None
    c_beta: Tensor | None
    near: Tensor  # where u is too close to 0
    mask: Tensor | None = None

    @property
    def inv_count(self) -> float:
        count = self.z.numel() // self.z.shape[1]
        return 1 / count if self.case.training and count else 0.0

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """All tensors but the mask and ``near`` through a function."""
        moved = {
            field.name: function(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
            and field.name not in ("near", "mask")
        }
        return dataclasses.replace(self, **moved)

    def on(self, device: str) -> Inputs:
        mask = None if self.mask is None else self.mask.to(device)
        return dataclasses.replace(self.map(lambda t: t.to(device)), mask=mask)

    @property
    def per_channel(self) -> tuple[Any, ...]:
        return self.mean, self.rstd, self.gamma, self.beta


def build(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)
    wide = _layout.accumulate_dtype(case.dtype)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    channels = case.shape[1]

    def full(scale: float = 1.0, offset: float = 0.0) -> Tensor:
        values = torch.randn(case.shape, generator=generator) * scale + offset
        return values.to(case.dtype).contiguous(memory_format=layout)

    def row(*shape: int) -> Tensor:
        return torch.randn(*shape, channels, generator=generator).to(wide)

    z = full(2.0, case.offset + 0.5)
    mean, squares = reference.bn_stats(z.double())
    rstd = (squares / max(z.numel() // channels, 1) + EPS).rsqrt()
    gamma, beta = row(), row()
    gamma = {"zero": gamma * 0, "negative": -gamma.abs()}.get(case.affine, gamma)
    inputs = Inputs(
        case, z, mean.to(wide), rstd.to(wide),
        None if case.affine in ("none", "beta") else gamma,
        None if case.affine in ("none", "gamma") else beta,
        full() if case.residual else None,
        full(), full() if case.addend else None, full(),
        full() if case.residual else None, full(), row(2), row(3),
        row() if case.cotangents else None, row() if case.cotangents else None,
        torch.zeros(case.shape, dtype=torch.bool),
    )  # fmt: skip
    truth = inputs.map(Tensor.double)
    u = reference.affine(
        reference.normalized(truth.z, truth.mean, truth.rstd), truth.gamma, truth.beta
    )
    u = u if truth.residual is None else u + truth.residual
    inputs.near = u.abs() <= 64 * torch.finfo(wide).eps * terms_of_u(truth)
    for cotangent in (inputs.grad, inputs.grad_grad, inputs.grad_grad_residual):
        if cotangent is not None:
            cotangent[inputs.near] = 0
    if case.residual and case.relu:
        inputs.mask = reference.pack_mask(~(reference.like_layout(u, z, torch.float64) <= 0))
    return inputs


def terms_of_u(x: Inputs) -> Tensor:
    zhat = reference.normalized(x.z, x.mean, x.rstd).abs()
    terms = reference.affine(zhat, *(None if t is None else t.abs() for t in (x.gamma, x.beta)))
    return terms if x.residual is None else terms + x.residual.abs()


# What each kernel is called with, and the size of the terms of its results.


def call(kernels: Callable[[str], Any], name: str, x: Inputs) -> tuple[Tensor, ...]:
    case = x.case
    if name == "bn_stats":
        result = kernels(name)(x.z)
    elif name == "bn_fwd":
        result = kernels(name)(x.z, *x.per_channel, x.residual, case.relu, x.mask is not None)
    elif name == "bn_bwd_reduce":
        result = kernels(name)(x.grad, x.z, *x.per_channel, x.mask, case.relu, case.guided)
    elif name == "bn_bwd":
        addend = x.addend if case.scaled else None
        grad = x.grad.clone() if case.inplace else x.grad
        result = kernels(name)(
            grad, x.z, *x.per_channel, x.mask, x.sums, x.inv_count, case.relu, case.guided,
            case.scaled, addend, case.residual, inplace=case.inplace,
        )  # fmt: skip
        assert not case.inplace or result[case.residual] is grad
    elif name == "bn_bwd_bwd_reduce":
        result = kernels(name)(x.grad_grad, x.grad_prime, x.z, x.mean, x.rstd)
    else:
        grad_grad = x.grad_grad.clone() if case.inplace else x.grad_grad
        grad_prime = x.grad_prime.clone() if case.reuse_prime else x.grad_prime
        result = kernels(name)(
            grad_grad, x.grad_grad_residual, grad_prime, x.z, *x.per_channel, x.mask, x.sums,
            x.grad_sums, x.inv_count, x.c_gamma, x.c_beta, case.relu, case.inplace,
            case.reuse_prime,
        )  # fmt: skip
        assert (result[0] is grad_grad) == case.inplace
        assert (result[1] is grad_prime) == case.reuse_prime
    return (result,) if isinstance(result, Tensor) else tuple(result)


NAMES = ("bn_stats", "bn_fwd", "bn_bwd_reduce", "bn_bwd", "bn_bwd_bwd_reduce", "bn_bwd_bwd")
DIMS = (0, 2, 3)


def terms(name: str, x: Inputs) -> list[Tensor | None]:
    """Sum of the magnitudes of what each result is summed from; None for a mask."""
    zhat = reference.normalized(x.z, x.mean, x.rstd).abs()
    scale = channelwise(x.rstd if x.gamma is None else (x.gamma * x.rstd).abs())
    if name == "bn_stats":
        count = max(x.z.numel() // x.z.shape[1], 1)
        return [
            x.z.abs().sum(DIMS) / count,
            (x.z - x.z.mean(DIMS, keepdim=True)).square().sum(DIMS),
        ]
    if name == "bn_fwd":
        return [terms_of_u(x), None]
    if name == "bn_bwd_reduce":
        return [torch.stack([x.grad.abs().sum(DIMS), (x.grad * zhat).abs().sum(DIMS)])]
    if name == "bn_bwd":
        sums = channelwise(x.sums[0].abs()) + zhat * channelwise(x.sums[1].abs())
        out = x.grad.abs() + sums * x.inv_count
        out = out * scale if x.case.scaled else out
        return [out if x.addend is None else out + x.addend.abs(), x.grad.abs()]
    h, prime = x.grad_grad.abs(), x.grad_prime.abs()
    if name == "bn_bwd_bwd_reduce":
        return [torch.stack([p.sum(DIMS) for p in (h, h * zhat, h * prime)])]
    sums = channelwise(x.grad_sums[0].abs()) + zhat * channelwise(x.grad_sums[1].abs())
    h = h + sums * x.inv_count
    to_grad = h * scale
    if x.grad_grad_residual is not None:
        to_grad = to_grad + x.grad_grad_residual.abs()
    to_z = h * channelwise(x.sums[1].abs()) + prime * channelwise(x.grad_sums[1].abs())
    to_z = (to_z + zhat * channelwise(x.grad_sums[2].abs())) * scale * channelwise(x.rstd)
    to_z = to_z * x.inv_count
    if x.c_gamma is not None and x.c_beta is not None:
        to_grad = to_grad + zhat * channelwise(x.c_gamma.abs()) + channelwise(x.c_beta.abs())
        to_z = to_z + prime * channelwise((x.c_gamma * x.rstd).abs())
    return [to_grad, to_z]


def check(backend: str, case: Case, names: tuple[str, ...] = NAMES) -> None:
    inputs = build(case)
    truth_inputs = inputs.map(Tensor.double)
    given = inputs.on(device_of(backend))
    kernels = functools.partial(implementation, "batch_norm_relu", backend=backend)
    for name in names:
        got = [t.cpu() for t in call(kernels, name, given)]
        truth = call(functools.partial(getattr, reference), name, truth_inputs)
        eager = call(functools.partial(getattr, reference), name, inputs)
        sizes = terms(name, truth_inputs)
        assert len(got) == len(truth)
        for i, (g, t, e) in enumerate(zip(got, truth, eager, strict=True)):
            label = f"{name}[{i}] of {case}"
            assert g.dtype == e.dtype, f"{label}: {g.dtype}, expected {e.dtype}"
            assert g.shape == t.shape, f"{label}: {tuple(g.shape)}, expected {tuple(t.shape)}"
            if g.dim() == 4:
                assert g.stride() == inputs.z.stride(), f"{label}: another layout"
            if t.numel():
                compare(label, g, t, e, sizes[i], inputs)


def compare(
    label: str, got: Tensor, truth: Tensor, eager: Tensor, size: Tensor | None, inputs: Inputs
) -> None:
    if size is None:
        bits = [reference.unpack_mask(m, inputs.z) for m in (got, truth)]
        assert torch.equal(bits[0] | inputs.near, bits[1] | inputs.near), f"{label}: wrong bits"
        assert torch.equal(reference.pack_mask(bits[0]), got), f"{label}: bits in the padding"
        return
    wide = torch.finfo(_layout.accumulate_dtype(got.dtype))
    bound = 4 * (eager.double() - truth).abs().nan_to_num(0.0).max() + 32 * wide.eps * size
    bound = bound + torch.finfo(got.dtype).eps * truth.abs() + 1e-7 * (got.dtype == torch.float16)
    error = (got.double() - truth).abs()
    if label.startswith("bn_bwd_bwd["):  # a sum with c_beta does not vanish there
        error = torch.where(inputs.near & (inputs.case.relu), 0.0, error)
    worst = int((error - bound).nan_to_num(math.inf).argmax())
    assert bool((error <= bound).all()), (
        f"{label}: at {worst} got {got.flatten()[worst]:.8g}, truth {truth.flatten()[worst]:.8g}"
    )
