"""CIFAR: files and archives, the usual augmentation, and what is told about what is wrong."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from camtrain.config import FitConfig, resolve
from camtrain.data import cifar
from camtrain.data.labelled import Sample
from camtrain.data.module import CamtrainData
from camtrain.data.sampling import Draw
from camtrain.errors import CamtrainError
from camtrain.fit import fit
from camtrain.models import build_model, default_layer
from camtrain.trained import load_run
from explain.real import resnet20
from picture_files import write_picture

import camkernels as ck

Tiny = Callable[..., FitConfig]
TEN = cifar.KINDS["cifar10"].classes


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Ten classes with two training pictures and a test picture each."""
    root = tmp_path / "files"
    for tone, name in enumerate(TEN):
        for part, numbers in (("train", (1, 2)), ("test", (3,))):
            for number in numbers:
                write_picture(root / part / name / f"{number:04d}.png", 20 * tone, (32, 32))
    return root


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both archives in the authors' format, with three pictures in each file."""
    datasets = pytest.importorskip("torchvision").datasets
    root = tmp_path / "archive"
    rows = pixels(3).transpose(0, 3, 1, 2).reshape(3, -1)
    for kind, label in (("cifar10", "labels"), ("cifar100", "fine_labels")):
        source = getattr(datasets, cifar.KINDS[kind].torchvision)
        place = root / source.base_folder
        place.mkdir(parents=True)
        count = len(cifar.KINDS[kind].classes)
        for name, _ in source.train_list + source.test_list:
            # every class must have something to learn from
            batch = -(-count // len(source.train_list)) if name != source.test_list[0][0] else 3
            begin = batch * [n for n, _ in source.train_list + source.test_list].index(name)
            labels = [(begin + index) % count for index in range(batch)]
            data = np.resize(rows, (batch, rows.shape[1]))
            (place / name).write_bytes(pickle.dumps({"data": data, label: labels}))
        meta = {source.meta["key"]: list(cifar.KINDS[kind].classes)}
        (place / source.meta["filename"]).write_bytes(pickle.dumps(meta))
        # torchvision compares MD5 sums with those of the true files; None: whatever is there
        for name in ("train_list", "test_list"):
            monkeypatch.setattr(source, name, [[file, None] for file, _ in getattr(source, name)])
        monkeypatch.setattr(source, "meta", {**source.meta, "md5": None})
    return root


def test_files_are_read_by_class(files: Path) -> None:
    found = cifar.read(files, "cifar10")
    assert found.splits.classes == TEN
    assert [s.target for s in found.splits.train] == [k for k in range(10) for _ in range(2)]
    assert [s.target for s in found.splits.test] == list(range(10))
    assert found.train is None


def test_archives_are_read_by_torchvision(archive: Path) -> None:
    for kind, count in (("cifar10", 10), ("cifar100", 100)):
        found = cifar.read(archive, kind)
        itself = cifar.read(archive / cifar.KINDS[kind].archive, kind)
        assert found.splits == itself.splits
        assert len(found.splits.train) == count
        assert {s.target for s in found.splits.train} == set(range(count))
        assert found.train is not None
        data = cifar.CifarPictures(found.splits.train, found.train, kind)
        expected = torch.from_numpy(pixels(3)[1]).permute(2, 0, 1)
        torch.testing.assert_close(data[1]["images"], expected)
        assert data.name(1) == f"{cifar.KINDS[kind].archive}/train-00001"
        assert data.mean == cifar.KINDS[kind].mean


def test_the_limit_takes_pixels_and_labels_together(archive: Path) -> None:
    found = cifar.read(archive, "cifar10")
    whole = cifar.CifarPictures(found.splits.train, found.train, "cifar10")
    part = cifar.CifarPictures(found.splits.train, found.train, "cifar10", limit=5)
    for index in range(5):
        assert torch.equal(part[index]["images"], whole[2 * index]["images"])
        assert torch.equal(part[index]["targets"], whole[2 * index]["targets"])


def test_an_archive_without_torchvision_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(CamtrainError, match=r"is read by torchvision, which does not import"):
        cifar.read(tmp_path, "cifar10")


def test_files_of_the_archive_are_named(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    place = archive / "cifar-10-batches-py"
    content = (place / "data_batch_3").read_bytes()
    (place / "data_batch_3").unlink()
    with pytest.raises(CamtrainError, match=r"no file .*data_batch_3; https"):
        cifar.read(archive, "cifar10")
    (place / "data_batch_3").write_bytes(content)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", "0" * 32]])
    with pytest.raises(CamtrainError, match=r"test_batch is damaged: its MD5 sum is not 000"):
        cifar.read(archive, "cifar10")


def test_labels_outside_the_range_are_named(archive: Path) -> None:
    path = archive / "cifar-10-batches-py" / "test_batch"
    content = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps({**content, "labels": [3, 10, -1]}))
    with pytest.raises(
        CamtrainError, match=r"test-00001 has label 10 \(and 1 more\); .* 10 classes, labels 0 to 9"
    ):
        cifar.read(archive, "cifar10")


def test_other_classes_are_named(files: Path) -> None:
    (files / "test" / "dog").rename(files / "test" / "wolf")
    with pytest.raises(CamtrainError, match=r"test must hold .*it lacks dog, unknown are wolf"):
        cifar.read(files, "cifar10")
    with pytest.raises(CamtrainError, match=r"train must hold the 100 classes of cifar100"):
        cifar.read(files, "cifar100")


def test_what_is_there_instead_is_told(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(CamtrainError, match=r"neither cifar-10-batches-py .*\(it holds cifar100\)"):
        cifar.read(tmp_path, "cifar10")
    (tmp_path / "cifar-10-python.tar.gz").touch()
    with pytest.raises(CamtrainError, match=r"\(unpack cifar-10-python\.tar\.gz\)"):
        cifar.read(tmp_path, "cifar10")
    with pytest.raises(CamtrainError, match=r"no folder .*nowhere"):
        cifar.read(tmp_path / "nowhere", "cifar10")


def drawn(count: int = 800, size: int = 32, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    samples = [Sample(Path("none"), 0)]
    data = cifar.CifarPictures(samples, pixels(1), "cifar10", size, augment=True, seed=seed)
    return torch.stack([data[Draw(epoch, 0)]["images"] for epoch in range(count)]), pixels(1)[0]


def test_crops_are_those_of_the_padded_picture() -> None:
    images, source = drawn()
    padded = np.pad(source, ((4, 4), (4, 4), (0, 0)))
    windows = {}
    for top in range(9):
        for left in range(9):
            window = padded[top : top + 32, left : left + 32]
            windows[window.tobytes()] = (top, left, False)
            windows[window[:, ::-1].tobytes()] = (top, left, True)
    found = [windows[image.permute(1, 2, 0).numpy().tobytes()] for image in images]
    assert {top for top, _, _ in found} == set(range(9))
    assert {left for _, left, _ in found} == set(range(9))
    assert 320 < sum(flip for _, _, flip in found) < 480
    # the three are drawn apart
    assert len(set(found)) > 100


def test_crops_hang_on_seed_and_epoch() -> None:
    assert torch.equal(drawn(20)[0], drawn(20)[0])
    assert not torch.equal(drawn(20)[0], drawn(20, seed=1)[0])
    assert drawn(3, size=64)[0].shape == (3, 3, 64, 64)


def test_test_pictures_are_whole(files: Path, tiny: Tiny) -> None:
    data = CamtrainData(tiny(data="cifar10", root=str(files)))
    item: dict[str, Any] = data.test[0]
    assert item["images"].shape == (3, 32, 32)
    assert (item["images"][0, :, 0].max(), item["images"][0, :, -1].min()) == (0, 255)
    normal = data.normalise(item["images"][None])
    expected = (item["images"][0].float() / 255 - 0.4914) / 0.2470
    torch.testing.assert_close(normal[0, 0], expected)
    assert not torch.equal(data.train[Draw(0, 0)]["images"], data.train[Draw(1, 0)]["images"])


def test_a_run_on_the_real_subset(shared_data: Path, tiny: Tiny) -> None:
    root = shared_data / "cifar10_subset"
    found = cifar.read(root, "cifar10")
    assert (len(found.splits.train), len(found.splits.test)) == (2000, 1000)
    run = fit(tiny(data="cifar10", root=str(root), beta=0.0), quiet=True)
    assert run.classes == TEN


@pytest.mark.parametrize("depth", [20, 56])
def test_published_resnets(shared_data: Path, depth: int) -> None:
    """Their weights fit, and they know the pictures if normalised as they expect."""
    weights = next((shared_data / "weights_cifar10_resnet").glob(f"resnet{depth}-*.th"))
    root = str(shared_data / "cifar10_subset")
    given = {"data": "cifar10", "root": root, "limit_test": 200, "recipe": "baseline",
             "arch": f"cifar_resnet{depth}", "weights": str(weights)}  # fmt: skip
    found = {}
    for normalization in ("data", "imagenet"):
        config = resolve({**given, "normalization": normalization})
        data = CamtrainData(config)
        model = build_model(config, 10).eval()
        items = [data.test[i] for i in range(len(data.test))]
        images = data.normalise(torch.stack([item["images"] for item in items]))
        targets = torch.stack([item["targets"] for item in items])
        with torch.no_grad():
            logits = model(images)
        found[normalization] = logits, float((logits.argmax(1) == targets).float().mean())
    assert found["imagenet"][1] > 0.75  # 81 % of JPEG files
    assert not torch.allclose(found["imagenet"][0], found["data"][0], atol=0.1)
    if depth == 20:
        with torch.no_grad():
            expected = resnet20(shared_data)(images)
        torch.testing.assert_close(found["imagenet"][0], expected, rtol=1e-4, atol=1e-4)
    with ck.CAM(model, default_layer(config.arch)) as cam:  # has a closed form
        assert cam.explain(images[:2], targets[:2]).shape == (2, 8, 8)


def test_a_run_keeps_its_normalization(tiny: Tiny) -> None:
    config = tiny(normalization="imagenet", beta=0.0)
    fit(config, quiet=True)
    content = json.loads((Path(config.out) / "classes.json").read_text())
    assert content["mean"] == pytest.approx([0.485, 0.456, 0.406])
    network = load_run(Path(config.out), torch.device("cpu"))
    assert network.mean == pytest.approx((0.485, 0.456, 0.406))
