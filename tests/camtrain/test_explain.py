"""``camtrain explain``: its pictures, maps and tables, and what it refuses."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from camtrain import cli
from camtrain.data.pictures import Box, read_picture, resized
from camtrain.trained import load_run
from finished_runs import finished_run
from picture_files import write_picture
from PIL import Image

import camkernels as ck
from camkernels import viz


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two pictures of one name, of different sizes, and a damaged one."""
    folder = tmp_path / "pictures"
    write_picture(folder / "a" / "bird.jpg", 40, (60, 48))
    write_picture(folder / "b" / "bird.jpg", 200, (31, 80))
    (folder / "b" / "broken.png").write_bytes(b"no picture")
    (folder / "b" / "notes.txt").write_text("no picture either")
    return folder


def run(*arguments: object) -> int:
    return cli.main(["explain", *map(str, arguments), "--device", "cpu", "--no-progress"])


@pytest.mark.parametrize("target", [None, "3"])
def test_maps_overlays_and_table(
    tmp_path: Path, pictures: Path, target: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = finished_run(tmp_path / "run"), tmp_path / "out"
    asked = [] if target is None else ["--target", target]
    flags = ["--methods", "gradcam", "layercam", "--out", out, "--batch-size", 1]
    assert run(folder, pictures, *flags, *asked) == 0
    printed = capsys.readouterr().out
    assert "damaged picture" in printed
    assert f"maps of 2 pictures: {out}/index.html" in printed
    network = load_run(folder, torch.device("cpu"))
    scores = {}
    for stem, name in (("bird", "a"), ("bird-2", "b")):
        picture = read_picture(pictures / name / "bird.jpg")
        square = resized(picture, Box(0, 0, picture.height, picture.width), 32)
        images = network.normalise(square[None])
        with torch.no_grad():
            scores[stem] = network.model(images).softmax(1)[0]
        for method, explainer in (("gradcam", ck.GradCAM), ("layercam", ck.LayerCAM)):
            chosen = None if target is None else int(target)
            expected = explainer(network.model, "layer3").explain(images, chosen)
            found = np.load(out / f"{stem}_{method}.npy")
            np.testing.assert_allclose(found, expected[0].numpy(), rtol=1e-5)
            over = viz.overlay(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None], expected)
            drawn = np.array(Image.open(out / f"{stem}_{method}.png").convert("RGB"))
            assert drawn.shape == (picture.height, picture.width, 3)
            np.testing.assert_allclose(drawn.astype(int), over[0].numpy().astype(int), atol=1)
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    sound = [row for row in rows if row["predicted"]]
    assert [row["file"] for row in sound] == ["bird", "bird-2"]
    (damaged,) = (row for row in rows if not row["predicted"])
    assert damaged["picture"].endswith("broken.png")
    assert "damaged picture" in damaged["damaged"]
    report = (out / "index.html").read_text()
    for row in sound:
        expected = scores[row["file"]]
        best = int(expected.argmax())
        explained = best if target is None else int(target)
        assert (row["predicted"], row["explained"]) == (str(best), str(explained))
        assert float(row["score"]) == pytest.approx(float(expected[best]), rel=1e-5)
        assert float(row["score of it"]) == pytest.approx(float(expected[explained]), rel=1e-5)
    assert "data:image/png;base64," in report


def test_layers_and_a_colour_map(tmp_path: Path, pictures: Path) -> None:
    folder, out = finished_run(tmp_path / "run"), tmp_path / "out"
    flags = ["--layers", "layer2", "layer3", "--colormap", "jet", "--alpha", 0.3, "--out", out]
    assert run(folder, pictures / "a", *flags) == 0
    shapes = [np.load(out / f"bird_gradcam-{layer}.npy").shape for layer in ("layer2", "layer3")]
    assert shapes == [(8, 8), (4, 4)]
    picture = np.array(read_picture(pictures / "a" / "bird.jpg"))
    image = torch.from_numpy(picture).permute(2, 0, 1)[None]
    maps = torch.from_numpy(np.load(out / "bird_gradcam-layer2.npy"))[None]
    over = viz.overlay(image, maps, colormap="jet", alpha=0.3)[0].numpy()
    drawn = np.array(Image.open(out / "bird_gradcam-layer2.png").convert("RGB"))
    np.testing.assert_allclose(drawn.astype(int), over.astype(int), atol=1)


def test_captions_of_the_sheet_are_of_what_was_explained(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    draw = viz.map_sheet
    monkeypatch.setattr(viz, "map_sheet", lambda *a, **k: asked.append(k) or draw(*a, **k))
    folder, out = finished_run(tmp_path / "run"), tmp_path / "out"
    network = load_run(folder, torch.device("cpu"))
    picture = read_picture(pictures / "a" / "bird.jpg")
    square = resized(picture, Box(0, 0, picture.height, picture.width), 32)
    with torch.no_grad():
        scores = network.model(network.normalise(square[None])).softmax(1)[0]
    other = int(scores.argmin())
    assert run(folder, pictures / "a", "--target", other, "--out", out) == 0
    assert asked[0]["names"] == ["bird"]
    assert asked[0]["captions"] == {"input": [f"{other} {100 * float(scores[other]):.0f} %"]}


def test_weights_of_a_library(tmp_path: Path, pictures: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    out = tmp_path / "out"
    flags = ["--arch", "squeezenet1_1", "--image-size", 64, "--out", out]
    assert run(tmp_path / "weights.pt", pictures, *flags, "--target", 999) == 0
    assert np.load(out / "bird_gradcam.npy").shape == (3, 3)


def test_refusals(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished_run(tmp_path / "run")
    out = ["--out", tmp_path / "out"]

    def refused(text: str, *arguments: object) -> None:
        assert run(*arguments) == 1
        assert text in capsys.readouterr().err

    refused("methods: unknown 'gradcamm'; did you mean gradcam", folder, pictures, *out,
            "--methods", "gradcamm")  # fmt: skip
    refused("no module named 'layer9'", folder, pictures, *out, "--layers", "layer9")
    refused("there are 10 classes, got 10", folder, pictures, *out, "--target", "10")
    refused("expected a class's number or name, got 'dog'", folder, pictures, *out,
            "--target", "dog")  # fmt: skip
    refused("colormap", folder, pictures, *out, "--colormap", "virids")
    refused("alpha: must be from 0 to 1", folder, pictures, *out, "--alpha", "2")
    refused("batch_size: must be at least 1", folder, pictures, *out, "--batch-size", "0")
    refused("image_size: must be at least 8", folder, pictures, *out, "--image-size", "4")
    refused("images: no file or folder", folder, tmp_path / "none", *out)
    (tmp_path / "empty").mkdir()
    refused("images: no picture in", folder, tmp_path / "empty", *out)
    refused("none of 1 could be read", folder, pictures / "b" / "broken.png", *out)
    refused("leave --arch away", folder, pictures, *out, "--arch", "resnet18")
    refused("no finished run in", tmp_path / "empty", pictures, *out)
    (tmp_path / "file").write_text("")
    refused("out: cannot write to", folder, pictures, "--out", tmp_path / "file" / "out")
