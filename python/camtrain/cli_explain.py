"""Flags of ``camtrain explain`` and ``camtrain evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from camtrain.errors import CamtrainError
from camtrain.methods import METHODS


def add(commands: Any) -> None:
    """Both parsers."""
    explain = commands.add_parser(
        "explain",
        help="maps of pictures, by a trained network",
        description="Write the maps of pictures: over each picture as PNG, as .npy, and all on an "
        "HTML page. The network is a run folder of camtrain fit, or a file of weights with --arch.",
    )
    explain.add_argument("network", type=Path, help="run folder, or a file with a state_dict")
    explain.add_argument("images", type=Path, nargs="+", help="picture files, folders of them")
    explain.add_argument("--arch", help="of a file of weights: a torchvision or timm name")
    explain.add_argument("--image-size", type=int, default=None, help="side of the network's input")
    explain.add_argument(
        "--methods", nargs="+", default=["gradcam"], metavar="METHOD", help=_names()
    )
    explain.add_argument("--layers", nargs="+", default=[], metavar="LAYER", help="names of layers")
    explain.add_argument("--target", help="class to explain, by name or number; else the predicted")
    explain.add_argument("--colormap", default="viridis", help="matplotlib's name; jet by choice")
    explain.add_argument("--alpha", type=float, default=0.5, help="share of the map in the overlay")
    explain.add_argument("--batch-size", type=int, default=16, help="pictures per forward")
    explain.add_argument("--out", type=Path, default=Path("runs/explain"), help="folder to write")
    _common(explain)

    evaluate = commands.add_parser(
        "evaluate",
        help="score the maps of trained networks on their test data",
        description="Average drop, increase and gain, top-25 % removal, insertion, deletion, IoU, "
        "MaxBoxAccV2, pointing, energy and the statistics of the maps, per run and method; on VOC "
        "of whole pictures, with one and several objects apart.",
    )
    evaluate.add_argument("runs", type=Path, nargs="+", help="run folders of camtrain fit")
    evaluate.add_argument(
        "--methods", nargs="+", default=["cam", "gradcam", "gradcam++"], metavar="METHOD",
        help=_names(),
    )  # fmt: skip
    evaluate.add_argument(
        "--target", choices=("true", "predicted"), default="true", help="class that is explained"
    )
    evaluate.add_argument("--steps", type=int, default=56, help="of insertion and deletion")
    evaluate.add_argument("--limit", type=int, help="at most so many test pictures")
    evaluate.add_argument("--batch-size", type=int, default=64, help="pictures per forward")
    evaluate.add_argument("--root", help="where the data is now")
    evaluate.add_argument("--out", type=Path, default=Path("runs/evaluate"), help="folder to write")
    _common(evaluate)


def _names() -> str:
    return f"some of {', '.join(METHODS)}"


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, help="progress bar")


def explain(arguments: argparse.Namespace) -> int:
    """Run ``camtrain explain``."""
    from camtrain.explaining import Options, explain_pictures
    from camtrain.trained import device_of, load_file, load_run

    device = device_of(arguments.device)
    if arguments.network.is_dir() or arguments.arch is None:
        if arguments.arch is not None:
            raise CamtrainError("arch: a run folder knows its network; leave --arch away")
        trained = load_run(arguments.network, device)
        trained.image_size = arguments.image_size or trained.image_size
    else:
        layer = arguments.layers[0] if arguments.layers else None
        size = arguments.image_size or 224
        trained = load_file(arguments.network, arguments.arch, device, layer=layer, image_size=size)
    if trained.image_size < 8:
        raise CamtrainError(f"image_size: must be at least 8, got {trained.image_size}")
    options = Options(
        methods=arguments.methods,
        layers=arguments.layers,
        target=arguments.target,
        colormap=arguments.colormap,
        alpha=arguments.alpha,
        batch_size=arguments.batch_size,
        progress=arguments.progress,
    )
    rows = explain_pictures(trained, arguments.images, arguments.out, options)
    for row in rows:
        said = row.get("damaged") or f"{row['predicted']} ({100 * row['score']:.1f} %)"
        print(f"{row['picture']}: {said}")
    print(
        f"maps of {sum('damaged' not in row for row in rows)} pictures: {arguments.out}/index.html"
    )
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Run ``camtrain evaluate``."""
    from camtrain.scoring import Options, evaluate_runs
    from camtrain.scoring_report import markdown

    names = ("methods", "target", "steps", "limit", "batch_size", "root", "device", "progress")
    options = Options(**{name: getattr(arguments, name) for name in names})
    rows = evaluate_runs(arguments.runs, arguments.out, options)
    print(markdown(rows), end="")
    print(f"report: {arguments.out}/report.html")
    return 0
