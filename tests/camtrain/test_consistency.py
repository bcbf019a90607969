"""The recipe ``consistency``: defaults, a run end to end, its scores, and its trivial solutions."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from camtrain import cli, criteria, evaluation
from camtrain import config as configuration
from camtrain.config import FitConfig
from camtrain.data.module import CamtrainData
from camtrain.errors import CamtrainError, DivergedError
from camtrain.evaluation import Evaluation, crops, evaluate
from camtrain.fit import fit
from camtrain.measures import ConsistencyMeasures
from camtrain.models import build_model
from camtrain.recorder import CHECKPOINT
from camtrain.training import ConsistencyClassifier, make_classifier
from picture_files import TinyCaltech, TinyCUB
from PIL import Image
from torch import nn

Tiny = Callable[..., FitConfig]


def parse(*argv: str) -> FitConfig:
    return cli.fit_config(cli.parser().parse_args(["fit", *argv]))


def test_the_papers_settings_are_the_defaults() -> None:
    birds = parse("--recipe", "consistency", "--data", "cub", "--data-root", "somewhere")
    assert (birds.optimizer, birds.lr, birds.momentum, birds.weight_decay) == (
        "sgd", 1e-3, 0.9, 1e-4,
    )  # fmt: skip
    assert (birds.lr_step, birds.lr_factor, birds.epochs) == (30, 0.1, 60)
    assert (birds.alpha, birds.beta, birds.norm, birds.target) == (0.1, 1e-6, 1, "predicted")
    assert (birds.image_size, birds.crop_scale, birds.augment) == (224, 0.08, True)
    assert (birds.arch, birds.weights, birds.root) == ("resnet50", "pretrained", "somewhere")
    assert birds.insertion_steps == 224
    objects = parse("--recipe", "consistency", "--data", "caltech101", "--root", "x",
                    "--model", "convnext_tiny", "--lr", "0.01", "--epochs", "3")  # fmt: skip
    assert (objects.epochs, objects.lr, objects.arch) == (3, 0.01, "convnext_tiny")
    assert parse("--recipe", "consistency", "--data", "caltech101", "--root", "x").epochs == 20


def test_where_training_begins() -> None:
    on_cub = ("--recipe", "consistency", "--data", "cub", "--root", "x")
    assert parse(*on_cub, "--weights", "none").weights is None
    assert parse(*on_cub, "--weights", "file.pth").weights == "file.pth"
    assert parse(*on_cub, "--arch", "timm:resnet26d").weights == "pretrained"
    assert parse(*on_cub, "--arch", "smallresnet").weights is None
    assert parse(*on_cub, "--arch", "mine:factory").weights is None
    assert parse("--data", "voc", "--root", "x").weights is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--data", "cub"), "root: --data cub needs --root, the folder that holds CUB_200_2011"),
        (("--data", "caltech101"), "101_ObjectCategories"),
        (("--alpha", "1"), "alpha: recipe 'entropy' does not read it, got 1.0"),
        (("--recipe", "baseline", "--norm", "2"), "norm: recipe 'baseline' does not read it"),
        (("--recipe", "consistency", "--normalize"), "normalize: recipe 'consistency' does not"),
        (("--momentum", "1"), "momentum: must be at least 0 and below 1"),
        (("--crop-scale", "0"), "crop_scale: must be above 0"),
        (("--lr-factor", "0"), "lr_factor: must be above 0"),
        (("--distance", "contrastive"), "distance: recipe 'entropy' does not read it"),
        (("--recipe", "baseline", "--views", "joint"), "views: recipe 'baseline' does not read it"),
        (
            ("--recipe", "consistency", "--distance", "contrastive", "--temperature", "0"),
            "temperature: must be above 0",
        ),
        (("--recipe", "consistency", "--temperature", "2"), "distance 'ssim' does not read it"),
        (
            ("--recipe", "combined", "--alpha", "1", "--beta", "1", "--views", "joint"),
            "views: 'joint' sends pictures and views through one forward",
        ),
        (("--recipe", "consistency", "--image-size", "8"), "insertion_steps: a picture of 8 x 8"),
    ],
)
def test_mistakes_are_named(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(CamtrainError, match=message):
        parse(*argv)


def test_a_run_leaves_scores_and_figures(run_on: Tiny, birds: TinyCUB) -> None:
    config = run_on(epochs=2)
    run = fit(config, quiet=True)
    folder = Path(config.out)
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for split in ("train", "test"):
        for name in ("accuracy", "cross_entropy", "consistency", "sparsity", "dead", "uniform"):
            assert float(rows[0][f"{split}/{name}"]) >= 0
    with open(folder / "consistency_scores.csv") as file:
        scores = list(csv.DictReader(file))
    assert [row["target"] for row in scores] == ["0", "0", "1", "1"]
    assert scores[0]["file"] == f"{birds.picture(3).parent.name}/{birds.picture(3).name}"
    values = torch.tensor([float(row["consistency"]) for row in scores])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == json.loads(json.dumps(run.summary))
    assert summary["consistency_mean"] == pytest.approx(values.mean().item(), abs=1e-5)
    assert summary["consistency_std"] == pytest.approx(values.std(correction=0).item(), abs=1e-5)
    assert summary["test_accuracy"] == pytest.approx(float(rows[1]["test/accuracy"]))
    assert summary["test_pictures"] == 4
    assert 0 <= summary["insertion_auc_mean"] <= 1
    for name in ("curves.png", "overlays.png", "consistency_scores.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
    assert run.classes == ("Black_footed_Albatross", "Laysan_Albatross")


def test_scores_are_compared_with_a_checkpoint(run_on: Tiny, tmp_path: Path) -> None:
    first = run_on(alpha=0.0, beta=0.0, out=str(tmp_path / "first"), insertion_steps=0)
    fit(first, quiet=True)
    second = run_on(compare=first.out, out=str(tmp_path / "second"), insertion_limit=1)
    run = fit(second, quiet=True)
    with open(tmp_path / "first" / "consistency_scores.csv") as file:
        before = [float(row["consistency"]) for row in csv.DictReader(file)]
    with open(tmp_path / "second" / "consistency_scores.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["compared"]) for row in rows] == pytest.approx(before, abs=1e-5)
    assert [bool(row["insertion_auc"]) for row in rows] == [True, False, False, False]
    assert run.summary["compared_mean"] == pytest.approx(sum(before) / 4, abs=1e-5)
    missing = dataclasses.replace(second, compare="nowhere.pt", out=str(tmp_path / "third"))
    with pytest.raises(CamtrainError, match=r"no file nowhere\.pt"):
        fit(missing, quiet=True)
    other = dataclasses.replace(missing, compare=first.out, head_units=3)
    with pytest.raises(CamtrainError, match=r"compare: .*model\.pt does not fit"):
        fit(other, quiet=True, overwrite=True)


def test_a_finished_run_is_evaluated_again(
    run_on: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a disk that was full when the figures were written."""
    config = run_on()
    first = fit(config, quiet=True)
    (Path(config.out) / "summary.json").unlink()
    again = fit(dataclasses.replace(config, insertion_steps=2), resume=True, quiet=True)
    assert "resuming after epoch 1" in capsys.readouterr().out
    assert again.rows == first.rows
    assert again.summary["consistency_mean"] == first.summary["consistency_mean"]
    assert (Path(config.out) / "summary.json").is_file()


