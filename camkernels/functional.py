"""The public functions over tensors."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, cast, overload

import torch
from torch import Tensor

from camkernels import backends
from camkernels.ops import _validate
from camkernels.ops.cam import reference as _cam_reference
from camkernels.ops.cam.op import cam_fwd
from camkernels.ops.cam_statistics import reference as _cam_statistics_reference
from camkernels.ops.cam_statistics.op import cam_statistics_fwd
from camkernels.ops.gradient_error import reference as _error_reference
from camkernels.ops.gradient_error.op import gradient_error_fwd
from camkernels.ops.map_statistics import reference as _statistics_reference
from camkernels.ops.map_statistics.op import map_statistics_fwd


class MapStatistics(NamedTuple):
    """Statistics of maps (B, h, w), one value per map; float32 (float64 for float64 maps).

    Coordinates are (row, column) in pixels of the map. A dead (all-zero) map has 0 everywhere;
    take means over ``live`` maps, or dead maps look like success.
    """

    entropy: Tensor
    """(B,) nats, -sum p ln p with p = M / sum M."""
    area: Tensor
    """(B,) pixels^2, the square root of the determinant of ``covariance``."""
    dispersion: Tensor
    """(B,) variance / mean^2 over all pixels."""
    mean: Tensor
    """(B,) over all pixels."""
    variance: Tensor
    """(B,) population variance over all pixels."""
    centroid: Tensor
    """(B, 2) row and column."""
    covariance: Tensor
    """(B, 2, 2) of row and column under p."""

    @property
    def live(self) -> Tensor:
        """(B,) bool: the map is not all zero."""
        return (self.mean != 0) | (self.variance != 0)


GradientError = Literal["sigmoid", "centered_sigmoid", "cosine", "histogram", "histogram_paper"]
"""Names of the errors of :func:`gradient_error`."""


class _Checks:
    enabled = False
    dead_maps = False


def set_checks(enabled: bool, *, dead_maps: bool = False) -> None:
    """Make values that kernels only mark (by NaN, or a dead map) raise at once, for debugging.

    Each check reads data back and so synchronises a GPU. Off by default.

    Args:
        enabled: raise ``ValueError`` on NaN, infinite or (where invalid) negative map values.
        dead_maps: raise on all-zero maps too; they do occur in sound training.
    """
    _Checks.enabled = enabled
    _Checks.dead_maps = dead_maps


def _check_maps(name: str, maps: Tensor, negative_is_invalid: bool) -> None:
    if not _Checks.enabled or torch.compiler.is_compiling():
        return
    values = maps.detach()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name}: NaN or infinite values (ck.set_checks is on)")
    if negative_is_invalid and bool((values < 0).any()):
        raise ValueError(
            f"{name}: negative values have no entropy or area; pass clamp=True, or relu=True "
            "where the map is made (ck.set_checks is on)"
        )
    dead = (values == 0).flatten(1).all(1)
    if _Checks.dead_maps and bool(dead.any()):
        raise ValueError(f"{name}: {int(dead.sum())} all-zero maps (ck.set_checks is on)")


def grad_cam(activations: Tensor, gradients: Tensor, *, relu: bool = True) -> Tensor:
    """Grad-CAM maps: relu(sum_k alpha_k A_k), alpha_k the mean of G_k over the pixels.

    Differentiable to any order in both arguments; deterministic; any strides without a copy.

    Args:
        activations: A (B, K, h, w), float32, bfloat16, float16, or float64 (CPU).
        gradients: G (B, K, h, w), of a class score with respect to A; make it with
            ``create_graph=True`` to train through it.
        relu: keep the positive part only.

    Returns:
        maps (B, h, w), float32 (float64 for float64 input). NaN or Inf in a sample's input gives
        NaN or Inf in its map.

    Raises:
        TypeError: a dtype without a kernel. ValueError: shapes or devices that disagree.
        BackendUnavailableError: the backend named by ``ck.backend`` cannot take the tensors.

    Source: Selvaraju et al., Grad-CAM, eqs. 1 and 2.

    Example:
        >>> import torch, camkernels as ck
        >>> ck.grad_cam(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 4, 4])
    """
    a, g = _validate.activations_and_gradients(activations, gradients)
    return _cam(a, g, relu)


def class_activation_map(activations: Tensor, weights: Tensor, *, relu: bool = True) -> Tensor:
    """Class activation maps: relu(sum_k w_k A_k).

    With w = W[c] / (h w), W the weight of the linear layer behind average pooling, this equals
    Grad-CAM of class c.

    Args:
        activations: A (B, K, h, w), float32, bfloat16, float16, or float64 (CPU).
        weights: w (B, K), one row per sample.
        relu: keep the positive part only.

    Returns:
        maps (B, h, w), float32 (float64 for float64 input).

    Raises:
        TypeError: a dtype without a kernel. ValueError: shapes or devices that disagree.
        BackendUnavailableError: the backend named by ``ck.backend`` cannot take the tensors.

    Source: Zhou et al., Learning deep features for discriminative localization, eq. 2.

    Example:
        >>> import torch, camkernels as ck
        >>> ck.class_activation_map(torch.ones(1, 2, 1, 1), torch.tensor([[1.0, 2.0]]))
        tensor([[[3.]]])
    """
    a, w = _validate.activations_and_weights(activations, weights)
    return _cam(a, w, relu)


def _cam(activations: Tensor, gradients: Tensor, relu: bool) -> Tensor:
    if torch.compiler.is_compiling():
        maps: Tensor = cam_fwd(activations, gradients, relu, backend="")[0]
        return maps
    chosen = backends.resolve(activations.device, activations.dtype)
    if chosen == "reference":
        maps = _cam_reference.cam(activations, gradients, relu)
    else:
        maps = cam_fwd(activations, gradients, relu, backend=chosen)[0]
    _check_maps("maps", maps, negative_is_invalid=False)
    return maps


def map_statistics(maps: Tensor, *, clamp: bool = False) -> MapStatistics:
    """Entropy, ellipsoidal area, dispersion, mean, variance, centroid and covariance of maps.

    Args:
        maps: M (B, h, w), float32, bfloat16, float16, or float64 (CPU).
        clamp: apply relu first. Without it a negative value makes entropy, area, centroid and
            covariance of its map NaN.

    Returns:
        :class:`MapStatistics`, differentiable to any order. A pixel at 0 gets no gradient from
        the entropy; a degenerate ellipse (a point, a line) has area 0 and no gradient.

    Raises:
        TypeError: a dtype without a kernel. ValueError: another rank, or no pixels.
        BackendUnavailableError: the backend named by ``ck.backend`` cannot take the tensors.

    Source: Schoettl, A light-weight method to foster the (Grad)CAM interpretability, eqs. 1 to 3.

    Example:
        >>> import torch, camkernels as ck
        >>> round(ck.map_statistics(torch.ones(1, 6, 6)).entropy.item(), 4)  # ln 36
        3.5835
    """
    m = _validate.floating_tensor("maps", maps, 3, "(B, h, w)")
    if torch.compiler.is_compiling():
        return MapStatistics(*map_statistics_fwd(m, clamp, backend=""))
    _check_maps("maps", m, negative_is_invalid=not clamp)
    chosen = backends.resolve(m.device, m.dtype)
    if chosen == "reference":
        return MapStatistics(*_statistics_reference.map_statistics(m, clamp))
    return MapStatistics(*map_statistics_fwd(m, clamp, backend=chosen))


def cam_entropy(maps: Tensor, *, normalize: bool = False, clamp: bool = False) -> Tensor:
    """CAM entropy (B,) of maps (B, h, w), in nats; divided by ln(h w) with ``normalize``.

    Arguments, errors and source as :func:`map_statistics` (eq. 1).

    Example:
        >>> import torch, camkernels as ck
        >>> ck.cam_entropy(torch.ones(1, 6, 6), normalize=True)
        tensor([1.])
    """
    entropy = map_statistics(maps, clamp=clamp).entropy
    return normalize_entropy(entropy, maps.shape[1] * maps.shape[2]) if normalize else entropy


def normalize_entropy(entropy: Tensor, pixels: int) -> Tensor:
    """Entropy in [0, 1]: divided by that of the uniform map, ln(h w); a 1x1 map stays at 0."""
    return entropy / math.log(pixels) if pixels > 1 else entropy


def cam_area(maps: Tensor, *, clamp: bool = False) -> Tensor:
    """CAM ellipsoidal area (B,) of maps (B, h, w), in pixels^2 of the map.

    Arguments, errors and source as :func:`map_statistics` (eq. 2).

    Example:
        >>> import torch, camkernels as ck
        >>> ck.cam_area(torch.ones(1, 3, 3))
        tensor([0.6667])
    """
    return map_statistics(maps, clamp=clamp).area


def cam_dispersion(maps: Tensor, *, clamp: bool = False) -> Tensor:
    """CAM dispersion (B,) of maps (B, h, w): variance / mean^2 over all pixels.

    Arguments, errors and source as :func:`map_statistics` (eq. 3).

    Example:
        >>> import torch, camkernels as ck
        >>> ck.cam_dispersion(torch.tensor([[[0.0, 2.0]]]))
        tensor([1.])
    """
    return map_statistics(maps, clamp=clamp).dispersion


@overload
def cam_statistics(
    activations: Tensor,
    gradients: Tensor | None = ...,
    *,
    weights: Tensor | None = ...,
    relu: bool = ...,
    return_maps: Literal[False] = ...,
) -> MapStatistics: ...
@overload
def cam_statistics(
    activations: Tensor,
    gradients: Tensor | None = ...,
    *,
    weights: Tensor | None = ...,
    relu: bool = ...,
    return_maps: Literal[True],
) -> tuple[MapStatistics, Tensor]: ...
def cam_statistics(
    activations: Tensor,
    gradients: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    relu: bool = True,
    return_maps: bool = False,
) -> MapStatistics | tuple[MapStatistics, Tensor]:
    """Statistics of Grad-CAM (or CAM) maps, straight from activations and gradients (or weights).

    One kernel forward, one backward. Equals ``map_statistics(grad_cam(A, G))``.

    Args:
        activations: A (B, K, h, w), float32, bfloat16, float16, or float64 (CPU).
        gradients: G (B, K, h, w). Exactly one of ``gradients`` and ``weights`` is given.
        weights: w (B, K) in place of the pooled gradients.
        relu: keep the positive part of the map only. Without it a negative value makes entropy,
            area, centroid and covariance of its map NaN.
        return_maps: return the maps (B, h, w) too, differentiable.

    Returns:
        :class:`MapStatistics`, or a pair of it and the maps.

    Raises:
        TypeError: a dtype without a kernel. ValueError: shapes or devices that disagree, or not
        exactly one of ``gradients`` and ``weights``. BackendUnavailableError: the backend named
        by ``ck.backend`` cannot take the tensors.

    Source: as :func:`grad_cam` and :func:`map_statistics`.

    Example:
        >>> import torch, camkernels as ck
        >>> ck.cam_statistics(torch.ones(1, 2, 2, 2), weights=torch.ones(1, 2)).mean
        tensor([2.])
    """
    statistics, maps, _ = cam_statistics_and_total(
        activations, gradients, weights=weights, relu=relu
    )
    return (statistics, maps) if return_maps else statistics


def cam_statistics_and_total(
    activations: Tensor,
    gradients: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    relu: bool = True,
) -> tuple[MapStatistics, Tensor, Tensor]:
    """Statistics, maps, and the sum of each map before its ReLU (B,), which has no gradient."""
    if (gradients is None) == (weights is None):
        raise ValueError("cam_statistics: exactly one of gradients and weights must be given")
    if gradients is not None:
        a, g = _validate.activations_and_gradients(activations, gradients)
    else:
        a, g = _validate.activations_and_weights(activations, weights)
    if torch.compiler.is_compiling():
        outputs = cam_statistics_fwd(a, g, relu, backend="")
    else:
        chosen = backends.resolve(a.device, a.dtype)
        if chosen == "reference":
            outputs = _cam_statistics_reference.cam_statistics_fwd(a, g, relu)
        else:
            outputs = cam_statistics_fwd(a, g, relu, backend=chosen)
        _check_maps("maps", outputs[0], negative_is_invalid=not relu)
    maps, _, total, *statistics = outputs
    return MapStatistics(*statistics), maps, total.detach()


def gradient_error(
    gradients: Tensor, guided_gradients: Tensor, error: GradientError = "cosine"
) -> Tensor:
    """Error between an input gradient d and the guided gradient g, its teacher, per sample.

        sigmoid            - sum g sigma(d)                                       (eq. 11)
        centered_sigmoid   - sum g sigma(d - mean d)                              (eq. 12)
        histogram          - sum min(|d| / |d|_1, |g| / |g|_1)
        histogram_paper    - sum min(|d|, |g|) / (|d|_1 |g|_1)                    (eq. 13)
        cosine             - <d, g> / (|d|_2 |g|_2)                               (eq. 14)

    ``cosine`` and ``histogram`` lie in [-1, 1] and [-1, 0] and do not depend on the scale of
    either side. The others do: d of a mean loss has a scale of 1/B, and ``histogram_paper``, the
    histogram intersection as it is printed, rewards gradients for shrinking.

    One pass over the two forward and one backward; ``centered_sigmoid`` and the histograms need a
    pass more forward, for the mean or the norms. Read in any strides that both share, if each
    sample is dense; otherwise a copy is made in the strides of the gradients, or contiguous.

    Args:
        gradients: d (B, ...), of any rank from 2; float32, bfloat16, float16, or float64 (CPU).
            Make it with ``create_graph=True`` to train through it.
        guided_gradients: g, of the shape of d; a constant.
        error: one of the names above.

    Returns:
        errors (B,), float32 (float64 for float64), differentiable to any order in d. Where a norm
        that is divided by is zero, the error is 0 and has no gradient. NaN or Inf in a sample
        gives NaN or Inf in its error.

    Raises:
        TypeError: a dtype without a kernel, or float64 beside another. ValueError: an unknown
        error, shapes or devices that disagree, or guided gradients that require grad.
        BackendUnavailableError: the backend named by ``ck.backend`` cannot take the tensors.

    Source: A Learning Paradigm for Interpretable Gradients, eqs. 11 to 14.

    Example:
        >>> import torch, camkernels as ck
        >>> ck.gradient_error(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4), "histogram")
        tensor([-1., -1.])
    """
    if error not in _error_reference.ERRORS:
        allowed = ", ".join(_error_reference.ERRORS)
        raise ValueError(f"error: unknown {error!r}, allowed are {allowed}")
    d, g = _validate.gradient_pair(gradients, guided_gradients)
    chosen = "" if torch.compiler.is_compiling() else backends.resolve(d.device, d.dtype)
    if chosen == "reference":
        return _error_reference.gradient_error_fwd(d, g, error)[0]
    errors, _ = gradient_error_fwd(d, g, error, backend=chosen)
    return cast(Tensor, errors)
