"""Models that write over the output of the layer that is explained, as torchvision's DenseNet does
by a function: its maps are those of the model that does not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camkernels as ck


class Net(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.inplace = nn.Conv2d(3, 4, 3), inplace
        self.head = nn.Sequential(nn.Conv2d(4, 5, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        values = F.relu(self.layer(x), inplace=self.inplace)
        logits: Tensor = self.head(values).flatten(1)
        return logits


METHODS: dict[str, Callable[..., Any]] = {
    "GradCAM": ck.GradCAM,
    "GradCAMPlusPlus": ck.GradCAMPlusPlus,
    "XGradCAM": ck.XGradCAM,
    "LayerCAM": ck.LayerCAM,
    "HiResCAM": ck.HiResCAM,
    "ScoreCAM": ck.ScoreCAM,
}


def images() -> Tensor:
    return torch.rand(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_explain(name: str, frozen: bool) -> None:
    expected, found = (
        METHODS[name](Net(inplace).requires_grad_(not frozen), "layer", relu=False).explain(
            images(), [4, 1]
        )
        for inplace in (False, True)
    )
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_gradients(mode: Callable[[], AbstractContextManager[None]]) -> None:
    maps = []
    for inplace in (False, True):
        model = Net(inplace)
        with ck.GradCAM(model, "layer") as cam, mode():
            plain = Net(inplace)(images())
            logits = model(images())
            assert torch.equal(logits, plain)
            assert not logits.requires_grad
            maps.append(cam(logits, [4, 1]))
    torch.testing.assert_close(maps[1], maps[0], rtol=0, atol=0)


def test_in_a_recorded_forward_it_is_told() -> None:
    """There a copy would be memory that training pays for."""
    model = Net(True)
    with ck.GradCAM(model, "layer") as cam:
        logits = model(images())
        with pytest.raises(ck.TapError, match="'layer' was changed in place after the tap"):
            cam(logits, [4, 1])
