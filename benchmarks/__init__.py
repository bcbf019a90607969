"""Measurements of the ops and training steps; see ``python -m benchmarks --help``."""
