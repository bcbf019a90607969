"""Metrics over a batch, against loops over single pictures.

insertion   areas of 64 pictures: ours in batches over pictures and steps, of channels_last pictures
            by the network through ck.swap_in (``plain``: by the network as it is); ``loop`` one
            picture at a time, its steps in one batch; ``single`` one picture and one step at a
            time, both by the network as it is
boxes       the best box of 64 maps at 1001 thresholds: ours in one pass over the pixels; ``loop``
            by contours of each map at each threshold
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camkernels as ck
from benchmarks.harness import (
    Benchmark,
    Case,
    Options,
    Side,
    SidesDisagreeError,
    UnsupportedError,
    relative_error,
)
from benchmarks.members import _steps
from camkernels import metrics
from camkernels.metrics.curves import blurred

THRESHOLDS = 1001
NETWORKS = ("resnet18", "squeezenet1_1")


def _maps(count: int, options: Options) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(count, 7, 7, generator=generator).to(options.device)


# ---- insertion ----


def _ours(model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor, steps: int) -> Side:
    def run() -> list[Tensor]:
        score = metrics.class_score(model, targets)
        return [metrics.insertion_auc(score, images, maps, steps=steps)]

    return Side(run)


@torch.no_grad()
def _area(model: nn.Module, image: Tensor, one: Tensor, target: Tensor, steps: int, at: int) -> Any:
    """Of one picture, ``at`` steps at a time, as the code of RISE does it."""
    size = (image.shape[1], image.shape[2])
    large = F.interpolate(one[None, None], size, mode="bilinear", align_corners=False)
    order = large.flatten().argsort(descending=True)
    soft, sharp = blurred(image[None])[0].flatten(1), image.flatten(1)
    pixels, scores = sharp.shape[1], []
    for first in range(0, steps + 1, at):
        pictures = []
        for step in range(first, min(first + at, steps + 1)):
            picture = soft.clone()
            shown = order[: step * pixels // steps]
            picture[:, shown] = sharp[:, shown]
            pictures.append(picture.view_as(image))
        scores.append(model(torch.stack(pictures)).softmax(1)[:, target])
    return torch.trapezoid(torch.cat(scores)) / steps


def _loop(
    model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor, steps: int, at: int
) -> Side:
    def run() -> list[Tensor]:
        areas = [_area(model, *one, steps, at) for one in zip(images, maps, targets, strict=True)]
        return [torch.stack(areas)]

    return Side(run)


def _insertion_case(network: str, options: Options) -> Case:
    batch, size, steps = (2, 64, 4) if options.quick else (64, 224, 4)

    def build() -> dict[str, Callable[[], Side]]:
        images, targets = _steps.batch(batch, size, options, torch.float32)
        model = copy.deepcopy(_steps.network(network)).to(options.device).eval()
        inputs = (model, images, _maps(batch, options), targets, steps)
        last = images.contiguous(memory_format=torch.channels_last)
        swapped = copy.deepcopy(model).to(memory_format=torch.channels_last)
        ck.swap_in(swapped)
        return {
            "loop": lambda: _loop(*inputs, at=steps + 1),
            "single": lambda: _loop(*inputs, at=1),
            "plain": lambda: _ours(model, last, *inputs[2:]),
            "ours": lambda: _ours(swapped, last, *inputs[2:]),
        }

    def check() -> None:
        # softmax scores of a network that was not trained are near 0: their areas keep few digits
        sides = _insertion_case(network, Options(device=options.device, quick=True)).build()
        want = sides["loop"]().results()[0]
        for name, side in sides.items():
            error = relative_error(side().results()[0], want)
            if not error < 1e-3:
                raise SidesDisagreeError(f"{name} disagrees with loop: relative error {error:.1e}")

    facts = {"model": network, "batch": batch, "image_size": size, "steps": steps}
    name = f"insertion {network} {batch}x{size}"
    return Case(name, build, check=check, rounds=(3, 7), facts=facts)


# ---- boxes ----


def _boxes(maps: Tensor, boxes: Tensor, size: tuple[int, int]) -> Side:
    def run() -> list[Tensor]:
        return [metrics.best_box_ious(maps, boxes, size, thresholds=THRESHOLDS)]

    return Side(run)


def _contours(maps: Tensor, boxes: Tensor, size: tuple[int, int]) -> Side:
    try:
        import cv2
    except ImportError as error:
        raise UnsupportedError(f"OpenCV does not import ({error})") from error

    def best(marked: np.ndarray[Any, Any], box: list[float]) -> float:
        # Outlines of segments, also of those within holes of others; not of holes.
        found, tree = cv2.findContours(marked, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        rectangles = [
            cv2.boundingRect(contour)
            for contour, links in zip(found, tree[0], strict=True)
            if links[3] < 0
        ]
        left, top, width, height = np.array(rectangles, dtype=np.float64).T
        rows = np.minimum(top + height, box[0] + box[2]) - np.maximum(top, box[0])
        columns = np.minimum(left + width, box[1] + box[3]) - np.maximum(left, box[1])
        common = rows.clip(0) * columns.clip(0)
        return float((common / (width * height + box[2] * box[3] - common)).max())

    def run() -> list[Tensor]:
        steps = (torch.arange(THRESHOLDS, dtype=torch.float64) / (THRESHOLDS - 1)).float().numpy()
        rows = []
        for one, box in zip(maps.cpu(), boxes.tolist(), strict=True):
            large = F.interpolate(one[None, None], size, mode="bilinear")[0, 0].numpy()
            share = (large - large.min()) / (large.max() - large.min())
            rows.append([best((share >= step).astype(np.uint8), box) for step in steps])
        return [torch.tensor(rows, dtype=torch.float64)]

    return Side(run)


def _boxes_case(options: Options) -> Case:
    batch, size = (2, 48) if options.quick else (64, 224)

    def build() -> dict[str, Callable[[], Side]]:
        maps = _maps(batch, options)
        generator = torch.Generator().manual_seed(3)
        places = torch.rand(batch, 4, generator=generator) * 0.4 + 0.1
        boxes = (places * size).round().to(options.device)
        inputs = (maps, boxes, (size, size))
        return {"loop": lambda: _contours(*inputs), "ours": lambda: _boxes(*inputs)}

    facts = {"batch": batch, "image_size": size, "thresholds": THRESHOLDS}
    return Case(f"boxes {batch}x{size}", build, rounds=(3, 21), facts=facts)


BENCHMARK = Benchmark(
    name="step_insertion",
    about="insertion areas, and best boxes at all thresholds, of a batch against single pictures",
    cases=lambda options: [*(_insertion_case(n, options) for n in NETWORKS), _boxes_case(options)],
    baseline="loop",
    seconds=60.0,
    needs_torchvision=True,
    measures_memory=False,
    caveats=(
        "insertion: 4 steps in place of RISE's 224, by which all sides grow alike",
        "insertion: the network's forward passes are the same in number on all sides",
        "boxes loop: the thresholds as they are; wsolevaluation rounds the map to 8 bits and makes "
        "the same 1001 calls of cv2.findContours",
    ),
)
