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

# Shares of the training maps that are told. Sound networks have up to 3 % of uniform maps (digits);
# on the CUB subset, alpha = 10 halved accuracy and ended at 29 and 10.5 % in two seeds.
DEAD, UNIFORM = 0.5, 0.1
# Recipes whose loss compares two views.
RECIPES = ("consistency", "combined")


def advice(row: Mapping[str, Any], config: FitConfig) -> str:
    """What to change where many of the training maps carry no explanation; else empty.

    A map of zeros is the same under every crop, and so is one that covers the whole picture: both
    are perfectly consistent and say nothing (Staying consistent with GradCAM, section 3.2.3).
    """
    combined = config.recipe == "combined"
    # there ``dead`` is of the entropy's maps, and ``beta`` its weight
    dead = row.get("train/dead_views" if combined else "train/dead", math.nan)
    uniform = row.get("train/uniform", math.nan)
    name = "norm_weight" if combined else "beta"
    norm, flag = getattr(config, name), f"--{name.replace('_', '-')}"
    lower = ["--alpha"] if config.alpha > 0 else []
    if dead > DEAD:
        what = f"{dead:.0%} of the training maps are all zero"
        paid = [f"{flag}, which pays for maps of zero"] if norm > 0 else []
        entropy = ["--beta, whose entropy is least there"] if combined and config.beta > 0 else []
        change = "lower " + ", or ".join(paid + lower + entropy)
    elif uniform > UNIFORM:
        what = f"{uniform:.0%} of the training maps are nearly uniform or cover the picture"
        change = f"raise {flag}, which pays for sparse maps"
        change += ", or lower --alpha" if lower else ""
    else:
        return ""
    if config.alpha == 0 and norm == 0:
        change = "alpha and beta are 0, so it is not their doing: look at --weights and --lr"
    return (
        f"epoch {row['epoch']}: {what} (alpha = {config.alpha:g}, {name} = {norm:g}): a trivial "
        f"solution, consistent without explaining anything; {change}"
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
