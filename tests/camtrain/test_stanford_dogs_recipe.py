"""The recipe ``stanford-dogs``: defaults, a run end to end, its IoU by hand, and its refusals."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from camtrain import cli
from camtrain.config import FitConfig
from camtrain.data.module import CamtrainData
from camtrain.data.whole import SEVERAL
from camtrain.errors import CamtrainError
from camtrain.fit import fit
from camtrain.trained import Trained, load_run
from dog_files import DOG_BOXES, TinyDogs
from picture_files import TinyCaltech
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn
from torch.nn.functional import interpolate
from voc_files import TinyVOC

Tiny = Callable[..., FitConfig]
FILES = ("iou.csv", "iou.md", "iou.png", "layers.png")


def parse(*argv: str) -> FitConfig:
    return cli.fit_config(cli.parser().parse_args(["fit", "--recipe", "stanford-dogs", *argv]))


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# -- what it is asked for ------------------------------------------------------------------------


def test_the_papers_settings_are_the_defaults() -> None:
    config = parse("--root", "r")
    assert config.data == "stanford-dogs"
    assert (config.arch, config.weights, config.image_size) == ("resnet50", "pretrained", 224)
    assert (config.optimizer, config.lr, config.momentum, config.weight_decay) == (
        "sgd", 0.01, 0, 0,
    )  # fmt: skip
    assert (config.epochs, config.batch_size, config.augment, config.beta) == (2, 16, False, 0)


@pytest.mark.parametrize("data", ["cub", "caltech101", "voc", "digits"])
def test_they_are_so_on_other_data(data: str) -> None:
    config = parse("--data", data, "--root", "r")
    assert config.data == data
    assert (config.epochs, config.batch_size) == (2, 16)
    assert (config.optimizer, config.lr, config.momentum, config.weight_decay) == (
        "sgd", 0.01, 0, 0,
    )  # fmt: skip
    assert (config.lr_step, config.warmup_epochs, config.head_units, config.beta) == (0, 0, 0, 0)
    assert not config.augment
    own = data == "digits"
    assert (config.arch, config.image_size) == (("smallresnet", 64) if own else ("resnet50", 224))
    assert config.weights == (None if own else "pretrained")


def test_flags_go_over_the_paper() -> None:
    config = parse("--data", "cub", "--root", "r", "--lr", "0.1", "--epochs", "5", "--arch",
                   "resnet18", "--weights", "none", "--augment", "--head-units", "7")  # fmt: skip
    assert (config.lr, config.epochs, config.arch, config.weights) == (0.1, 5, "resnet18", None)
    assert config.augment
    assert config.head_units == 7


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "root: --data stanford-dogs needs --root, the folder that holds Images"),
        (("--data", "folder", "--root", "r"), "true boxes, which 'folder' does not have; allowed"),
        (("--data", "cifar10", "--root", "r"), "which 'cifar10' .*digits, voc, cub, caltech101, s"),
        (("--data", "cifar100", "--root", "r"), "data: recipe 'stanford-dogs' compares maps"),
        (("--root", "r", "--beta", "1"), "beta: recipe 'stanford-dogs' does not read it, got 1.0"),
        (("--root", "r", "--normalize"), "normalize: recipe 'stanford-dogs' does not read"),
    ],
)
def test_mistakes_are_named(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(CamtrainError, match=message):
        parse(*argv)


def test_pictures_without_a_box_are_refused_before_the_training(
    tmp_path: Path, on_dogs: Tiny
) -> None:
    objects = TinyCaltech(tmp_path / "objects")
    config = on_dogs(data="caltech101", root=str(objects.root))
    with pytest.raises(CamtrainError, match=r"4 of 4 test pictures of caltech101 in .*image_0\d+"):
        fit(config, quiet=True)
    assert not (Path(config.out) / "metrics.csv").exists()
    objects.annotate()
    (objects.root / "Annotations" / "ant" / "annotation_0001.mat").unlink()
    bare = {name.parent.name + name.name for name in objects.folder.glob("ant/image_0001.jpg")}
    there = {s.path.parent.name + s.path.name for s in CamtrainData(config).test.samples}
    if bare & there:
        with pytest.raises(CamtrainError, match="and 1 of 4 test pictures"):
            fit(config, quiet=True, overwrite=True)
    else:  # a picture to train on needs no box
        assert fit(config, quiet=True, overwrite=True).summary["scored_pictures"] == 4


def normed() -> nn.Module:
    """A head without a closed form, as that of ConvNeXt."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, 2), nn.ReLU(), nn.Conv2d(6, 8, 5, 2), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 9),
    )  # fmt: skip


