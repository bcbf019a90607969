"""Explainers."""

from camkernels.explain.grad_cam import GradCAM

__all__ = ["GradCAM"]
