"""``camtrain data check``: read labels and boxes, decode every picture, say what is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from camtrain.config import HOLDS, FitConfig
from camtrain.data import caltech, cifar, cub, dogs, folder
from camtrain.data.labelled import Splits, check_several
from camtrain.data.pictures import Box, read_picture
from camtrain.data.recognise import URLS, VOC_URL, missing, recognise
from camtrain.data.voc import find_devkit, read_annotation, read_names
from camtrain.errors import CamtrainError, DamagedDataError


class Entry(NamedTuple):
    """A picture of a split: the classes in it, and the boxes that are known."""

    path: Path
    targets: tuple[int, ...]
    boxes: tuple[Box, ...] = ()


class Row(NamedTuple):
    """Of one split."""

    split: str
    pictures: int
    classes: int
    boxes: int
    damaged: int


@dataclass
class Report:
    """What was found."""

    name: str
    root: Path
    rows: list[Row] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    """Files that cannot be read, named."""
    problems: list[str] = field(default_factory=list)
    """What keeps the data from being trained on."""
    notes: list[str] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether training can begin; damaged files are left out."""
        return not self.problems

    def text(self) -> str:
        """The report for a terminal."""
        source = f" ({URLS[self.name]})" if self.name in URLS else ""
        lines = [f"{self.name} in {self.root}{source}"]
        if self.rows:
            width = max(5, *(len(row.split) for row in self.rows))
            lines.append(f"{'split':{width}}" + "".join(f"{key:>10}" for key in Row._fields[1:]))
            lines += [
                f"{row.split:{width}}" + "".join(f"{value:>10}" for value in row[1:])
                for row in self.rows
            ]
        lines += [f"note: {note}" for note in self.notes]
        if self.damaged:
            count = len(self.damaged)
            lines.append(f"{count} damaged file{'s' * (count != 1)}:")
            lines += [f"  {message}" for message in self.damaged]
        lines += [f"missing or wrong: {problem}" for problem in self.problems]
        advice = "; --damaged skip leaves the damaged files out" * bool(self.damaged)
        lines.append(f"usable{advice}" if self.usable else "not usable")
        return "\n".join(lines)


def check(root: Path | str, name: str | None = None, *, progress: bool | None = None) -> Report:
    """Read labels and boxes of the data set in ``root`` and decode every picture.

    Args:
        root: what ``--root`` is given.
        name: as ``--data`` has it; None: whatever is recognised.
        progress: show a progress bar; None: where standard error is a terminal.

    Raises:
        CamtrainError: no folder; nothing that is recognised, or several data sets; a name that is
            not one of a data set on disk.
    """
    root = Path(root)
    try:
        return _checked(root, name, progress)
    except OSError as error:  # permissions, a disk that is gone
        raise CamtrainError(f"root: {root} cannot be read: {error}") from error


def _checked(root: Path, name: str | None, progress: bool | None) -> Report:
    if name is None:
        name = recognise(root)
    elif name not in HOLDS:
        raise CamtrainError(f"data: got {name!r}, allowed are {', '.join(HOLDS)}")
    elif not root.is_dir():
        raise CamtrainError(f"root: no folder {root}")
    report = Report(name, root)
    report.problems += missing(name, root)
    if report.problems:
        return report
    try:
        splits = _voc(root, report) if name == "voc" else _read(name, root, report)
    except CamtrainError as error:
        source = f" ({URLS[name]})" if name in URLS and URLS[name] not in str(error) else ""
        report.problems.append(f"{error}{source}")
        return report
    pixels = name not in cifar.KINDS or cifar.find(root, name) is None
    wrong = _decode(splits, report, progress) if pixels else set()
    for split, entries in splits.items():
        report.rows.append(_row(split, entries, wrong))
    _judge(splits, wrong, report)
    return report


def _row(split: str, entries: list[Entry], wrong: set[Path]) -> Row:
    return Row(
        split,
        len(entries),
        len({target for entry in entries for target in entry.targets}),
        sum(len(entry.boxes) for entry in entries),
        sum(entry.path in wrong for entry in entries),
    )


def _judge(splits: dict[str, list[Entry]], wrong: set[Path], report: Report) -> None:
    """Whether enough is left without the damaged files."""
    sound = {
        split: [entry for entry in entries if entry.path not in wrong and entry.targets]
        for split, entries in splits.items()
    }
    if report.name == "voc":
        # sets are chosen by --sets: one that can be learnt from is enough
        if all(len({t for e in part for t in e.targets}) < 2 for part in sound.values()):
            report.problems.append("no set holds sound pictures of two classes")
        return
    lost = {t for e in splits["train"] for t in e.targets} - {
        t for e in sound["train"] for t in e.targets
    }
    if lost:
        report.problems.append(f"all training pictures of {len(lost)} classes are damaged")
    if not sound["test"]:
        report.problems.append("all test pictures are damaged")


