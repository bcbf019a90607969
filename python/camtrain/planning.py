"""What batch fits into a memory, and on which engine: told without a GPU."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

import camkernels as ck
from camtrain import config as configuration
from camtrain.config import AUTO, FitConfig
from camtrain.counting import PROBES, Peaks, bytes_of, step_of
from camtrain.errors import CamtrainError

# Of the data sets whose number of classes does not depend on what lies on the disk.
CLASSES = {
    "digits": 10,
    "voc": 20,
    "cub": 200,
    "caltech101": 101,
    "stanford-dogs": 120,
    "cifar10": 10,
    "cifar100": 100,
}
GB = 1e9
MIB = 2**20
MODES = ("off", "fast", "lean", "lean-bf16")
COUNTED = (
    "parameters and buffers, gradients, the optimiser's state and its step, pictures as bytes and "
    "floats, and all that forward, loss and backward allocate"
)
NOT_COUNTED = (
    "workspaces of cuDNN and cuBLAS, the CUDA context (some hundred MiB), fragmentation, the "
    "measures of an epoch, crops that are cut on the device"
)
# Where modes take batches alike: the engine keeps less and is not slower, lean makes some again.
_PREFERRED = ("fast", "lean", "off")


@dataclass
class Row:
    """One way to run a step, within one budget.

    Attributes:
        recipe: of the row; ``"baseline"`` in a row that stands for comparison.
        refused: why it cannot run; then the numbers are None.
        at_batch_0, per_sample: bytes, by the line near the largest batch.
    """

    recipe: str
    engine: str
    refused: str | None = None
    at_batch_0: float | None = None
    per_sample: float | None = None
    largest: int | None = None
    peak: int | None = None
    least: int | None = None
    """Bytes of the smallest batch, where not even that fits."""


@dataclass
class Option:
    """What a change of one setting would make of the recommended row."""

    name: str
    offered: bool
    effect: str
    largest: int | None = None
    per_sample: float | None = None


@dataclass
class Table:
    """All rows within one budget, and the one to take."""

    vram: float
    rows: list[Row] = field(default_factory=list)
    options: list[Option] = field(default_factory=list)
    taken: Row | None = None


class Planner:
    """Plans one configuration; what is counted once serves all budgets.

    Args:
        config: of the run; its engine and batch size are not read. classes: of the data.

    Raises:
        CamtrainError: what no mode could train.
    """

    def __init__(
        self, config: FitConfig, classes: int, tell: Callable[[str], None] | None = None
    ) -> None:
        if config.precision == "64-true":
            raise CamtrainError(
                "precision: a plan cannot tell what 64-true takes: no kernel of a GPU computes in "
                "float64 here, and the formulas in their place take more; allowed are "
                "32-true, bf16-mixed, 16-mixed"
            )
        self.config, self.classes, self.tell = config, classes, tell or (lambda line: None)
        self._peaks: dict[Any, Peaks | str] = {}

    def modes(self) -> list[str]:
        """Engines that make a difference to the recipe."""
        config = self.config
        second = config.recipe in ("interpretable", "combined") and config.gradient_weight != 0
        return [mode for mode in MODES if second or mode != "lean-bf16"]

    def peaks(self, config: FitConfig) -> Peaks | str:
        """Of ``config``, or why it cannot run."""
        key = dataclasses.astuple(config)
        if key not in self._peaks:
            self.tell(f"counting: {config.recipe}, engine {config.engine}, {config.precision}")
            try:
                configuration.validate(config)
                with _reference_if_asked(config):
                    self._peaks[key] = found = Peaks(*step_of(config, self.classes))
                    found.at(PROBES[0])
            except CamtrainError as error:
                if config.engine == "off":
                    raise
                self._peaks[key] = str(error)
            except Exception as error:
                if config.engine == "off" and config.recipe == self.config.recipe:
                    raise CamtrainError(
                        f"recipe: {config.recipe!r} with {config.arch} cannot be counted without "
                        f"numbers: {type(error).__name__}: {error}"
                    ) from error
                self._peaks[key] = f"{type(error).__name__}: {error}"
        return self._peaks[key]

    def row(self, config: FitConfig, vram: float) -> Row:
        """``config`` within ``vram`` GB."""
        peaks = self.peaks(config)
        row = Row(config.recipe, config.engine)
        if isinstance(peaks, str):
            row.refused = peaks
            return row
        with _reference_if_asked(config):
            row.largest = peaks.largest(vram * GB)
            row.at_batch_0, row.per_sample = peaks.line(vram * GB)
            if row.largest:
                row.peak = peaks.at(row.largest)
            else:
                row.least = peaks.least()[1]
        return row

    def table(self, vram: float, *, engines: list[str] | None = None) -> Table:
        """Every mode of the recipe within ``vram`` GB, and cross-entropy alone beside them."""
        made = Table(vram)
        for engine in engines or self.modes():
            made.rows.append(self.row(dataclasses.replace(self.config, engine=engine), vram))
        made.taken = best(made.rows)
        return made

    def compare(self, table: Table) -> None:
        """Add the rows of cross-entropy alone and what options would change."""
        if self.config.recipe != "baseline":
            plain = as_baseline(self.config)
            table.rows.append(self.row(plain, table.vram))
        if table.taken is not None:
            table.options = self._options(table)

    def _options(self, table: Table) -> list[Option]:
        taken, budget = table.taken, table.vram * GB
        assert taken is not None
        assert taken.largest is not None
        assert taken.peak is not None
        config = dataclasses.replace(self.config, engine=taken.engine)
        options = []
        if config.precision == "32-true":
            row = self.row(dataclasses.replace(config, precision="bf16-mixed"), table.vram)
            options.append(Option(
                "--precision bf16-mixed", True,
                row.refused or "autocast to bfloat16: other numbers", row.largest, row.per_sample,
            ))  # fmt: skip
        if config.accumulate == 1:
            row = self.row(dataclasses.replace(config, accumulate=2), table.vram)
            if row.largest:
                options.append(Option(
                    "--accumulate k", True,
                    f"so many samples k times in a step: gradients stay through the next forward; "
                    f"{2 * row.largest} samples a step with k = 2; BatchNorm sees the parts",
                    row.largest, row.per_sample,
                ))  # fmt: skip
            options.append(self._stepping_in_backward(config, taken, budget))
        if config.recipe in ("interpretable", "combined") and config.gradient_weight:
            options.append(Option(
                "--every n", True,
                "changes nothing: the steps with the regulariser have the peak", taken.largest,
            ))  # fmt: skip
        return options

    def _stepping_in_backward(self, config: FitConfig, taken: Row, budget: float) -> Option:
        """Freeing each gradient as the optimiser has used it, within the backward."""
        assert taken.largest is not None
        assert taken.peak is not None
        freed = Peaks(*step_of(config, self.classes))
        freed.free_in_backward()
        with _reference_if_asked(config):
            largest = freed.largest(budget)
            saved = taken.peak - freed.at(taken.largest)
        gradients = bytes_of(freed.step.parameters) / MIB
        return Option(
            "step within the backward, freeing each gradient", False,
            f"{saved / MIB:.0f} MiB less at batch {taken.largest} (all gradients: {gradients:.0f} "
            "MiB)",
            largest,
        )  # fmt: skip


def _reference_if_asked(config: FitConfig) -> Any:
    """Kernels that are named run on their own device; here they are counted as ``auto``'s."""
    return ck.backend("reference") if config.backend == "reference" else nullcontext()


