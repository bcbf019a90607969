"""Boxes of maps against true boxes: what is shown, which layers, the summary."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from camtrain import localisation
from camtrain.config import FitConfig
from camtrain.data.module import CamtrainData
from camtrain.data.whole import WholePictures
from camtrain.errors import CamtrainError
from camtrain.models import build_model
from camtrain.trained import Trained
from dog_files import TinyDogs
from torch import Tensor, nn

from camkernels import viz

Tiny = Callable[..., FitConfig]


def test_pictures_are_spread_over_those_that_are_right() -> None:
    rows = [{"true": "a", "predicted": "a" if i % 2 else "b"} for i in range(40)]
    assert localisation._chosen(rows) == [1, 7, 13, 21, 27, 33]
    rows = [{"true": "a", "predicted": "a" if i == 5 else "b"} for i in range(7)]
    assert localisation._chosen(rows) == [5, 0, 1, 2, 3, 4]
    assert localisation._chosen(rows[:2]) == [0, 1]


class Shared(nn.Module):
    """Registered in another order than it runs, with a convolution that runs twice, one whose
    output is a single pixel, and activations in place behind convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Conv2d(8, 8, 3, padding=1)
        self.early = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.early(x))
        x = x * self.gate(self.pool(x)).sigmoid()
        x = self.relu(self.late(self.twice(self.twice(x))))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def test_layers_are_the_last_convolutions_in_the_order_they_run_in() -> None:
    torch.manual_seed(0)
    model = Shared().eval()
    images = torch.rand(2, 3, 16, 16)
    assert localisation.last_convolutions(model, images) == ["early", "late"]
    deep = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(9)))
    names = localisation.last_convolutions(deep, images)
    assert names == ["3", "4", "5", "6", "7", "8"]
    assert not any(m._forward_hooks for m in model.modules())
    found = localisation._layer_maps(
        Trained("run", model, "late", 16, ("a", "b")), images, torch.tensor([0, 1])
    )
    assert model.relu.inplace
    kept: list[Tensor] = []
    handle = model.late.register_forward_hook(lambda *passed: kept.append(passed[2].clone()))
    model(images)
    handle.remove()
    # d logit / d late = w / (16 x 16) where the ReLU passes
    (after,) = kept
    gradient = model.fc.weight[:, :, None, None] * (after > 0) / 256
    maps = (gradient.mean((2, 3), keepdim=True) * after).sum(1).relu()
    torch.testing.assert_close(found["late"], maps.detach())


def test_a_figure_has_the_heatmaps_and_the_boxes(
    on_dogs: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on_dogs()
    data = CamtrainData(config)
    torch.manual_seed(0)
    model = build_model(config, 2)
    with monkeypatch.context() as patch:
        patch.setattr("camtrain.data.whole.CamtrainData", None)  # nothing is read twice
        found = localisation.evaluate(model, "layer3", data, config, lambda line: None)
    assert model.training
    assert [one.shape for one in found.shown.layers.values()] == [
        (4, 16, 16), (4, 16, 16), (4, 16, 16), (4, 8, 8), (4, 8, 8), (4, 8, 8),
    ]  # fmt: skip
    figure = localisation.compared(found.shown, "title")
    cells = figure.axes[: 4 * 5]
    assert [axis.get_title() for axis in cells[:5]] == [
        "input", "CAM", "Grad-CAM", "CAM", "Grad-CAM",
    ]  # fmt: skip
    for row, line in zip(found.shown.rows, np.array(cells).reshape(4, 5), strict=True):
        assert [axis.get_xlabel() for axis in line] == [
            f"says {row['predicted']}", "", "", f"IoU {row['cam_iou']:.2f}",
            f"IoU {row['gradcam_iou']:.2f}",
        ]  # fmt: skip
    shown = np.asarray(cells[2].images[0].get_array())
    assert np.array_equal(shown, viz.overlay(found.shown.images, found.shown.maps["gradcam"],
                                             alpha=1.0)[0].numpy())  # fmt: skip
    whole = WholePictures(config)
    for i, row in enumerate(found.shown.rows):
        index = [whole.name(k) for k in range(4)].index(row["picture"])
        assert torch.equal(whole[index]["images"], found.shown.images[i])
        assert torch.equal(whole[index]["boxes"], found.shown.boxes[i])


def test_no_picture_that_can_be_read(on_dogs: Tiny, kennel: TinyDogs) -> None:
    for index in range(4):
        kennel.picture("test", index).write_bytes(b"no picture")
    config = on_dogs()
    data = CamtrainData(config)
    model = build_model(config, 2)
    localisation.check(config, data, model)  # there is none to try it on
    with pytest.raises(CamtrainError, match=r"no test picture could be read \(4 are damaged\)"):
        localisation.evaluate(model, "layer3", data, config, lambda line: None)
    assert model.training


def test_the_summary_keeps_what_is_right_apart() -> None:
    values = ((0.8, 0.6, "a"), (float("nan"), 0.2, "a"), (0.1, 0.4, "b"))
    rows = [{"true": "a", "predicted": says, "cam_iou": one, "gradcam_iou": other}
            for one, other, says in values]  # fmt: skip
    table = [{"run": "run", "method": method, "pictures": group, "MaxBoxAccV2 %": None,
              "pointing %": points, "energy %": 50.0}
             for method in ("cam", "gradcam")
             for group, points in (("all", 40.0), ("one object", 90.0))]  # fmt: skip
    nothing = localisation.Shown(torch.empty(0), [], [], {}, {})
    found = localisation.Localisation([], rows, nothing, [])
    told = localisation.summary(found, table)
    assert told["cam_iou_mean"] == pytest.approx(0.45)
    assert (told["cam_iou_right_mean"], told["cam_iou_undefined"]) == (0.8, 1)
    assert told["gradcam_iou_mean"] == pytest.approx(0.4)
    assert told["gradcam_iou_right_mean"] == pytest.approx(0.4)
    assert told["scored_accuracy"] == pytest.approx(2 / 3)
    assert (told["cam_pointing"], told["cam_max_box_acc"]) == (0.4, None)
    report = localisation.markdown(found, table, "title")
    assert "- CAM: mean IoU 0.450, over pictures classified right 0.800\n" in report
    assert "the same IoU" not in report
    assert "layers.png" not in report
    wrong = localisation.Localisation([], rows[2:], nothing, [])
    assert localisation.summary(wrong, table)["cam_iou_right_mean"] is None
