"""Writes a tiny PASCAL VOC in its exact format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

OBJECT = """
	<object>
		<name>{name}</name>
		<pose>Left</pose>
		<truncated>0</truncated>
		<difficult>{difficult}</difficult>
		{extra}
		<bndbox>
			<xmin>{box[0]}</xmin>
			<ymin>{box[1]}</ymin>
			<xmax>{box[2]}</xmax>
			<ymax>{box[3]}</ymax>
		</bndbox>
	</object>"""

PART = """<part>
			<name>head</name>
			<bndbox>
				<xmin>1</xmin>
				<ymin>1</ymin>
				<xmax>2</xmax>
				<ymax>2</ymax>
			</bndbox>
		</part>"""


class TinyVOC:
    """Writes pictures and annotations under ``root/VOCdevkit/VOC<year>``."""

    def __init__(self, root: Path, year: str = "2007") -> None:
        self.root = root
        self.folder = root / "VOCdevkit" / f"VOC{year}"
        for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (self.folder / part).mkdir(parents=True)

    def annotation(self, name: str) -> Path:
        return self.folder / "Annotations" / f"{name}.xml"

    def image(self, name: str) -> Path:
        return self.folder / "JPEGImages" / f"{name}.jpg"

    def add(self, name: str, *objects: dict[str, Any], size: tuple[int, int] = (60, 40)) -> None:
        """A picture (width, height) whose pixels differ from place to place."""
        width, height = size
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0] = np.linspace(0, 255, width)[None]
        pixels[..., 1] = np.linspace(0, 255, height)[:, None]
        Image.fromarray(pixels).save(self.image(name), quality=95)
        nodes = "".join(
            OBJECT.format(**{"difficult": 0, "extra": "", "name": "dog", **o}) for o in objects
        )
        self.annotation(name).write_text(
            f"<annotation>\n\t<folder>VOC2007</folder>\n\t<filename>{name}.jpg</filename>\n"
            f"\t<size>\n\t\t<width>{width}</width>\n\t\t<height>{height}</height>\n"
            f"\t\t<depth>3</depth>\n\t</size>\n\t<segmented>0</segmented>{nodes}\n</annotation>\n"
        )

    def split(self, split: str, *names: str) -> None:
        file = self.folder / "ImageSets" / "Main" / f"{split}.txt"
        file.write_text("".join(f"{name}\n" for name in names))
