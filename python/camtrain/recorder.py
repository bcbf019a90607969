"""What a run keeps: one row per epoch with time and memory, and a checkpoint after each."""

from __future__ import annotations

import io
import os
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint

from camtrain import files
from camtrain.errors import DivergedError
from camtrain.training import Classifier

CHECKPOINT = Path("checkpoints") / "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that replace the older one in one step, or leave it as it was."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Serialise to memory first: torch.save hides what the file system says."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        files.write_bytes(Path(path), buffer.getvalue())


class SaveEveryEpoch(Checkpoint):
    """A checkpoint after each finished epoch; Lightning runs it after all other callbacks."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / CHECKPOINT

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save."""
        trainer.save_checkpoint(self.path)


class StopDiverged(Callback):
    """Stops at the end of an epoch that left weights which are not finite, before it is saved."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at all weights."""
        if all(bool(weight.isfinite().all()) for weight in pl_module.parameters()):
            return
        done = trainer.current_epoch
        kept = f"the checkpoint of epoch {done} is kept" if done else "no checkpoint was written"
        raise DivergedError(
            f"epoch {done + 1}: the weights are no longer finite: the training diverged; lower "
            f"--lr, or the weights of the other terms of the loss; {kept}"
        )


class PeakMemory:
    """Peak memory since :meth:`start`, of this process and of the GPU, in MiB.

    Linux lets a process reset its high-water mark; elsewhere the peak is that of the whole run.
    """

    def start(self) -> None:
        """Forget earlier peaks."""
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> dict[str, float]:
        """``peak_rss_mib`` and, with a GPU, ``peak_cuda_mib``."""
        peaks = {"peak_rss_mib": round(_peak_rss() / 2**20, 1)}
        if torch.cuda.is_available():
            peaks["peak_cuda_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        return peaks


def _peak_rss() -> int:
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Recorder(Callback):
    """Collects one row per epoch, writes ``metrics.csv`` and hands the row to the loggers.

    The rows travel in the checkpoint, so a resumed run goes on with them.
    """

    def __init__(self, folder: Path, quiet: bool = False) -> None:
        self.folder = folder
        self.quiet = quiet
        self.rows: list[dict[str, Any]] = []
        self.memory = PeakMemory()
        self._began = self._test_began = self._test_ended = 0.0

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.rows = list(state_dict["rows"])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        assert isinstance(pl_module, Classifier)
        for split in ("train", "test"):
            pl_module.split(split).reset()
        self.memory.start()
        self._began = self._test_began = self._test_ended = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training of the epoch is over."""
        self._test_began = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """So is its test."""
        self._test_ended = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the row of the epoch."""
        assert isinstance(pl_module, Classifier)
        row: dict[str, Any] = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        for split in ("train", "test"):
            values = pl_module.split(split).compute()
            row.update({f"{split}/{name}": value for name, value in values.items()})
        if pl_module.balance is not None:
            row["weight_scale"] = pl_module.scale
        row["train_seconds"] = round(self._test_began - self._began, 3)
        row["test_seconds"] = round(self._test_ended - self._test_began, 3)
        row.update(self.memory.read())
        self.rows.append(row)
        for logger in trainer.loggers:
            numbers = {k: v for k, v in row.items() if k not in ("epoch", "step")}
            logger.log_metrics(numbers, step=trainer.global_step)
        if trainer.is_global_zero:
            files.write_csv(self.folder / "metrics.csv", self.rows)
            if not self.quiet:
                print(describe_row(row, trainer.max_epochs or 0), flush=True)


# What a line says of a split, and how: of each, what the row holds.
_SHOWN = (
    ("acc", "accuracy", "{:.3f}"),
    ("ce", "entropy", "{:.3f}"),
    ("ca", "area", "{:.3f}"),
    ("cd", "dispersion", "{:.3f}"),
    ("SSIM", "consistency", "{:.3f}"),
    ("norm", "sparsity", "{:.3g}"),
    ("error", "gradient_error", "{:.3f}"),
    ("dead", "dead", "{:.1%}"),
    ("uniform", "uniform", "{:.1%}"),
)


def describe_row(row: Mapping[str, Any], epochs: int) -> str:
    """One line on an epoch."""

    def figures(split: str) -> str:
        shown = [
            f"{short} {form.format(row[f'{split}/{name}'])}"
            for short, name, form in _SHOWN
            if f"{split}/{name}" in row
        ]
        return " ".join([split, *(shown or ["nothing measured"])])

    return (
        f"epoch {row['epoch']}/{epochs} | {figures('train')} | {figures('test')} | "
        f"{row['train_seconds']:.1f} s + {row['test_seconds']:.1f} s, "
        f"{row['peak_rss_mib']:.0f} MiB"
    )


def checkpoint_epoch(path: Path) -> int:
    """How many epochs a checkpoint has finished."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    return int(content["epoch"]) + 1


def partial_files(folder: Path) -> list[Path]:
    """Left by a kill in the middle of a write; of no use to anyone."""
    mine = f".{os.getpid()}."
    return [p for p in folder.rglob(".*.partial") if mine not in p.name]
