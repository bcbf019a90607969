"""One run from configuration to run folder."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor

import camkernels as ck
from camtrain import config as configuration
from camtrain import figures, files
from camtrain.config import FitConfig
from camtrain.data.module import CamtrainData
from camtrain.data.voc import describe_skipped
from camtrain.errors import CamtrainError
from camtrain.models import build_model
from camtrain.recorder import (
    CHECKPOINT,
    AtomicCheckpointIO,
    Recorder,
    SaveEveryEpoch,
    checkpoint_epoch,
    partial_files,
)
from camtrain.training import Classifier

log = logging.getLogger("camtrain")


class InterruptedRunError(CamtrainError):
    """Stopped by a signal; the message says how to go on."""


@dataclass
class Run:
    """What a finished run leaves in memory."""

    config: FitConfig
    rows: list[dict[str, Any]]
    head: str
    backend: str
    examples: Examples


@dataclass
class Examples:
    """Fixed test pictures with the maps of their class at the end of training."""

    images: Tensor
    """(N, 3, H, W) uint8."""
    targets: Tensor
    """(N,)"""
    predictions: Tensor
    """(N,)"""
    boxes: Tensor | None
    """(N, 4)"""
    maps: Tensor
    """(N, h, w)"""
    entropy: Tensor
    """(N,) of the maps."""


def fit(
    config: FitConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
    quiet: bool = False,
    data: CamtrainData | None = None,
) -> Run:
    """Train by ``config`` and write the run folder ``config.out``.

    The folder holds ``config.yaml``, ``environment.json``, ``metrics.csv`` (one row per epoch with
    time and peak memory), ``curves.png``, ``overlays.png``, ``model.pt`` (a state_dict),
    ``summary.json``, ``checkpoints/last.ckpt``, and the logs of CSV and TensorBoard.

    Args:
        config: of the run.
        resume: go on after the last finished epoch of the run in ``config.out``.
        overwrite: remove an earlier run there.
        progress: show a progress bar; None: where standard error is a terminal.
        quiet: print nothing per epoch.
        data: made beforehand by the same configuration, to share between runs.

    Raises:
        CamtrainError: whatever the user can put right, a full disk and an interrupt among them.
    """
    folder = Path(config.out)
    checkpoint = _prepare(folder, config, resume, overwrite)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    with _quiet_lightning(), _backend(config.backend):
        data = CamtrainData(config) if data is None else data
        model = build_model(config, len(data.classes))
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        module = Classifier(model, config, len(data.classes))
        recorder, collector = Recorder(folder, quiet), ExampleCollector(data)
        trainer = _trainer(config, folder, [recorder, collector], progress)
        files.write_json(folder / "environment.json", files.environment())
        _run(trainer, module, data, checkpoint, folder)
        skipped = data.skipped + sorted(module.damaged)
        if module.damaged:
            log.warning("%s", describe_skipped(sorted(module.damaged)))
        run = Run(config, recorder.rows, **collector.found)
        module.close()
    if trainer.is_global_zero:
        _finish(folder, run, module, skipped)
    return run


def _prepare(folder: Path, config: FitConfig, resume: bool, overwrite: bool) -> Path | None:
    """Make the folder; the checkpoint to go on from, if any."""
    started = (folder / "config.yaml").is_file()
    if started and overwrite and not resume:
        shutil.rmtree(folder)
    elif started and not resume:
        raise CamtrainError(
            f"out: {folder} holds a run already; pass --resume, --overwrite or another --out"
        )
    try:
        files.write_text(folder / "config.yaml", configuration.dump(config))
    except OSError as error:
        raise CamtrainError(f"out: cannot write to {folder}: {error}") from error
    for path in partial_files(folder):
        path.unlink()
    checkpoint = folder / CHECKPOINT
    if not resume:
        return None
    if not checkpoint.is_file():
        print("no epoch of this run was finished; starting from the beginning", flush=True)
        return None
    print(f"resuming after epoch {checkpoint_epoch(checkpoint)}", flush=True)
    return checkpoint


def _trainer(
    config: FitConfig, folder: Path, callbacks: list[Callback], progress: bool | None
) -> pl.Trainer:
    progress = sys.stderr.isatty() if progress is None else progress
    callbacks = [*callbacks, SaveEveryEpoch(folder)]
    if progress:
        callbacks.append(TQDMProgressBar(refresh_rate=5))
    loggers: list[Logger] = [CSVLogger(folder, name="csv")]
    try:
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version=""))
    except ModuleNotFoundError as error:
        log.warning("no TensorBoard logs: %s", error)
    return pl.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        precision=config.precision,  # type: ignore[arg-type]
        max_epochs=config.epochs,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        logger=loggers,
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        enable_progress_bar=progress,
        enable_model_summary=False,
        enable_checkpointing=True,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


def _run(
    trainer: pl.Trainer,
    module: Classifier,
    data: CamtrainData,
    checkpoint: Path | None,
    folder: Path,
) -> None:
    """Train; turn a signal and a full disk into messages."""
    handler = signal.getsignal(signal.SIGINT)
    saved = folder / CHECKPOINT
    try:
        trainer.fit(
            module, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint)
        )
    except (SystemExit, KeyboardInterrupt) as error:
        done = f"after epoch {checkpoint_epoch(saved)}" if saved.is_file() else "from the start"
        raise InterruptedRunError(
            f"interrupted; camtrain fit --resume --out {folder} goes on {done}"
        ) from error
    except Exception as error:
        if files.is_disk_full(error):
            done = (
                f"the checkpoint of epoch {checkpoint_epoch(saved)} is intact: make room, then "
                f"camtrain fit --resume --out {folder}"
                if saved.is_file()
                else "no checkpoint was written yet"
            )
            raise files.DiskFullError(f"disk full: {error}; {done}") from error
        raise
    finally:
        if trainer.is_global_zero:
            signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    if trainer.interrupted:
        raise InterruptedRunError(f"interrupted; camtrain fit --resume --out {folder} goes on")


class ExampleCollector(Callback):
    """At the end of training, maps of fixed test pictures: the first of each class, at most 8."""

    def __init__(self, data: CamtrainData, count: int = 8) -> None:
        self.data = data
        self.items = example_items(data, count)
        self.found: dict[str, Any] = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The model is still on its device here."""
        assert isinstance(pl_module, Classifier)
        description = pl_module.describe()
        examples = explain(pl_module.model, pl_module.layer, self.items, self.data)
        self.found = {**description, "examples": examples}


