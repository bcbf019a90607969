"""Grids and sheets: what is on them, that nothing is cut, that matplotlib stays as it was."""

from __future__ import annotations

import math
import subprocess
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from viz.readable import assert_readable

from camkernels import metrics, viz
from camkernels.viz._layout import text_width, wrapped


def cells(rows: int, columns: int, height: int = 10, width: int = 12) -> Tensor:
    return torch.randint(0, 256, (rows, columns, height, width, 3), dtype=torch.uint8)


def batch(count: int = 3) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 3, 20, 20), torch.rand(count, 5, 5)


def labels(figure: Figure) -> list[tuple[str, str, str]]:
    """Above, left of and below each axes."""
    return [(a.get_title(), a.get_ylabel(), a.get_xlabel()) for a in figure.axes]


def boxes_of(axis: Any) -> list[tuple[Any, ...]]:
    """Rectangles of an axes: colour, dashes, place; those of the black rim left out."""
    found = []
    for patch in axis.patches:
        colour = mpl.colors.to_hex(patch.get_edgecolor())
        if colour != "#000000":
            found.append((colour, patch.get_linestyle(), patch.get_bbox().bounds))
    return found


def test_a_grid_has_an_axes_per_cell_and_its_labels() -> None:
    pictures = cells(2, 3)
    figure = viz.grid(pictures, ["cat", "dog"], ["input", "Grad-CAM", "LayerCAM"], title="Maps")
    assert len(figure.axes) == 2 * 3 + 1
    assert labels(figure)[:6] == [
        ("input", "cat", ""), ("Grad-CAM", "", ""), ("LayerCAM", "", ""),
        ("", "dog", ""), ("", "", ""), ("", "", ""),
    ]  # fmt: skip
    for axis, picture in zip(figure.axes, pictures.flatten(0, 1), strict=False):
        assert np.array_equal(axis.images[0].get_array(), picture.numpy())
        assert axis.get_xticks().size == axis.get_yticks().size == 0
    assert "Maps" in [text.get_text() for text in figure.texts]


def test_the_colour_bar_is_one_and_of_the_chosen_colours() -> None:
    figure = viz.grid(cells(3, 2), "abc", "de", colormap="cividis", bar_label="map / its maximum")
    assert len(figure.axes) == 7
    bar = figure.axes[-1]
    assert bar.get_ylabel() == "map / its maximum"
    assert bar.get_ylim() == (0, 1)
    shown = bar.collections[-1].cmap(np.linspace(0, 1, 9))
    assert np.allclose(shown, mpl.colormaps["cividis"](np.linspace(0, 1, 9)), atol=1e-6)
    assert len(viz.grid(cells(3, 2), "abc", "de", colormap=None).axes) == 6


def test_groups_captions_and_empty_cells() -> None:
    pictures: list[list[Any]] = [list(row) for row in cells(2, 3)]
    pictures[1][2] = None
    pictures[0][0] = pictures[0][0][..., 0].numpy()  # grey, numpy
    columns = {"": ["input"], "Grad-CAM": ["epoch 1", "epoch 90"]}
    captions = [["", "ce 2.1", "ce 1.0"], ["", "", "no map"]]
    figure = viz.grid(pictures, ["a", "b"], columns, captions=captions, title="Two checkpoints")
    assert [text.get_text() for text in figure.texts] == ["Two checkpoints", "Grad-CAM"]
    assert [label[0] for label in labels(figure)[:3]] == ["input", "epoch 1", "epoch 90"]
    assert labels(figure)[1][2] == "ce 2.1"
    assert labels(figure)[5][2] == "no map"
    assert [len(axis.images) for axis in figure.axes[:6]] == [1, 1, 1, 1, 1, 0]
    assert_readable(figure)


LONG = "features.denseblock4.denselayer16.conv2 of a picture with a long name, 0000001.JPEG"


