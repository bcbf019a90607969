"""Train classifiers with their explanation in the loss: fused kernels for PyTorch."""

from camkernels import nn
from camkernels.backends import BackendUnavailableError, backend, current_backend
from camkernels.cam_methods import cam_pixels, cam_weights
from camkernels.consistency import lp_norm, min_max_normalize, ssim, warp, warped_ssim
from camkernels.engine import BudgetError, EngineError, PlanReport, input_gradients, plan_report
from camkernels.explain import (
    CAM,
    GradCAM,
    GradCAMPlusPlus,
    GuidedBackprop,
    GuidedGradCAM,
    HiResCAM,
    InputGradient,
    LayerCAM,
    ScoreCAM,
    SmoothGrad,
    SmoothGradCAMPlusPlus,
    XGradCAM,
    consistency_scores,
)
from camkernels.functional import (
    MapStatistics,
    cam_area,
    cam_dispersion,
    cam_entropy,
    cam_statistics,
    class_activation_map,
    grad_cam,
    gradient_error,
    map_statistics,
    set_checks,
)
from camkernels.losses import (
    CAMConsistencyLoss,
    CAMEntropyLoss,
    CombinedLoss,
    InterpretableGradientLoss,
)
from camkernels.modes import guided, no_weight_gradients
from camkernels.nn.swap import swap_in, swap_out, swap_report
from camkernels.taps.tap import TapError
from camkernels.taps.views import RandomResizedCropFlip

__version__ = "0.1.0"

__all__ = [
    "CAM",
    "BackendUnavailableError",
    "BudgetError",
    "CAMConsistencyLoss",
    "CAMEntropyLoss",
    "CombinedLoss",
    "EngineError",
    "GradCAM",
    "GradCAMPlusPlus",
    "GuidedBackprop",
    "GuidedGradCAM",
    "HiResCAM",
    "InputGradient",
    "InterpretableGradientLoss",
    "LayerCAM",
    "MapStatistics",
    "PlanReport",
    "RandomResizedCropFlip",
    "ScoreCAM",
    "SmoothGrad",
    "SmoothGradCAMPlusPlus",
    "TapError",
    "XGradCAM",
    "backend",
    "cam_area",
    "cam_dispersion",
    "cam_entropy",
    "cam_pixels",
    "cam_statistics",
    "cam_weights",
    "class_activation_map",
    "consistency_scores",
    "current_backend",
    "grad_cam",
    "gradient_error",
    "guided",
    "input_gradients",
    "lp_norm",
    "map_statistics",
    "min_max_normalize",
    "nn",
    "no_weight_gradients",
    "plan_report",
    "set_checks",
    "ssim",
    "swap_in",
    "swap_out",
    "swap_report",
    "warp",
    "warped_ssim",
]
