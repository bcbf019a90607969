"""What tests of the examples share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

for _folder in (Path(__file__).resolve().parents[2], Path(__file__).resolve().parent):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))


@pytest.fixture(scope="module")
def pictures(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photographs of each of five classes: forty to train with, ten to test."""
    source = shared_data / "caltech101_subset" / "101_ObjectCategories"
    folder = tmp_path_factory.mktemp("pictures")
    for category in sorted(p for p in source.iterdir() if p.is_dir())[:5]:
        (folder / category.name).mkdir()
        for path in sorted(category.glob("*.jpg"))[:10]:
            (folder / category.name / path.name).symlink_to(path)
    return folder


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
