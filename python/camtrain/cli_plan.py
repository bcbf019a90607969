"""``camtrain plan``: flags, and the tables it prints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtrain import config as configuration
from camtrain.config import FitConfig
from camtrain.defaults import HOLDS
from camtrain.errors import CamtrainError

if TYPE_CHECKING:
    from camtrain.planning import Option, Row, Table


def add(commands: Any, add_fields: Callable[[argparse.ArgumentParser], None]) -> None:
    """The parser; ``add_fields`` gives it the flags of ``fit``."""
    plan = commands.add_parser(
        "plan",
        help="what batch fits into a GPU's memory, and on which engine",
        description="Predict, without a GPU and without the data, the largest batch within a "
        "memory, for every engine. Takes the flags of camtrain fit, so that a command can be "
        "tried by another word. Nothing is measured; what is counted stands above the tables.",
    )
    plan.add_argument(
        "--vram", type=float, nargs="+", required=True, metavar="GB",
        help="memory, in units of 1e9 bytes; one table for each",
    )  # fmt: skip
    plan.add_argument("--classes", type=int, help="number of classes (known data sets have theirs)")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("--config", type=Path, help="YAML file with the same keys as the flags")
    add_fields(plan)


def plan(arguments: argparse.Namespace) -> int:
    """Run ``camtrain plan``; 1 where not even one picture fits into a memory."""
    from camtrain import planning

    given = {n: getattr(arguments, n) for n in configuration.fields() if n in arguments}
    given.pop("vram")
    file = {} if arguments.config is None else dict(configuration.load(arguments.config))
    file.pop("vram", None)
    for vram in arguments.vram:
        if not 0 < vram < float("inf"):
            raise CamtrainError(f"vram: must be above 0 GB, got {vram:g}")
    # the data is not read
    config = configuration.resolve(given, {"root": "", **file})
    classes = planning.classes_of(config, arguments.classes)
    planner = planning.Planner(
        config, classes, lambda line: print(line, file=sys.stderr, flush=True)
    )
    tables = []
    for vram in arguments.vram:
        table = planner.table(vram)
        planner.compare(table)
        tables.append(table)
    asked = "batch_size" in given or "batch_size" in file
    wanted = config.batch_size if asked else None
    command = _command(arguments, given, config)
    if arguments.json:
        print(json.dumps(_as_json(config, classes, tables, command), indent=1))
    else:
        print("\n".join(_lines(config, classes, tables, command, wanted)))
    small = [planning.too_small(t.vram, t.rows) for t in tables if t.taken is None]
    for error in small:
        print(f"camtrain: {error}", file=sys.stderr)
    return 1 if small else 0


def _command(arguments: argparse.Namespace, given: dict[str, Any], config: FitConfig) -> list[str]:
    """``camtrain fit`` with what was given, without what a plan sets."""
    words = ["camtrain", "fit"]
    if arguments.config is not None:
        words += ["--config", str(arguments.config)]
    for name, value in given.items():
        flag = name.replace("_", "-")
        if name in ("engine", "batch_size"):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    if config.data in HOLDS and "root" not in given and arguments.config is None:
        words += ["--root", "ROOT"]
    return words


def _recommended(command: list[str], row: Row) -> str:
    engine = [] if row.engine == "off" else ["--engine", row.engine]
    return shlex.join([*command, *engine, "--batch-size", str(row.largest)])


def _lines(
    config: FitConfig, classes: int, tables: list[Table], command: list[str], wanted: int | None
) -> list[str]:
    from camtrain.planning import COUNTED, GB, MIB, NOT_COUNTED

    decay = f", weight decay {config.weight_decay:g}" if config.weight_decay else ""
    lines = [
        f"{config.arch} at {config.image_size} x {config.image_size}, {classes} classes, recipe "
        f"{config.recipe}, {config.optimizer}{decay}, {config.precision}",
        f"Predicted, not measured on a GPU. Counted: {COUNTED}.",
        f"Not counted: {NOT_COUNTED}.",
    ]
    for table in tables:
        lines += ["", f"{table.vram:g} GB ({table.vram * GB / MIB:.0f} MiB)"]
        lines += _rows(table)
        taken = table.taken
        if taken is None:
            lines.append("nothing fits")
            continue
        assert taken.largest is not None
        lines += ["", f"with engine {taken.engine}:"]
        lines += [f"  {_option(option)}" for option in table.options]
        if wanted is not None and wanted > taken.largest:
            lines.append(f"  {_in_parts(wanted, table)}")
        lines += ["", f"take: {_recommended(command, taken)}"]
    return lines


def _in_parts(wanted: int, table: Table) -> str:
    """How a batch that does not fit can be trained."""
    offers = (o.largest for o in table.options if o.name.startswith("--accumulate"))
    most = next(filter(None, offers), None)
    text = f"--batch-size {wanted} does not fit"
    if most is None:
        return text
    parts = -(-wanted // most)
    return f"{text}; --batch-size {-(-wanted // parts)} --accumulate {parts} takes as many samples"


def _rows(table: Table) -> list[str]:
    from camtrain.planning import MIB

    heads = (
        "step",
        "engine",
        "MiB fixed",
        "MiB per sample",
        "largest batch",
        "x off",
        "x plain CE",
    )
    own, plain = table.rows[0].largest, table.rows[-1].largest
    body: list[tuple[str, ...]] = []
    refused = []
    for row in table.rows:
        name = "cross-entropy" if row.recipe == "baseline" else row.recipe
        if row.refused is not None:
            body.append((name, row.engine, "-", "-", "-", "-", "-"))
            refused.append(f"{name}, engine {row.engine}: {row.refused}")
            continue
        assert row.at_batch_0 is not None
        assert row.per_sample is not None
        assert row.largest is not None
        body.append((
            name, row.engine, f"{row.at_batch_0 / MIB:.0f}", f"{row.per_sample / MIB:.2f}",
            str(row.largest), _ratio(row.largest, own), _ratio(row.largest, plain),
        ))  # fmt: skip
    if table.rows[-1].recipe != "baseline" or len(table.rows) == 1:
        heads, body = heads[:-1], [cells[:-1] for cells in body]
    widths = [max(len(cells[i]) for cells in (heads, *body)) for i in range(len(heads))]
    lines = []
    for cells in (heads, *body):
        texts = [
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(texts).rstrip())
    return lines + refused


def _ratio(largest: int, of: int | None) -> str:
    return f"{largest / of:.2f}" if of else "-"


def _option(option: Option) -> str:
    from camtrain.planning import MIB

    parts = [] if option.largest is None else [f"batch {option.largest}"]
    if option.per_sample is not None:
        parts.append(f"{option.per_sample / MIB:.2f} MiB per sample")
    offered = "" if option.offered else " (camtrain fit does not offer it)"
    return f"{option.name}: {', '.join([*parts, option.effect])}{offered}"


def _as_json(
    config: FitConfig, classes: int, tables: list[Table], command: list[str]
) -> dict[str, Any]:
    from camtrain.planning import COUNTED, NOT_COUNTED

    return {
        "arch": config.arch,
        "image_size": config.image_size,
        "classes": classes,
        "recipe": config.recipe,
        "optimizer": config.optimizer,
        "precision": config.precision,
        "measured_on_gpu": False,
        "counted": COUNTED,
        "not_counted": NOT_COUNTED,
        "budgets": [
            {
                "vram_gb": table.vram,
                "rows": [dataclasses.asdict(row) for row in table.rows],
                "options": [dataclasses.asdict(option) for option in table.options],
                "take": None if table.taken is None else _recommended(command, table.taken),
            }
            for table in tables
        ],
    }
