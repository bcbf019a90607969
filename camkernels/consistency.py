"""Comparing maps of two views: crop, resize and flip, structural similarity, norms.

Public functions over tensors, and their checks; kernels are in ``ops``.
"""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
from torch import Tensor

from camkernels import backends
from camkernels.functional import _Checks
from camkernels.ops import _validate
from camkernels.ops.lp_norm import reference as _lp_reference
from camkernels.ops.lp_norm.op import lp_norm_fwd
from camkernels.ops.min_max import reference as _min_max_reference
from camkernels.ops.min_max.op import min_max_fwd
from camkernels.ops.ssim import reference as _ssim_reference
from camkernels.ops.ssim.op import ssim_fwd
from camkernels.ops.warp import reference as _warp_reference
from camkernels.ops.warp.op import warp_fwd
from camkernels.ops.warped_ssim import reference as _warped_reference
from camkernels.ops.warped_ssim.op import warped_ssim_fwd

Window = Literal["gaussian", "uniform"]
Padding = Literal["valid", "same"]
_INTEGERS = (torch.int64, torch.int32)


def warp(
    images: Tensor,
    boxes: Tensor,
    flips: Tensor | None = None,
    size: tuple[int, int] | None = None,
    *,
    source_size: tuple[int, int] | None = None,
) -> Tensor:
    """Crop, resize and mirror each sample by parameters of its own, bilinear.

    Sample b is ``F.interpolate(images[b, :, top:top+height, left:left+width], size,
    mode="bilinear", align_corners=False)``, then mirrored left to right where ``flips[b]``. With
    ``source_size`` the images are first resized to it, in the same way, and boxes count its pixels;
    nothing of that size is stored: a 7 x 7 map is cropped and enlarged as if it were 224 x 224.

    Args:
        images: (B, C, h, w) or (B, h, w); float32, bfloat16, float16, or float64 (CPU).
        boxes: (B, 4) int64 or int32: top, left, height, width in pixels of the images, or of
            ``source_size``.
        flips: (B,) bool; None: no sample is mirrored.
        size: (H, W) of the output; None: ``source_size``, or the size of the images.
        source_size: (H0, W0).

    Returns:
        (B, C, H, W) or (B, H, W), contiguous, in the dtype of the images; differentiable to any
        order in them.

    Raises:
        TypeError: boxes that are not integers, flips that are not bool, a dtype without a kernel.
        ValueError: shapes, batch sizes or devices that disagree; on a CPU a box that is empty or
        leaves the picture. On a GPU, where reading boxes would stall it, the outputs of such a
        sample are NaN, and ``ck.set_checks(True)`` raises.

    Example:
        >>> import torch, camkernels as ck
        >>> ck.warp(torch.rand(1, 3, 8, 8), torch.tensor([[2, 0, 4, 8]]), size=(16, 16)).shape
        torch.Size([1, 3, 16, 16])
    """
    planes = isinstance(images, Tensor) and images.dim() == 3
    rank, shape = (3, "(B, h, w)") if planes else (4, "(B, C, h, w)")
    values = _validate.floating_tensor("images", images, rank, shape)
    values = values.unsqueeze(1) if planes else values
    via = _size("source_size", source_size, (values.shape[2], values.shape[3]))
    target = _size("size", size, via)
    boxes, flips = _boxes(boxes, flips, values, via)
    chosen = _backend(values)
    if chosen == "reference":
        out = _warp_reference.warp(values, boxes, flips, via, target)
    else:
        out = warp_fwd(values, boxes, flips, list(via), list(target), backend=chosen)
    return out.squeeze(1) if planes else out


