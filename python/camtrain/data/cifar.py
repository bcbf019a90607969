"""CIFAR-10 and CIFAR-100: pictures of 32 x 32.

Layout under ``root``: the unpacked archive of the authors, read by torchvision's classes, or the
pictures as files::

    cifar-10-batches-py/, cifar-100-python/      train/<class>/*.png, test/<class>/*.png

Augmentation as usual for CIFAR: padded by 4 pixels of black, a random crop of 32 x 32, mirrored or
not. Other sizes than 32 are the same picture resized, with a margin of an eighth.

Source: Krizhevsky, Learning multiple layers of features from tiny images, 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from camtrain.data import folder
from camtrain.data.labelled import LabelledPictures, Sample, Splits, check_classes
from camtrain.data.pictures import Box, resized
from camtrain.errors import CamtrainError

URL = "https://www.cs.toronto.edu/~kriz/cifar.html"

_TEN = "airplane automobile bird cat deer dog frog horse ship truck"
_HUNDRED = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree
orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum
rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train
trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


class Kind(NamedTuple):
    """What sets the two apart."""

    archive: str
    torchvision: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[str, ...]


KINDS = {
    "cifar10": Kind(
        "cifar-10-batches-py",
        "CIFAR10",
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        tuple(_TEN.split()),
    ),
    "cifar100": Kind(
        "cifar-100-python",
        "CIFAR100",
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        tuple(_HUNDRED.split()),
    ),
}


class Cifar(NamedTuple):
    """What was found: samples, and the pixels (N, 32, 32, 3) uint8 of an archive's splits."""

    splits: Splits
    train: np.ndarray | None = None
    test: np.ndarray | None = None


class CifarPictures(LabelledPictures):
    """Whole pictures; for training padded, cropped and mirrored.

    Args:
        samples: of the split. pixels: (N, 32, 32, 3) uint8 of the samples, None where they are
            files. kind: which CIFAR. options: of :class:`LabelledPictures`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        pixels: np.ndarray | None,
        kind: str,
        image_size: int = 32,
        **options: Any,
    ) -> None:
        found = KINDS[kind]
        super().__init__(samples, found.classes, image_size, **options)
        self.mean, self.std = found.mean, found.std
        self.pixels = None if pixels is None else pixels[self.chosen]

    def _picture(self, index: int) -> Image.Image:
        if self.pixels is None:
            return super()._picture(index)
        return Image.fromarray(self.pixels[index])

    def _drawn(self, picture: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        found = self._uncut(picture, rng)
        top, left, height, width = found["crops"].tolist()
        image = found["images"][:, top : top + height, left : left + width]
        return {"images": image.flip(2) if found["flips"] else image.contiguous()}

    def _uncut(self, picture: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        size = self.image_size
        margin = size // 8
        whole = pad(resized(picture, self._cut(picture), size), [margin] * 4)
        top, left = rng.integers(0, 2 * margin + 1, 2).tolist()
        return {
            "images": whole,
            "crops": torch.tensor([top, left, size, size]),
            "flips": torch.tensor(rng.random() < 0.5),
        }

    def _cut(self, picture: Image.Image) -> Box:
        return Box(0, 0, picture.height, picture.width)


def find(root: Path, kind: str) -> Path | None:
    """The folder that holds the archive's folder, or None where the pictures are files."""
    if not root.is_dir():
        raise CamtrainError(f"root: no folder {root}")
    archive = KINDS[kind].archive
    if (root / archive).is_dir():
        return root
    if root.resolve().name == archive:
        return root.resolve().parent
    if folder.class_folders(root / "train") and folder.class_folders(root / "test"):
        return None
    packed = sorted(path.name for path in root.glob("cifar-10*-python.tar.gz"))
    there = "".join(f" (unpack {name})" for name in packed)
    others = [name for name, other in KINDS.items() if (root / other.archive).is_dir()]
    there += "".join(f" (it holds {name})" for name in others)
    raise CamtrainError(
        f"{kind}: {root} holds neither {archive} nor train/<class>/ and test/<class>/{there}; "
        f"{URL} has it"
    )


def read(root: Path, kind: str) -> Cifar:
    """Both splits of ``cifar10`` or ``cifar100``.

    Raises:
        CamtrainError: neither layout is there; a file of the archive is missing or damaged; an
            archive, and torchvision does not import; other classes.
    """
    place = find(root, kind)
    return _files(root, kind) if place is None else _archive(place, kind)


def _files(root: Path, kind: str) -> Cifar:
    expected = KINDS[kind].classes
    for part in ("train", "test"):
        there = set(folder.class_folders(root / part))
        missing, strange = sorted(set(expected) - there), sorted(there - set(expected))
        if missing or strange:
            what = ", ".join(
                f"{word} {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
                for word, names in (("it lacks", missing), ("unknown are", strange))
                if names
            )
            raise CamtrainError(
                f"{kind}: {root / part} must hold the {len(expected)} classes of {kind}: {what}; "
                "--data folder takes any classes"
            )
    return Cifar(folder.read(root))


def _archive(root: Path, kind: str) -> Cifar:
    found = KINDS[kind]
    place = root / found.archive
    try:
        from torchvision import datasets
        from torchvision.datasets.utils import check_integrity
    except Exception as error:  # a broken binary raises RuntimeError or OSError as well
        raise CamtrainError(
            f"{kind}: {place} is read by torchvision, which does not import: "
            f"{type(error).__name__}: {error} (install the torchvision that fits torch, or unpack "
            "the pictures as train/<class>/*.png and test/<class>/*.png)"
        ) from error
    source = getattr(datasets, found.torchvision)
    meta = (source.meta["filename"], source.meta["md5"])
    for name, digest in [*source.train_list, *source.test_list, meta]:
        if not (place / name).is_file():
            raise CamtrainError(f"{kind}: no file {place / name}; {URL} has it")
        if not check_integrity(str(place / name), digest):
            raise CamtrainError(
                f"{kind}: {place / name} is damaged: its MD5 sum is not {digest}; {URL} has it"
            )
    train, test = (source(str(root), train=part) for part in (True, False))
    splits = Splits(found.classes, _listed(place, train, "train"), _listed(place, test, "test"))
    check_classes(kind, place, splits)
    return Cifar(splits, train.data, test.data)


def _listed(place: Path, data: Any, split: str) -> list[Sample]:
    return [
        Sample(place / f"{split}-{index:05d}", int(target))
        for index, target in enumerate(data.targets)
    ]
