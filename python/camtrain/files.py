"""Writing that a full disk or a kill cannot leave half done, and what a run ran on."""

from __future__ import annotations

import csv
import errno
import importlib.metadata
import io
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from camkernels.viz.files import write
from camtrain.errors import CamtrainError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

PACKAGES = (
    "camkernels",
    "torch",
    "lightning",
    "torchmetrics",
    "triton",
    "torchvision",
    "timm",
    "numpy",
    "scikit-learn",
    "matplotlib",
    "pillow",
)


class DiskFullError(CamtrainError):
    """No room for a file of the run; what was there before is intact."""


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step: readers see the old file or the new one.

    Raises:
        DiskFullError: no room (or no quota); an older ``path`` stays as it was.
    """
    try:
        write(path, content)
    except OSError as error:
        if error.errno in _FULL:
            kept = "the older file is intact" if path.exists() else "nothing was written"
            raise DiskFullError(
                f"no room for {path} ({len(content) >> 20} MiB): {os.strerror(error.errno)}; {kept}"
            ) from error
        raise


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` for text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """:func:`write_bytes` for JSON, indented."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """:func:`write_bytes` for rows of one header; a column is empty where a row lacks it."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def is_disk_full(error: BaseException) -> bool:
    """Whether ``error``, or what caused it, says that a disk or quota is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DiskFullError) or (isinstance(seen, OSError) and seen.errno in _FULL):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def environment() -> dict[str, Any]:
    """Versions, machine and threads, for the run folder."""
    from camkernels import backends

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    if versions["camkernels"] is None:  # run from a source tree
        import camkernels

        versions["camkernels"] = camkernels.__version__
    reasons = {name: backends.unavailable_reason(name) for name in backends.NAMES[1:]}
    return {
        "python": sys.version.split()[0],
        "versions": versions,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ],
        "backends": {name: reason or "works" for name, reason in reasons.items()},
        "command": sys.argv,
    }
