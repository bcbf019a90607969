"""``camtrain evaluate``: its scores against the metrics of the package, its files, its refusals."""

from __future__ import annotations

import csv
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from camtrain import cli
from camtrain.data.whole import SEVERAL, SINGLE, WholePictures, collate_whole
from camtrain.errors import CamtrainError
from camtrain.scoring import Options, evaluate_runs
from camtrain.trained import Trained, load_run
from finished_runs import finished_run
from picture_files import TinyCUB
from torch import Tensor
from voc_files import TinyVOC

import camkernels as ck
from camkernels import metrics

CPU = torch.device("cpu")


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def whole(run: Trained) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """All pictures of a run's test data in one batch, normalised, their classes, and the rest."""
    assert run.config is not None
    data = WholePictures(run.config)
    batch = collate_whole([data[i] for i in range(len(data))])
    return run.normalise(batch["images"]), batch["targets"], batch


@pytest.mark.parametrize("target", ["true", "predicted"])
def test_scores_are_those_of_the_metrics(tmp_path: Path, target: str) -> None:
    folder = finished_run(tmp_path / "run")
    options = Options(("gradcam", "layercam"), target=target, steps=6, batch_size=5)
    rows = evaluate_runs([folder], tmp_path / "out", options)
    run = load_run(folder, CPU)
    images, targets, batch = whole(run)
    classes = targets if target == "true" else run.model(images).argmax(1)
    for row, method in zip(rows, (ck.GradCAM, ck.LayerCAM), strict=True):
        assert (row["run"], row["pictures"], row["count"]) == ("run", "all", 12)
        maps = method(run.model, "layer3").explain(images, classes)
        expected = {}
        change = metrics.ConfidenceChange(run.model)
        change.update(images, maps, classes)
        for name, title in (("drop", "AD %"), ("increase", "AI %"), ("gain", "AG %")):
            expected[title] = change.compute()[f"average_{name}"]
        for title, metric in (
            ("top-25 % removal", metrics.RemovalChange(run.model)),
            ("insertion", metrics.InsertionAUC(run.model, steps=6)),
            ("deletion", metrics.DeletionAUC(run.model, steps=6)),
        ):
            metric.update(images, maps, classes)
            expected[title] = metric.compute()
        boxes = batch["boxes"][:, 0]
        for title, regional in (
            ("pointing %", metrics.PointingGame()),
            ("energy %", metrics.EnergyInRegion()),
            ("IoU %", metrics.BoxIoU()),
        ):
            regional.update(maps, boxes, (32, 32))
            expected[title] = 100 * regional.compute()
        best = metrics.MaxBoxAccV2()
        best.update(maps, boxes, (32, 32))
        expected["MaxBoxAccV2 %"] = 100 * best.compute()["max_box_acc"]
        means = metrics.MapStatisticsMeans()
        means.update(maps)
        for name, title in (("entropy", "ce"), ("area", "ca"), ("dispersion", "cd")):
            expected[title] = means.compute()[name]
        expected["dead maps %"] = 100 * means.compute()["dead_fraction"]
        for title, value in expected.items():
            assert row[title] == pytest.approx(float(value), rel=1e-4, abs=1e-5), title
        accuracy = float((run.model(images).argmax(1) == targets).float().mean())
        assert row["accuracy %"] == pytest.approx(100 * accuracy)


class _Sources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if tag == "img" and name == "src"]