@pytest.mark.parametrize("text", ["x", LONG])
@pytest.mark.parametrize(
    ("shape", "size"),
    [((1, 1), (10, 10)), ((1, 7), (9, 30)), ((3, 2), (40, 10)), ((1, 1), (2, 200)),
     ((2, 1), (200, 2))],
)  # fmt: skip
def test_nothing_is_cut_or_laid_over_another(
    text: str, shape: tuple[int, int], size: tuple[int, int]
) -> None:
    rows, columns = shape
    boxes = torch.tensor([1.0, 1.0, 5.0, 5.0])
    figure = viz.grid(
        cells(rows, columns, *size), [text] * rows, [text] * columns,
        captions=[[text] * columns] * rows, title=f"Title: {text}", bar_label=f"scaled {text}",
        true_boxes=[boxes] * rows, found_boxes=[[boxes + 1] * columns] * rows,
    )  # fmt: skip
    assert_readable(figure)


def test_cells_are_filled_by_pictures_of_one_shape() -> None:
    figure = viz.grid(cells(2, 2, 30, 20), "ab", "cd", colormap=None)
    FigureCanvasAgg(figure).draw()
    width, height = figure.get_size_inches()
    place = figure.axes[0].get_position()
    assert place.height * height == pytest.approx(1.5 * place.width * width, rel=1e-6)
    assert place.width * width == pytest.approx(1.9)


def test_dollar_signs_and_control_characters_are_text() -> None:
    name = "$x^$ \x07\udcff"
    figure = viz.grid(cells(1, 1), [name], {name: [name]}, captions=[[name]], title=name)
    assert_readable(figure)
    assert figure.axes[0].get_title() == "$x^$  ?"


def test_boxes_are_drawn_where_they_are() -> None:
    boxes: list[Any] = [torch.tensor([[1.0, 2, 3, 4], [5, 6, 2, 3]]), None]
    found: list[Any] = [[torch.tensor([0, 0, 10, 12]), None], [torch.tensor([math.nan] * 4)] * 2]
    figure = viz.grid(cells(2, 2), "ab", "cd", true_boxes=boxes, found_boxes=found)
    true = [
        ("#ffffff", "-", (1.5, 0.5, 4.0, 3.0)),
        ("#ffffff", "-", (5.5, 4.5, 3.0, 2.0)),
    ]
    assert boxes_of(figure.axes[1]) == true
    first = boxes_of(figure.axes[0])
    assert first[:2] == true
    (dashed,) = first[2:]
    assert dashed[0] == "#ff9e4a"
    assert dashed[1] != "-"
    assert dashed[2] == (-0.5, -0.5, 12, 10)
    assert boxes_of(figure.axes[2]) == []
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["true box", "box of the map"]
    assert not viz.grid(cells(1, 1), "a", "b", true_boxes=[torch.zeros(4)]).legends


def test_a_map_sheet_shows_pictures_and_overlays() -> None:
    images, maps = batch()
    other = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).expand(3, 2, 2)
    boxes = torch.tensor([[2, 2, 9, 9]] * 3)
    figure = viz.map_sheet(
        images, {"Grad-CAM": maps, "LayerCAM": other}, names=["a", "b", "c"], true_boxes=boxes,
        box_threshold=0.5, colormap="jet", alpha=0.3,
    )  # fmt: skip
    assert len(figure.axes) == 3 * 3 + 1
    assert [label[0] for label in labels(figure)[:3]] == ["input", "Grad-CAM", "LayerCAM"]
    assert [labels(figure)[i][1] for i in (0, 3, 6)] == ["a", "b", "c"]
    shown = torch.stack([torch.from_numpy(axis.images[0].get_array()) for axis in figure.axes[:9]])
    expected = [viz.pictures(images)]
    expected += [viz.overlay(images, m, colormap="jet", alpha=0.3) for m in (maps, other)]
    assert torch.equal(shown, torch.stack(expected, 1).flatten(0, 1))
    found = metrics.box_of_map(other, (20, 20), 0.5)[1]
    top, left, height, width = found.tolist()
    assert height < 20  # as it would be at a lower share
    assert boxes_of(figure.axes[5])[1][2] == (left - 0.5, top - 0.5, width, height)
    assert len(boxes_of(figure.axes[3])) == 1


