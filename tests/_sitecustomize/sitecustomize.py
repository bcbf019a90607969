"""Test only: lets torchvision import beside a build of torch that its binary was not made for.

torchvision registers fake kernels for its own operators when it is imported, which fails where its
binary does not load (a CUDA wheel beside a CPU torch). Its models need none of these operators, so
their schemas are declared in its place, just before the first import of torchvision.

conftest.py loads this file; processes started by tests get it by having this folder on PYTHONPATH.
"""

from __future__ import annotations

import importlib.machinery
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[Any] = []  # a Library that is collected takes its schemas with it


class _DeclareBeforeTorchvision(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            found = importlib.machinery.PathFinder.find_spec(fullname)
            if found is not None and found.origin is not None:
                _declare_where_missing(Path(found.origin).parent)


def _declare_where_missing(package: Path) -> None:
    import torch

    for binary in package.glob("_C*.so"):
        try:
            torch.ops.load_library(str(binary))
        except OSError:
            continue
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _kept.append(library)


if not any(type(finder).__name__ == "_DeclareBeforeTorchvision" for finder in sys.meta_path):
    sys.meta_path.insert(0, _DeclareBeforeTorchvision())
