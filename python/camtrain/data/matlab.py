"""Variables of MATLAB 5 files, as the authors of Stanford Dogs and Caltech-101 ship them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from camtrain.errors import CamtrainError, DamagedDataError


def read_mat(path: Path, *names: str) -> list[np.ndarray]:
    """The named variables of a file.

    Raises:
        CamtrainError: scipy does not import.
        DamagedDataError: no MATLAB 5 file, or one without a variable.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise CamtrainError(
            f"{path} needs scipy, which does not import: {error} (pip install scipy; it comes "
            "with scikit-learn)"
        ) from error
    try:
        content: dict[str, Any] = loadmat(path)
    except Exception as error:  # a damaged file makes scipy raise a dozen kinds
        raise DamagedDataError(
            f"{path} is no MATLAB 5 file: {type(error).__name__}: {error}"
        ) from error
    missing = [name for name in names if name not in content]
    if missing:
        there = ", ".join(name for name in content if not name.startswith("__")) or "none"
        raise DamagedDataError(f"{path} has no variable {missing[0]} (there: {there})")
    return [content[name] for name in names]
