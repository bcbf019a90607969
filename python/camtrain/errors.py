"""What a user is told without a traceback."""

from __future__ import annotations


class CamtrainError(Exception):
    """A mistake or a condition outside the program that the message explains."""


class DivergedError(CamtrainError):
    """Training that left the finite numbers."""


class DamagedDataError(CamtrainError):
    """A file of a data set that cannot be read, where ``--damaged error`` asks to stop."""