def _read(name: str, root: Path, report: Report) -> dict[str, list[Entry]]:
    """Splits of a data set with one class per picture."""
    splits: Splits
    if name in cifar.KINDS:
        splits = cifar.read(root, name).splits
    elif name == "cub":
        splits = cub.read(root)
    elif name == "caltech101":
        splits = caltech.read(root, damaged="skip")
        if not (caltech.find(root).parent / caltech.ANNOTATIONS).is_dir():
            report.notes.append(
                f"no {caltech.ANNOTATIONS} beside {caltech.FOLDER}, so boxes are not known; "
                f"{URLS[name]} has them"
            )
    elif name == "stanford-dogs":
        splits = dogs.read(root, damaged="skip")
    else:
        splits = folder.read(root)
    check_several(name, root, splits.classes)
    report.notes += [splits.note] * bool(splits.note)
    report.damaged += splits.skipped
    return {
        split: [
            Entry(sample.path, (sample.target,), () if sample.box is None else (sample.box,))
            for sample in samples
        ]
        for split, samples in (("train", splits.train), ("test", splits.test))
    }


def _voc(root: Path, report: Report) -> dict[str, list[Entry]]:
    """All sets of all years; a picture may be in several."""
    devkit = find_devkit(root)
    splits: dict[str, list[Entry]] = {}
    broken: dict[Path, str] = {}
    for place in sorted(devkit.glob("VOC20[0-9][0-9]")):
        year = place.name[3:]
        names = sorted(p.stem for p in (place / "ImageSets" / "Main").glob("*.txt"))
        sets = [name for name in names if "_" not in name]
        if not sets:
            read_names(devkit, year, "trainval")  # raises, naming the folder or file
        for split in sets:
            if split == "test" and year > "2007":
                report.notes.append(f"{year}:test is left out: its boxes were not published")
                continue
            splits[f"{year}:{split}"] = _voc_set(devkit, year, split, report, broken)
    report.damaged += broken.values()
    expected = f"{FitConfig.sets},{FitConfig.test_sets}".split(",")
    absent = [name for name in expected if name not in splits]
    if absent:
        report.notes.append(
            f"--sets and --test-sets name {', '.join(absent)} by default, which is not here: "
            f"choose others, or get it from {VOC_URL}"
        )
    return splits


def _voc_set(
    devkit: Path, year: str, split: str, report: Report, broken: dict[Path, str]
) -> list[Entry]:
    place, names = read_names(devkit, year, split)
    entries, gone = [], []
    for name in names:
        annotation = place / "Annotations" / f"{name}.xml"
        image = place / "JPEGImages" / f"{name}.jpg"
        lacking = [path for path in (annotation, image) if not path.is_file()]
        gone += lacking
        if lacking:
            continue
        try:
            objects = read_annotation(annotation)
        except DamagedDataError as error:
            broken[annotation] = str(error)
            objects = ()
        targets, boxes = tuple(o.target for o in objects), tuple(o.box for o in objects)
        entries.append(Entry(image, targets, boxes))
    if gone:
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        report.problems.append(f"{year}:{split} names {gone[0]}{more}, which is not there")
    return entries


def _decode(splits: dict[str, list[Entry]], report: Report, progress: bool | None) -> set[Path]:
    """Pictures that cannot be decoded, or that a box of theirs lies outside of."""
    boxes = {entry.path: entry.boxes for entries in splits.values() for entry in entries}
    wrong = set()
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        found = pool.map(_fault, boxes, boxes.values())
        for path, message in zip(boxes, _bar(found, len(boxes), progress), strict=True):
            if message:
                wrong.add(path)
                report.damaged.append(message)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest
    return wrong


def _fault(path: Path, boxes: tuple[Box, ...]) -> str:
    """What is wrong with a picture; empty where nothing is."""
    try:
        width, height = read_picture(path).size
    except DamagedDataError as error:
        return str(error)
    for box in boxes:
        inside = box.top < height and box.left < width
        if not inside or box.top + box.height <= 0 or box.left + box.width <= 0:
            return f"{path}: box {tuple(box)} lies outside the picture of {width} x {height}"
    return ""


def _bar(found: Iterable[str], total: int, progress: bool | None) -> Iterable[str]:
    from tqdm import tqdm  # comes with Lightning

    shown = sys.stderr.isatty() if progress is None else progress
    return tqdm(found, total=total, desc="decoding", unit="pictures", disable=not shown)