def test_a_network_without_cam_is_refused_before_the_training(
    on_dogs: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    config = on_dogs(arch="mine:normed", layer="2")
    with pytest.raises(CamtrainError, match=r"arch: recipe 'stanford-dogs' .*no CAM of '2': "):
        fit(config, quiet=True)
    assert not (Path(config.out) / "metrics.csv").exists()
    wrong = dataclasses.replace(config, layer="layer9")
    with pytest.raises(CamtrainError, match="layer9"):
        fit(wrong, quiet=True, overwrite=True)


# -- a run ---------------------------------------------------------------------------------------


def by_hand(run: Trained, images: Tensor, target: int) -> dict[str, Tensor]:
    """Maps (h, w) of one picture (1, 3, S, S) by hooks and autograd, by method."""
    kept: list[Tensor] = []
    handle = run.model.layer3.register_forward_hook(lambda *passed: kept.append(passed[2]))
    logits = run.model(images)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[0, target], kept[0])
    weights = {"cam": run.model.fc.weight[target], "gradcam": gradient.mean((0, 2, 3))}
    return {
        method: (one[:, None, None] * kept[0][0]).sum(0).relu().detach()
        for method, one in weights.items()
    }


def iou_by_hand(maps: Tensor, true: tuple[float, ...], size: int) -> float:
    """Of the box of the largest part above 15 % of the maximum with (top, left, bottom, right)."""
    large = interpolate(maps[None, None], (size, size), mode="bilinear")[0, 0].numpy()
    parts, count = ndimage.label(large >= 0.15 * large.max(), np.ones((3, 3)))
    sizes = [int((parts == part).sum()) for part in range(1, count + 1)]
    rows, columns = ndimage.find_objects(parts)[int(np.argmax(sizes))]
    top, left, bottom, right = true
    common = max(0.0, min(bottom, rows.stop) - max(top, rows.start)) * max(
        0.0, min(right, columns.stop) - max(left, columns.start)
    )
    found = (rows.stop - rows.start) * (columns.stop - columns.start)
    return common / (found + (bottom - top) * (right - left) - common)


def in_the_middle(box: tuple[int, ...], size: int) -> tuple[float, ...]:
    """(left, top, right, bottom) of a picture of 60 x 48 as (top, left, bottom, right) of the
    square of 42 in its middle, resized to ``size``."""
    x0, y0, x1, y1 = box
    edges = ((y0 - 3), (x0 - 9), (y1 - 3), (x1 - 9))
    return tuple(min(max(edge * size / 42, 0.0), size) for edge in edges)


