"""The command line of ``camtrain data``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from camtrain.config import HOLDS


def add_data(commands: Any) -> None:
    """Add ``data check`` to the commands of the program."""
    data = commands.add_parser("data", help="what is known about a data set on disk")
    actions = data.add_subparsers(dest="action", required=True)
    check = actions.add_parser(
        "check",
        help="read labels and boxes and decode every picture",
        description="Say which data set lies in a folder, what of it is missing and where it is to "
        "be had. Reads labels and boxes and decodes every picture; damaged files are counted and "
        "named. The exit status is 0 where the data can be trained on, else 1.",
    )
    check.add_argument("root", type=Path, metavar="ROOT", help="what fit takes as --root")
    check.add_argument("--data", choices=tuple(HOLDS), help="which it is (default: recognise it)")
    check.add_argument("--progress", action=argparse.BooleanOptionalAction, help="progress bar")


def run_data(arguments: argparse.Namespace) -> int:
    """Run ``data check``; 0 where the data is usable, else 1."""
    from camtrain.data.check import check

    report = check(arguments.root, arguments.data, progress=arguments.progress)
    print(report.text())
    return 0 if report.usable else 1
