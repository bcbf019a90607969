"""Evaluation of explanations: functions per sample, and torchmetrics Metrics that average them.

The functions need torch only. The Metrics (``ConfidenceChange``, ``RemovalChange``,
``InsertionAUC``, ``DeletionAUC``, ``ROAD``, ``PointingGame``, ``EnergyInRegion``, ``BoxIoU``,
``MaxBoxAccV2``, ``MapStatisticsMeans``, ``MapConsistency``, ``GradientSmoothness``) need
torchmetrics (``pip install 'camkernels[train]'``); they accumulate, reset, and share their sums
over processes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from camkernels.metrics.boxes import best_box_ious
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
from camkernels.metrics.gradients import gradient_agreement, total_variation
from camkernels.metrics.regions import box_iou, box_of_map, localisation
from camkernels.metrics.road import ROADScores, imputed, road

if TYPE_CHECKING:
    from camkernels.metrics.accumulated import (
        ROAD,
        ConfidenceChange,
        DeletionAUC,
        InsertionAUC,
        RemovalChange,
    )
    from camkernels.metrics.accumulated_maps import (
        GradientSmoothness,
        MapConsistency,
        MapStatisticsMeans,
    )
    from camkernels.metrics.accumulated_regions import (
        BoxIoU,
        EnergyInRegion,
        MaxBoxAccV2,
        PointingGame,
    )

_METRICS = {
    "accumulated": ("ConfidenceChange", "DeletionAUC", "InsertionAUC", "ROAD", "RemovalChange"),
    "accumulated_maps": ("GradientSmoothness", "MapConsistency", "MapStatisticsMeans"),
    "accumulated_regions": ("BoxIoU", "EnergyInRegion", "MaxBoxAccV2", "PointingGame"),
}

__all__ = [
    "ROAD",
    "BoxIoU",
    "ConfidenceChange",
    "DeletionAUC",
    "EnergyInRegion",
    "GradientSmoothness",
    "InsertionAUC",
    "MapConsistency",
    "MapStatisticsMeans",
    "MaxBoxAccV2",
    "PointingGame",
    "ROADScores",
    "RemovalChange",
    "best_box_ious",
    "box_iou",
    "box_of_map",
    "class_score",
    "confidence_change",
    "deletion_auc",
    "deletion_curve",
    "drop",
    "gain",
    "gradient_agreement",
    "imputed",
    "increase",
    "insertion_auc",
    "insertion_curve",
    "localisation",
    "masked",
    "removal_change",
    "road",
    "total_variation",
]


def __getattr__(name: str) -> Any:
    """The Metrics, at their first use: torchmetrics is an extra."""
    file = next((file for file, names in _METRICS.items() if name in names), None)
    if file is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        accumulated = importlib.import_module(f"camkernels.metrics.{file}")
    except ImportError as error:
        raise ImportError(
            f"camkernels.metrics.{name} needs torchmetrics ({error}): "
            "pip install 'camkernels[train]'"
        ) from error
    return getattr(accumulated, name)