def as_baseline(config: FitConfig) -> FitConfig:
    """``config`` with cross-entropy alone, on modules as they are."""
    values = {name: getattr(FitConfig, name) for name in configuration.READ_BY}
    values |= {"label_smoothing": config.label_smoothing, "recipe": "baseline", "engine": "off"}
    return dataclasses.replace(config, **values)


def best(rows: list[Row], samples: int | None = None) -> Row | None:
    """The row with the largest batch, of those that compute what is asked to full precision; where
    several take as much (all ``samples``), the fastest. None: nothing fits."""

    def rank(row: Row) -> tuple[int, int]:
        assert row.largest is not None
        return -min(row.largest, samples or row.largest), _PREFERRED.index(row.engine)

    fitting = [row for row in rows if row.largest and row.engine in _PREFERRED]
    return min(fitting, key=rank, default=None)


def too_small(vram: float, rows: list[Row]) -> CamtrainError:
    """What to say where no batch fits."""
    needs = [(row.least, row.engine) for row in rows if row.least is not None]
    if not needs:
        return CamtrainError("; ".join(row.refused or "" for row in rows))
    least, engine = min(needs)
    gb = math.ceil(least / GB * 1000) / 1000
    return CamtrainError(
        f"vram: {vram:g} GB are too little for the smallest batch, which takes {least / MIB:.0f} "
        f"MiB (engine {engine}); at least --vram {gb:g} would do"
    )


