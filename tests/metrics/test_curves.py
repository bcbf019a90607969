"""Insertion AUC of cases made by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from camkernels.metrics.curves import blurred, class_score, insertion_auc, insertion_curve, ranks
from camkernels.metrics.regions import enlarged


def descending(size: int) -> Tensor:
    """A map (1, size, size) whose order is row by row."""
    return torch.arange(size * size, 0, -1.0).view(1, size, size)


def checkered(size: int) -> Tensor:
    """A picture (1, 3, size, size) that is 10 here and -10 there, so that its blur is near 0."""
    index = torch.arange(size)
    signs = 1 - 2 * ((index[:, None] + index) % 2)
    return 10.0 * signs.expand(1, 3, -1, -1)


@pytest.mark.parametrize("steps", [1, 7, 16, 64])
def test_a_score_that_counts_pixels_gives_a_half(steps: int) -> None:
    images = checkered(8)

    def score(pictures: Tensor, owner: Tensor) -> Tensor:
        return (pictures[:, 0].abs() > 5).flatten(1).float().mean(1)

    shares, scores = insertion_curve(score, images, descending(8), steps=steps)
    torch.testing.assert_close(scores[0].double(), shares, atol=1e-7, rtol=0)
    assert (shares[0], shares[-1], len(shares)) == (0, 1, steps + 1)
    area = insertion_auc(score, images, descending(8), steps=steps)
    assert area.item() == pytest.approx(0.5, abs=1e-6)


def test_a_constant_score_is_its_own_area() -> None:
    area = insertion_auc(lambda p, o: torch.full((len(p),), 0.3), torch.rand(2, 3, 6, 6),
                         torch.rand(2, 3, 3), steps=9)  # fmt: skip
    torch.testing.assert_close(area, torch.tensor([0.3, 0.3]))


def test_one_decisive_pixel_counts_from_when_it_is_revealed() -> None:
    """The score is 1 once the pixel that the map ranks at place r is shown, else 0."""
    images = checkered(4)
    steps = 16
    for rank in (0, 5, 15):
        row, column = divmod(rank, 4)

        def score(pictures: Tensor, owner: Tensor, r: int = row, c: int = column) -> Tensor:
            return (pictures[:, 0, r, c].abs() > 5).float()

        area = insertion_auc(score, images, descending(4), steps=steps).item()
        # 0 up to step r, 1 from step r + 1, a straight line between
        assert area == pytest.approx(1 - (rank + 0.5) / steps)


def test_a_good_order_beats_a_bad_one() -> None:
    images = checkered(8)
    weight = torch.zeros(8, 8)
    weight[2:4, 2:4] = 1.0

    def score(pictures: Tensor, owner: Tensor) -> Tensor:
        shown = (pictures[:, 0].abs() > 5).float()
        return (shown * weight).flatten(1).sum(1) / weight.sum()

    good, bad = (insertion_auc(score, images, m[None], steps=64) for m in (weight, -weight))
    assert good.item() == pytest.approx(1 - 2 / 64)
    assert bad.item() == pytest.approx(2 / 64)


def test_the_ends_are_the_blurred_picture_and_the_picture() -> None:
    images, seen = torch.rand(2, 3, 16, 16), []

    def score(pictures: Tensor, owner: Tensor) -> Tensor:
        seen.append((pictures, owner))
        return pictures.flatten(1).mean(1)

    insertion_curve(score, images, torch.rand(2, 4, 4), steps=3, batch_size=3)
    pictures, owner = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert max(len(p) for p, _ in seen) == 3
    assert owner.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert torch.equal(pictures[[0, 4]], blurred(images))
    assert torch.equal(pictures[[3, 7]], images)


def test_batches_do_not_matter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images, maps = torch.rand(3, 3, 12, 12), torch.rand(3, 4, 4)
    score = class_score(model, torch.tensor([0, 2, 3]))
    whole = insertion_auc(score, images, maps, steps=10, batch_size=999)
    parts = insertion_auc(score, images, maps, steps=10, batch_size=4)
    torch.testing.assert_close(whole, parts)
    alone = insertion_auc(class_score(model, torch.tensor([2])), images[1:2], maps[1:2], steps=10)
    torch.testing.assert_close(whole[1:2], alone)


def test_a_picture_has_the_same_values_alone_and_in_a_batch() -> None:
    """Bitwise: scores that differ by rounding are the model's; the order of pixels is not."""
    generator = torch.Generator().manual_seed(3)
    images, maps = torch.rand(9, 3, 30, 26), torch.rand(9, 7, 5, generator=generator)
    maps[4] = (maps[4] * 3).round()  # ties and near ties

    def score(pictures: Tensor, owner: Tensor) -> Tensor:
        return pictures[:, 1, 11, 13]  # no sum that a batch could round otherwise

    large = enlarged(maps, (30, 26))
    areas = insertion_auc(score, images, maps, steps=30 * 26, batch_size=100)
    for index in range(len(maps)):
        one = slice(index, index + 1)
        assert torch.equal(enlarged(maps[one], (30, 26)), large[one])
        assert torch.equal(insertion_auc(score, images[one], maps[one], steps=30 * 26), areas[one])


