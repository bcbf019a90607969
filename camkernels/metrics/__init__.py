"""Evaluation of explanations: functions per sample, and torchmetrics Metrics that average them.

The functions need torch only. The Metrics (``ConfidenceChange``, ``RemovalChange``,
``InsertionAUC``, ``DeletionAUC``, ``PointingGame``, ``EnergyInRegion``, ``BoxIoU``) need
torchmetrics (``pip install 'camkernels[train]'``); they accumulate, reset, and share their sums
over processes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from camkernels.metrics.confidence import (
    confidence_change,
    drop,
    gain,
    increase,
    masked,
    removal_change,
)
from camkernels.metrics.curves import (
    class_score,
    deletion_auc,
    deletion_curve,
    insertion_auc,
    insertion_curve,
)
from camkernels.metrics.regions import box_iou, box_of_map, localisation

if TYPE_CHECKING:
    from camkernels.metrics.accumulated import (
        BoxIoU,
        ConfidenceChange,
        DeletionAUC,
        EnergyInRegion,
        InsertionAUC,
        PointingGame,
        RemovalChange,
    )

__all__ = [
    "BoxIoU",
    "ConfidenceChange",
    "DeletionAUC",
    "EnergyInRegion",
    "InsertionAUC",
    "PointingGame",
    "RemovalChange",
    "box_iou",
    "box_of_map",
    "class_score",
    "confidence_change",
    "deletion_auc",
    "deletion_curve",
    "drop",
    "gain",
    "increase",
    "insertion_auc",
    "insertion_curve",
    "localisation",
    "masked",
    "removal_change",
]


def __getattr__(name: str) -> Any:
    """The Metrics, at their first use: torchmetrics is an extra."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        accumulated = importlib.import_module("camkernels.metrics.accumulated")
    except ImportError as error:
        raise ImportError(
            f"camkernels.metrics.{name} needs torchmetrics ({error}): "
            "pip install 'camkernels[train]'"
        ) from error
    return getattr(accumulated, name)