def test_normalised_images_and_the_scale_reach_the_sheet() -> None:
    images, maps = batch(1)
    figure = viz.map_sheet(
        images * 4 - 2, {"m": maps}, mean=(0.5,) * 3, std=(0.25,) * 3, scale="max", grey=True
    )
    assert figure.axes[-1].get_ylabel() == "map / its maximum"
    expected = viz.overlay(images, maps, scale="max", grey=True)[0].numpy().astype(int)
    assert np.abs(figure.axes[1].images[0].get_array() - expected).max() <= 1
    assert figure.axes[0].get_ylabel() == "picture 1"


def test_maps_that_show_nothing_are_told() -> None:
    images, maps = batch(4)
    maps[0], maps[1], maps[2, 1, 1] = 0, 0.7, math.nan
    figure = viz.map_sheet(images, {"m": maps}, captions={"m": ["ce 0", "", "ce ?", "ce 3"]})
    captions = [labels(figure)[i][2] for i in (1, 3, 5, 7)]
    assert captions == ["ce 0\ndead map", "constant map", "ce ?\nmap not finite", "ce 3"]
    assert_readable(figure)


def test_methods_and_checkpoints() -> None:
    images, maps = batch(2)
    sets = {"Grad-CAM": {"epoch 1": maps, "epoch 9": maps}, "LayerCAM": {"epoch 9": maps}}
    figure = viz.map_sheet(images, sets, captions={"LayerCAM/epoch 9": ["one", "two"]})
    assert len(figure.axes) == 2 * 4 + 1
    above = [label[0] for label in labels(figure)[:4]]
    assert above == ["input", "epoch 1", "epoch 9", "epoch 9"]
    assert [text.get_text() for text in figure.texts] == ["Grad-CAM", "LayerCAM"]
    assert [labels(figure)[i][2] for i in (2, 3, 7)] == ["", "one", "two"]


def test_a_layer_sheet_shows_the_last_six() -> None:
    images, _ = batch(2)
    layers = {f"layer{i}": torch.rand(2, 9 - i, 9 - i) for i in range(8)}
    figure = viz.layer_sheet(images, layers)
    expected = ["input", *(f"layer{i}" for i in range(2, 8))]
    assert [label[0] for label in labels(figure)[:7]] == expected
    assert len(figure.axes) == 2 * 7 + 1
    assert len(viz.layer_sheet(images, layers, last=99, colormap="jet").axes) == 2 * 9 + 1
    with pytest.raises(ValueError, match="last: expected at least one layer, got 0"):
        viz.layer_sheet(images, layers, last=0)


