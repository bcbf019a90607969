"""Figures of insertion and deletion curves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from viz.readable import assert_readable

from camkernels import viz
from camkernels.viz import curves as lines


def test_curves_are_means_with_their_spread_and_area() -> None:
    shares, scores = torch.linspace(0, 1, 11).double(), torch.rand(6, 11)
    figure = viz.curve_figure({"insertion": {"Grad-CAM": (shares, scores)}}, title="Six")
    (axis,) = figure.axes
    (line,) = axis.lines
    assert np.allclose(line.get_xdata(), shares)
    assert np.allclose(line.get_ydata(), scores.mean(0), atol=1e-6)
    area = torch.trapezoid(scores.double(), shares, dim=1).mean().item()
    assert line.get_label() == f"Grad-CAM: AUC {area:.3f}, N = 6"
    (band,) = axis.collections
    edges = band.get_paths()[0].vertices
    assert edges[:, 1].max() == pytest.approx(
        (scores.mean(0) + scores.std(0)).max().item(), abs=1e-6
    )
    assert edges[:, 1].min() == pytest.approx(
        (scores.mean(0) - scores.std(0)).min().item(), abs=1e-6
    )
    assert (axis.get_title(), axis.get_xlabel()) == ("insertion", "share of pixels revealed")
    assert "one standard deviation" in figure.get_supxlabel()
    assert_readable(figure)


def test_the_band_of_quartiles_and_none() -> None:
    shares, scores = torch.linspace(0, 1, 4), torch.arange(20.0).view(5, 4)
    curves = {"other": {"m": (shares, scores)}}
    (axis,) = viz.curve_figure(curves, spread="quartiles").axes
    edges = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == (4, 15)
    assert axis.get_xlabel() == "share of pixels"
    assert not viz.curve_figure(curves, spread="none").axes[0].collections
    one = {"other": {"m": (shares, scores[:1])}}
    assert not viz.curve_figure(one).axes[0].collections


def test_pictures_without_numbers_are_left_out_and_counted() -> None:
    shares, scores = torch.linspace(0, 1, 4), torch.rand(3, 4)
    scores[1, 2] = math.nan
    curves = {"deletion": {"some": (shares, scores), "none": (shares, scores[1:2])}}
    (axis,) = viz.curve_figure(curves).axes
    assert np.allclose(axis.lines[0].get_ydata(), scores[[0, 2]].mean(0), atol=1e-6)
    assert axis.lines[0].get_label().endswith("N = 2, 1 left out")
    assert axis.lines[1].get_label() == "none: no picture, 1 left out"


def test_methods_have_one_style_in_all_panels_and_no_two_the_same() -> None:
    shares = torch.linspace(0, 1, 3)
    names = [f"m{i}" for i in range(9)]
    curves = {name: (shares, torch.rand(2, 3)) for name in names}
    backwards = dict(reversed(curves.items()))
    figure = viz.curve_figure({"insertion": curves, "deletion": backwards})
    styles = [
        {line.get_label().split(":")[0]: (line.get_color(), str(line._unscaled_dash_pattern))
         for line in axis.lines}
        for axis in figure.axes
    ]  # fmt: skip
    assert styles[0] == styles[1]
    assert len(set(styles[0].values())) == 9
    every = {(i % len(lines.COLOURS), i % len(lines.DASHES)) for i in range(35)}
    assert len(every) == 35
    assert len(set(lines.COLOURS)) == len(lines.COLOURS)
    assert_readable(figure)


@pytest.mark.parametrize(
    ("panels", "options", "message"),
    [
        ({}, {}, "panels: expected at least one"),
        ({"a": {}}, {}, "panels: expected at least one, each with a curve"),
        ({"a": {"m": (torch.ones(3), torch.ones(3))}}, {}, r"panels\['a'\]\['m'\]: .* got \(3,\)"),
        ({"a": {"m": (torch.ones(3), torch.ones(2, 4))}}, {}, r"\(3,\) and \(2, 4\)"),
        ({"a": {"m": (torch.ones(3), torch.ones(2, 3))}}, {"spread": "sd"}, "spread: .* 'sd'"),
    ],
)
def test_bad_curves_are_named(panels: Any, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        viz.curve_figure(panels, **options)


def test_dollar_signs_are_text() -> None:
    shares = torch.linspace(0, 1, 5)
    assert_readable(viz.curve_figure({"$x^$": {"$y_$": (shares, torch.rand(2, 5))}}, title="$z_$"))
