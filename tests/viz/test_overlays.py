"""Overlays and boxes in tensors, against numpy and matplotlib's own colour maps."""

from __future__ import annotations

import math
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
import pytest
import torch
from pytorch_grad_cam.utils.image import show_cam_on_image
from torch import Tensor
from torch.nn import functional as F

from camkernels import metrics, viz

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def enlarged(one: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    wide = cv2.resize(one, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    return np.clip(wide, 0, 1)


def oracle(picture: np.ndarray, one: np.ndarray, colormap: str, alpha: float) -> np.ndarray:
    """(H, W, 3) in 0..255, of a picture (H, W, 3) in [0, 1] and a map (h, w)."""
    scaled = (one - one.min()) / (one.max() - one.min())
    colour = mpl.colormaps[colormap](enlarged(scaled, picture.shape[:2]))[..., :3]
    return 255 * ((1 - alpha) * picture + alpha * colour)


def pictures(batch: int = 3, height: int = 24, width: int = 40, channels: int = 3) -> Tensor:
    return torch.rand(batch, channels, height, width)


def assert_close(got: Tensor, expected: np.ndarray) -> None:
    """Rounded, but for pixels whose map lies on the edge of two of the 256 colours."""
    assert got.dtype == torch.uint8
    off = np.abs(got.numpy() - expected)
    assert (off > 0.501).mean() < 0.01
    assert off.max() < 8


@pytest.mark.parametrize("colormap", ["viridis", "cividis", "jet", "tab10"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_values_are_those_of_numpy_and_matplotlib(colormap: str, alpha: float) -> None:
    images, maps = pictures(), 5 * torch.randn(3, 6, 5) - 2
    got = viz.overlay(images, maps, colormap=colormap, alpha=alpha)
    assert got.shape == (3, 24, 40, 3)
    for picture, one, shown in zip(images, maps, got, strict=True):
        expected = oracle(picture.permute(1, 2, 0).numpy(), one.numpy(), colormap, alpha)
        if colormap == "tab10" and alpha:  # ten colours: an edge is a leap
            assert (np.abs(shown.numpy() - expected) > 0.501).mean() < 0.01
        else:
            assert_close(shown, expected)


def test_the_whole_colour_map_is_used() -> None:
    """A ramp of 256 steps shows each colour of the table once, the ends included."""
    ramp = torch.linspace(0, 1, 256).view(1, 1, 256)
    black = torch.zeros(1, 3, 1, 256)
    got = viz.overlay(black, ramp, alpha=1.0)[0, 0].numpy()
    table = mpl.colormaps["viridis"](np.arange(256), bytes=False)[:, :3]
    assert np.abs(got - 255 * table).max() <= 0.501
    assert not np.array_equal(got[0], got[-1])


def test_defaults_are_viridis_half_and_half() -> None:
    images, maps = pictures(), torch.rand(3, 4, 4)
    named = viz.overlay(images, maps, colormap="viridis", alpha=0.5)
    assert torch.equal(viz.overlay(images, maps), named)
    assert not torch.equal(named, viz.overlay(images, maps, colormap="jet"))
    by_object = viz.overlay(images, maps, colormap=mpl.colormaps["jet"])
    assert torch.equal(by_object, viz.overlay(images, maps, colormap="jet"))


def test_pytorch_grad_cams_is_the_same_blend_before_it_is_divided_by_its_maximum() -> None:
    images, maps = 0.4 * pictures(1), torch.rand(1, 5, 5)
    ours = viz.overlay(images, maps, colormap="jet")[0].numpy().astype(np.float64)
    scaled = enlarged(((maps - maps.min()) / (maps.max() - maps.min()))[0].numpy(), (24, 40))
    theirs = show_cam_on_image(images[0].permute(1, 2, 0).numpy(), scaled, use_rgb=True)
    undone = theirs.astype(np.float64) * ours.max() / 255
    off = np.abs(undone - ours)
    assert np.median(off) < 1.5
    assert off.mean() < 5  # OpenCV's jet is not quite matplotlib's
    assert np.abs(theirs - ours).mean() > 2 * off.mean()


def test_normalisation_is_undone() -> None:
    plain = pictures()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    normalised, maps = (plain - mean) / std, torch.rand(3, 7, 7)
    got = viz.overlay(normalised, maps, mean=MEAN, std=torch.tensor(STD))
    off = (got.int() - viz.overlay(plain, maps).int()).abs()
    assert off.max() <= 1
    assert torch.equal(viz.pictures(plain), (plain * 255).round().byte().permute(0, 2, 3, 1))
    assert (
        viz.pictures(normalised, mean=MEAN, std=STD).int() - viz.pictures(plain)
    ).abs().max() < 2


def test_uint8_pictures_stay_what_they_are() -> None:
    images = torch.randint(0, 256, (2, 3, 9, 11), dtype=torch.uint8)
    assert torch.equal(viz.pictures(images), images.permute(0, 2, 3, 1))
    assert torch.equal(
        viz.overlay(images, torch.rand(2, 3, 3), alpha=0.0), images.permute(0, 2, 3, 1)
    )


def test_pictures_without_colour_are_three_equal_channels() -> None:
    images = pictures(channels=1)
    maps = torch.rand(3, 4, 4)
    assert torch.equal(viz.overlay(images, maps), viz.overlay(images.expand(-1, 3, -1, -1), maps))
    one = viz.pictures(images * 2 - 1, mean=(0.5,), std=(0.5,))
    assert (one.int() - viz.pictures(images)).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    images, maps = pictures(), torch.rand(3, 8, 8)
    got = viz.overlay(images.to(dtype), maps.to(dtype))
    coarse = viz.overlay(images.to(dtype).float(), maps.to(dtype).float())
    assert (got.int() - coarse).abs().max() <= 1


@pytest.mark.parametrize("scale", ["minmax", "max"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (24, 40), (50, 90)])
def test_maps_of_any_size(size: tuple[int, int], scale: str) -> None:
    images, maps = pictures(), torch.rand(3, *size)
    got = viz.overlay(images, maps, scale=scale)
    assert got.shape == (3, 24, 40, 3)
    if size == (24, 40) and scale == "minmax":
        assert_close(
            got[0], oracle(images[0].permute(1, 2, 0).numpy(), maps[0].numpy(), "viridis", 0.5)
        )


def test_a_constant_map_lies_evenly_in_the_lowest_colour() -> None:
    images = pictures(4)
    maps = torch.tensor([0.0, 3.0, -2.0, 1e30]).view(4, 1, 1).expand(4, 5, 5)
    by_max = viz.overlay(images, maps, scale="max")
    assert torch.equal(by_max[[0, 2]], viz.overlay(images, maps)[[0, 2]])  # dead by either scale
    lowest = torch.tensor(mpl.colormaps["viridis"](0)[:3], dtype=torch.float32)
    expected = 255 * (0.5 * images.permute(0, 2, 3, 1) + 0.5 * lowest)
    assert (viz.overlay(images, maps) - expected).abs().max() <= 0.501


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale", ["minmax", "max"])
def test_a_map_that_is_not_finite_is_grey_and_hatched(bad: float, scale: str) -> None:
    images, maps = pictures(), torch.rand(3, 5, 5)
    whole = viz.overlay(images, maps, scale=scale)
    maps[1, 2, 2] = bad
    got = viz.overlay(images, maps, scale=scale)
    assert torch.equal(got[[0, 2]], whole[[0, 2]])  # only its own picture
    assert torch.equal(got[1, ..., 0], got[1, ..., 1])
    assert torch.equal(got[1, ..., 0], got[1, ..., 2])
    white = (got[1, ..., 0] == 255).float().mean()
    assert 0.1 < white < 0.5
    grey = (images[1] * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0) * 0.7 * 255
    under = got[1, ..., 0] != 255
    assert (got[1, ..., 0].float() - grey)[under].abs().max() <= 0.501


def test_the_scale_by_the_maximum_leaves_a_nearly_flat_map_flat() -> None:
    maps = 1 + 0.01 * torch.rand(1, 6, 6)
    maps[0, 0, 0] = 0.99
    images = torch.zeros(1, 3, 6, 6)
    by_max = viz.overlay(images, maps, scale="max", alpha=1.0)
    table = 255 * mpl.colormaps["viridis"]((maps / maps.max())[0].numpy())[..., :3]
    assert np.abs(by_max[0].numpy() - table).max() < 2
    spread = [shown.float().std((0, 1, 2)).max() for shown in (viz.overlay(images, maps), by_max)]
    assert spread[0] > 5 * spread[1]
    negative = torch.tensor([[[-5.0, 1.0]]])
    wide = torch.zeros(1, 3, 1, 8)
    clamped = viz.overlay(wide, negative, scale="max", alpha=1.0)
    zeroed = viz.overlay(wide, negative.clamp(min=0), scale="max", alpha=1.0)
    assert torch.equal(clamped, zeroed)


def test_grey_takes_the_colour_out_of_the_picture_only() -> None:
    images, maps = pictures(), torch.rand(3, 4, 4)
    bare = viz.overlay(images, maps, grey=True, alpha=0.0)
    assert torch.equal(bare[..., 0], bare[..., 2])
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    assert (bare[..., 0] - 255 * (images * weights).sum(1)).abs().max() <= 0.501
    full = viz.overlay(images, maps, grey=True, alpha=1.0)
    assert torch.equal(full, viz.overlay(images, maps, alpha=1.0))


def test_an_empty_batch_gives_an_empty_batch() -> None:
    for scale in ("minmax", "max"):
        got = viz.overlay(torch.rand(0, 3, 8, 9), torch.rand(0, 4, 4), scale=scale)
        assert got.shape == (0, 8, 9, 3)
        assert got.dtype == torch.uint8


def test_layouts_gradients_and_inputs_are_left_alone() -> None:
    images, maps = pictures(), torch.rand(3, 5, 5).requires_grad_()
    before = images.clone()
    got = viz.overlay(images, maps)
    assert not got.requires_grad
    assert torch.equal(images, before)
    assert got.is_contiguous()
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(viz.overlay(last, maps.detach().mT.contiguous().mT), got)


IMAGES, MAPS = torch.rand(2, 3, 8, 8), torch.rand(2, 4, 4)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"images": [1]}, TypeError, r"images: expected a tensor \(B, 3, H, W\), got list"),
    ({"images": IMAGES[0]}, ValueError, r"images: .* got \(3, 8, 8\)"),
    ({"images": torch.rand(2, 4, 8, 8)}, ValueError, r"images: .* got \(2, 4, 8, 8\)"),
    ({"images": torch.rand(2, 3, 0, 8)}, ValueError, r"images: .* got \(2, 3, 0, 8\)"),
    ({"images": IMAGES.long()}, TypeError, "images: .* got torch.int64"),
    ({"images": IMAGES * 255}, ValueError, r"images: .* \[0, 1\], got .* pass mean= and std="),
    ({"images": IMAGES - 1}, ValueError, r"images: expected values in \[0, 1\], got -"),
    ({"images": IMAGES / 0}, ValueError, "images: expected finite"),
    ({"images": IMAGES, "mean": MEAN}, ValueError, "both or neither, got mean only"),
    ({"mean": (0.5,), "std": STD}, ValueError, "mean: expected 3 numbers"),
    ({"images": IMAGES.byte(), "mean": MEAN, "std": STD}, ValueError, "none for uint8 images"),
    ({"maps": None}, TypeError, r"maps: expected a tensor \(B, h, w\), got NoneType"),
    ({"maps": MAPS.byte()}, TypeError, "maps: .* got torch.uint8"),
    ({"maps": MAPS[:1]}, ValueError, r"maps: expected \(2, h, w\), got \(1, 4, 4\)"),
    ({"maps": MAPS[:, None]}, ValueError, r"maps: .* got \(2, 1, 4, 4\)"),
    ({"maps": MAPS[:, :0]}, ValueError, r"maps: .* got \(2, 0, 4\)"),
    ({"maps": MAPS.to("meta")}, ValueError, "maps: expected on cpu .* got meta"),
    ({"alpha": 1.5}, ValueError, r"alpha: expected a share in \[0, 1\], got 1.5"),
    ({"alpha": math.nan}, ValueError, "alpha: "),
    ({"scale": "sum"}, ValueError, "scale: expected one of minmax, max, got 'sum'"),
    ({"colormap": "virids"}, ValueError, "none named 'virids'; near names: 'viridis'"),
    ({"colormap": "JET"}, ValueError, "near names: 'jet'"),
    ({"colormap": "?"}, ValueError, "some names: 'viridis', 'cividis', 'jet'"),
    ({"colormap": 3}, TypeError, "colormap: .* got int"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "kind", "message"), BAD)
def test_bad_input_is_named(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        viz.overlay(**{"images": IMAGES, "maps": MAPS, **given})


def test_boxes_are_framed_inside_their_edges_with_a_rim() -> None:
    grey = torch.full((1, 12, 14, 3), 100, dtype=torch.uint8)
    got = viz.draw_boxes(grey, torch.tensor([[3, 4, 6, 7]]), colour=(255, 0, 10), width=1)[0]
    expected = grey[0].clone()
    expected[2:10, 3:12] = 0
    expected[3:9, 4:11] = torch.tensor([255, 0, 10], dtype=torch.uint8)
    expected[4:8, 5:10] = 0
    expected[5:7, 6:9] = 100
    assert torch.equal(got, expected)
    assert bool((grey == 100).all())  # a new one


def test_boxes_without_area_or_with_nan_are_not_drawn() -> None:
    grey = torch.full((4, 9, 9, 3), 50, dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 0, 0], [2, 2, 0, 5], [math.nan] * 4, [1, 1, 5, 5]])
    got = viz.draw_boxes(grey, boxes)
    assert torch.equal(got[:3], grey[:3])
    assert not torch.equal(got[3], grey[3])