def test_files_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [finished_run(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    out = tmp_path / "out"
    arguments = ["evaluate", *map(str, runs), "--out", str(out), "--steps", "4", "--limit", "5"]
    assert cli.main([*arguments, "--device", "cpu", "--no-progress"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith((out / "table.md").read_text())
    table = rows_of(out / "table.csv")
    methods = ["cam", "gradcam", "gradcam++"]
    assert [(r["run"], r["method"]) for r in table] == [
        (r, m) for r in ("one", "two") for m in methods
    ]
    assert table[0]["AD %"] != table[3]["AD %"]
    scores = rows_of(out / "scores.csv")
    assert len(scores) == 2 * 3 * 5
    mean = sum(float(r["drop"]) for r in scores[:5]) / 5
    assert float(table[0]["AD %"]) == pytest.approx(mean)
    content = json.loads((out / "table.json").read_text())
    assert content["rows"][0]["AD %"] == pytest.approx(mean)
    assert content["damaged"] == []
    sources = _Sources()
    sources.feed((out / "report.html").read_text())
    assert len(sources.found) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources.found)
    for name in ("curves.png", "examples.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_voc_is_scored_on_whole_pictures(tmp_path: Path, voc: TinyVOC) -> None:
    voc.image("000003").write_bytes(b"no picture")
    voc.split("test", "000001", "000002", "000003")
    folder = finished_run(tmp_path / "run", data="voc", root=str(voc.root), head_units=0,
                          sets="2007:trainval", test_sets="2007:test")  # fmt: skip
    run = load_run(folder, CPU)
    images, targets, batch = whole(run)
    assert batch["group"] == [SEVERAL] * 3 + [SINGLE]
    assert len(batch["damaged"]) == 1
    assert "000003.jpg" in batch["damaged"][0]
    assert torch.equal(images[0], images[1])
    # 1-based (41, 1, 60, 40) in 60 x 40 pixels, of the bird, which comes before cat and dog
    wide = torch.tensor([0.0, 40 * 32 / 60, 32.0, 20 * 32 / 60])
    torch.testing.assert_close(batch["boxes"][0, 0], wide)
    rows = evaluate_runs([folder], tmp_path / "out", Options(("gradcam++",), steps=4))
    assert [(r["pictures"], r["count"]) for r in rows] == [("all", 4), (SINGLE, 1), (SEVERAL, 3)]
    assert rows[2]["MaxBoxAccV2 %"] is None
    assert rows[0]["MaxBoxAccV2 %"] == rows[1]["MaxBoxAccV2 %"]
    both = (rows[1]["energy %"] + 3 * rows[2]["energy %"]) / 4
    assert rows[0]["energy %"] == pytest.approx(both)
    maps = ck.GradCAMPlusPlus(run.model, "layer3").explain(images, targets)
    energy = metrics.localisation(maps, batch["boxes"][:, 0], (32, 32))[1]
    assert rows[2]["energy %"] == pytest.approx(100 * float(energy[:3].mean()), rel=1e-4)
    content = json.loads((tmp_path / "out" / "table.json").read_text())
    assert len(content["damaged"]) == 1


def test_several_boxes_of_a_class(tmp_path: Path, voc: TinyVOC) -> None:
    """Pointing and energy take all of them, IoU the best."""
    dogs = [{"box": (1, 1, 20, 40)}, {"box": (41, 1, 60, 40)}]
    voc.add("000004", *dogs)
    voc.split("test", "000004")
    folder = finished_run(tmp_path / "run", data="voc", root=str(voc.root), head_units=0,
                          sets="2007:trainval", test_sets="2007:test")  # fmt: skip
    run = load_run(folder, CPU)
    images, targets, batch = whole(run)
    assert batch["boxes"].shape == (1, 2, 4)
    (row,) = evaluate_runs([folder], tmp_path / "out", Options(("gradcam++",), steps=4))
    maps = ck.GradCAMPlusPlus(run.model, "layer3").explain(images, targets)
    each = [metrics.localisation(maps, one, (32, 32))[1] for one in batch["boxes"].unbind(1)]
    assert row["energy %"] == pytest.approx(100 * float(sum(each)), rel=1e-4)
    marked = metrics.box_of_map(maps, (32, 32))
    best = max(float(metrics.box_iou(marked, one)) for one in batch["boxes"].unbind(1))
    assert row["IoU %"] == pytest.approx(100 * best, rel=1e-5)
    assert row["MaxBoxAccV2 %"] is None


def test_data_without_boxes_and_dead_maps(tmp_path: Path, birds: TinyCUB) -> None:
    folder = finished_run(tmp_path / "run", data="cub", root=str(birds.root))
    state = torch.load(folder / "model.pt", weights_only=True)
    state["fc.weight"] = -state["fc.weight"].abs()  # every map is dead
    torch.save(state, folder / "model.pt")
    (row,) = evaluate_runs([folder], tmp_path / "out", Options(("gradcam",), steps=4))
    assert row["dead maps %"] == 100
    assert row["ce"] is None
    assert row["IoU %"] == row["pointing %"] == row["energy %"] == 0
    assert math.isfinite(row["insertion"])


def test_refusals(tmp_path: Path, birds: TinyCUB) -> None:
    folder = finished_run(tmp_path / "run")
    out = tmp_path / "out"

    def refused(match: str, runs: list[Path] | None = None, **options: Any) -> None:
        with pytest.raises(CamtrainError, match=match):
            evaluate_runs(runs or [folder], out, Options(**options))

    refused("methods: unknown 'gradcan'; did you mean gradcam", methods=["gradcan"])
    refused("steps: must be at least 1, got 0", steps=0)
    refused("steps: a picture has 1024 pixels, got 2000", steps=2000)
    refused("limit: must be at least 1", limit=0)
    refused("device: cannot use 'tpu9'", device="tpu9")
    refused(r"no finished run in .*nowhere", runs=[tmp_path / "nowhere"])
    other = finished_run(tmp_path / "birds", data="cub", root=str(birds.root))
    refused("were trained on different classes", runs=[folder, other])
    refused("folders of one name", runs=[folder, folder])
    (out / "table.csv").unlink(missing_ok=True)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CamtrainError, match="out: cannot write to"):
        evaluate_runs([folder], blocked / "out", Options())
    (folder / "model.pt").write_bytes(b"half a file")
    refused(r"model\.pt is no file of tensors")
    (folder / "classes.json").write_text("{")
    refused(r"classes\.json cannot be read")
