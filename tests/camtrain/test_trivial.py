"""The trivial solutions of the consistency loss: when they are told, and with what advice."""

from __future__ import annotations

import dataclasses
import logging
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
from camtrain.trivial import TrivialSolutions, advice

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
        ({"dead": 0.0, "uniform": 0.7}, (9.0, 0.0), "lower --alpha"),
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
    assert (
        "epoch 1: 90% of the training maps are nearly uniform or cover the picture" in warnings[0]
    )
    assert "raise --beta" in warnings[0]
    callback = TrivialSolutions(config, Recorder(Path("unused")))
    callback.load_state_dict({"warned": True})
    assert callback.state_dict() == {"warned": True}
