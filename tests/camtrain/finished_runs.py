"""Run folders as a fit leaves them, with networks that were not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from camtrain import config as configuration
from camtrain.data.module import CamtrainData
from camtrain.models import build_model
from camtrain.trained import write_classes


def finished_run(folder: Path, seed: int = 0, **values: Any) -> Path:
    """A run of ``smallresnet`` at 32 x 32 whose channels differ enough for maps to live."""
    config = configuration.resolve(
        {"image_size": 32, "limit_train": 40, "limit_test": 12, "arch": "smallresnet",
         "recipe": "baseline", "workers": 0, **values}
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(configuration.dump(config))
    data = CamtrainData(config)
    torch.manual_seed(seed)
    model = build_model(config, len(data.classes))
    torch.save(model.state_dict(), folder / "model.pt")
    write_classes(folder, data.classes, data.train.mean, data.train.std)
    return folder
