"""Configuration: recipe, file and flags, in this order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from camtrain import cli
from camtrain import config as configuration
from camtrain.errors import CamtrainError


def parse(*argv: str) -> configuration.FitConfig:
    return cli.fit_config(cli.parser().parse_args(["fit", *argv]))


def test_the_papers_settings_are_the_defaults_on_voc() -> None:
    config = parse("--data", "voc", "--root", "somewhere")
    assert (config.arch, config.head_units, config.image_size) == ("resnet50", 300, 192)
    assert (config.batch_size, config.epochs, config.lr) == (20, 30, 1e-3)
    assert config.beta == 100
    assert config.regularizer == "entropy"


def test_the_papers_settings_are_the_defaults_on_stanford_dogs() -> None:
    config = parse("--data", "stanford-dogs", "--root", "somewhere")
    assert (config.optimizer, config.lr, config.momentum, config.batch_size) == ("sgd", 0.01, 0, 16)
    assert (config.arch, config.weights, config.image_size) == ("resnet50", "pretrained", 224)
    assert (config.epochs, config.augment, config.weight_decay, config.lr_step) == (2, False, 0, 0)
    # the consistency recipe brings an optimiser of its own
    config = parse("--data", "stanford-dogs", "--root", "r", "--recipe", "consistency")
    assert (config.lr, config.momentum, config.weight_decay) == (1e-3, 0.9, 1e-4)


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_cifar_is_small(data: str) -> None:
    config = parse("--data", data, "--root", "somewhere")
    assert (config.arch, config.image_size, config.weights) == ("smallresnet", 32, None)


def test_a_folder_is_trained_at_the_usual_size() -> None:
    config = parse("--data", "folder", "--root", "somewhere")
    assert (config.image_size, config.damaged, config.weights) == (224, "skip", None)


@pytest.mark.parametrize(
    ("data", "holds"),
    [
        ("voc", "VOCdevkit"),
        ("cub", "CUB_200_2011"),
        ("caltech101", "101_ObjectCategories"),
        ("stanford-dogs", r"Images, Annotation, train_list\.mat"),
        ("cifar10", "cifar-10-batches-py, or train/<class>/"),
        ("cifar100", "cifar-100-python, or train/<class>/"),
        ("folder", "or a folder for each class"),
    ],
)
def test_data_on_disk_needs_a_root(data: str, holds: str) -> None:
    with pytest.raises(CamtrainError, match=rf"root: --data {data} needs --root, .*{holds}"):
        parse("--data", data)


def test_flags_go_over_the_file_and_the_file_over_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: voc\nroot: r\nbeta: 5\nlr: 1e-4\nbatch-size: 7\n")
    config = parse("--config", str(file), "--beta", "0.25", "--difficult")
    assert (config.beta, config.lr, config.batch_size) == (0.25, 1e-4, 7)
    assert config.difficult
    assert config.arch == "resnet50"


def test_the_baseline_has_no_regulariser() -> None:
    assert parse("--recipe", "baseline").beta == 0
    with pytest.raises(CamtrainError, match="beta"):
        parse("--recipe", "baseline", "--beta", "1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown key 'epoch'; did you mean epochs"),
        ("epochs: many", "epochs must be int, got 'many'"),
        ("epochs: 0", "epochs: must be at least 1, got 0"),
        ("regularizer: width", "allowed are entropy, area, dispersion"),
        ("difficult: 1", "difficult must be bool"),
        ("data: voc", "--root"),
        ("data: stanford_dogs", "data: got 'stanford_dogs'; did you mean stanford-dogs"),
        ("data: cifar", "did you mean cifar10 or cifar100.*allowed are digits, voc"),
        ("image-sise: 3", "unknown key 'image-sise'; did you mean image_size"),
        ("crop-scal: 3", "unknown key 'crop-scal'; did you mean crop_scale"),
        ("momentun: 0.9", "unknown key 'momentun'; did you mean momentum"),
        ("- epochs", "mapping"),
        ("a: [", "not YAML"),
        ("lr: 0", "lr: must be above 0"),
        ("distance: cosine", "distance: got 'cosine', allowed are ssim, contrastive"),
        ("views: join", "views: got 'join'; did you mean joint"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(CamtrainError, match=message):
        parse("--config", str(file))


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--config", "nowhere.yaml"]) == 1
    assert "no file nowhere.yaml" in capsys.readouterr().err


def test_every_field_has_a_flag_and_survives_the_file(tmp_path: Path) -> None:
    assert set(configuration.fields()) == set(cli._HELP)
    config = parse("--beta", "0.5", "--limit-train", "9", "--no-normalize")
    file = tmp_path / "config.yaml"
    file.write_text(configuration.dump(config))
    assert configuration.resolve({}, configuration.load(file)) == config


def test_a_resumed_run_keeps_what_decides_it(tmp_path: Path) -> None:
    stored = parse("--seed", "3", "--out", str(tmp_path))
    (tmp_path / "config.yaml").write_text(configuration.dump(stored))
    config = parse("--resume", "--out", str(tmp_path), "--epochs", "50")
    assert config == dataclasses.replace(stored, epochs=50)
    with pytest.raises(CamtrainError, match="seed: the run was begun with 3, got 4"):
        parse("--resume", "--out", str(tmp_path), "--seed", "4")
    with pytest.raises(CamtrainError, match="resume: no run in"):
        parse("--resume", "--out", str(tmp_path / "nowhere"))
