"""The command line: ``camtrain fit``, ``plan``, ``study``, ``explain``, ``evaluate``, ``demo``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from camtrain import cli_data, cli_explain, cli_plan
from camtrain import config as configuration
from camtrain.config import CHOICES, FitConfig
from camtrain.errors import CamtrainError

_HELP = {
    "recipe": "entropy: cross-entropy + beta x CAM entropy; consistency: cross-entropy + alpha x "
    "(1 - SSIM of the maps of a picture and of its crop) + beta x norm of the map; interpretable: "
    "cross-entropy + gradient_weight x error between the input gradient and the guided one; "
    "combined: every regulariser that is given a weight; "
    "stanford-dogs: cross-entropy, then CAM and Grad-CAM against true boxes; baseline: beta = 0",
    "data": "digits: scans among clutter, nothing to download; voc: boxes of PASCAL VOC; cub: "
    "CUB-200-2011; caltech101: Caltech-101; stanford-dogs; cifar10, cifar100: archives or class "
    "folders; folder: pictures in a folder for each class",
    "root": "folder that holds the data, such as VOCdevkit or CUB_200_2011",
    "sets": "VOC sets to train on, year:split by commas",
    "test_sets": "VOC sets to test on",
    "difficult": "keep objects marked as difficult",
    "test_boxes": "one box per test picture, always the same, or all",
    "damaged": "files that cannot be read: skip and count them, or stop",
    "image_size": "side of the square pictures, in pixels",
    "augment": "not voc, digits: train on a random crop, mirrored or not, else on the centre",
    "normalization": "of pictures: by mean and deviation of the data (digits and CIFAR have their "
    "own), or by those of ImageNet, as some weights expect",
    "augment_on": "where crops are cut: by the loader, or batches at a time by the device",
    "crop_scale": "see augment: least share of the picture in the crop",
    "limit_train": "at most so many training samples",
    "limit_test": "at most so many test samples",
    "arch": "smallresnet, cifar_resnet20 (32, 44, 56), a torchvision or timm name, "
    "torchvision:NAME, timm:NAME, module:factory",
    "layer": "name of the layer whose map is taken (default: the last stage)",
    "weights": "file with a state_dict; 'pretrained' for the library's own (the default on cub, "
    "caltech101 and stanford-dogs, and of recipe stanford-dogs), or 'none'",
    "head_units": "hidden units of the head; 300 in the paper, 0: one linear layer",
    "alpha": "consistency: weight of 1 - SSIM, or of the other distance",
    "beta": "weight of the regulariser; consistency: of the norm of the map; combined: of the CAM "
    "entropy",
    "norm": "consistency: p of the norm, 0, 1 or 2",
    "norm_weight": "combined: weight of the norm of the map",
    "map_relu": "consistency: keep the ReLU of Grad-CAM, which the paper takes out",
    "view_scale": "consistency: least share of the picture in the crop of the second view",
    "window": "consistency: of the SSIM",
    "window_size": "consistency: side of the window in pixels",
    "sigma": "consistency: width of the Gaussian window in pixels",
    "padding": "consistency: SSIM over windows inside the map, or one around each pixel",
    "distance": "consistency: 1 - SSIM of the two maps, or CGC's contrastive loss over the batch",
    "temperature": "consistency: of the contrastive distance",
    "views": "consistency: pictures and views in a forward each, or joint in one of twice the "
    "batch, which BatchNorm then takes as one",
    "warmup_epochs": "epochs of cross-entropy alone before the regulariser sets in",
    "ramp_epochs": "epochs over which the regularisers then rise to their weights",
    "ramp": "how they rise",
    "balance": "scale the weights, so that the gradient of the regularisers is so many times that "
    "of the cross-entropy; 0: leave them",
    "balance_every": "steps after which the two are measured again",
    "regularizer": "which statistic of the map is driven",
    "target": "map of the true or of the predicted class",
    "other_classes": "weight of the negative term for classes known to be absent",
    "normalize": "divide the entropy by its largest value, ln(h w)",
    "label_smoothing": "as in nn.CrossEntropyLoss",
    "head_path": "channel weights in closed form where possible (auto), or by autograd",
    "error": "interpretable: error between the input gradient and the guided one",
    "gradient_weight": "interpretable: weight of that error, lambda in the paper",
    "every": "interpretable: the error at every so-manieth step, with as many times the weight",
    "engine": "the network as scheduled passes, fast or lean in memory; lean-bf16 rounds the "
    "second-order tensors of the input gradient's error; auto: by --vram (the default with it)",
    "backend": "which kernels run",
    "epochs": "epochs",
    "batch_size": "samples per forward and device",
    "accumulate": "forwards per step of the optimiser, which gets their mean gradient",
    "vram": "GB of GPU memory: batch size and engine by a plan, as camtrain plan tells it",
    "optimizer": "adam, or sgd with momentum",
    "lr": "learning rate",
    "momentum": "of sgd",
    "weight_decay": "of the optimiser",
    "lr_step": "epochs after which the rate is multiplied by lr_factor, again and again; 0: never",
    "lr_factor": "see lr_step",
    "seed": "decides data, weights and order",
    "precision": "as Lightning names it",
    "channels_last": "lay out weights and pictures as NHWC",
    "accelerator": "as Lightning names it: auto, cpu, gpu",
    "devices": "number of devices",
    "workers": "worker processes that load data",
    "insertion_steps": "consistency: steps of the insertion AUC of each test picture; 0: not taken",
    "insertion_limit": "consistency: insertion AUC of at most so many test pictures",
    "compare": "consistency: run folder or state_dict whose scores are shown beside the run's",
    "out": "run folder",
}
_ALIASES = {"root": ("--data-root",), "arch": ("--model",)}
# The grid of the consistency study, and what only the other one reads.
_GRID = (("alphas", float, "A"), ("betas", float, "B"), ("norms", float, "P"))
_GRID_DEFAULTS = {"alphas": [0.0, 0.1, 1.0], "betas": [0.0, 1e-6], "norms": [1.0]}
_OF_RECIPES = ("recipes", "set", "steps", "score_limit")
# Set by a study.
_VARIED = ("recipe", "alpha", "beta", "norm", "seed", "out")


def parser() -> argparse.ArgumentParser:
    """The parser; flags of ``fit`` are the fields of :class:`FitConfig`."""
    top = argparse.ArgumentParser(
        prog="camtrain", description="Train classifiers with their explanation in the loss."
    )
    commands = top.add_subparsers(dest="command", required=True)
    fit = commands.add_parser(
        "fit",
        help="train by a recipe",
        description="Train by a recipe. Values come from the recipe's defaults (on voc those of "
        "the paper), then --config, then flags.",
    )
    fit.add_argument("--config", type=Path, help="YAML file with the same keys as the flags")
    fit.add_argument("--resume", action="store_true", help="go on with the run in --out")
    fit.add_argument("--overwrite", action="store_true", help="remove an earlier run in --out")
    fit.add_argument("--progress", action=argparse.BooleanOptionalAction, help="progress bar")
    _add_fields(fit)
    cli_plan.add(commands, lambda parser: _add_fields(parser, without=("vram",)))
    _add_study(commands)
    cli_explain.add(commands)
    cli_data.add_data(commands)

    demo = commands.add_parser("demo", help="what CAM entropy changes, on digits, in minutes")
    demo.add_argument("--out", default="runs/demo", help="folder for table and figures")
    demo.add_argument("--beta", type=float, default=None, help="weight of the CAM entropy")
    demo.add_argument("--epochs", type=int, default=None, help="epochs of each run")
    demo.add_argument("--seed", type=int, default=0, help="of both runs")
    demo.add_argument("--limit-train", type=int, default=None, help="training samples")
    demo.add_argument("--limit-test", type=int, default=None, help="test samples")
    demo.add_argument("--progress", action=argparse.BooleanOptionalAction, help="progress bar")
    return top


def _add_fields(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """A flag for each field of :class:`FitConfig`."""
    hints = get_type_hints(FitConfig)
    for name in configuration.fields():
        if name in without:
            continue
        kinds = get_args(hints[name]) or (hints[name],)
        kind = next(k for k in kinds if k is not type(None))
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _HELP[name]}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif name in CHOICES:
            options["choices"] = CHOICES[name]
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        flags = (f"--{name.replace('_', '-')}", *_ALIASES.get(name, ()))
        parser.add_argument(*flags, dest=name, **options)


def _add_study(commands: Any) -> None:
    study = commands.add_parser(
        "study",
        help="train a grid of settings, or every recipe, and tabulate them",
        description="consistency: train every setting of a grid of that recipe and tabulate "
        "accuracy, consistency and insertion AUC. recipes: train every recipe from every seed, "
        "score their maps alike, and tabulate what each changes. What is done is skipped and a run "
        "that was cut short goes on, so the same command again goes on with an interrupted study. "
        "All flags of fit that the study does not set are taken.",
        allow_abbrev=False,
    )
    study.add_argument("recipe", choices=("consistency", "recipes"), help="which study")
    for name, kind, short in _GRID:
        study.add_argument(f"--{name}", type=kind, nargs="+", metavar=short, help="consistency")
    study.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    study.add_argument("--recipes", nargs="+", metavar="RECIPE", help="recipes: which (all)")
    study.add_argument(
        "--set", nargs="+", metavar="RECIPE.KEY=VALUE", help="recipes: values of one recipe"
    )
    study.add_argument("--steps", type=int, help="recipes: of insertion and deletion (56)")
    study.add_argument("--score-limit", type=int, help="recipes: pictures that are scored (200)")
    study.add_argument("--out", default="runs/study", help="folder for the runs and the table")
    study.add_argument("--overwrite", action="store_true", help="remove an earlier study in --out")
    study.add_argument("--config", type=Path, help="YAML file with the same keys as the flags")
    study.add_argument("--progress", action=argparse.BooleanOptionalAction, help="progress bar")
    _add_fields(study, without=(*_VARIED, "vram"))


def fit_config(arguments: argparse.Namespace) -> FitConfig:
    """The configuration that the arguments of ``fit`` mean."""
    given = {name: getattr(arguments, name) for name in configuration.fields() if name in arguments}
    if arguments.resume:
        out = Path(given.get("out", FitConfig.out))
        stored = out / "config.yaml"
        if not stored.is_file():
            raise CamtrainError(f"resume: no run in {out} (no file {stored})")
        if arguments.config is not None:
            given = {**configuration.load(arguments.config), **given}
        return configuration.resumed(stored, {**given, "out": str(out)})
    file = {} if arguments.config is None else configuration.load(arguments.config)
    flags, keys = ((given, "command line"), (file, "config file"))
    configuration.refuse_both({**configuration.checked(*keys), **configuration.checked(*flags)})
    return configuration.resolve(given, file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 0, or 1 after an error that the message explains, or 130 after an interrupt."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        if arguments.command == "fit":
            return _fit(arguments)
        if arguments.command == "plan":
            _import_training()
            return cli_plan.plan(arguments)
        if arguments.command == "study":
            return _study(arguments)
        if arguments.command == "data":
            return cli_data.run_data(arguments)
        if arguments.command in ("explain", "evaluate"):
            _import_training()
            run = cli_explain.explain if arguments.command == "explain" else cli_explain.evaluate
            return run(arguments)
        return _demo(arguments)
    except CamtrainError as error:
        print(f"camtrain: {error}", file=sys.stderr)
        return 130 if type(error).__name__ == "InterruptedRunError" else 1
    except KeyboardInterrupt:
        print("camtrain: interrupted", file=sys.stderr)
        return 130


def _import_training() -> None:
    """Lightning and torchmetrics, or a message that names what is missing."""
    try:
        import lightning.pytorch  # noqa: F401
        import torchmetrics  # noqa: F401
    except Exception as error:  # torchmetrics imports torchvision where it is installed
        raise CamtrainError(
            f"the training program needs lightning and torchmetrics, and one of them does not "
            f"import: {type(error).__name__}: {error} (pip install 'camkernels[train]'; a "
            "torchvision that does not match torch also breaks it)"
        ) from error


def _fit(arguments: argparse.Namespace) -> int:
    config = fit_config(arguments)
    _import_training()
    from camtrain.fit import fit

    run = fit(
        config,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        progress=arguments.progress,
    )
    print(f"head: {run.head}; backend: {run.backend}; run folder: {config.out}")
    return 0


def _study(arguments: argparse.Namespace) -> int:
    given = {
        name: getattr(arguments, name)
        for name in configuration.fields()
        if name in arguments and name not in _VARIED
    }
    file = {} if arguments.config is None else configuration.load(arguments.config)
    fixed = sorted(set(file) & {*_VARIED, *(name.replace("_", "-") for name in _VARIED)})
    if fixed:
        raise CamtrainError(f"config: the grid of a study sets {', '.join(fixed)}")
    if file.get("vram") is not None:
        raise CamtrainError("vram: the runs of a study share one batch size; pass --batch-size")
    wrong = _GRID_DEFAULTS if arguments.recipe == "recipes" else _OF_RECIPES
    for name in wrong:
        if getattr(arguments, name) is not None:
            raise CamtrainError(
                f"{name}: study {arguments.recipe!r} does not read --{name.replace('_', '-')}"
            )
    options = {"overwrite": arguments.overwrite, "progress": arguments.progress}
    if arguments.recipe == "recipes":
        _import_training()
        from camtrain import comparison

        asked = {name: getattr(arguments, name) for name in ("recipes", "steps", "score_limit")}
        asked = {name: value for name, value in asked.items() if value is not None}
        settings = comparison.parse_settings(arguments.set or [])
        which = comparison.Options(seeds=arguments.seeds, settings=settings, **asked)
        values = {**configuration.checked(file, "config file"), **given}
        comparison.compare(Path(arguments.out), values, which, **options)
        return 0
    base = configuration.resolve({**given, "recipe": arguments.recipe}, file)
    _import_training()
    from camtrain.study import Grid, study

    grid = [getattr(arguments, name) or default for name, default in _GRID_DEFAULTS.items()]
    study(Path(arguments.out), base, Grid(*grid, arguments.seeds), **options)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    _import_training()
    from camtrain.demo import demo

    demo(
        Path(arguments.out),
        beta=arguments.beta,
        epochs=arguments.epochs,
        seed=arguments.seed,
        limit_train=arguments.limit_train,
        limit_test=arguments.limit_test,
        progress=arguments.progress,
    )
    return 0