@pytest.mark.parametrize("small", [(1, 1), (1, 4), (7, 5), (30, 26), (40, 31)])
def test_maps_are_enlarged_as_torch_does(small: tuple[int, int]) -> None:
    maps = torch.rand(3, *small, dtype=torch.float64)
    expected = F.interpolate(maps[:, None], (30, 26), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(enlarged(maps, (30, 26)), expected, atol=1e-12, rtol=0)
    assert enlarged(maps.half(), (30, 26)).dtype == torch.float32


def test_pixels_beyond_the_outermost_centres_are_exactly_equal() -> None:
    large = enlarged(torch.rand(50, 3, 3) * 1e-3 + 1, (21, 21))
    for line in (large, large.mT):
        for side in (line[:, :4], line[:, -4:]):
            assert torch.equal(side, side[:, :1].expand_as(side))


def test_equal_values_keep_their_order() -> None:
    maps = torch.tensor([[[1.0, 2.0], [1.0, 2.0]]])
    assert ranks(maps).tolist() == [[2, 0, 3, 1]]
    assert ranks(torch.zeros(1, 30, 30)).tolist() == [list(range(900))]


def test_the_blur_is_a_gaussian() -> None:
    images = torch.zeros(1, 2, 21, 21)
    images[0, 1, 10, 10] = 1.0
    soft = blurred(images)
    line = torch.exp(-((torch.arange(11.0) - 5) ** 2) / 50)
    line = line / line.sum()
    torch.testing.assert_close(soft[0, 1, 5:16, 5:16], line[:, None] * line)
    assert soft[0, 1, 4].abs().max() == 0
    assert soft[0, 0].abs().max() == 0  # channels do not mix
    flat = blurred(torch.ones(1, 3, 21, 21))
    assert flat[0, 0, 10, 10] == pytest.approx(1)
    assert flat[0, 0, 0, 0] < 0.5  # zeros outside


def test_the_map_is_enlarged() -> None:
    """A 2 x 2 map with its peak at the bottom right reveals that quarter first."""
    maps = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]])
    images = checkered(8)

    def score(pictures: Tensor, owner: Tensor) -> Tensor:
        return (pictures[:, 0, 6:, 6:].abs() > 5).flatten(1).float().mean(1)

    _, scores = insertion_curve(score, images, maps, steps=16)
    assert scores[0, 1] == 1  # the 4 pixels of the corner, all beyond the last centre, come first


def test_a_map_that_is_not_finite_has_no_area() -> None:
    maps = torch.rand(3, 2, 2)
    maps[1, 0, 0] = math.nan
    area = insertion_auc(lambda p, o: torch.ones(len(p)), torch.rand(3, 3, 4, 4), maps, steps=4)
    assert area.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("steps", "maps", "message"),
    [
        (0, (2, 3, 3), "steps: expected 1 to 16"),
        (17, (2, 3, 3), "steps: expected 1 to 16"),
        (4, (1, 3, 3), r"maps: expected \(2, h, w\), got \(1, 3, 3\)"),
        (4, (2, 1, 3, 3), r"maps: expected \(2, h, w\)"),
    ],
)
def test_mistakes_are_named(steps: int, maps: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        insertion_curve(lambda p, o: torch.ones(len(p)), torch.rand(2, 3, 4, 4),
                        torch.rand(maps), steps=steps)  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pictures_come_as_they_are_laid_out(layout: torch.memory_format) -> None:
    images = torch.rand(2, 3, 6, 6).contiguous(memory_format=layout)
    seen = []

    def score(pictures: Tensor, owner: Tensor) -> Tensor:
        seen.append(pictures.is_contiguous(memory_format=layout))
        return pictures.flatten(1).mean(1)

    maps = descending(6).expand(2, 6, 6)
    found = insertion_auc(score, images, maps, steps=5, batch_size=4)
    assert seen == [True] * 3
    torch.testing.assert_close(found, insertion_auc(score, images.contiguous(), maps, steps=5))
