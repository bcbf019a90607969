"""Picture files: read, cut and resized; and crops drawn at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from camtrain.errors import DamagedDataError

# Of ImageNet, which torchvision's trained networks expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_UNREADABLE = (
    OSError,
    UnidentifiedImageError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,  # a damaged header claims a picture of gigabytes
)


class Box(NamedTuple):
    """Pixels of the picture, from 0; top and left inclusive, so that 1 .. 10 has height 10."""

    top: float
    left: float
    height: float
    width: float


def read_picture(path: Path) -> Image.Image:
    """The decoded picture in RGB; 16 bits per pixel become 8.

    Raises:
        DamagedDataError: a file that cannot be decoded to its end, or whose pixels are floats.
    """
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise ValueError("its pixels are floats, whose range is not known")
            if image.mode.startswith("I"):  # convert() cuts 16 bits at 255: all white
                high = np.asarray(image).clip(0, 65535) >> 8
                return Image.fromarray(high.astype(np.uint8)).convert("RGB")
            return image.convert("RGB")  # decodes; a truncated file raises here
    except _UNREADABLE as error:
        raise DamagedDataError(f"damaged picture {path}: {error}") from error


def resized(picture: Image.Image, box: Box, size: int) -> Tensor:
    """The box of a picture, which lies inside it, as (3, size, size) uint8."""
    edges = (box.left, box.top, box.left + box.width, box.top + box.height)
    small = picture.resize((size, size), Image.Resampling.BILINEAR, edges)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bytes (B, 3, H, W), or floats of their range, to float32 of about mean 0 and variance 1."""
    low, width = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (mean, std))
    return (images.float() / 255 - low) / width


def crop(path: Path, box: Box, size: int) -> Tensor:
    """The box of a picture file, as (3, size, size) uint8; the box is cut at the border."""
    picture = read_picture(path)
    top, left = max(box.top, 0.0), max(box.left, 0.0)
    bottom = min(box.top + box.height, picture.height)
    right = min(box.left + box.width, picture.width)
    if bottom <= top or right <= left:
        raise DamagedDataError(f"damaged picture {path}: box {tuple(box)} lies outside")
    return resized(picture, Box(top, left, bottom - top, right - left), size)


def centre(height: int, width: int, share: float = 224 / 256) -> Box:
    """The square in the middle whose side is ``share`` of the shorter side.

    The default is the usual way to test: the shorter side resized to 256, the middle 224 kept.
    """
    side = share * min(height, width)
    return Box((height - side) / 2, (width - side) / 2, side, side)


def random_crop(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A box of whole pixels with a random share of the area and a random ratio, width to height.

    As torchvision's ``RandomResizedCrop`` draws it: the logarithm of the ratio is uniform, and
    where ten draws do not fit, the largest box in the middle that keeps the ratio is taken.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        tall, wide = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < tall <= height and 0 < wide <= width:
            top, left = rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1)
            return Box(int(top), int(left), tall, wide)
    wide = min(width, max(1, round(height * ratio[1])))
    tall = min(height, max(1, round(width / ratio[0])))
    return Box((height - tall) // 2, (width - wide) // 2, tall, wide)
