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

__all__ = [
    "CAM",
    "GradCAM",
    "GradCAMPlusPlus",
    "GuidedBackprop",
    "GuidedGradCAM",
    "HiResCAM",
    "InputGradient",
    "LayerCAM",
    "SmoothGrad",
    "XGradCAM",
    "consistency_scores",
]