def ssim(
    x: Tensor,
    y: Tensor,
    *,
    data_range: float = 1.0,
    window: Window = "gaussian",
    window_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
    padding: Padding = "valid",
) -> Tensor:
    """Structural similarity per sample, differentiable in both arguments.

    The mean over windows and channels of
    (2 mu nu + C1)(2 sigma_xy + C2) / ((mu^2 + nu^2 + C1)(sigma_x^2 + sigma_y^2 + C2)),
    C1 = (k1 L)^2, C2 = (k2 L)^2. An axis shorter than the window gets the largest window of odd
    size that fits, with the same sigma: one pixel then compares means alone.

    Args:
        x, y: (B, C, H, W) or (B, H, W), alike; float32, bfloat16, float16, or float64 (CPU).
        data_range: L, the distance of the largest from the smallest possible value; 1 for maps
            in [0, 1], 255 for bytes.
        window: ``"gaussian"`` of ``sigma`` pixels, or ``"uniform"``.
        window_size: odd; 11 in the paper (COSE takes a uniform 5).
        padding: ``"valid"``: windows inside the picture, as pytorch-msssim and scikit-image;
            ``"same"``: one around each pixel, zeros outside, as fused-ssim.

    Returns:
        (B,), float32 (float64 for float64), at most 1. NaN or Inf in a sample gives NaN there.

    Raises:
        TypeError: a dtype without a kernel. ValueError: shapes or devices that disagree, an even or
        non-positive window, a ``data_range`` or ``sigma`` that is not positive.

    Source: Wang et al., Image quality assessment: from error visibility to structural similarity.

    Example:
        >>> import torch, camkernels as ck
        >>> x = torch.rand(2, 3, 32, 32)
        >>> [round(float(s), 4) for s in ck.ssim(x, x)]
        [1.0, 1.0]
    """
    a, b = _pictures(x, y)
    options = _window(
        (a.shape[2], a.shape[3]), data_range, window, window_size, sigma, k1, k2, padding
    )
    chosen = _backend(a)
    if chosen == "reference":
        return _ssim_reference.ssim_fwd(a, b, *options)
    return cast(Tensor, ssim_fwd(a, b, *options, backend=chosen))


def warped_ssim(
    maps: Tensor,
    others: Tensor,
    boxes: Tensor,
    flips: Tensor | None = None,
    size: tuple[int, int] = (224, 224),
    *,
    source_size: tuple[int, int] | None = None,
    data_range: float = 1.0,
    window: Window = "gaussian",
    window_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
    padding: Padding = "valid",
) -> Tensor:
    """Similarity of the warped map of one view with the map of the warped view, in one kernel.

        ssim(warp(maps, boxes, flips, size, source_size=source_size), resize(others, size))

    Nothing of the size ``size`` is stored. The C++ kernel keeps the rows that a window spans: from
    7 x 7 to 224 x 224 it allocates 120 KB per thread, in the backward 170 KB.

    Args:
        maps: (B, h, w), of the whole picture. others: (B, h', w'), of the crop.
        boxes, flips: of :func:`warp`, in pixels of ``source_size``.
        size: (H, W) at which the two are compared.
        source_size: size of the picture that was cropped; None: ``size``.
        data_range, window, window_size, sigma, k1, k2, padding: of :func:`ssim`.

    Returns:
        (B,), float32 (float64 for float64), differentiable to any order in both maps.

    Raises:
        As :func:`warp` and :func:`ssim`. ValueError: maps above 64 x 64 in Triton.

    Source: Staying Consistent with GradCAM, eq. 2.

    Example:
        >>> import torch, camkernels as ck
        >>> whole = torch.tensor([[0, 0, 32, 32]])
        >>> maps = torch.rand(1, 7, 7)
        >>> round(float(ck.warped_ssim(maps, maps, whole, size=(32, 32))), 4)
        1.0
    """
    a = _validate.floating_tensor("maps", maps, 3, "(B, h, w)")
    b = _validate.floating_tensor("others", others, 3, "(B, h, w)")
    _alike("others", b, "maps", a)
    target = _size("size", size, size)
    via = _size("source_size", source_size, target)
    boxes, flips = _boxes(boxes, flips, a, via)
    options = _window(target, data_range, window, window_size, sigma, k1, k2, padding)
    chosen = _backend(a)
    if chosen == "reference":
        return _warped_reference.warped_ssim_fwd(a, b, boxes, flips, via, target, *options)
    found = warped_ssim_fwd(a, b, boxes, flips, list(via), list(target), *options, backend=chosen)
    return cast(Tensor, found)