def example_items(data: CamtrainData, count: int) -> list[dict[str, Tensor]]:
    """The first sound test picture of each class, in the order of the data."""
    found: dict[int, dict[str, Tensor]] = {}
    for index in range(len(data.test)):
        if len(found) == min(count, len(data.classes)):
            break
        item = data.test[index]
        if "damaged" not in item:
            found.setdefault(int(item["targets"]), item)
    return list(found.values())


@torch.no_grad()
def explain(
    model: torch.nn.Module, layer: str, items: list[dict[str, Tensor]], data: CamtrainData
) -> Examples:
    """Maps of the true class of each item, in evaluation mode; the mode is put back."""
    parameter = next(model.parameters())
    images = torch.stack([item["images"] for item in items])
    targets = torch.stack([item["targets"] for item in items])
    training = model.training
    model.eval()
    try:
        with ck.GradCAM(model, layer) as cam:
            logits = model(data.normalise(images.to(parameter.device)).to(parameter.dtype))
            maps = cam(logits, targets.to(parameter.device)).detach()
    finally:
        model.train(training)
    boxes = torch.stack([item["boxes"] for item in items]) if "boxes" in items[0] else None
    entropy = ck.map_statistics(maps).entropy
    return Examples(images, targets, logits.argmax(1).cpu(), boxes, maps.cpu(), entropy.cpu())


def describe_example(examples: Examples, index: int, classes: tuple[str, ...]) -> str:
    """One line under a map."""
    name = classes[int(examples.predictions[index])]
    if not bool(examples.maps[index].any()):
        return f"says {name}, dead map"
    return f"says {name}, ce {max(float(examples.entropy[index]), 0.0):.2f}"


def _finish(folder: Path, run: Run, module: Classifier, skipped: list[str]) -> None:
    config, examples = run.config, run.examples
    name = f"{config.arch} on {config.data}, beta = {config.beta:g}"
    try:
        state = module.model.state_dict()
        AtomicCheckpointIO().save_checkpoint(dict(state), folder / "model.pt")
        figures.curves({name: run.rows}, folder / "curves.png", name)
        classes = _classes(config)
        count = range(len(examples.targets))
        figures.before_and_after(
            examples.images,
            examples.boxes,
            {f"map, beta = {config.beta:g}": examples.maps},
            {
                f"map, beta = {config.beta:g}": [
                    describe_example(examples, i, classes) for i in count
                ]
            },
            [classes[int(t)] for t in examples.targets],
            folder / "overlays.png",
            name,
        )
        summary = {
            **run.rows[-1],
            "head": run.head,
            "backend": run.backend,
            "damaged": skipped,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }
        files.write_json(folder / "summary.json", summary)
    except files.DiskFullError as error:
        raise files.DiskFullError(
            f"training is done and its checkpoint is intact, but {error}; make room, then "
            f"camtrain fit --resume --out {folder}"
        ) from error


def _classes(config: FitConfig) -> tuple[str, ...]:
    from camtrain.data import digits, voc

    return {"digits": digits.CLASSES, "voc": voc.CLASSES}[config.data]


def _backend(name: str) -> Any:
    if name == "auto":
        return nullcontext()  # CAMKERNELS_BACKEND stays in force
    try:
        return ck.backend(name)  # type: ignore[arg-type]
    except ck.BackendUnavailableError as error:
        raise CamtrainError(str(error)) from error


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence advice that does not concern this program; real warnings stay."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*LeafSpec.*",
            ".*number of training batches.*",
            ".*Checkpoint directory.*",
            ".*Experiment logs directory.*",
            ".*GPU available but not used.*",
            ".*You're resuming from a checkpoint that ended before the epoch ended.*",
        ):
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            logger.setLevel(level)