def test_several_boxes_per_picture_and_none() -> None:
    grey = torch.full((2, 20, 20, 3), 50, dtype=torch.uint8)
    first, second = torch.tensor([[1, 1, 7, 7]]), torch.tensor([[11, 11, 7, 7]])
    both = torch.stack([first, second], 1).expand(2, 2, 4)
    once = viz.draw_boxes(viz.draw_boxes(grey, first.expand(2, 4)), second.expand(2, 4))
    assert torch.equal(viz.draw_boxes(grey, both), once)
    none = viz.draw_boxes(grey, both[:, :0])
    assert torch.equal(none, grey)
    assert none.data_ptr() != grey.data_ptr()


def test_the_box_of_a_map_frames_what_is_strong() -> None:
    maps = torch.zeros(1, 16, 16)
    maps[0, 4:8, 6:12] = 1
    box = metrics.box_of_map(maps, (16, 16), 0.5)
    got = viz.draw_boxes(torch.zeros(1, 16, 16, 3, dtype=torch.uint8), box, width=1)[0, ..., 0]
    frame = F.pad(torch.zeros(2, 4), (1, 1, 1, 1), value=255)
    assert torch.equal(got[4:8, 6:12].float(), frame)
    assert int((got > 0).sum()) == 16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"boxes": torch.zeros(3, 4)}, r"boxes: expected \(2, 4\) or \(2, n, 4\), got \(3, 4\)"),
        ({"boxes": torch.zeros(2, 5)}, r"boxes: .* got \(2, 5\)"),
        ({"pictures": IMAGES}, "pictures: expected uint8, got torch.float32"),
        ({"pictures": IMAGES.byte()}, r"pictures: expected \(B, H, W, 3\), got \(2, 3, 8, 8\)"),
        ({"width": 0}, "width: expected at least 1 pixel, got 0"),
        ({"colour": (0, 0, 256)}, "colour: expected three numbers from 0 to 255"),
    ],
)
def test_bad_boxes_are_named(given: dict[str, Any], message: str) -> None:
    good = {"pictures": torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "boxes": torch.zeros(2, 4)}
    with pytest.raises((ValueError, TypeError), match=message):
        viz.draw_boxes(**{**good, **given})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_is_the_same_and_stays_there() -> None:
    images, maps = pictures(), torch.rand(3, 5, 5)
    maps[1] = math.nan
    got = viz.overlay(images.cuda(), maps.cuda())
    boxed = viz.draw_boxes(got, torch.tensor([[1, 1, 9, 9]] * 3, device="cuda"))
    assert got.is_cuda
    assert boxed.is_cuda
    assert (got.cpu().int() - viz.overlay(images, maps)).abs().float().mean() < 0.5