def test_a_run_leaves_the_iou_of_both_methods(
    on_dogs: Tiny, kennel: TinyDogs, capsys: pytest.CaptureFixture[str]
) -> None:
    config = on_dogs(epochs=2)
    run = fit(config)
    folder = Path(config.out)
    assert "IoU of 4 test pictures by CAM and Grad-CAM" in capsys.readouterr().out
    assert run.rows[-1]["train/loss"] == run.rows[-1]["train/cross_entropy"]

    rows = rows_of(folder / "iou.csv")
    names = [name for name, _ in kennel.splits["test"]]
    assert [row["picture"] for row in rows] == names
    trained = load_run(folder, torch.device("cpu"))
    ious: dict[str, list[float]] = {"cam": [], "gradcam": []}
    for row, box, (name, label) in zip(rows, DOG_BOXES, kennel.splits["test"], strict=True):
        with Image.open(kennel.root / "Images" / name) as picture:
            square = picture.resize((64, 64), Image.Resampling.BILINEAR, (9, 3, 51, 45))
            pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)
        images = trained.normalise(pixels[None])
        assert row["true"] == trained.classes[label - 1]
        assert row["predicted"] == trained.classes[int(trained.model(images).argmax())]
        for method, maps in by_hand(trained, images, label - 1).items():
            ious[method].append(iou_by_hand(maps, in_the_middle(box, 64), 64))
            assert float(row[f"{method}_iou"]) == pytest.approx(ious[method][-1], abs=1e-4)
    assert len({round(value, 3) for value in ious["cam"]}) > 2  # no trivial pictures
    assert 0 < sum(ious["cam"]) < 4

    summary = json.loads((folder / "summary.json").read_text())
    assert summary == json.loads(json.dumps(run.summary))
    right = [row["true"] == row["predicted"] for row in rows]
    assert summary["scored_pictures"] == 4
    assert summary["scored_accuracy"] == sum(right) / 4 == summary["test/accuracy"]
    for method, values in ious.items():
        assert summary[f"{method}_iou_mean"] == pytest.approx(sum(values) / 4, abs=1e-4)
        assert summary[f"{method}_iou_std"] == pytest.approx(np.std(values), abs=1e-4)
        of_right = [value for value, one in zip(values, right, strict=True) if one]
        expected = pytest.approx(np.mean(of_right), abs=1e-4) if of_right else None
        assert summary[f"{method}_iou_right_mean"] == expected
        assert summary[f"{method}_iou_undefined"] == 0
        assert summary[f"{method}_energy"] == pytest.approx(summary["test/energy"], abs=1e-5)
        assert summary[f"{method}_pointing"] == summary["test/pointing"]
        assert 0 <= summary[f"{method}_max_box_acc"] <= 1
    report = (folder / "iou.md").read_text()
    assert f"- Grad-CAM: mean IoU {summary['gradcam_iou_mean']:.3f}" in report
    assert "Both methods have the same IoU in every picture" in report
    assert "AD %" not in report  # the network was asked about no changed picture
    for name in ("iou.png", "layers.png"):
        assert f"({name})" in report
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300


@pytest.mark.slow
def test_explain_and_evaluate_take_the_run(on_dogs: Tiny, kennel: TinyDogs, tmp_path: Path) -> None:
    config = on_dogs()
    fit(config, quiet=True)
    out = tmp_path / "scores"
    assert cli.main(["evaluate", config.out, "--methods", "gradcam", "cam", "--steps", "2",
                     "--device", "cpu", "--out", str(out)]) == 0  # fmt: skip
    scores = rows_of(out / "scores.csv")
    for row in rows_of(Path(config.out) / "iou.csv"):
        for method in ("cam", "gradcam"):
            (one,) = (s["iou"] for s in scores
                      if (s["picture"], s["method"]) == (row["picture"], method))  # fmt: skip
            assert float(row[f"{method}_iou"]) == pytest.approx(float(one), abs=1e-6)
    picture = kennel.picture("test", 0)
    assert cli.main(["explain", config.out, str(picture), "--device", "cpu", "--out",
                     str(tmp_path / "maps")]) == 0  # fmt: skip
    assert (tmp_path / "maps" / f"{picture.stem}_gradcam.png").is_file()


@pytest.mark.slow  # as in the other recipes' tests
def test_a_resumed_run_equals_one_that_was_not_interrupted(on_dogs: Tiny, tmp_path: Path) -> None:
    whole = fit(on_dogs(epochs=2, out=str(tmp_path / "whole")), quiet=True)
    part = on_dogs(out=str(tmp_path / "part"))
    fit(part, quiet=True)
    folder = Path(part.out)
    before = (folder / "iou.csv").read_text()
    assert cli.main(["fit", "--resume", "--out", part.out, "--epochs", "2"]) == 0
    after = (folder / "iou.csv").read_text()
    assert after == (tmp_path / "whole" / "iou.csv").read_text()
    assert after != before
    for name in ("summary.json", *FILES):  # as after a disk that was full
        (folder / name).unlink()
    again = fit(dataclasses.replace(part, epochs=2), resume=True, quiet=True)
    assert again.summary["gradcam_iou_mean"] == whole.summary["gradcam_iou_mean"]
    assert all((folder / name).is_file() for name in FILES)


