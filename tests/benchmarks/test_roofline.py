"""The roofline: known work first, then what it must say of itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks import loops, roofline
from benchmarks.roofline import PLAIN, PRESETS, Rates, Work

RATES = Rates(bandwidth=100, tflops=10, source="made up")  # 1e11 bytes/s, 1e13 FLOP/s


def test_the_longer_of_arithmetic_and_memory_counts() -> None:
    work = Work(products=((10**10, 10), (10, 10**8)), passes=4, elements=10**7)
    products, passes = work.milliseconds(RATES)
    assert products == pytest.approx(1 + 1)  # 1e10 FLOP take 1 ms, 1e8 bytes take 1 ms
    assert passes == pytest.approx(1e3 * 4 * 1e7 * 2 / 1e11)
    slower = work.milliseconds(RATES.reached(0.5, 0.25))
    assert slower[0] == pytest.approx(2 + 4)
    assert slower[1] == pytest.approx(4 * passes)


class Two(nn.Module):
    """A convolution, pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.bn, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


def test_products_of_a_step() -> None:
    """Of a convolution that reads leaves: forward and the weights' gradient; of the linear layer
    all three."""

    class Wide(Two):  # the images have three channels
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.pad(x, (0, 0, 0, 0, 0, 1)))

    make: Callable[[], nn.Module] = Wide
    found = roofline.products(loops.plain, make, 2, 6)
    convolution, linear = 2 * 2 * 36 * 8 * 4 * 9, 2 * 2 * 8 * 10
    assert sorted(flops for flops, _ in found) == sorted([convolution] * 2 + [linear] * 3)
    x, z, w = 2 * 4 * 36, 2 * 8 * 36, 8 * 4 * 9
    assert [b for f, b in found if f == convolution] == [2 * (x + z + w)] * 2  # of bfloat16
    assert roofline.norm_elements(make, 2, 6) == z


@pytest.mark.slow
def test_a_plain_step_of_resnet18_is_three_passes_over_its_convolutions() -> None:
    pytest.importorskip("torchvision", reason="make test installs it")
    found = roofline.count("resnet18", 2, 64, (5, 32), {PLAIN: loops.plain})
    (work,) = found.values()
    forward = 2 * 1.814e9 * (64 / 224) ** 2 * 2  # multiply-adds of torchvision's table, two images
    assert work.flops == pytest.approx(3 * forward, rel=0.1)
    assert 12 < work.passes < 20


def test_tables_say_what_they_are() -> None:
    work = {
        PLAIN: Work(((10**12, 10**9),), 16, 10**8),
        "other": Work(((2 * 10**12, 1),), 32, 10**8),
    }
    text = roofline.document(work, PRESETS)
    assert text.startswith("# Predicted, not measured")
    rows = [line for line in text.splitlines() if line.startswith(("| plain", "| other"))]
    assert len(rows) == 2 * len(PRESETS)
    assert all(row.endswith("| not measured |") for row in rows)
    assert all(rates.source in text for rates in PRESETS.values())
    for row in roofline.table(work, RATES).splitlines()[2:]:
        assert " nan " not in row
    assert torch.bfloat16 == roofline.DTYPE
