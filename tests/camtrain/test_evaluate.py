"""``camtrain evaluate``: its scores against the metrics of the package, its files, its refusals."""

from __future__ import annotations

import csv
import dataclasses
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
from camtrain.scoring import Options, evaluate_runs, score_run
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


def voc_options(voc: TinyVOC) -> dict[str, Any]:
    return {"data": "voc", "root": str(voc.root), "head_units": 0, "sets": "2007:trainval",
            "test_sets": "2007:test"}  # fmt: skip


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
    folder = finished_run(tmp_path / "run", **voc_options(voc))
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


@pytest.mark.parametrize("turned", [False, True])
def test_several_boxes_of_a_class(tmp_path: Path, voc: TinyVOC, turned: bool) -> None:
    """Pointing and energy take all of them, IoU the best, whichever comes first."""
    dogs = [{"box": (1, 1, 20, 40)}, {"box": (31, 1, 60, 40)}]
    voc.add("000004", *(dogs[::-1] if turned else dogs))
    voc.split("test", "000004")
    folder = finished_run(tmp_path / "run", **voc_options(voc))
    run = load_run(folder, CPU)
    images, targets, batch = whole(run)
    assert batch["boxes"].shape == (1, 2, 4)
    (row,) = evaluate_runs([folder], tmp_path / "out", Options(("gradcam++",), steps=4))
    maps = ck.GradCAMPlusPlus(run.model, "layer3").explain(images, targets)
    each = [metrics.localisation(maps, one, (32, 32))[1] for one in batch["boxes"].unbind(1)]
    assert row["energy %"] == pytest.approx(100 * float(sum(each)), rel=1e-4)
    marked = metrics.box_of_map(maps, (32, 32))
    overlaps = [float(metrics.box_iou(marked, one)) for one in batch["boxes"].unbind(1)]
    best = max(overlaps)
    assert min(overlaps) < best
    assert row["IoU %"] == pytest.approx(100 * best, rel=1e-5)
    assert row["MaxBoxAccV2 %"] is None


def test_a_picture_whose_middle_holds_nothing_of_the_object(tmp_path: Path, birds: TinyCUB) -> None:
    """Its box has no area where the network looks: there is no score of it, and no zero."""
    folder = finished_run(tmp_path / "run", data="cub", root=str(birds.root))
    options = Options(("gradcam++",), steps=4)
    lines, moved = birds.lines("bounding_boxes"), "0.0 0.0 6.0 2.0"
    test = [i for i, line in enumerate(birds.lines("train_test_split")) if line.endswith(" 0")]
    lines[test[0]] = f"{lines[test[0]].split()[0]} {moved}"
    birds.write("bounding_boxes", lines)
    evaluate_runs([folder], tmp_path / "out", options)
    rows = rows_of(tmp_path / "out" / "scores.csv")
    titles = ("iou", "pointing", "energy")
    known = [all(math.isfinite(float(row[t] or "nan")) for t in titles) for row in rows]
    unknown = [all(not math.isfinite(float(row[t] or "nan")) for t in titles) for row in rows]
    assert known == [False, True, True, True]
    assert unknown == [True, False, False, False]


def test_data_that_was_moved(tmp_path: Path, voc: TinyVOC) -> None:
    voc.split("test", "000001")
    folder = finished_run(tmp_path / "run", **voc_options(voc))
    options = Options(("gradcam",), steps=4)
    before = evaluate_runs([folder], tmp_path / "out", options)
    (tmp_path / "elsewhere").mkdir()
    (voc.root / "VOCdevkit").rename(tmp_path / "elsewhere" / "VOCdevkit")
    with pytest.raises(CamtrainError):
        evaluate_runs([folder], tmp_path / "out", options)
    options = dataclasses.replace(options, root=str(tmp_path / "elsewhere"))
    assert evaluate_runs([folder], tmp_path / "out", options) == before


def test_examples_show_one_object_and_several(tmp_path: Path, voc: TinyVOC) -> None:
    dog, cat = {"box": (1, 1, 20, 40)}, {"box": (41, 1, 60, 40), "name": "cat"}
    singles = [f"0001{i:02d}" for i in range(7)]
    for name in singles:
        voc.add(name, dog)
    for name in ("000200", "000201"):
        voc.add(name, dog, cat)
    voc.split("test", *singles, "000200", "000201")
    folder = finished_run(tmp_path / "run", **voc_options(voc))
    run = load_run(folder, CPU)
    examples: dict[str, Any] = {}
    (scores,) = score_run(run, ["gradcam"], Options(steps=0), set(), examples)
    chosen = [scores.rows[i]["group"] for i in examples["chosen"]]
    assert chosen == [SINGLE] * 4 + [SEVERAL] * 2
    images, targets, _ = whole(run)
    maps = ck.GradCAM(run.model, "layer3").explain(images, targets)[examples["chosen"]]
    torch.testing.assert_close(examples["maps"]["run"]["gradcam"], maps)
    first = examples["chosen"]
    # a second run keeps the pictures of the first and adds its maps
    other = load_run(finished_run(tmp_path / "two", 1, **voc_options(voc)), CPU)
    score_run(other, ["gradcam"], Options(steps=0), set(), examples)
    assert examples["chosen"] == first
    assert set(examples["maps"]) == {"run", "two"}


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
