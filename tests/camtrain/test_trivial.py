"""The trivial solutions of the consistency loss: when they are told, and with what advice."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from camtrain import config as configuration
from camtrain.config import FitConfig
from camtrain.fit import fit
from camtrain.measures import ConsistencyMeasures
from camtrain.recorder import Recorder
from camtrain.trivial import TrivialSolutions, advice, coverage

import camkernels as ck

Tiny = Callable[..., FitConfig]


@pytest.mark.parametrize(
    ("shares", "weights", "words"),
    [
        ({"dead": 0.4, "uniform": 0.5}, (0.1, 1e-6), ""),
        ({"dead": 0.6, "uniform": 0.0}, (0.1, 1e-6), "60% of the training maps are constant"),
        ({"dead": 0.6, "uniform": 0.0}, (0.1, 1e-6), "lower --beta"),
        ({"dead": 0.6, "uniform": 0.0}, (0.1, 0.0), "lower --alpha"),
        ({"dead": 0.0, "uniform": 0.7}, (0.1, 1e-6), "raise --beta"),
        ({"dead": 0.0, "uniform": 0.7}, (0.0, 0.0), "alpha and beta are 0"),
        ({"dead": 0.0, "uniform": 0.0, "sparsity": 0.79 * 64**2}, (9.0, 0.0), ""),
        ({"dead": 0.0, "uniform": 0.0, "sparsity": 0.9 * 64**2}, (9.0, 0.0), "cover 90% of the"),
        ({"dead": 0.0, "uniform": 0.0, "sparsity": 0.9 * 64**2}, (9.0, 0.0), "raise --beta"),
    ],
)
def test_advice_names_what_to_change(
    shares: dict[str, float], weights: tuple[float, float], words: str
) -> None:
    config = configuration.resolve(
        {"recipe": "consistency", "alpha": weights[0], "beta": weights[1]}
    )
    row = {"epoch": 3, **{f"train/{name}": value for name, value in shares.items()}}
    told = advice(row, config)
    assert words in told
    assert bool(told) == bool(words)


def test_coverage_follows_from_the_norm() -> None:
    config = configuration.resolve({"recipe": "consistency", "image_size": 20})
    maps = torch.rand(1, 20, 20)
    for norm in (1.0, 2.0):
        row = {"train/sparsity": float(ck.lp_norm(maps, norm))}
        covered = coverage(row, dataclasses.replace(config, norm=norm))
        assert covered == pytest.approx(maps.pow(norm).mean().item(), rel=1e-5)
    assert math.isnan(coverage({"train/sparsity": 3.0}, dataclasses.replace(config, norm=0.0)))
    assert math.isnan(coverage({}, config))


def test_trivial_solutions_are_told_once(
    run_on: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    update = ConsistencyMeasures.update

    def uniform(self: Any, logits: Any, targets: Any, loss: Any, terms: Any) -> None:
        update(self, logits, targets, loss, {**terms, "uniform": torch.tensor(0.9)})

    monkeypatch.setattr(ConsistencyMeasures, "update", uniform)
    config = run_on(epochs=2, insertion_steps=0)
    with caplog.at_level(logging.WARNING, "camtrain"):
        fit(config, quiet=True)
        fit(dataclasses.replace(config, epochs=3), resume=True, quiet=True)
    warnings = [r.message for r in caplog.records if "nearly uniform" in r.message]
    assert len(warnings) == 1
    assert "epoch 1: 90% of the training maps are nearly uniform" in warnings[0]
    assert "raise --beta" in warnings[0]
    callback = TrivialSolutions(config, Recorder(Path("unused")))
    callback.load_state_dict({"warned": True})
    assert callback.state_dict() == {"warned": True}
