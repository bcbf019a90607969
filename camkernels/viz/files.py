"""PNG files, and writing that leaves nothing half done."""

from __future__ import annotations

import io
import os
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

Picture = Tensor | np.ndarray
"""(H, W, 3) or (H, W), uint8."""


def save(picture: Figure | Picture, path: str | os.PathLike[str], *, dpi: float = 150) -> None:
    """Write a figure or a picture as PNG in one step: readers see the old file or the new one.

    Folders above ``path`` are made.

    Args:
        picture: a matplotlib figure; or (H, W, 3) or (H, W) uint8, of :func:`overlay` say.
        path: ends in ``.png``.
        dpi: pixels per inch of a figure.

    Raises:
        ValueError: another ending or shape. TypeError: another kind or dtype. OSError: the folder
        cannot be written to, the disk is full: nothing is left, an older file stays as it was.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"path: expected a name that ends in .png, got {os.fspath(path)!r}")
    write(path, png(picture, dpi))


def png(picture: Figure | Picture, dpi: float = 150) -> bytes:
    """The PNG file of what :func:`save` takes."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        if not dpi > 0:
            raise ValueError(f"dpi: expected a positive number, got {dpi}")
        picture.savefig(buffer, dpi=dpi, format="png")
    else:
        Image.fromarray(array(picture)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def array(picture: object, name: str = "picture") -> np.ndarray:
    """A picture (H, W, 3) or (H, W) uint8 for what draws it, on the CPU."""
    if not isinstance(picture, Tensor | np.ndarray):
        raise TypeError(
            f"{name}: expected a matplotlib Figure, a tensor or an array, got "
            f"{type(picture).__name__}"
        )
    if picture.dtype not in (torch.uint8, np.uint8):
        raise TypeError(f"{name}: expected uint8, got {picture.dtype}")
    shape = tuple(picture.shape)
    if not (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)) or 0 in shape:
        raise ValueError(f"{name}: expected (H, W, 3) or (H, W), got {shape}")
    values = picture.cpu().numpy() if isinstance(picture, Tensor) else picture
    return np.ascontiguousarray(values)


def write(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step, through a file beside it.

    Raises:
        OSError: with the path and the reason, of the kind that was met (PermissionError, say).
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        kept = "the older file is intact" if target.is_file() else "nothing was written"
        raise OSError(
            error.errno, f"cannot write {target}: {error.strerror or error}; {kept}"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
