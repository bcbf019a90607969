"""Explainers."""

from camkernels.explain.consistency import consistency_scores
from camkernels.explain.grad_cam import GradCAM
from camkernels.explain.input_gradient import (
    GuidedBackprop,
    GuidedGradCAM,
    InputGradient,
    SmoothGrad,
)

__all__ = [
    "GradCAM",
    "GuidedBackprop",
    "GuidedGradCAM",
    "InputGradient",
    "SmoothGrad",
    "consistency_scores",
]
