"""Models by name, weights and heads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from camtrain.config import FitConfig, resolve
from camtrain.errors import CamtrainError
from camtrain.models import build_model, default_layer, split_name
from torch import nn


def config(**overrides: Any) -> FitConfig:
    return resolve(overrides)


def linears(model: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]


def factory() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 99)
    )


def test_the_small_network_keeps_maps_of_eight() -> None:
    model = build_model(config(), 10)
    assert 2e5 < sum(p.numel() for p in model.parameters()) < 6e5
    seen = []
    model.get_submodule(default_layer("smallresnet")).register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape)
    )
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 10)
    assert seen == [(2, 128, 8, 8)]


def test_the_papers_head() -> None:
    model = build_model(config(head_units=300), 10)
    assert linears(model) == [(128, 300), (300, 10)]


def test_module_and_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    model = build_model(config(arch="mine:factory", layer="0"), 7)
    assert linears(model) == [(4, 7)]
    with pytest.raises(CamtrainError, match="mine:nothing is not there"):
        build_model(config(arch="mine:nothing"), 7)
    monkeypatch.setattr(sys.modules[__name__], "bad", list, raising=False)
    with pytest.raises(CamtrainError, match="gives list"):
        build_model(config(arch="mine:bad"), 7)


def test_weights_before_and_after_the_head_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    trained = build_model(config(head_units=5), 10)
    torch.save({k: v.half() if v.is_floating_point() else v
                for k, v in trained.state_dict().items()}, path)  # fmt: skip
    again = build_model(config(head_units=5, weights=str(path)), 10)
    torch.testing.assert_close(again.fc[0].weight, trained.fc[0].weight, rtol=1e-3, atol=1e-4)
    plain = build_model(config(), 10)
    torch.save(plain.state_dict(), path)
    other = build_model(config(weights=str(path), head_units=5), 10)
    assert torch.equal(other.layer3.conv1.weight, plain.layer3.conv1.weight)
    assert linears(other) == [(128, 5), (5, 10)]


def test_weights_that_do_not_fit_are_described(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"stem.0.weight": torch.rand(1)}, path)
    with pytest.raises(CamtrainError, match=r"lacks .*other shapes 1 \(stem.0.weight"):
        build_model(config(weights=str(path)), 10)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(CamtrainError, match="no file of tensors"):
        build_model(config(weights=str(path)), 10)
    with pytest.raises(CamtrainError, match="no file"):
        build_model(config(weights=str(tmp_path / "none.pt")), 10)


def test_a_library_that_does_not_import_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(CamtrainError, match=r"'resnet18' needs torchvision.*timm:resnet18"):
        split_name("resnet18")
    assert split_name("timm:resnet18") == ("timm", "resnet18")  # not asked, not imported
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(CamtrainError, match="timm, which does not import"):
        build_model(config(arch="timm:resnet18"), 3)


def test_torchvision_and_timm_names() -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    assert split_name("resnet50") == ("torchvision", "resnet50")
    assert split_name("resnet26d") == ("timm", "resnet26d")
    with pytest.raises(CamtrainError, match=r"near names:.*resnet50"):
        split_name("resnet5O")
    net = build_model(config(arch="resnet18", head_units=300), 20)
    assert linears(net) == [(512, 300), (300, 20)]
    assert default_layer("timm:resnet26d") == "layer4"
    with pytest.raises(CamtrainError, match="--layer"):
        default_layer("vit_b_16")


def test_squeezenet_gets_pooling_and_dense_layers(shared_data: Path) -> None:
    pytest.importorskip("torchvision")
    weights = shared_data / "weights_squeezenet1_0_imagenet" / "squeezenet1_0_dc_fp16.pth"
    model = build_model(
        config(arch="squeezenet1_0", weights=str(weights), head_units=300), 20
    ).eval()
    assert linears(model) == [(512, 300), (300, 20)]
    stored = torch.load(weights, weights_only=True)
    assert torch.equal(model.features[0].weight, stored["features.0.weight"].float())
    logits = model(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 20)
    assert (logits < 0).any()  # no ReLU behind the logits


def test_weights_of_other_classes_are_told_so(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    for units in (0, 5):
        torch.save(build_model(config(head_units=units), 10).state_dict(), path)
        with pytest.raises(
            CamtrainError, match=r"weights\.pt has a head of 10 classes, and the data has 7"
        ):
            build_model(config(head_units=units, weights=str(path)), 7)
    # another width of the head is no matter of classes
    with pytest.raises(CamtrainError, match=r"does not fit the model: other shapes"):
        build_model(config(head_units=6, weights=str(path)), 10)
    narrow = {**build_model(config(), 10).state_dict(), "fc.weight": torch.zeros(10, 64)}
    torch.save(narrow, path)
    with pytest.raises(CamtrainError, match=r"does not fit the model: other shapes 1 \(fc\.weight"):
        build_model(config(weights=str(path)), 10)