def test_before_and_after() -> None:
    images, before = batch(2)
    after = torch.rand(2, 7, 7)
    figure = viz.before_after_sheet(images, before, after, labels=("epoch 0", "epoch 9"))
    assert [label[0] for label in labels(figure)[:3]] == ["input", "epoch 0", "epoch 9"]
    for column, maps in ((1, before), (2, after)):
        shown = figure.axes[column].images[0].get_array()
        assert np.array_equal(shown, viz.overlay(images, maps)[0].numpy())
    with pytest.raises(ValueError, match="labels: expected two different ones"):
        viz.before_after_sheet(images, before, after, labels=("a", "a"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: viz.grid([], [], ["a"]), r"rows, columns: .* got \(0, 1\)"),
        (lambda: viz.grid(cells(1, 2), ["a"], ["b"]), r"cells: expected 1 rows of 1, .* \[2\]"),
        (lambda: viz.grid(cells(1, 1).float(), ["a"], ["b"]), r"cells\[0\]\[0\]: expected uint8"),
        (lambda: viz.grid([["x"]], ["a"], ["b"]), r"cells\[0\]\[0\]: .* got str"),
        (lambda: viz.grid(cells(1, 1)[..., :2], ["a"], ["b"]), r"cells\[0\]\[0\]: .*\(10, 12, 2\)"),
        (lambda: viz.grid(cells(1, 1), ["a"], ["b"], captions=[]), "captions: expected 1 rows"),
        (lambda: viz.grid(cells(1, 1), ["a"], ["b"], true_boxes=[]), "true_boxes: .* 1, got 0"),
        (lambda: viz.grid(cells(1, 1), ["a"], ["b"], found_boxes=[[]]), "found_boxes: "),
        (lambda: viz.grid(cells(1, 1), "a", "b", true_boxes=[torch.ones(3)]), r"got \(3,\)"),
        (lambda: viz.grid(cells(1, 1), "a", "b", colormap="virids"), "near names: 'viridis'"),
        (lambda: viz.grid(cells(1, 1), "a", "b", cell_width=0), "cell_width: .* got 0"),
        (lambda: viz.map_sheet(batch()[0], {}), "maps: expected at least one"),
        (lambda: viz.map_sheet(batch()[0], {"m": batch(2)[1]}), r"maps\['m'\]: expected \(3, h"),
        (lambda: viz.map_sheet(*batch_of("m"), names=["a"]), "names: expected one per image, 3"),
        (lambda: viz.map_sheet(*batch_of("m"), captions={"n": []}), "names of input, m; got 'n'"),
        (lambda: viz.map_sheet(*batch_of("m"), captions={"m": [""]}), "expected 3, got 1"),
        (lambda: viz.map_sheet(*batch_of("m"), colour="jet"), "unexpected keyword argument"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def batch_of(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    images, maps = batch()
    return images, {name: maps}


def test_text_is_wrapped_to_its_width() -> None:
    for width in (0.3, 1.0, 2.5):
        lines_of = wrapped(LONG, width, 9.0).split("\n")
        assert all(text_width(line, 9.0) <= width for line in lines_of)
        assert "".join(lines_of).replace(" ", "") == LONG.replace(" ", "")
    assert wrapped("a\nb", 5.0, 9.0) == "a\nb"
    assert wrapped("", 1.0, 9.0) == ""


USE = """
import sys
import camkernels
assert not [name for name in sys.modules if name.split(".")[0] == "matplotlib"]
import matplotlib
names = set(matplotlib.rcParams) - {"backend"}  # who asks for it has one chosen, by pyplot
before = {name: matplotlib.rcParams[name] for name in names}
import torch
from camkernels import viz
images, maps = torch.rand(2, 3, 8, 8), torch.rand(2, 4, 4)
viz.files.png(viz.map_sheet(images, {"m": maps}))
viz.files.png(viz.curve_figure({"insertion": {"m": (torch.linspace(0, 1, 3), torch.rand(2, 3))}}))
assert {name: matplotlib.rcParams[name] for name in names} == before
assert "matplotlib.pyplot" not in sys.modules
from matplotlib import pyplot
assert pyplot.get_fignums() == []
"""
ABSENT = """
import sys
sys.modules["matplotlib"] = None
import camkernels
try:
    import camkernels.viz
except ImportError as error:
    assert "pip install 'camkernels[train]'" in str(error), error
else:
    raise AssertionError("imported")
"""


@pytest.mark.parametrize(
    "code",
    [pytest.param(USE, marks=pytest.mark.slow), ABSENT],
    ids=["use", "absent"],
)
def test_matplotlib_is_an_extra_and_stays_as_it_was(
    code: str, python: str, subprocess_environment: dict[str, str]
) -> None:
    run = subprocess.run(
        [python, "-c", code], env=subprocess_environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
