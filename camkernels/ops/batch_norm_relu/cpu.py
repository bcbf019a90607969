"""BatchNorm, residual and ReLU by the C++ kernels of csrc/batch_norm_relu. Signatures:
reference.py."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from camkernels import _cpu
from camkernels.ops import _cpu_view, _layout, _native

# The order in which csrc/batch_norm_relu/batch_norm_relu_bindings.h takes pointers.
TENSORS = (
    "z", "mean", "rstd", "gamma", "beta", "mask", "grad", "residual", "addend", "grad_grad",
    "grad_grad_residual", "grad_prime", "sums", "grad_sums", "c_gamma", "c_beta", "out",
    "second_out", "out_mask", "results", "scratch",
)  # fmt: skip
_PLACES = {name: place for place, name in enumerate(TENSORS)}

# Pixels of a plane per task: what a second pass of bn_stats, where one is needed, finds in the
# first-level cache.
_STRETCH = 4096
# Bytes per task in channels_last, likewise for the second-level cache: more of large tensors, whose
# many tasks would take long to merge.
_BLOCK_BYTES, _LARGE_BLOCK_BYTES, _SMALLEST_BLOCK, _LARGEST_BLOCK = 1 << 17, 1 << 19, 16, 1024
_TASKS = 128
# Sums per task, and values per channel, of each kernel (kSums, kParts and kValues in csrc).
_SUMS = {"bn_stats": 3, "bn_bwd_reduce": 2, "bn_bwd_bwd_reduce": 3}
_VALUES = 10


class _Plan(NamedTuple):
    """How a kernel runs over tensors of one shape, dtype and layout."""

    sizes: tuple[int, int, int]
    dtype: int
    block: int
    """Pixels per task; from shape and dtype alone, so that sums are added in the same order
    whatever the thread count."""
    elements: int
    scratch: int
    whole_lines: bool
    """Whether every row begins on a cache line where the first does."""


@functools.lru_cache(maxsize=4096)
def _plan(kernel: str, shape: torch.Size, dtype: torch.dtype, channels_last: bool) -> _Plan:
    batch, channels, pixels = shape[0], shape[1], shape[2] * shape[3]
    elements, sums = batch * channels * pixels, _SUMS.get(kernel, 0)
    if channels_last:
        row = channels
        size = min(max(_BLOCK_BYTES, elements * dtype.itemsize // _TASKS), _LARGE_BLOCK_BYTES)
        wanted = size // (channels * dtype.itemsize)
        block = min(max(wanted // 8 * 8, _SMALLEST_BLOCK), _LARGEST_BLOCK)
        rows = -(-batch * pixels // block) * sums + (0 if kernel == "bn_stats" else _VALUES)
        scratch = rows * (-(-channels // 16) * 16)
    else:
        row = pixels
        block = min(_STRETCH, max(pixels, 1))
        scratch = batch * channels * -(-pixels // block) * sums
    whole_lines = row * dtype.itemsize % 64 == 0
    code = _native.DTYPE_CODES[dtype]
    return _Plan((batch, channels, pixels), code, block, elements, scratch, whole_lines)


def _run(
    kernel: str,
    z: Tensor,
    mean: Tensor,
    *,
    relu: bool = False,
    guided: bool = False,
    scaled: bool = False,
    inv_count: float = 0.0,
    **tensors: Tensor | None,
) -> None:
    # A training step makes hundreds of these calls: what shapes decide is looked up.
    channels_last = _layout.is_channels_last(z) or (
        # Planes of one pixel are rows of channels; only the layout of a mask tells them apart.
        z.shape[2] * z.shape[3] == 1
        and tensors.get("mask") is None
        and tensors.get("out_mask") is None
    )
    plan = _plan(kernel, z.shape, z.dtype, channels_last)
    scratch = mean.new_empty(plan.scratch)
    tensors |= {"z": z, "mean": mean, "scratch": scratch}
    addresses = [0] * len(TENSORS)
    for name, tensor in tensors.items():
        if tensor is not None:
            addresses[_PLACES[name]] = tensor.data_ptr()
    getattr(_cpu, kernel)(
        plan.sizes,
        plan.dtype,
        channels_last,
        _streams(plan, z.dtype, addresses[_PLACES["out"]], addresses[_PLACES["second_out"]]),
        relu,
        guided,
        scaled,
        inv_count,
        plan.block,
        _cpu_view.threads(plan.elements),
        addresses,
    )


def _streams(plan: _Plan, dtype: torch.dtype, *outputs: int) -> bool:
    """Whether outputs at these addresses are stored past the caches."""
    return (
        plan.whole_lines
        and all(address % 64 == 0 for address in outputs)
        and _cpu_view.streams(plan.elements, dtype)
    )


def _given(mask: Tensor | None) -> Tensor | None:
    return None if mask is None or mask.numel() == 0 else mask


def _like(z: Tensor) -> Tensor:
    """An unwritten output in the dense layout of z."""
    layout = _layout.memory_format(_layout.is_channels_last(z))
    return torch.empty(z.shape, dtype=z.dtype, device=z.device, memory_format=layout)


def bn_stats(z: Tensor) -> tuple[Tensor, Tensor]:
    results = z.new_empty((2, z.shape[1]), dtype=_layout.accumulate_dtype(z.dtype))
    _run("bn_stats", z, results, results=results)
    mean, squares = results.unbind(0)
    return mean, squares


def bn_fwd(
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    want_mask: bool,
) -> tuple[Tensor, Tensor]:
    out, mask = _like(z), None
    if want_mask:
        batch, channels, height, width = z.shape
        planes, pixels = (batch * channels, height * width)
        if _layout.is_channels_last(z):
            planes, pixels = batch * height * width, channels
        mask = z.new_empty((planes, -(-pixels // 8)), dtype=torch.uint8)
    _run(
        "bn_fwd", z, mean, rstd=rstd, gamma=gamma, beta=beta, residual=residual, relu=relu,
        out=out, out_mask=mask,
    )  # fmt: skip
    return out, z.new_empty(0, dtype=torch.uint8) if mask is None else mask


def bn_bwd_reduce(
    grad: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mask: Tensor | None,
    relu: bool,
    guided: bool,
) -> Tensor:
    results = mean.new_empty((2, z.shape[1]))
    _run(
        "bn_bwd_reduce", z, mean, rstd=rstd, gamma=gamma, beta=beta, mask=_given(mask), grad=grad,
        relu=relu, guided=guided, results=results,
    )  # fmt: skip
    return results


def bn_bwd(
    grad: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mask: Tensor | None,
    sums: Tensor,
    inv_count: float,
    relu: bool,
    guided: bool,
    scaled: bool,
    addend: Tensor | None,
    want_residual: bool,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    out = grad if inplace and not want_residual else _like(z)
    second = grad if inplace and want_residual else _like(z) if want_residual else None
    _run(
        "bn_bwd", z, mean, rstd=rstd, gamma=gamma, beta=beta, mask=_given(mask), grad=grad,
        sums=sums, inv_count=inv_count, relu=relu, guided=guided, scaled=scaled, addend=addend,
        out=out, second_out=second,
    )  # fmt: skip
    return out, z.new_empty(0) if second is None else second


def bn_bwd_bwd_reduce(
    grad_grad: Tensor, grad_prime: Tensor, z: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    results = mean.new_empty((3, z.shape[1]))
    _run(
        "bn_bwd_bwd_reduce", z, mean, rstd=rstd, grad_grad=grad_grad, grad_prime=grad_prime,
        results=results,
    )  # fmt: skip
    return results


def bn_bwd_bwd(
    grad_grad: Tensor,
    grad_grad_residual: Tensor | None,
    grad_prime: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mask: Tensor | None,
    sums: Tensor,
    grad_sums: Tensor,
    inv_count: float,
    c_gamma: Tensor | None,
    c_beta: Tensor | None,
    relu: bool,
    inplace: bool,
    reuse_prime: bool = False,
) -> tuple[Tensor, Tensor]:
    to_grad = grad_grad if inplace else _like(z)
    to_z = grad_prime if reuse_prime else _like(z)
    _run(
        "bn_bwd_bwd", z, mean, rstd=rstd, gamma=gamma, beta=beta, mask=_given(mask),
        grad_grad=grad_grad, grad_grad_residual=grad_grad_residual, grad_prime=grad_prime,
        sums=sums, grad_sums=grad_sums, c_gamma=c_gamma, c_beta=c_beta, inv_count=inv_count,
        relu=relu, out=to_grad, second_out=to_z,
    )  # fmt: skip
    return to_grad, to_z
