"""Scanned handwritten digits at random places among clutter; nothing to download.

scikit-learn's ``load_digits`` holds 1797 real scans of 8 x 8 pixels. Each sample is one of them,
enlarged and put at a random place of a larger canvas among strokes, blobs and scrambled scraps of
other scans, none of which is a digit. The box of the digit is known, so that a map can be scored.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from camtrain.data.sampling import Draw, generator
from camtrain.errors import CamtrainError

CLASSES = tuple(str(digit) for digit in range(10))
MEAN, STD = (0.2, 0.2, 0.2), (0.25, 0.25, 0.25)
TEST_SHARE = 0.3
SIZES = {"train": 4000, "test": 1000}


def scans(split: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scans (N, 8, 8) in 0..1 and labels (N,) of a split; the splits share no scan."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise CamtrainError(
            f"--data digits needs scikit-learn, which does not import: {error}"
        ) from error
    loaded = load_digits()
    order = generator(seed, 2).permutation(len(loaded.target))
    cut = int(len(order) * TEST_SHARE)
    chosen = order[:cut] if split == "test" else order[cut:]
    return loaded.images[chosen] / 16.0, loaded.target[chosen]


def _clutter(rng: np.random.Generator, size: int, others: np.ndarray) -> np.ndarray:
    """Strokes, blobs and scrambled scraps on a canvas (size, size) in 0..1."""
    picture = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(picture)
    unit = size / 64
    for _ in range(rng.integers(3, 7)):  # open strokes
        points = np.cumsum(rng.normal(0, 7 * unit, (rng.integers(2, 5), 2)), 0)
        points += rng.uniform(0, size, 2)
        shade, width = int(rng.integers(90, 230)), max(1, round(rng.uniform(1.5, 3.5) * unit))
        draw.line([tuple(point) for point in points.tolist()], fill=shade, width=width)
    for _ in range(rng.integers(2, 5)):  # filled blobs
        y, x = rng.uniform(0, size, 2)
        ry, rx = rng.uniform(1.5, 4.5, 2) * unit
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=int(rng.integers(90, 230)))
    canvas = np.asarray(picture, np.float32) / 255
    for _ in range(rng.integers(2, 5)):  # scraps: the ink of a digit, its shape destroyed
        scrap = others[rng.integers(len(others))].reshape(-1)
        scrap = rng.permutation(scrap).reshape(8, 8)
        side = round(rng.uniform(10, 18) * unit)
        _place(canvas, _enlarge(scrap, side, side) * 0.8, *rng.integers(0, size - side + 1, 2))
    return canvas


def _enlarge(scan: np.ndarray, height: int, width: int) -> np.ndarray:
    picture = Image.fromarray(scan.astype(np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)


def _place(canvas: np.ndarray, patch: np.ndarray, top: int, left: int) -> None:
    region = canvas[top : top + patch.shape[0], left : left + patch.shape[1]]
    np.maximum(region, patch, out=region)


def compose(
    rng: np.random.Generator, scan: np.ndarray, others: np.ndarray, size: int
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """One canvas (size, size) uint8 and the digit's box: top, left, height, width in pixels.

    The box is tight around the ink of the enlarged scan.
    """
    canvas = _clutter(rng, size, others)
    side = round(size * rng.uniform(0.28, 0.45))
    patch = _enlarge(scan, side, side)
    ink = patch > 0.15
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    patch = patch[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = patch.shape
    top, left = (int(rng.integers(0, size - extent + 1)) for extent in (height, width))
    region = canvas[top : top + height, left : left + width]
    region *= 1 - patch.clip(0, 1)  # ink covers what lies under it
    _place(canvas, patch, top, left)
    canvas = canvas + rng.normal(0, 0.04, canvas.shape)
    return (canvas.clip(0, 1) * 255).astype(np.uint8), (top, left, height, width)


class Digits(Dataset[dict[str, Tensor]]):
    """Canvases with one digit each.

    Args:
        split: ``"train"`` or ``"test"``; they share no scan.
        size: side of the canvas in pixels.
        seed: decides everything; the same seed gives the same pictures.
        length: number of canvases.

    Items: ``images`` (3, size, size) uint8, ``targets`` () int64, ``boxes`` (4,) float32: top,
    left, height, width in pixels.
    """

    classes = CLASSES
    mean, std = MEAN, STD

    def __init__(self, split: str, size: int = 64, seed: int = 0, length: int | None = None):
        if size < 32:
            raise CamtrainError(f"image_size: digits need a canvas of at least 32, got {size}")
        length = SIZES[split] if length is None else length
        images, labels = scans(split, seed)
        stream = {"train": 3, "test": 4}[split]
        canvases = np.empty((length, size, size), np.uint8)
        boxes = np.empty((length, 4), np.float32)
        chosen = np.empty(length, np.int64)
        for index in range(length):
            rng = generator(seed, stream, index)
            chosen[index] = rng.integers(len(images))
            canvases[index], boxes[index] = compose(rng, images[chosen[index]], images, size)
        self.images = torch.from_numpy(canvases)
        self.boxes = torch.from_numpy(boxes)
        self.targets = torch.from_numpy(labels[chosen].astype(np.int64))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, draw: Draw | int) -> dict[str, Tensor]:
        index = draw.index if isinstance(draw, Draw) else draw
        return {
            "images": self.images[index].expand(3, -1, -1),
            "targets": self.targets[index],
            "boxes": self.boxes[index],
        }
