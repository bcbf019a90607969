"""Explainers."""

from camkernels.explain.consistency import consistency_scores
from camkernels.explain.grad_cam import GradCAM

__all__ = ["GradCAM", "consistency_scores"]
