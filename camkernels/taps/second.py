"""Forwards that a criterion makes for itself, behind the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_depth: ContextVar[int] = ContextVar("camkernels_second_forward", default=0)


@contextmanager
def second_forward() -> Iterator[None]:
    """What runs inside is not a forward of the user's."""
    token = _depth.set(_depth.get() + 1)
    try:
        yield
    finally:
        _depth.reset(token)


def in_second_forward() -> bool:
    """Whether the model is run by a criterion now."""
    return _depth.get() > 0