def min_max_normalize(maps: Tensor) -> Tensor:
    """(M - min M) / (max M - min M) per sample, with the gradient of the extremes.

    Args:
        maps: (B, h, w); float32, bfloat16, float16, or float64 (CPU).

    Returns:
        (B, h, w) in [0, 1], float32 (float64 for float64), differentiable to any order. A constant
        map becomes 0 everywhere and has no gradient; pixels that tie for an extreme share its
        gradient. NaN or Inf in a sample makes it NaN.

    Raises:
        TypeError: a dtype without a kernel. ValueError: another rank, or an empty map.

    Example:
        >>> import torch, camkernels as ck
        >>> ck.min_max_normalize(torch.tensor([[[-1.0, 0.0, 3.0]]]))
        tensor([[[0.0000, 0.2500, 1.0000]]])
    """
    values = _validate.floating_tensor("maps", maps, 3, "(B, h, w)")
    chosen = _backend(values)
    if chosen == "reference":
        return _min_max_reference.min_max_fwd(values)[0]
    return cast(Tensor, min_max_fwd(values, backend=chosen)[0])


def lp_norm(values: Tensor, p: float = 1.0, *, size: tuple[int, int] | None = None) -> Tensor:
    """(sum |v|^p)^(1/p) per sample.

    Args:
        values: (B, ...); float32, bfloat16, float16, or float64 (CPU).
        p: at least 1, or ``inf``, or 0: the number of values that are not zero, which is constant
            almost everywhere and so has no gradient (a penalty with p = 0 is measured, not
            trained).
        size: (H, W): of maps (B, h, w) enlarged to it bilinearly, which is never stored.

    Returns:
        (B,), float32 (float64 for float64), differentiable to any order; a zero norm has gradient
        zero.

    Raises:
        TypeError: a dtype without a kernel. ValueError: p below 0, or between 0 and 1; ``size``
        with another rank than (B, h, w), or in Triton with maps above 64 x 64.

    Source: Staying Consistent with GradCAM, eq. 3.

    Example:
        >>> import torch, camkernels as ck
        >>> ck.lp_norm(torch.tensor([[[3.0, -4.0]]]), 2)
        tensor([5.])
    """
    found = _validate.floating("values", values, "(B, ...)")
    if found.dim() < 2 or 0 in found.shape[1:]:
        raise ValueError(
            f"values: expected (B, ...), only the batch may be empty, got {tuple(found.shape)}"
        )
    _lp_reference.check_order(p)
    target: list[int] = []
    if size is not None:
        found = _validate.floating_tensor("values", found, 3, "(B, h, w), as size is given")
        target = list(_size("size", size, (1, 1)))
    chosen = _backend(found)
    if chosen == "reference":
        return _lp_reference.lp_norm_fwd(found, float(p), target)
    return cast(Tensor, lp_norm_fwd(found, float(p), target, backend=chosen))


# -- checks ------------------------------------------------------------------------------------


def check_order(p: float) -> None:
    """Raise where there is no norm of this order."""
    _lp_reference.check_order(p)


def check_window(
    window: str, window_size: int, sigma: float, padding: str, data_range: float
) -> None:
    """Raise where :func:`ssim` would."""
    _window((1, 1), data_range, window, window_size, sigma, 0.01, 0.03, padding)


