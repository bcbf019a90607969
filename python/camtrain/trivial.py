"""The trivial solutions of the consistency loss: told once, with what to change."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from camtrain.config import FitConfig
from camtrain.recorder import Recorder

log = logging.getLogger("camtrain")

SHARE = 0.5


def advice(row: Mapping[str, Any], config: FitConfig) -> str:
    """What to change where more than half of the training maps carry no explanation; else empty.

    A constant map is the same under every crop, and so is one that covers the whole picture: both
    are perfectly consistent and say nothing (Staying consistent with GradCAM, section 3.2.3).
    """
    dead = row.get("train/dead", math.nan)
    uniform = row.get("train/uniform", math.nan)
    settings = f"alpha = {config.alpha:g}, beta = {config.beta:g}"
    if dead > SHARE:
        what = f"{dead:.0%} of the training maps are constant"
        change = "lower --beta, which pays for maps of zero" if config.beta > 0 else "lower --alpha"
        if config.alpha > 0 and config.beta > 0:
            change += ", or --alpha"
    elif uniform > SHARE:
        what = f"{uniform:.0%} of the training maps are nearly uniform or cover the picture"
        change = "raise --beta, which pays for sparse maps"
        change += ", or lower --alpha" if config.alpha > 0 else ""
    else:
        return ""
    if config.alpha == 0 and config.beta == 0:
        change = "alpha and beta are 0, so it is not their doing: look at --weights and --lr"
    return (
        f"epoch {row['epoch']}: {what} ({settings}): a trivial solution, consistent without "
        f"explaining anything; {change}"
    )


class TrivialSolutions(Callback):
    """Warns once in a run, also over a resume; stands behind the recorder."""

    def __init__(self, config: FitConfig, recorder: Recorder) -> None:
        self.config = config
        self.recorder = recorder
        self.warned = False

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"warned": self.warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.warned = bool(state_dict["warned"])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the row of the epoch."""
        message = "" if self.warned else advice(self.recorder.rows[-1], self.config)
        if message and trainer.is_global_zero:
            log.warning("%s", message)
        self.warned = self.warned or bool(message)
