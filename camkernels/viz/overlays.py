"""Maps laid over pictures, in batches and on their device."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import matplotlib as mpl
import torch
from matplotlib.colors import Colormap
from torch import Tensor

from camkernels.consistency import min_max_normalize
from camkernels.metrics.regions import enlarged

DEFAULT = "viridis"
SCALES = ("minmax", "max")
_LUMINANCE = (0.299, 0.587, 0.114)
Colours = Sequence[float] | Tensor
"""A number per channel."""


def overlay(
    images: Tensor,
    maps: Tensor,
    *,
    colormap: str | Colormap = DEFAULT,
    alpha: float = 0.5,
    mean: Colours | None = None,
    std: Colours | None = None,
    scale: str = "minmax",
    grey: bool = False,
) -> Tensor:
    """(1 - alpha) picture + alpha colour(M): each map over its picture.

    M is the map scaled to [0, 1] and enlarged bilinearly to the picture. A constant map, such as a
    dead one, is 0 everywhere: the picture lies under the lowest colour evenly. A map that is not
    finite has no colour: its picture is grey under diagonal white lines.

    pytorch-grad-cam's ``show_cam_on_image(picture, M, use_rgb=True)`` is the same blend in
    ``"jet"``, but afterwards divides each picture by its maximum, so that the same colour does not
    mean the same value in two pictures, and rounds down. Its ``image_weight`` is 1 - alpha.

    Args:
        images: (B, 3, H, W) or, without colour, (B, 1, H, W): uint8; floating in [0, 1]; or
            floating and normalised, with ``mean`` and ``std``.
        maps: (B, h, w) floating, of any size, on the device of the images.
        colormap: a name that matplotlib knows, or a colour map. ``"viridis"`` and ``"cividis"`` are
            read alike with every common colour blindness; ``"jet"`` is not.
        alpha: share of the colour, in [0, 1].
        mean, std: a number per channel, of the normalisation that is undone; what lies outside of
            [0, 1] then is clamped.
        scale: ``"minmax"``, (M - min M) / (max M - min M); or ``"max"``, relu(M) / max M, in which
            a map that is nearly flat looks so.
        grey: take the colour out of the picture, so that all colour is the map's.

    Returns:
        (B, H, W, 3) uint8, on the device of the images.

    Raises:
        TypeError: images or maps of another kind or dtype. ValueError: another shape, number or
        device of maps; an unknown colour map (near names are told) or scale; alpha outside [0, 1];
        floating images outside [0, 1] without ``mean`` and ``std``, or not finite.

    Example:
        >>> import torch
        >>> from camkernels import viz
        >>> viz.overlay(torch.rand(2, 3, 32, 48), torch.rand(2, 7, 7)).shape
        torch.Size([2, 32, 48, 3])
    """
    table = colour_table(colormap)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a share in [0, 1], got {alpha}")
    shares = _shares(images, mean, std)
    check_maps(maps, images)
    maps = maps.detach()
    strength = _strength(maps, (images.shape[2], images.shape[3]), scale)
    under = _without_colour(shares) if grey else shares
    index = (strength.nan_to_num(0) * len(table)).long().clamp(0, len(table) - 1)
    mixed = (1 - alpha) * under.movedim(1, -1) + alpha * table.to(images.device)[index]
    broken = ~maps.flatten(1).isfinite().all(1)
    if bool(broken.any()):
        mixed[broken] = _hatched(shares[broken]).movedim(1, -1)
    return _bytes(mixed)


def pictures(images: Tensor, *, mean: Colours | None = None, std: Colours | None = None) -> Tensor:
    """The pictures themselves, (B, H, W, 3) uint8; arguments and errors as :func:`overlay`'s."""
    return _bytes(_shares(images, mean, std).movedim(1, -1))


def colour_table(colormap: str | Colormap) -> Tensor:
    """The colours (N, 3) of a colour map from its lowest to its highest, float32 in [0, 1].

    Raises:
        ValueError: matplotlib has none of that name; near names are told. TypeError: no name.
    """
    if isinstance(colormap, str):
        if colormap not in mpl.colormaps:
            lower = {name.lower(): name for name in reversed(list(mpl.colormaps))}
            near = difflib.get_close_matches(colormap.lower(), lower, n=3, cutoff=0.5)
            shown = [lower[name] for name in near] or ["viridis", "cividis", "jet"]
            raise ValueError(
                f"colormap: matplotlib has none named {colormap!r}; "
                f"{'near names' if near else 'some names'}: {', '.join(map(repr, shown))}"
            )
        colormap = mpl.colormaps[colormap]
    if not isinstance(colormap, Colormap):
        raise TypeError(
            f"colormap: expected a name or a matplotlib Colormap, got {type(colormap).__name__}"
        )
    return torch.as_tensor(colormap(range(colormap.N))[:, :3], dtype=torch.float32)


