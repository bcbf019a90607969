"""Means over data sets: statistics of maps, their consistency, how smooth gradients are."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import camkernels as ck
from camkernels import metrics


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(5, 4),
    ).train()  # fmt: skip


# ---- statistics of maps ----


@pytest.mark.parametrize("normalize", [False, True])
def test_statistics_are_means_over_live_maps(normalize: bool) -> None:
    maps = torch.rand(7, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    maps[2] = maps[5] = 0
    entropies, areas, dispersions = [], [], []
    rows, columns = np.mgrid[:5, :6].reshape(2, -1)
    for a_map in maps[[0, 1, 3, 4, 6]].flatten(1).numpy():
        share = a_map / a_map.sum()
        entropies.append(-(share * np.log(share)).sum() / (math.log(30) if normalize else 1))
        covariance = np.cov(np.stack([rows, columns]), aweights=share, bias=True)
        areas.append(math.sqrt(np.linalg.det(covariance)))
        dispersions.append(a_map.var() / a_map.mean() ** 2)
    metric = metrics.MapStatisticsMeans(normalize=normalize)
    for part in (maps[:3], maps[:0], maps[3:]):
        metric.update(part)
    found = {name: float(value) for name, value in metric.compute().items()}
    expected = {"entropy": np.mean(entropies), "area": np.mean(areas),
                "dispersion": np.mean(dispersions), "dead_fraction": 2 / 7}  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-9)


def test_statistics_of_dead_bad_and_negative_maps() -> None:
    metric = metrics.MapStatisticsMeans()
    assert all(value.isnan() for value in metric.compute().values())
    metric.update(torch.zeros(3, 4, 4))
    found = metric.compute()
    assert found["dead_fraction"] == 1
    assert found["entropy"].isnan()
    bad = torch.rand(2, 4, 4)
    bad[1, 2, 2] = math.nan
    metric.update(bad)
    assert metric.compute()["entropy"].isnan()
    metric.reset()
    metric.update(torch.rand(2, 4, 4) - 0.5)
    assert metric.compute()["entropy"].isnan()
    clamped = metrics.MapStatisticsMeans(clamp=True)
    clamped.update(torch.stack([torch.eye(4) - 0.5, -torch.ones(4, 4)]))
    assert float(clamped.compute()["entropy"]) == pytest.approx(math.log(4))
    assert clamped.compute()["dead_fraction"] == 0.5


# ---- consistency ----


def test_consistency_is_the_mean_of_the_scores() -> None:
    net = model()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, 3, 16, 16, generator=generator)
    boxes = torch.tensor(
        [[0, 0, 16, 16], [2, 3, 10, 12], [4, 0, 12, 9], [1, 1, 8, 8], [0, 5, 16, 11]]
    )
    flips = torch.tensor([False, True, False, True, True])
    targets = torch.tensor([0, 1, 2, 3, 0])
    options = {"relu": True, "window_size": 5}
    expected = ck.consistency_scores(net, "3", images, boxes, flips, targets=targets, **options)
    assert float(expected.std()) > 0.01
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    for layer in ("3", net[3]):
        metric = metrics.MapConsistency(net, layer, score_options=options)
        for part in (slice(0, 2), slice(2, 2), slice(2, 5)):
            metric.update(images[part], boxes[part], flips[part], targets[part])
        assert float(metric.compute()) == pytest.approx(float(expected.mean()), abs=1e-6)
        assert not metric.state_dict()
        assert not list(metric.parameters())
    predicted = metrics.MapConsistency(net, "3")
    predicted.update(images, boxes)
    plain = ck.consistency_scores(net, "3", images, boxes)
    assert float(predicted.compute()) == pytest.approx(float(plain.mean()), abs=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    metric.reset()
    assert math.isnan(metric.compute())


# ---- gradients ----


def gradients(count: int) -> Tensor:
    return torch.randn(count, 3, 7, 6, generator=torch.Generator().manual_seed(3))


def test_total_variation_by_hand() -> None:
    ours = gradients(4)
    for one, value in zip(ours.double().numpy(), metrics.total_variation(ours), strict=True):
        varied = np.abs(np.diff(one, axis=1)).sum() + np.abs(np.diff(one, axis=2)).sum()
        assert float(value) == pytest.approx(varied / np.abs(one).sum(), rel=1e-6)
    board = (-1.0) ** (torch.arange(200)[:, None] + torch.arange(200))
    assert float(metrics.total_variation(board[None, None])) == pytest.approx(4, rel=0.01)
    noise = torch.randn(1, 3, 300, 300, generator=torch.Generator().manual_seed(0))
    assert float(metrics.total_variation(noise)) == pytest.approx(2 * math.sqrt(2), rel=0.01)
    assert metrics.total_variation(torch.ones(2, 3, 4, 4)).tolist() == [0, 0]
    assert metrics.total_variation(torch.ones(2, 3, 1, 1)).tolist() == [0, 0]
    torch.testing.assert_close(metrics.total_variation(ours * 1e-30), metrics.total_variation(ours))


def test_agreement_is_a_cosine() -> None:
    ours, smooth = gradients(3), gradients(6)[3:]
    expected = torch.cosine_similarity(ours.flatten(1).double(), smooth.flatten(1).double())
    found = metrics.gradient_agreement(ours, smooth)
    torch.testing.assert_close(found, expected.float())
    assert found.dtype == torch.float32
    tiny = metrics.gradient_agreement(ours * 1e-30, smooth * 1e-30)  # squares below float32
    torch.testing.assert_close(tiny, found)
    torch.testing.assert_close(metrics.gradient_agreement(ours, -2 * ours), -torch.ones(3))
    assert metrics.gradient_agreement(ours, 0 * ours).tolist() == [0, 0, 0]


def test_smoothness_is_a_mean_over_gradients_that_are_not_zero() -> None:
    ours, smooth = gradients(5), gradients(10)[5:]
    ours[3] = 0
    metric = metrics.GradientSmoothness()
    assert all(value.isnan() for value in metric.compute().values())
    metric.update(ours[:2], smooth[:2])
    metric.update(ours[:0], smooth[:0])
    metric.update(ours[2:4], smooth[2:4])
    metric.update(ours[4:])
    live = [0, 1, 2, 4]
    expected = {
        "total_variation": float(metrics.total_variation(ours)[live].mean()),
        "agreement": float(metrics.gradient_agreement(ours, smooth)[:3].mean()),
        "dead_fraction": 0.2,
    }
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found == pytest.approx(expected, rel=1e-6)
    metric.reset()
    metric.update(ours)
    assert metric.compute()["agreement"].isnan()
    ours[1, 2, 3, 3] = math.nan
    metric.update(ours, smooth)
    values = metric.compute()
    assert values["total_variation"].isnan()
    assert values["agreement"].isnan()


def test_smoothgrad_is_smoother_and_agrees_with_itself() -> None:
    net, images = model(), torch.randn(4, 3, 16, 16)
    before = torch.get_rng_state()
    plain = ck.InputGradient(net)(images)
    smooth = ck.SmoothGrad(net, samples=20)(images)
    metric = metrics.GradientSmoothness()
    metric.update(plain, smooth)
    other = metrics.GradientSmoothness()
    other.update(smooth, smooth)
    assert torch.equal(torch.get_rng_state(), before)
    assert float(metric.compute()["agreement"]) < float(other.compute()["agreement"])
    assert float(other.compute()["agreement"]) == pytest.approx(1)


def test_processes_share_sums() -> None:
    maps, ours = torch.rand(5, 4, 4), gradients(5)
    maps[1], ours[4] = 0, 0
    for make, batch in ((metrics.MapStatisticsMeans, maps), (metrics.GradientSmoothness, ours)):
        whole, one, other = make(), make(), make()
        whole.update(batch)
        one.update(batch[:2])
        other.update(batch[2:])
        one.merge_state(other)
        for name, value in whole.compute().items():
            torch.testing.assert_close(one.compute()[name], value, equal_nan=True)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"gradients: expected floating-point \(B, C, H, W\)"):
        metrics.total_variation(torch.ones(3, 4, 4))
    with pytest.raises(ValueError, match="gradients: expected floating-point"):
        metrics.GradientSmoothness().update(torch.ones(1, 3, 4, 4).long())
    with pytest.raises(ValueError, match=r"smooth_gradients: expected floating-point \(5, 3, 7, 6"):
        metrics.gradient_agreement(gradients(5), gradients(4))
    with pytest.raises(ValueError, match="maps"):
        metrics.MapStatisticsMeans().update(torch.ones(3, 4))