def classes_of(config: FitConfig, classes: int | None) -> int:
    """As given, else as the data set is known to have.

    Raises:
        CamtrainError: neither, or not a number of classes.
    """
    if classes is None:
        classes = CLASSES.get(config.data)
    if classes is None:
        raise CamtrainError(
            f"classes: how many --data {config.data} has is not known before it is read; pass "
            "--classes"
        )
    if classes < 1:
        raise CamtrainError(f"classes: must be at least 1, got {classes}")
    return classes


def chosen(config: FitConfig, classes: int, samples: int) -> tuple[FitConfig, str]:
    """``config`` with the batch size and the engine that ``config.vram`` allows, and what to tell.

    Args:
        config: of a run that was given ``vram`` and no batch size; an engine other than ``"auto"``
            stays. classes: of its data. samples: of its training data: no batch is larger.

    Raises:
        CamtrainError: not even the smallest batch fits.
    """
    assert config.vram is not None
    planner = Planner(config, classes)
    given = None if config.engine == AUTO else [config.engine]
    rows = planner.table(config.vram, engines=given).rows
    row = best(rows, samples) if given is None else rows[0]
    if row is None or not row.largest:
        raise too_small(config.vram, rows)
    batch = min(row.largest, samples)
    found = dataclasses.replace(config, engine=row.engine, batch_size=batch)
    peaks = planner.peaks(dataclasses.replace(config, engine=row.engine))
    assert isinstance(peaks, Peaks)
    with _reference_if_asked(config):
        needed = peaks.at(batch)
    return found, (
        f"plan: engine {row.engine}, batch size {batch}: {needed / MIB:.0f} of "
        f"{config.vram * GB / MIB:.0f} MiB, by prediction"
    )


class WithinBudget(Callback):
    """Compares what was allocated with the plan's budget, at the first steps of each epoch (the
    optimiser's state is there from the second on, a regulariser may come in later)."""

    def __init__(self, vram: float, tell: Callable[[str], None]) -> None:
        self.vram, self.tell = vram, tell

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where nothing can be compared."""
        if pl_module.device.type != "cuda":
            self.tell(f"plan: not verified: this run is on {pl_module.device.type}, not on a GPU")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Compare.

        Raises:
            CamtrainError: more was allocated.
        """
        if pl_module.device.type != "cuda" or trainer.fit_loop.epoch_loop.batch_idx > 1:
            return
        allocated = torch.cuda.max_memory_allocated(pl_module.device)
        if allocated > self.vram * GB:
            raise CamtrainError(
                f"vram: a step took {allocated / MIB:.0f} MiB, the budget is {self.vram:g} GB "
                f"({self.vram * GB / MIB:.0f} MiB): the plan was too low for this network; take a "
                "smaller --vram, or --batch-size"
            )
