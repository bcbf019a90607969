"""Train classifiers with their explanation in the loss: fused kernels for PyTorch."""

from camkernels.backends import BackendUnavailableError, backend, current_backend
from camkernels.explain import GradCAM
from camkernels.functional import (
    MapStatistics,
    cam_area,
    cam_dispersion,
    cam_entropy,
    cam_statistics,
    class_activation_map,
    grad_cam,
    map_statistics,
    set_checks,
)
from camkernels.losses import CAMEntropyLoss
from camkernels.taps.tap import TapError

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "CAMEntropyLoss",
    "GradCAM",
    "MapStatistics",
    "TapError",
    "backend",
    "cam_area",
    "cam_dispersion",
    "cam_entropy",
    "cam_statistics",
    "class_activation_map",
    "current_backend",
    "grad_cam",
    "map_statistics",
    "set_checks",
]