@pytest.mark.slow
def test_a_full_disk_keeps_the_training(
    on_dogs: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = on_dogs()
    fit(config, quiet=True)
    synced = os.fsync

    def full(descriptor: int) -> None:
        if "iou.png" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see which file is written")
    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(["fit", "--resume", "--out", config.out]) == 1
    told = capsys.readouterr().err
    assert "training is done and its checkpoint is intact, but no room for" in told
    assert not list(Path(config.out).rglob("*.partial"))


@pytest.mark.slow
def test_pictures_that_cannot_be_scored(on_dogs: Tiny, kennel: TinyDogs) -> None:
    """A damaged one is named; one without its object in the middle counts in no mean."""
    kennel.picture("test", 0).write_bytes(b"no picture")
    kennel.annotate(kennel.splits["test"][1][0], (0, 5, 8, 40))  # left of the middle, 9 to 51
    config = on_dogs()
    run = fit(config, quiet=True)
    rows = rows_of(Path(config.out) / "iou.csv")
    assert [row["picture"] for row in rows] == [name for name, _ in kennel.splits["test"][1:]]
    values = [float(row["cam_iou"]) for row in rows]
    assert np.isnan(values[0])
    assert run.summary["cam_iou_mean"] == pytest.approx(sum(values[1:]) / 2)
    assert (run.summary["scored_pictures"], run.summary["cam_iou_undefined"]) == (3, 1)
    (damaged,) = run.summary["damaged"]
    assert kennel.picture("test", 0).name in damaged
    assert "1 of 3 pictures have no IoU" in (Path(config.out) / "iou.md").read_text()
    # training is over, so that scoring alone meets it
    assert fit(config, resume=True, quiet=True).summary["damaged"] == [damaged]


def test_the_predicted_class_and_fewer_pictures(on_dogs: Tiny) -> None:
    config = on_dogs(target="predicted", limit_test=2)
    run = fit(config, quiet=True)
    assert run.summary["scored_pictures"] == 2
    rows = rows_of(Path(config.out) / "iou.csv")
    trained = load_run(Path(config.out), torch.device("cpu"))
    data = CamtrainData(config)
    for index, (row, place) in enumerate(zip(rows, (0, 2), strict=True)):
        images = trained.normalise(data.test[index]["images"][None])
        said = trained.classes.index(row["predicted"])
        maps = by_hand(trained, images, said)["gradcam"]
        expected = iou_by_hand(maps, in_the_middle(DOG_BOXES[place], 64), 64)
        assert float(row["gradcam_iou"]) == pytest.approx(expected, abs=1e-4)


def test_digits_need_no_download(tiny: Tiny) -> None:
    config = tiny(recipe="stanford-dogs", data="digits", beta=0.0)
    run = fit(config, quiet=True)
    assert run.summary["scored_pictures"] == 30
    assert 0 < run.summary["gradcam_iou_mean"] < 1


@pytest.mark.slow
def test_voc_is_scored_on_whole_pictures(on_dogs: Tiny, voc: TinyVOC) -> None:
    voc.split("test", "000001", "000002", "000003")
    config = on_dogs(data="voc", root=str(voc.root), sets="2007:trainval", test_sets="2007:test",
                    limit_test=2)  # fmt: skip
    run = fit(config, quiet=True)
    rows = rows_of(Path(config.out) / "iou.csv")
    assert [row["picture"] for row in rows] == [
        "000001.jpg bird", "000001.jpg cat", "000001.jpg dog", "000002.jpg dog",
    ]  # fmt: skip
    assert [row["group"] == SEVERAL for row in rows] == [True, True, True, False]
    mean = sum(float(row["cam_iou"]) for row in rows) / 4
    assert run.summary["cam_iou_mean"] == pytest.approx(mean)
