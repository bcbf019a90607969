"""Explainers."""

from camkernels.explain.consistency import consistency_scores
from camkernels.explain.grad_cam import GradCAM
from camkernels.explain.input_gradient import (
    GuidedBackprop,
    GuidedGradCAM,
    InputGradient,
    SmoothGrad,
)
from camkernels.explain.methods import CAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM
from camkernels.explain.score_cam import ScoreCAM
from camkernels.explain.smooth_cam import SmoothGradCAMPlusPlus

__all__ = [
    "CAM",
    "GradCAM",
    "GradCAMPlusPlus",
    "GuidedBackprop",
    "GuidedGradCAM",
    "HiResCAM",
    "InputGradient",
    "LayerCAM",
    "ScoreCAM",
    "SmoothGrad",
    "SmoothGradCAMPlusPlus",
    "XGradCAM",
    "consistency_scores",
]
