"""ROAD against dense solves, loops over single pictures, and pytorch-grad-cam."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from camkernels import metrics
from camkernels.metrics.curves import class_score

SIZE = (13, 11)


def solved(image: Tensor, removed: Tensor) -> Tensor:
    """The system written out, one equation per removed pixel."""
    height, width = removed.shape
    unknown = removed.nonzero().tolist()
    place = {tuple(pixel): row for row, pixel in enumerate(unknown)}
    system, right = np.zeros((len(unknown),) * 2), np.zeros((len(unknown), len(image)))
    for row, (i, j) in enumerate(unknown):
        for di, dj in itertools.product((-1, 0, 1), repeat=2):
            other = (i + di, j + dj)
            inside = 0 <= other[0] < height and 0 <= other[1] < width
            if not inside or (di, dj) == (0, 0):
                continue
            weight = 1 / 12 if di and dj else 1 / 6
            system[row, row] += weight
            if other in place:
                system[row, place[other]] -= weight
            else:
                right[row] += weight * image[:, other[0], other[1]].double().numpy()
    found = image.clone()
    values = np.linalg.solve(system, right)
    for (i, j), value in zip(unknown, values, strict=True):
        found[:, i, j] = torch.from_numpy(value)
    return found


def pictures(count: int, size: tuple[int, int] = SIZE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 3, *size, generator=generator)
    shares = torch.linspace(0.1, 0.9, count)[:, None, None]
    return images, torch.rand(count, *size, generator=generator) < shares


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_imputed_pixels_solve_the_system(dtype: torch.dtype) -> None:
    images, removed = pictures(6)
    removed[1] = False
    removed[1, 2:12, 1:] = True  # one large hole, which reaches the border
    images = images.to(dtype)
    found = metrics.imputed(images, removed, noise=0)
    for image, gone, one in zip(images, removed, found, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(one, solved(image, gone), atol=tolerance, rtol=0)
    assert torch.equal(found.movedim(1, 3)[~removed], images.movedim(1, 3)[~removed])


def test_imputed_pictures_are_those_of_pytorch_grad_cam() -> None:
    road = pytest.importorskip("pytorch_grad_cam.metrics.road")
    images, removed = pictures(4, (40, 36))
    removed[3] = True
    removed[3, :5, :7] = False  # a hole wide enough for many steps of the solve
    found = metrics.imputed(images, removed, noise=0)
    impute = road.NoisyLinearImputer(noise=0)
    for image, gone, one in zip(images, removed, found, strict=True):
        torch.testing.assert_close(one, impute(image, (~gone).float()), atol=1e-4, rtol=0)


def test_all_or_nothing_removed() -> None:
    images, _ = pictures(2)
    nothing = torch.zeros(2, *SIZE, dtype=torch.bool)
    assert torch.equal(metrics.imputed(images, nothing), images)
    assert not metrics.imputed(images, ~nothing, noise=0).any()
    single = images[:, :, :1, :1]
    assert torch.equal(metrics.imputed(single, nothing[:, :1, :1]), single)
    assert not metrics.imputed(single, ~nothing[:, :1, :1], noise=0).any()
    assert metrics.imputed(images[:0], nothing[:0]).shape == (0, 3, *SIZE)
    flat = metrics.imputed(torch.full((1, 3, *SIZE), 7.0), torch.rand(1, *SIZE) < 0.9, noise=0)
    assert torch.equal(flat, torch.full_like(flat, 7.0))


def test_what_is_not_finite_stays_in_its_channel() -> None:
    images, removed = pictures(3)
    expected = metrics.imputed(images, removed, noise=0)
    row, column = (~removed[1]).nonzero()[0].tolist()
    images[1, 2, row, column] = math.nan
    found = metrics.imputed(images, removed, noise=0)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(found[1, :2], expected[1, :2])
    assert found[1, 2][removed[1]].isnan().all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_pictures_does_not_matter(scale: float) -> None:
    images, removed = pictures(3)
    expected = metrics.imputed(images, removed, noise=0)
    found = metrics.imputed(images * scale, removed, noise=0) / scale
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_noise_is_the_same_for_all_and_the_random_state_is_left() -> None:
    images, removed = pictures(3, (50, 60))
    before = torch.get_rng_state()
    clean = metrics.imputed(images, removed, noise=0)
    noisy = metrics.imputed(images, removed, noise=0.1, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    grain = (noisy - clean).movedim(1, 3)
    assert not grain[~removed].any()
    assert float(grain[removed].std()) == pytest.approx(0.1, rel=0.05)
    both = removed[1] & removed[2]
    torch.testing.assert_close(grain[1][both], grain[2][both], atol=1e-6, rtol=0)
    alone = metrics.imputed(images[1:2], removed[1:2], noise=0.1, seed=4)
    torch.testing.assert_close(alone, noisy[1:2], atol=1e-6, rtol=0)
    assert not torch.equal(metrics.imputed(images, removed, noise=0.1, seed=5), noisy)


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(3),
                        nn.Flatten(), nn.Linear(54, 4)).double()  # fmt: skip
    with torch.no_grad():
        net[-1].weight.mul_(9)
    return net.train()


def by_hand(net: nn.Module, image: Tensor, a_map: Tensor, target: int, percentile: float) -> Any:
    """Change of the score without the most, and the least, relevant."""

    def score(picture: Tensor) -> float:
        with torch.no_grad():
            return float(copy.deepcopy(net).eval()(picture[None]).softmax(1)[0, target])

    changes = []
    for ranked in (a_map, 1 - a_map):
        removed = ranked >= float(np.percentile(ranked.numpy(), percentile))
        changes.append(score(solved(image, removed)) - score(image))
    return changes


def test_scores_are_those_of_a_loop() -> None:
    net, targets = model(), torch.tensor([0, 1, 2, 3])
    images = pictures(4)[0].double()
    maps = torch.rand(4, *SIZE, generator=torch.Generator().manual_seed(2)).double()
    expected = [
        np.mean([by_hand(net, *one, q) for q in (20, 40, 60, 80)], 0)
        for one in zip(images, maps, targets.tolist(), strict=True)
    ]
    with torch.no_grad():
        score = class_score(copy.deepcopy(net).eval(), targets)
        found = metrics.road(score, images, maps, noise=0, batch_size=5)
    most, least = torch.from_numpy(np.array(expected)).unbind(1)
    torch.testing.assert_close(found.most_relevant_first, most)
    torch.testing.assert_close(found.least_relevant_first, least)
    torch.testing.assert_close(found.combined, (least - most) / 2)
    assert float((most - least).abs().min()) > 1e-4

    modes = [m.training for m in net.modules()]
    metric = metrics.ROAD(net, noise=0, batch_size=7)
    metric.update(images[:1], maps[:1], targets[:1])
    metric.update(images[1:], maps[1:], targets[1:])
    means = metric.compute()
    assert set(means) == set(metrics.ROADScores._fields)
    for name, value in found._asdict().items():
        assert float(means[name]) == pytest.approx(float(value.mean()), rel=1e-9)
    assert [m.training for m in net.modules()] == modes
    metric.update(images[:0], maps[:0], targets[:0])
    assert float(metric.compute()["combined"]) == float(means["combined"])
    metric.reset()
    assert math.isnan(metric.compute()["combined"])


def test_scores_are_those_of_pytorch_grad_cam() -> None:
    peer = pytest.importorskip("pytorch_grad_cam.metrics.road")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    net = model().float().eval()
    images = pictures(3)[0]
    maps = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(2))
    wanted = [targets.ClassifierOutputSoftmaxTarget(c) for c in (0, 1, 2)]
    expected = peer.ROADCombined(percentiles=[20, 40, 60, 80])(images, maps.numpy(), wanted, net)
    score = class_score(net, torch.tensor([0, 1, 2]))
    found = metrics.road(score, images, maps)
    # theirs has other noise, of 0.01
    np.testing.assert_allclose(found.combined.numpy(), expected, atol=5e-3)
    assert np.abs(expected).max() > 0.02


def test_each_percentile_removes_its_share_whatever_is_equal() -> None:
    """A rectified map is zero in many places: those go in the order of rows."""
    maps = torch.zeros(2, 4, 5)
    maps[0, 2:, 3] = torch.tensor([2.0, 1.0])
    seen: list[Tensor] = []

    def score(images: Tensor, owner: Tensor) -> Tensor:
        seen.append(images[:, 0])
        return images.flatten(1).sum(1)

    metrics.road(score, torch.full((2, 3, 4, 5), 7.0).index_fill(3, torch.tensor(4), -9.0), maps,
                 percentiles=(50,), noise=1.0, batch_size=100)  # fmt: skip
    plain = torch.full((4, 5), 7.0).index_fill(1, torch.tensor(4), -9.0)
    changed = (seen[0] != plain).view(2, 2, 4, 5)  # picture, most or least first
    assert changed.flatten(2).sum(2).tolist() == [[10, 10], [10, 10]]  # 20 - ceil(0.5 * 19)
    assert changed[0, 0, 2:, 3].all()
    assert not changed[0, 1, 2:, 3].any()
    assert torch.equal(changed[1, 0], changed[1, 1])  # a dead map: first of all rows, both times
    assert changed[1, 0, :2].all()


def test_dead_single_and_bad_maps() -> None:
    images = pictures(4)[0]
    maps = torch.rand(4, 3, 3)
    maps[0], maps[2, 1, 1] = 0, math.nan
    score = class_score(model().float().eval(), torch.tensor([0, 1, 2, 3]))
    found = metrics.road(score, images, maps)
    assert float(found.combined[0]) == pytest.approx(0, abs=1e-6)
    for values in found:
        assert values.isnan().tolist() == [False, False, True, False]
    single = metrics.road(score, images, maps[:, :1, :1])
    assert single.combined.isfinite().all()
    torch.testing.assert_close(single.combined, torch.zeros(4), atol=1e-6, rtol=0)
    alone = metrics.road(class_score(model().float().eval(), torch.tensor([1])), images[1:2],
                         maps[1:2])  # fmt: skip
    for one, all_of_them in zip(alone, found, strict=True):
        torch.testing.assert_close(one, all_of_them[1:2], atol=1e-5, rtol=0)


def test_what_is_refused() -> None:
    images, removed = pictures(2)
    score = class_score(model(), torch.tensor([0, 1]))
    for bad in ((), (0,), (100,), (50, 120)):
        with pytest.raises(ValueError, match="percentiles: expected some"):
            metrics.road(score, images, torch.rand(2, 3, 3), percentiles=bad)
        with pytest.raises(ValueError, match="percentiles: expected some"):
            metrics.ROAD(model(), percentiles=bad)
    with pytest.raises(ValueError, match="noise"):
        metrics.imputed(images, removed, noise=-1)
    with pytest.raises(ValueError, match="noise"):
        metrics.ROAD(model(), noise=math.nan)
    with pytest.raises(ValueError, match="batch_size"):
        metrics.road(score, images, torch.rand(2, 3, 3), batch_size=0)
    with pytest.raises(ValueError, match=r"maps: expected \(2, h, w\), got \(1, 3, 3\)"):
        metrics.road(score, images, torch.rand(1, 3, 3))
    with pytest.raises(ValueError, match=r"removed: expected bool \(2, 13, 11\)"):
        metrics.imputed(images, removed.float())
    with pytest.raises(ValueError, match="removed"):
        metrics.imputed(images, removed[:1])