def test_a_resumed_run_equals_one_that_was_not_interrupted(run_on: Tiny, tmp_path: Path) -> None:
    whole = fit(run_on(epochs=3, lr_step=1, out=str(tmp_path / "whole")), quiet=True)
    part = run_on(epochs=2, lr_step=1, out=str(tmp_path / "part"))
    fit(part, quiet=True)
    resumed = fit(dataclasses.replace(part, epochs=3), resume=True, quiet=True)
    for name in ("consistency", "sparsity", "accuracy", "loss"):
        for split in ("train", "test"):
            key = f"{split}/{name}"
            assert [r[key] for r in resumed.rows] == [r[key] for r in whole.rows], key
    assert resumed.summary["consistency_mean"] == whole.summary["consistency_mean"]


def test_without_weights_the_test_data_is_compared_all_the_same(run_on: Tiny) -> None:
    plain = fit(run_on(alpha=0.0, beta=0.0), quiet=True)
    row = plain.rows[0]
    assert "train/consistency" not in row
    assert -1 <= row["test/consistency"] <= 1
    assert row["test/loss"] == row["test/cross_entropy"]  # to the bit: it is measured only
    assert row["train/loss"] == row["train/cross_entropy"]
    assert "train/sparsity" in row


def test_views_hang_on_seed_and_epoch(run_on: Tiny) -> None:
    def drawn(config: FitConfig, *key: int) -> list[list[int]]:
        boxes, _ = criteria.views(config, *key)(8, 64, 64)
        return boxes.tolist()

    config = run_on()
    assert drawn(config, 1) == drawn(config, 1)
    assert drawn(config, 1) != drawn(config, 2)
    assert drawn(config, 1) != drawn(run_on(seed=1), 1)
    large = drawn(run_on(view_scale=0.9), 1)
    assert all(height * width > 0.85 * 64 * 64 for _, _, height, width in large)


