"""One run from configuration to run folder."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

import camkernels as ck
from camtrain import config as configuration
from camtrain import figures, files, localisation, planning, trivial
from camtrain.config import FitConfig
from camtrain.data.module import CamtrainData
from camtrain.data.voc import describe_skipped
from camtrain.defaults import DOGS
from camtrain.errors import CamtrainError
from camtrain.evaluation import check_compared, evaluate, write
from camtrain.examples import ExampleCollector, Examples, describe_example
from camtrain.models import build_model
from camtrain.recorder import (
    CHECKPOINT,
    AtomicCheckpointIO,
    Recorder,
    SaveEveryEpoch,
    StopDiverged,
    checkpoint_epoch,
    partial_files,
)
from camtrain.trained import write_classes
from camtrain.training import Classifier, make_classifier

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
    classes: tuple[str, ...] = ()
    summary: dict[str, Any] = field(default_factory=dict)
    """What ``summary.json`` holds."""


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

    The folder holds ``config.yaml``, ``environment.json``, ``classes.json``, ``metrics.csv`` (one
    row per epoch with time and peak memory), ``curves.png``, ``overlays.png``, ``model.pt`` (a
    state_dict), ``summary.json``, ``checkpoints/last.ckpt``, and the logs of CSV and TensorBoard;
    with the recipe ``consistency`` also ``consistency_scores.csv`` and ``consistency_scores.png``,
    with ``stanford-dogs`` ``iou.csv``, ``iou.md``, ``iou.png`` and ``layers.png``.

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
        tell = _silent if quiet else _tell
        tell(data.note)
        if config.vram is not None and not resume:
            # classes and samples are known now; a run that goes on has the answer in its file
            config, said = planning.chosen(config, len(data.classes), len(data.train))
            data.config = config
            _write_config(folder, config)
            tell(said)
        model = build_model(config, len(data.classes), tell)
        check_compared(config, model)
        if config.recipe == DOGS:
            localisation.check(config, data, model)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        module = make_classifier(model, config, len(data.classes))
        recorder, collector = Recorder(folder, quiet), ExampleCollector(data)
        callbacks: list[Callback] = [recorder, collector, StopDiverged()]
        if config.recipe in trivial.RECIPES:
            callbacks.append(trivial.TrivialSolutions(config, recorder))
        if config.vram is not None:
            callbacks.append(planning.WithinBudget(config.vram, tell))
        trainer = _trainer(config, folder, callbacks, progress)
        files.write_json(folder / "environment.json", files.environment())
        write_classes(folder, data.classes, data.train.mean, data.train.std)
        _run(trainer, module, data, checkpoint, folder)
        skipped = data.skipped + sorted(module.damaged)
        if module.damaged:
            log.warning("%s", describe_skipped(sorted(module.damaged)))
        if not collector.found:
            collector.collect(module)
        run = Run(config, recorder.rows, **collector.found, classes=data.classes)
        module.close()
        if trainer.is_global_zero:
            scores: Callable[[str], dict[str, Any]] | None = None
            if config.recipe == "consistency":
                model.to(trainer.strategy.root_device)
                evaluation = evaluate(model, module.layer, data, config, tell)
                skipped = sorted({*skipped, *evaluation.damaged})
                scores = partial(write, evaluation, folder)
            elif config.recipe == DOGS:
                model.to(trainer.strategy.root_device)
                found = localisation.evaluate(model, module.layer, data, config, tell)
                skipped = sorted({*skipped, *found.damaged})
                scores = partial(localisation.write, found, folder)
            _finish(folder, run, module, skipped, scores)
    return run


def _tell(line: str) -> None:
    if line:
        print(line, flush=True)


def _silent(line: str) -> None:
    pass


def _prepare(folder: Path, config: FitConfig, resume: bool, overwrite: bool) -> Path | None:
    """Make the folder; the checkpoint to go on from, if any."""
    started = (folder / "config.yaml").is_file()
    if started and overwrite and not resume:
        shutil.rmtree(folder)
    elif started and not resume:
        raise CamtrainError(
            f"out: {folder} holds a run already; pass --resume, --overwrite or another --out"
        )
    if config.vram is None or resume:
        _write_config(folder, config)
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


def _write_config(folder: Path, config: FitConfig) -> None:
    try:
        files.write_text(folder / "config.yaml", configuration.dump(config))
    except OSError as error:
        raise CamtrainError(f"out: cannot write to {folder}: {error}") from error


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
        accumulate_grad_batches=config.accumulate,
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


def _finish(
    folder: Path,
    run: Run,
    module: Classifier,
    skipped: list[str],
    scores: Callable[[str], dict[str, Any]] | None,
) -> None:
    """Write what a finished run leaves; ``scores`` writes the recipe's own under a title, and says
    what the summary holds of them."""
    config, examples, classes = run.config, run.examples, run.classes
    weights, panels = _described(config)
    name = f"{config.arch} on {config.data}, {weights}"
    try:
        state = module.model.state_dict()
        AtomicCheckpointIO().save_checkpoint(dict(state), folder / "model.pt")
        figures.curves({name: run.rows}, folder / "curves.png", name, panels)
        count = range(len(examples.targets))
        figures.before_and_after(
            examples.images,
            examples.boxes,
            {f"map, {weights}": examples.maps},
            {f"map, {weights}": [describe_example(examples, i, classes) for i in count]},
            [classes[int(t)] for t in examples.targets],
            folder / "overlays.png",
            name,
        )
        run.summary = {
            **run.rows[-1],
            **(scores(name) if scores is not None else {}),
            "head": run.head,
            "backend": run.backend,
            "damaged": skipped,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }
        files.write_json(folder / "summary.json", run.summary)
    except files.DiskFullError as error:
        raise files.DiskFullError(
            f"training is done and its checkpoint is intact, but {error}; make room, then "
            f"camtrain fit --resume --out {folder}"
        ) from error


def _described(config: FitConfig) -> tuple[str, figures.Panels]:
    """Weights of the loss, for titles, and what the curves show."""
    if config.recipe == "combined":
        names = ("alpha", "beta", "gradient_weight", "norm_weight")
        weights = [f"{name} = {getattr(config, name):g}" for name in names if getattr(config, name)]
        return ", ".join(weights), figures.COMBINED_PANELS
    if config.recipe == "interpretable":
        text = f"{config.error}, weight {config.gradient_weight:g}"
        return text, figures.GRADIENT_PANELS
    if config.recipe == "consistency":
        return f"alpha = {config.alpha:g}, beta = {config.beta:g}", figures.CONSISTENCY_PANELS
    if config.recipe == DOGS:
        return "cross-entropy", figures.PANELS
    return f"beta = {config.beta:g}", figures.PANELS


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
