"""Any image folder: a folder of pictures per class.

Layout under ``root``, either with a split or without::

    train/<class>/**/*.jpg    test/<class>/**/*.jpg, or val/<class>/**/*.jpg
    <class>/**/*.jpg

Without a split each class is split 4 : 1 by the seed. Classes are numbered in the order of their
names. Folders that begin with a dot, and __MACOSX, are no classes.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import NoReturn

from camtrain.data.labelled import Sample, Splits, check_classes, check_several
from camtrain.data.sampling import generator
from camtrain.errors import CamtrainError

NAME = "folder"
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
HELD = ("test", "val")
HELD_SHARE = 5


def read(root: Path, seed: int = 0) -> Splits:
    """Classes and both splits.

    Raises:
        CamtrainError: no class folder or a single one, a class without pictures, a class that is
            only in the test data, a test folder without a training folder.
    """
    if not root.is_dir():
        raise CamtrainError(f"root: no folder {root}")
    held = [name for name in HELD if class_folders(root / name)]
    if class_folders(root / "train"):
        return _given(root, held) if held else _drawn(root / "train", seed)
    if held:
        raise CamtrainError(
            f"{NAME}: {root / held[0]} holds class folders, but {root / 'train'} holds none"
        )
    return _drawn(root, seed)


def class_folders(folder: Path) -> dict[str, Path]:
    """Folders of classes by their names, in order; none where ``folder`` is no folder."""
    if not folder.is_dir():
        return {}
    found = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    return {p.name: p for p in found if not p.name.startswith(".") and p.name != "__MACOSX"}


def pictures(folder: Path) -> list[Path]:
    """Picture files of a class folder, also in folders below it, in order."""
    return sorted(
        Path(place) / file
        for place, _, files in os.walk(folder, onerror=_raise)
        for file in files
        if _is_picture(file)
    )


def _raise(error: OSError) -> NoReturn:
    raise error  # os.walk passes over folders that it may not read


def _is_picture(file: str) -> bool:
    return file.lower().endswith(SUFFIXES) and not file.startswith(".")


def _loose(folder: Path) -> str:
    """A note on pictures that lie beside the class folders."""
    count = sum(_is_picture(path.name) for path in folder.iterdir())
    return f"; {count} pictures lie in no class folder of {folder} and are left out" * bool(count)


def _given(root: Path, held: list[str]) -> Splits:
    """The split that is there."""
    train, test = class_folders(root / "train"), class_folders(root / held[0])
    strange = sorted(set(test) - set(train))
    if strange:
        unseen = sorted(set(train) - set(test))
        only = f"; only {root / 'train'} holds {_some(unseen)}" * bool(unseen)
        raise CamtrainError(
            f"{NAME}: {root / held[0]} holds {_some(strange)}, which {root / 'train'} does not hold"
            f"{only}"
        )
    classes = tuple(train)
    check_several(NAME, root / "train", classes)
    order = {name: index for index, name in enumerate(classes)}
    parts = [
        [Sample(path, order[name]) for name, place in part.items() for path in pictures(place)]
        for part in (train, test)
    ]
    splits = Splits(classes, *parts)
    if not splits.test:
        raise CamtrainError(f"{NAME}: no picture in the class folders of {root / held[0]}")
    check_classes(NAME, root / "train", splits)
    bare = set(range(len(classes))) - {sample.target for sample in splits.test}
    note = "".join(f"; {name}/ is left alone" for name in held[1:])
    if bare:
        note += f"; no test picture of {_some([classes[index] for index in sorted(bare)])}"
    note += _loose(root / "train") + _loose(root / held[0])
    return splits._replace(note=f"folder: tested on {held[0]}/{note}" if note else "")


def _drawn(folder: Path, seed: int) -> Splits:
    """A split by the seed."""
    places = class_folders(folder)
    if not places:
        raise CamtrainError(
            f"{NAME}: no class folder in {folder}; expected train/<class>/ and test/<class>/ or "
            "val/<class>/, or a folder for each class"
        )
    check_several(NAME, folder, tuple(places))
    splits = Splits(tuple(places), [], [])
    for target, (name, place) in enumerate(places.items()):
        files = pictures(place)
        if len(files) < 2:
            raise CamtrainError(
                f"{NAME}: {place} holds {len(files)} pictures; a class takes 2, one to train and "
                "one to test on"
            )
        # by the name, so that it does not matter which other classes are there
        order = generator(seed, 21, zlib.crc32(name.encode())).permutation(len(files))
        chosen = {int(index) for index in order[: max(1, len(files) // HELD_SHARE)]}
        for index, path in enumerate(files):
            (splits.test if index in chosen else splits.train).append(Sample(path, target))
    return splits._replace(
        note=f"folder: no test/ or val/ with class folders, so each class of {folder} is split "
        f"{HELD_SHARE - 1} : 1 by seed {seed}: {len(splits.train)} pictures to train on, "
        f"{len(splits.test)} to test on{_loose(folder)}"
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3])) + ", ..." * (len(names) > 3)
    return f"{len(names)} class{'es' * (len(names) > 1)}: {shown}"