def test_views_are_drawn_anew_for_training_and_alike_for_testing(
    run_on: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: dict[str, list[int]] = {"training": [], "validation": []}
    for name, seen in seeds.items():
        step = getattr(ConsistencyClassifier, f"{name}_step")

        def watched(
            self: Any, batch: Any, batch_idx: int, step: Any = step, seen: Any = seen
        ) -> Any:
            if batch_idx == 0:
                seen.append(self.criterion.transform.seed)
            return step(self, batch, batch_idx)

        monkeypatch.setattr(ConsistencyClassifier, f"{name}_step", watched)
    fit(run_on(epochs=3, insertion_steps=0), quiet=True)
    assert len(set(seeds["training"])) == 3
    assert len(set(seeds["validation"])) == 1
    assert len(seeds["validation"]) == 3
    assert not set(seeds["training"]) & set(seeds["validation"])


def test_the_criterion_gets_its_options(run_on: Tiny) -> None:
    config = run_on(alpha=0.3, beta=1e-5, norm=2.0, map_relu=True, window="uniform", target="true",
                    window_size=5, padding="same", distance="contrastive", temperature=0.2,
                    views="joint")  # fmt: skip
    module = ConsistencyClassifier(build_model(config, 2), config, 2)
    criterion = module.criterion
    assert (criterion.alpha, criterion.beta, criterion.p) == (0.3, 1e-5, 2.0)
    assert (criterion.relu, criterion.target, criterion.size) == (True, "true", (32, 32))
    assert (criterion.distance, criterion.temperature, criterion.views) == (
        "contrastive", 0.2, "joint",
    )  # fmt: skip
    assert criterion._window == {
        "window": "uniform", "window_size": 5, "sigma": 1.5, "padding": "same",
    }  # fmt: skip
    module.close()
    with pytest.raises(CamtrainError, match=r"window_size: .*odd"):
        ConsistencyClassifier(build_model(config, 2), dataclasses.replace(config, window_size=4), 2)


@pytest.mark.parametrize("recipe", ["consistency", "combined"])
@pytest.mark.parametrize(("views", "forwards"), [("separate", 2), ("joint", 1)])
def test_a_contrastive_step(run_on: Tiny, recipe: str, views: str, forwards: int) -> None:
    """So hot that all pairs are alike: InfoNCE is then the logarithm of the batch."""
    config = run_on(recipe=recipe, alpha=0.5, beta=0.0, insertion_steps=224, views=views,
                    distance="contrastive", temperature=1e6)  # fmt: skip
    torch.manual_seed(0)
    module = make_classifier(build_model(config, 2), config, 2)
    seen: list[int] = []
    module.model.register_forward_hook(lambda *_: seen.append(1))
    loss = module._step(
        {"images": torch.rand(4, 3, 32, 32), "targets": torch.arange(4) % 2}, "train"
    )
    assert loss is not None
    expected = module.criterion.terms["cross_entropy"] + 0.5 * math.log(4)
    torch.testing.assert_close(loss.detach(), expected)
    assert len(seen) == forwards
    module.close()


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(run_on: Tiny) -> None:
    config = run_on(insertion_steps=0)
    fit(config, quiet=True)
    worse = dataclasses.replace(config, epochs=2, lr=1e30, out=config.out + "2")
    with pytest.raises(DivergedError, match=r"epoch 1: the weights are no longer finite.*--lr"):
        fit(worse, quiet=True)
    assert not (Path(worse.out) / CHECKPOINT).exists()


def test_caltech_tells_its_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objects = TinyCaltech(tmp_path)
    assert cli.main(["fit", "--recipe", "consistency", "--data", "caltech101", "--data-root",
                     str(objects.root), "--model", "smallresnet", "--image-size", "32", "--epochs",
                     "1", "--batch-size", "4", "--workers", "0", "--insertion-steps", "2",
                     "--accelerator", "cpu", "--out", str(tmp_path / "run")]) == 0  # fmt: skip
    told = capsys.readouterr().out
    assert "split 2 : 1 by a fixed rule: 8 pictures to train on, 4 to test on" in told
    assert "insertion AUC of 4 test pictures: 12 forward passes" in told
    assert "SSIM" in told


def normed() -> nn.Module:
    """A head without a closed form, as that of ConvNeXt."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, 2), nn.ReLU(), nn.Conv2d(6, 8, 5, 2), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 9),
    )  # fmt: skip


@pytest.mark.parametrize("recipe", ["consistency", "baseline"])
def test_a_head_without_a_closed_form(
    run_on: Tiny, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    options: dict[str, Any] = {} if recipe == "consistency" else {"insertion_steps": 224, "beta": 0}
    run = fit(run_on(recipe=recipe, arch="mine:normed", layer="2", **options), quiet=True)
    assert run.head.startswith("autograd")
    assert ("insertion_auc_mean" in run.summary) == (recipe == "consistency")
    assert run.examples.maps.shape[0] == 2


def test_the_optimiser_and_its_steps(run_on: Tiny) -> None:
    config = run_on(lr_step=2, lr_factor=0.5, lr=0.2, momentum=0.7)
    module = ConsistencyClassifier(build_model(config, 2), config, 2)
    made = module.configure_optimizers()
    (group,) = made["optimizer"].param_groups
    assert isinstance(made["optimizer"], torch.optim.SGD)
    assert (group["momentum"], group["weight_decay"]) == (0.7, 1e-4)
    rates = []
    for _ in range(5):
        rates.append(group["lr"])
        made["optimizer"].step()
        made["lr_scheduler"].step()
    assert rates == pytest.approx([0.2, 0.2, 0.1, 0.1, 0.05])
    module.close()


def test_measures_are_means_over_samples() -> None:
    measures = ConsistencyMeasures(2)
    for count, value in ((1, 1.0), (3, 0.2)):
        terms = {name: torch.tensor(value) for name in
                 ("cross_entropy", "consistency", "sparsity", "dead", "uniform")}  # fmt: skip
        logits = torch.eye(2)[[0] * count]
        measures.update(logits, torch.zeros(count, dtype=torch.long), torch.tensor(value), terms)
    values = measures.compute()
    assert values["accuracy"] == 1
    for name in ("consistency", "dead", "uniform", "sparsity", "cross_entropy", "loss"):
        assert values[name] == pytest.approx(0.4)
    measures.reset()
    assert measures.compute() == {}


def test_crops_hang_on_the_index_alone() -> None:
    boxes, flips = crops(torch.arange(60), 64)
    assert boxes.dtype == torch.int64
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 64).all()
    assert 15 < flips.sum() < 45
    again, _ = crops(torch.tensor([7, 3]), 64)
    assert torch.equal(again, boxes[[7, 3]])


def test_evaluation_puts_the_mode_back_and_spreads_insertion(run_on: Tiny) -> None:
    config = run_on(insertion_limit=2, batch_size=3)
    data = CamtrainData(config)
    model = build_model(config, 2)
    told: list[str] = []
    found = evaluate(model, "layer3", data, config, told.append)
    assert model.training
    assert ["insertion_auc" in row for row in found.rows] == [True, False, True, False]
    assert told == ["insertion AUC of 2 test pictures: 10 forward passes"]


def test_scores_without_a_number_are_counted(tmp_path: Path) -> None:
    rows = [{"target": 0, "predicted": 0, "consistency": v} for v in (0.5, float("nan"), 0.7)]
    summary = evaluation.write(Evaluation(rows), tmp_path, "title")
    assert summary["consistency_mean"] == pytest.approx(0.6)
    assert summary["consistency_undefined"] == 1
    none = evaluation.write(Evaluation(rows[1:2]), tmp_path, "title")
    assert none["consistency_mean"] is None


def test_a_replaced_head_is_told(shared_data: Path) -> None:
    pytest.importorskip("torchvision")
    weights = shared_data / "weights_squeezenet1_0_imagenet" / "squeezenet1_0_dc_fp16.pth"
    config = configuration.resolve(
        {"recipe": "consistency", "data": "cub", "root": "x", "arch": "squeezenet1_0",
         "weights": str(weights)}
    )  # fmt: skip
    told: list[str] = []
    model = build_model(config, 10, told.append)
    assert "classifier of 1000 classes was replaced by pooling and Linear for 10" in told[0]
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 10)
    told.clear()
    build_model(dataclasses.replace(config, weights=None), 10, told.append)
    assert told == []


@pytest.mark.slow
def test_the_real_subset(shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    weights = shared_data / "weights_squeezenet1_0_imagenet" / "squeezenet1_0_dc_fp16.pth"
    config = configuration.resolve(
        {"recipe": "consistency", "data": "cub", "root": str(shared_data / "cub200_subset"),
         "arch": "squeezenet1_0", "weights": str(weights), "image_size": 96, "epochs": 3,
         "crop_scale": 0.5, "lr": 3e-5, "batch_size": 16, "workers": 0, "insertion_steps": 8,
         "insertion_limit": 20, "accelerator": "cpu", "out": str(tmp_path / "run")}
    )  # fmt: skip
    run = fit(config, quiet=True)
    assert run.summary["test_pictures"] == 161
    assert run.rows[-1]["train/cross_entropy"] < 0.6 * run.rows[0]["train/cross_entropy"]
    assert run.summary["test_accuracy"] > 0.1  # ten classes
    assert 0.3 < run.summary["consistency_mean"] < 0.95
    assert run.summary["consistency_undefined"] == 0
