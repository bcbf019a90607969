"""Which data set lies in a folder, what of it is missing, and where it is to be had."""

from __future__ import annotations

import re
from pathlib import Path

from camtrain.config import HOLDS
from camtrain.data import caltech, cifar, cub, dogs, folder
from camtrain.errors import CamtrainError

VOC_URL = "http://host.robots.ox.ac.uk/pascal/VOC/"
URLS = {
    "voc": VOC_URL,
    "cub": "https://www.vision.caltech.edu/datasets/cub_200_2011/",
    "caltech101": "https://data.caltech.edu/records/mzrjq-6wc02",
    "stanford-dogs": dogs.URL,
    "cifar10": cifar.URL,
    "cifar100": cifar.URL,
}


def recognise(root: Path) -> str:
    """The name of the data set in ``root``, by what ``--data`` calls it.

    Raises:
        CamtrainError: no folder, none of the data sets, several of them.
    """
    if not root.is_dir():
        raise CamtrainError(f"root: no folder {root}")
    found = [name for name, seen in _traces(root).items() if seen]
    if not found and (_pictured(root) or _pictured(root / "train")):
        found = ["folder"]
    if len(found) > 1:
        raise CamtrainError(f"root: {root} holds {' and '.join(found)}; choose one with --data")
    if not found:
        lines = [f"{name}: {held}, from {URLS.get(name, 'you')}" for name, held in HOLDS.items()]
        raise CamtrainError(f"root: {root} holds no data set; looked for\n  " + "\n  ".join(lines))
    return found[0]


def _traces(root: Path) -> dict[str, bool]:
    """Whether anything of a data set is there, complete or not."""
    here = root.resolve().name
    images = root / "Images"
    breeds = images.is_dir() and any(re.match(r"n\d{8}-", path.name) for path in images.iterdir())
    found = {
        "voc": any(any(place.glob("VOC20[0-9][0-9]")) for place in (root, root / "VOCdevkit")),
        "cub": (root / cub.FOLDER).is_dir() or any((root / name).is_file() for name in cub.TABLES),
        "caltech101": here == caltech.FOLDER
        or any((place / caltech.FOLDER).is_dir() for place in (root, root / "caltech101")),
        "stanford-dogs": breeds or any((root / name).is_file() for name in dogs.LISTS),
    }
    trained = set(folder.class_folders(root / "train"))
    for name, kind in cifar.KINDS.items():
        archive = here == kind.archive or (root / kind.archive).is_dir()
        found[name] = archive or trained == set(kind.classes)
    return found


def _pictured(place: Path) -> bool:
    """Whether there are class folders with pictures."""
    return any(folder.pictures(path) for path in folder.class_folders(place).values())


def missing(name: str, root: Path) -> list[str]:
    """Parts that the data set cannot do without and that are not there, with their source."""
    if name == "cub":
        place = root / cub.FOLDER if (root / cub.FOLDER).is_dir() else root
        parts = dict.fromkeys((*cub.TABLES, "images"), "CUB_200_2011.tgz")
    elif name == "stanford-dogs":
        place = root
        parts = {part: dogs.ARCHIVES.get(part, "lists.tar") for part in dogs.FOLDERS + dogs.LISTS}
    else:
        return []  # its reader names the single part that it needs
    return [
        f"{place / part}: it is in {archive} of {URLS[name]}"
        for part, archive in parts.items()
        if not (place / part).exists()
    ]