def check_maps(maps: object, images: Tensor, name: str = "maps") -> None:
    """Raise unless ``maps`` are floating-point (B, h, w), one per image, on the same device."""
    if not isinstance(maps, Tensor):
        raise TypeError(f"{name}: expected a tensor (B, h, w), got {type(maps).__name__}")
    if not maps.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {maps.dtype}")
    if maps.dim() != 3 or len(maps) != len(images) or 0 in maps.shape[1:]:
        raise ValueError(f"{name}: expected ({len(images)}, h, w), got {tuple(maps.shape)}")
    if maps.device != images.device:
        raise ValueError(f"{name}: expected on {images.device} as the images, got {maps.device}")


def _strength(maps: Tensor, size: tuple[int, int], scale: str) -> Tensor:
    """Maps in [0, 1], (B, H, W); NaN where a map is not finite, or has no maximum to divide by."""
    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {', '.join(SCALES)}, got {scale!r}")
    if scale == "minmax":
        return enlarged(min_max_normalize(maps), size)
    positive = (maps if maps.dtype == torch.float64 else maps.float()).clamp(min=0)
    return enlarged(positive / positive.amax((1, 2), keepdim=True), size)


def _shares(images: object, mean: Colours | None, std: Colours | None) -> Tensor:
    """Pictures (B, 3, H, W) float32 in [0, 1], of images as :func:`overlay` takes them."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor (B, 3, H, W), got {type(images).__name__}")
    if images.dim() != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise ValueError(
            f"images: expected (B, 3, H, W) or (B, 1, H, W), got {tuple(images.shape)}"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images: expected uint8 or a floating-point dtype, got {images.dtype}")
    if (mean is None) != (std is None):
        raise ValueError(
            f"mean, std: expected both or neither, got {'std' if mean is None else 'mean'} only"
        )
    if images.dtype == torch.uint8:
        if mean is not None:
            raise ValueError("mean, std: expected none for uint8 images, which are not normalised")
        values = images.float() / 255
    else:
        values = images.detach().float()
        if mean is not None and std is not None:
            values = values * _channels("std", std, values) + _channels("mean", mean, values)
        _check_range(values, normalised=mean is not None)
    return values.clamp(0, 1).expand(-1, 3, -1, -1)


def _channels(name: str, given: Colours, images: Tensor) -> Tensor:
    values = torch.as_tensor(given, dtype=torch.float32, device=images.device)
    if values.shape != (images.shape[1],):
        raise ValueError(
            f"{name}: expected {images.shape[1]} numbers, one per channel, got {given!r}"
        )
    return values.view(-1, 1, 1)


def _check_range(values: Tensor, normalised: bool) -> None:
    if not values.numel():
        return
    low, high = (float(value) for value in values.aminmax())
    if not (-torch.inf < low and high < torch.inf):
        raise ValueError(f"images: expected finite values, got {low:.4g} to {high:.4g}")
    if not normalised and (low < -0.01 or high > 1.01):  # resizing overshoots a little
        raise ValueError(
            f"images: expected values in [0, 1], got {low:.4g} to {high:.4g}; pass mean= and std= "
            "for normalised images, or uint8 for 0 to 255"
        )


def _without_colour(shares: Tensor) -> Tensor:
    weights = torch.tensor(_LUMINANCE, device=shares.device).view(-1, 1, 1)
    return (shares * weights).sum(1, keepdim=True).expand(-1, 3, -1, -1)


def _hatched(shares: Tensor) -> Tensor:
    """The mark of a map without values: grey under white lines from corner to corner."""
    height, width = shares.shape[2:]
    rows = torch.arange(height, device=shares.device)[:, None]
    columns = torch.arange(width, device=shares.device)
    period = max(4, min(height, width) // 8)
    lines = (rows + columns) % period < max(1, period // 9)
    return torch.where(lines, 1.0, 0.7 * _without_colour(shares))


def _bytes(shares: Tensor) -> Tensor:
    return (shares * 255).round().to(torch.uint8).contiguous()
