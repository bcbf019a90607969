"""Writes a tiny Stanford Dogs in its exact format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from picture_files import write_picture
from PIL import Image
from scipy.io import savemat

BREEDS = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel")

ANNOTATION = """<annotation>
	<folder>{folder}</folder>
	<filename>{name}</filename>
	<source>
		<database>ImageNet database</database>
	</source>
	<size>
		<width>60</width>
		<height>48</height>
		<depth>3</depth>
	</size>
	<segment>0</segment>{objects}
</annotation>"""

OBJECT = """
	<object>
		<name>{breed}</name>
		<pose>Unspecified</pose>
		<truncated>0</truncated>
		<difficult>0</difficult>
		<bndbox>
			<xmin>{box[0]}</xmin>
			<ymin>{box[1]}</ymin>
			<xmax>{box[2]}</xmax>
			<ymax>{box[3]}</ymax>
		</bndbox>
	</object>"""

DOG_BOXES = ((10, 5, 50, 42), (6, 8, 36, 28), (20, 10, 55, 44), (30, 4, 52, 40))
# Of the four test pictures: several sizes and places.


class TinyDogs:
    """Two breeds with labels 1 and 2, three training and two test pictures of each."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.splits: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
        for label, breed in enumerate(BREEDS, 1):
            wnid = breed.partition("-")[0]
            for number in range(5):
                name = f"{breed}/{wnid}_{100 + number}.jpg"
                write_picture(root / "Images" / name, 40 * label)
                self.annotate(name, (6, 8, 36, 28))
                self.splits["train" if number < 3 else "test"].append((name, label))
        self.write_lists()

    def picture(self, split: str, index: int) -> Path:
        return self.root / "Images" / self.splits[split][index][0]

    def annotation(self, name: str) -> Path:
        return self.root / "Annotation" / name.removesuffix(".jpg")

    def annotate(self, name: str, *boxes: tuple[int, int, int, int]) -> None:
        """An object for each box: xmin, ymin, xmax, ymax."""
        breed, _, file = name.partition("/")
        nodes = "".join(OBJECT.format(breed=breed.partition("-")[2], box=box) for box in boxes)
        path = self.annotation(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            ANNOTATION.format(
                folder=breed.partition("-")[0][1:], name=file.removesuffix(".jpg"), objects=nodes
            )
        )

    def write_lists(self) -> None:
        for split, entries in self.splits.items():
            self.write_list(split, [name for name, _ in entries], [label for _, label in entries])

    def write_list(self, split: str, names: list[str], labels: list[int]) -> None:
        """Cell arrays of strings and a column of labels, as MATLAB wrote them."""
        files, notes = (np.empty((len(names), 1), object) for _ in range(2))
        for row, name in enumerate(names):
            files[row, 0], notes[row, 0] = name, name.removesuffix(".jpg")
        column = np.array(labels, np.float64).reshape(-1, 1)
        content = {"file_list": files, "annotation_list": notes, "labels": column}
        savemat(self.root / f"{split}_list.mat", content)


def make_png(path: Path) -> None:
    """The same picture as a PNG with transparency, under its old name."""
    with Image.open(path) as image:
        image.convert("RGBA").save(path, format="PNG")
