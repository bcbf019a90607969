"""Writes tiny CUB-200-2011 and Caltech-101 trees in their exact layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross")


def write_picture(path: Path, tone: int, size: tuple[int, int] = (60, 48)) -> None:
    """(width, height) pixels that differ from place to place; ``tone`` sets the class apart."""
    width, height = size
    pixels = np.full((height, width, 3), tone, np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)


class TinyCUB:
    """Two classes, three training and two test pictures of each; ids have gaps."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "CUB_200_2011"
        tables: dict[str, list[str]] = {
            name: [] for name in ("images", "image_class_labels", "train_test_split")
        }
        tables["bounding_boxes"] = []
        identity = 1
        for label, bird in enumerate(BIRDS, 1):
            for number in range(5):
                identity += 2
                name = f"{bird}/{bird[4:]}_{number:04d}_{identity}.jpg"
                write_picture(self.folder / "images" / name, 40 * label)
                tables["images"].append(f"{identity} {name}")
                tables["image_class_labels"].append(f"{identity} {label}")
                tables["train_test_split"].append(f"{identity} {int(number < 3)}")
                tables["bounding_boxes"].append(f"{identity} 6.0 8.0 30.5 20.0")
        for table, lines in tables.items():
            self.write(table, lines)
        self.write("classes", [f"{label} {bird}" for label, bird in enumerate(BIRDS, 1)])

    def table(self, name: str) -> Path:
        return self.folder / f"{name}.txt"

    def lines(self, name: str) -> list[str]:
        return self.table(name).read_text().splitlines()

    def write(self, name: str, lines: list[str]) -> None:
        self.table(name).write_text("".join(f"{line}\n" for line in lines))

    def picture(self, index: int) -> Path:
        return self.folder / "images" / self.lines("images")[index].split()[1]


class TinyCaltech:
    """Two classes of six pictures and the background, without lists."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "101_ObjectCategories"
        for tone, name in enumerate(("BACKGROUND_Google", "Faces", "ant")):
            for number in range(1, 7):
                write_picture(self.folder / name / f"image_{number:04d}.jpg", 60 * tone)

    def lists(self, train: list[str], test: list[str]) -> None:
        for name, lines in (("train", train), ("test", test)):
            (self.root / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))

    def annotate(self) -> None:
        """An annotation for each picture: a box and an outline, as MATLAB wrote them."""
        for folder, name in (("Faces", "Faces_2"), ("ant", "ant")):
            place = self.root / "Annotations" / name
            place.mkdir(parents=True)
            for number in range(1, 7):
                content = {
                    "box_coord": np.array([[9, 28, 7, 36]], np.uint16),
                    "obj_contour": np.zeros((2, 5)),
                }
                savemat(place / f"annotation_{number:04d}.mat", content)
            assert (self.folder / folder).is_dir()
