"""The network ops as functions: differentiable twice, guided where the backward says so."""

from __future__ import annotations