def check_view(boxes: object, flips: object, images: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (int64) and flips of these images (B, C, H, W), or raise as :func:`warp` does."""
    return _boxes(boxes, flips, images, (images.shape[2], images.shape[3]))


def _backend(leader: Tensor) -> str:
    return "" if torch.compiler.is_compiling() else backends.resolve(leader.device, leader.dtype)


def _size(name: str, size: object, default: tuple[int, int]) -> tuple[int, int]:
    if size is None:
        return default
    sizes = tuple(size) if isinstance(size, (tuple, list, torch.Size)) else ()
    if len(sizes) != 2 or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(f"{name}: expected two positive integers (H, W), got {size!r}")
    return int(sizes[0]), int(sizes[1])


def _alike(name: str, value: Tensor, leader_name: str, leader: Tensor) -> None:
    if value.shape[0] != leader.shape[0]:
        raise ValueError(
            f"{name}: expected a batch of {leader.shape[0]}, as {leader_name} has, got "
            f"{value.shape[0]}"
        )
    _validate.same_device(name, value, leader_name, leader)
    _validate.same_precision(name, value, leader_name, leader)


def _pictures(x: object, y: object) -> tuple[Tensor, Tensor]:
    planes = isinstance(x, Tensor) and x.dim() == 3
    rank, shape = (3, "(B, H, W)") if planes else (4, "(B, C, H, W)")
    a = _validate.floating_tensor("x", x, rank, shape)
    b = _validate.floating_tensor("y", y, rank, shape)
    if a.shape != b.shape:
        raise ValueError(f"y: expected the shape of x, {tuple(a.shape)}, got {tuple(b.shape)}")
    _alike("y", b, "x", a)
    return (a.unsqueeze(1), b.unsqueeze(1)) if planes else (a, b)


def _boxes(
    boxes: object, flips: object, leader: Tensor, via: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Boxes as int64 and flips, checked."""
    batch = leader.shape[0]
    if not isinstance(boxes, Tensor) or boxes.dtype not in _INTEGERS:
        got = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
        raise TypeError(f"boxes: expected an int64 or int32 tensor (B, 4), got {got}")
    if tuple(boxes.shape) != (batch, 4):
        raise ValueError(
            f"boxes: expected ({batch}, 4) for this batch (top, left, height, width), got "
            f"{tuple(boxes.shape)}"
        )
    _validate.same_device("boxes", boxes, "the images", leader)
    if flips is None:
        flips = torch.zeros(batch, dtype=torch.bool, device=leader.device)
    if not isinstance(flips, Tensor) or flips.dtype != torch.bool:
        got = flips.dtype if isinstance(flips, Tensor) else type(flips).__name__
        raise TypeError(f"flips: expected a bool tensor (B,), got {got}")
    if tuple(flips.shape) != (batch,):
        raise ValueError(f"flips: expected ({batch},) for this batch, got {tuple(flips.shape)}")
    _validate.same_device("flips", flips, "the images", leader)
    boxes = boxes.to(torch.int64)
    _check_boxes(boxes, via)
    return boxes, flips


def _check_boxes(boxes: Tensor, via: tuple[int, int]) -> None:
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(boxes):
        return
    if boxes.device.type != "cpu" and not (boxes.is_cuda and _Checks.enabled):
        return
    valid = _warp_reference.boxes_are_valid(boxes, via)
    if not bool(valid.all()):
        wrong = int((~valid).nonzero()[0])
        raise ValueError(
            f"boxes: sample {wrong} has top, left, height, width = {boxes[wrong].tolist()}, which "
            f"is empty or leaves a picture of {via[0]} x {via[1]} pixels"
        )


def _window(
    shape: tuple[int, int],
    data_range: float,
    window: str,
    window_size: int,
    sigma: float,
    k1: float,
    k2: float,
    padding: str,
) -> tuple[list[float], list[float], float, float, bool]:
    """Weights along both axes, C1, C2, and whether zeros surround the picture."""
    if window not in ("gaussian", "uniform"):
        raise ValueError(f"window: expected 'gaussian' or 'uniform', got {window!r}")
    if padding not in ("valid", "same"):
        raise ValueError(f"padding: expected 'valid' or 'same', got {padding!r}")
    if not isinstance(window_size, int) or window_size < 1 or window_size % 2 == 0:
        raise ValueError(f"window_size: expected an odd positive integer, got {window_size!r}")
    for name, value in (("data_range", data_range), ("sigma", sigma)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a positive number, got {value!r}")
    for name, value in (("k1", k1), ("k2", k2)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected a number from 0 on, got {value!r}")
    rows, columns = (_ssim_reference.window(window, window_size, sigma, length) for length in shape)
    return rows, columns, (k1 * data_range) ** 2, (k2 * data_range) ** 2, padding == "same"
