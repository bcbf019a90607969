"""How well maps find an object whose box, or mask, is known."""

from __future__ import annotations

import torch
from torch import Tensor

from camkernels.ops.best_box_ious.reference import segments


def enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, h, w) enlarged bilinearly to (B, H, W), float32 or float64.

    As :func:`torch.nn.functional.interpolate` with ``align_corners=False``, whose rounding depends
    on the shape of the batch and on the CPU. Here each step is rounded by itself, so that a map has
    the same values in any batch, and pixels beyond the outermost centres are exactly equal: the
    order of pixels, which the curves go by, is the map's own.
    """
    if maps.dim() != 3 or not maps.is_floating_point():
        raise ValueError(
            f"maps: expected floating-point (B, h, w), got {maps.dtype} {tuple(maps.shape)}"
        )
    wide = maps if maps.dtype == torch.float64 else maps.float()
    return _stretched(_stretched(wide, 1, size[0]), 2, size[1])


def _stretched(maps: Tensor, axis: int, length: int) -> Tensor:
    """a + t (b - a) along an axis, a and b the neighbours of each new place."""
    old = maps.shape[axis]
    places = (torch.arange(length, dtype=torch.float64, device=maps.device) + 0.5) * old / length
    places = (places - 0.5).clamp(0, old - 1)
    first = places.floor().long()
    share = (places - first).to(maps.dtype)
    a = maps.index_select(axis, first)
    b = maps.index_select(axis, (first + 1).clamp(max=old - 1))
    return (b - a).mul_(share[:, None] if axis == 1 else share).add_(a)  # no FMA: separate steps


def inside(regions: Tensor, size: tuple[int, int]) -> Tensor:
    """Which pixels lie in the region of each picture, (B, H, W) bool.

    Args:
        regions: boxes (B, 4) as top, left, height, width in pixels of the picture, a pixel being in
            a box where its centre is; or masks (B, H, W) bool, of several objects, say.
        size: height and width of the picture.
    """
    if regions.dtype == torch.bool:
        if regions.dim() != 3 or tuple(regions.shape[1:]) != tuple(size):
            raise ValueError(
                f"regions: expected masks (B, {size[0]}, {size[1]}), got {tuple(regions.shape)}"
            )
        return regions
    if regions.dim() != 2 or regions.shape[1] != 4:
        raise ValueError(
            "regions: expected boxes (B, 4), or masks (B, H, W) bool, got "
            f"{regions.dtype} {tuple(regions.shape)}"
        )
    wide = regions if regions.dtype == torch.float64 else regions.float()
    top, left, height, width = (edge[:, None] for edge in wide.unbind(1))
    rows = torch.arange(size[0], device=regions.device)[None] + 0.5  # centres of the pixels
    columns = torch.arange(size[1], device=regions.device)[None] + 0.5
    inside_rows = (rows > top) & (rows < top + height)
    inside_columns = (columns > left) & (columns < left + width)
    return inside_rows[:, :, None] & inside_columns[:, None, :]


def missing(regions: Tensor) -> Tensor:
    """Which pictures have no region, (B,) bool: boxes whose height or width is not above 0, or with
    NaN; masks without a pixel. See :func:`inside`."""
    if regions.dtype == torch.bool:
        return ~regions.flatten(1).any(1)
    some = (regions[:, 2:] > 0).all(1) & ~regions.isnan().any(1)
    return ~some


def localisation(maps: Tensor, regions: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Whether each map's maximum lies inside its region, and the share of its energy there.

    Maps are upsampled bilinearly to the picture, then with M the upsampled map::

        pointing = [argmax M in region],    energy = sum of M over the region / sum of M

    Args:
        maps: (B, h, w), not negative.
        regions: see :func:`inside`.
        size: height and width of the picture.

    Returns:
        pointing (B,) bool, energy (B,) float; False and 0 for a dead map.

    Source: Zhang et al., Top-down neural attention by excitation backprop, section 4.2 (pointing);
    Wang et al., Score-CAM, section 4.3 (energy).
    """
    large, where = enlarged(maps, size), inside(regions, size)
    if len(large) != len(where):
        raise ValueError(f"regions: expected one per map, {len(large)}, got {len(where)}")
    total = large.sum((1, 2))
    live = total > 0
    energy = (large * where).sum((1, 2)) / torch.where(live, total, 1.0)
    peak = (
        large.flatten(1).argmax(1, keepdim=True) if large.numel() else large.new_zeros(0, 1).long()
    )
    pointing = where.flatten(1).gather(1, peak)[:, 0] & live
    return pointing, energy


def box_of_map(maps: Tensor, size: tuple[int, int], threshold: float = 0.15) -> Tensor:
    """Boxes (B, 4) as top, left, height, width around what each map marks.

    Pixels of the enlarged map of at least ``threshold`` of its maximum make segments (pixels that
    touch at an edge or a corner); the box is that of the largest, the first of equal ones. Empty
    (all 0) for a dead map.

    Args:
        maps: (B, h, w).
        size: height and width of the picture.
        threshold: in (0, 1].

    Raises:
        ValueError: a threshold outside (0, 1], maps of another shape or dtype.

    Source: Selvaraju et al., Grad-CAM, section 4.1 (15 % of the maximum, the largest segment).
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a share of the maximum in (0, 1], got {threshold}")
    large = enlarged(maps, size)
    boxes = torch.zeros(len(large), 4, dtype=torch.long, device=large.device)
    if not large.numel():
        return boxes
    highest = large.amax((1, 2), keepdim=True)
    marked = (large >= threshold * highest) & (highest > 0)
    segment = _largest_segment(marked)
    for axis, (begin, length) in ((2, (0, 2)), (1, (1, 3))):
        line = segment.any(axis)
        first = line.int().argmax(1)
        last = line.shape[1] - 1 - line.flip(1).int().argmax(1)
        some = line.any(1)
        boxes[:, begin] = torch.where(some, first, 0)
        boxes[:, length] = torch.where(some, last - first + 1, 0)
    return boxes


def _largest_segment(marked: Tensor) -> Tensor:
    """The largest connected part of each mask (B, H, W)."""
    height, width = marked.shape[1:]
    # numbered backwards, the first of equal ones has the highest number
    index = segments(marked.flip(1, 2)).flip(1, 2).flatten(1)
    counts = index.new_zeros(len(marked), height * width + 1)
    counts.scatter_add_(1, index, torch.ones_like(index))
    counts[:, 0] = 0
    best = height * width - counts.flip(1).argmax(1)
    return marked & (index == best[:, None]).view_as(marked)


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union (B,) of boxes (B, 4) as top, left, height, width; 0 of empty ones.

    In float64. Raises ValueError for boxes of two shapes, or another.
    """
    if boxes.shape != others.shape or boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(
            f"boxes: expected two times (B, 4), got {tuple(boxes.shape)}, {tuple(others.shape)}"
        )
    one, two = boxes.double(), others.double()
    low = torch.maximum(one[:, :2], two[:, :2])
    high = torch.minimum(one[:, :2] + one[:, 2:], two[:, :2] + two[:, 2:])
    common = (high - low).clamp(min=0).prod(1)
    union = one[:, 2:].prod(1) + two[:, 2:].prod(1) - common
    return torch.where(union > 0, common / torch.where(union > 0, union, 1.0), 0.0)
