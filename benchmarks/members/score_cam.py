"""Score-CAM: one forward of a picture per channel, at equal numbers of pictures per forward.

passes            the forwards that it needs, of masked pictures that are there already: the
                  network in NCHW
ours              ck.ScoreCAM of the network through ck.swap_in, masked pictures in NHWC
ours NHWC         ck.ScoreCAM of the network as it is, masked pictures in NHWC
ours NCHW         the same, masked pictures as they are made by default
torch-cam         that library's ScoreCAM
pytorch-grad-cam  that library's ScoreCAM, whose maps differ: it enlarges with corners aligned
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import camkernels as ck
from benchmarks.harness import (
    Benchmark,
    Case,
    Options,
    Side,
    UnsupportedError,
)
from benchmarks.members import _steps

AT_ONCE = 32
CHANNELS = 512
LAYERS = {"resnet18": "layer4", "squeezenet1_1": "features"}
"""Networks, and their layers of ``CHANNELS`` channels."""


def _passes(model: nn.Module, images: Tensor) -> Side:
    masked = torch.rand(AT_ONCE, *images.shape[1:], device=images.device)

    def run() -> list[Tensor]:
        with torch.no_grad():
            found = [model(images)]
            for _ in range(len(images) * CHANNELS // AT_ONCE):
                found.append(model(masked))
        return [torch.cat(found)]

    return Side(run)


def _ours(
    model: nn.Module, layer: str, images: Tensor, memory_format: torch.memory_format | None
) -> Side:
    cam = ck.ScoreCAM(model, layer, memory_format=memory_format)

    def run() -> list[Tensor]:
        maps = cam.explain(images, batch_size=AT_ONCE)
        assert isinstance(maps, Tensor)
        return [ck.min_max_normalize(maps)]

    return Side(run, close=cam.close)


def _swapped(model: nn.Module) -> nn.Module:
    ck.swap_in(model.to(memory_format=torch.channels_last))
    return model


def _torch_cam(model: nn.Module, layer: str, images: Tensor) -> Side:
    try:
        from torchcam.methods import ScoreCAM
    except ImportError as error:
        raise UnsupportedError(f"torch-cam does not import ({error})") from error
    cam = ScoreCAM(model, layer, batch_size=AT_ONCE, input_shape=tuple(images.shape[1:]))

    def run() -> list[Tensor]:
        with torch.no_grad():
            logits = model(images)
            (maps,) = cam(logits.argmax(1).tolist(), logits)
        return [maps]

    return Side(run, close=cam.remove_hooks)


def _grad_cam(model: nn.Module, layer: str, images: Tensor) -> Side:
    try:
        from pytorch_grad_cam import ScoreCAM
    except ImportError as error:
        raise UnsupportedError(f"pytorch-grad-cam does not import ({error})") from error
    cam: Any = ScoreCAM(model, [model.get_submodule(layer)])
    cam.batch_size = AT_ONCE

    def run() -> list[Tensor]:
        # it draws a progress bar, whatever is asked
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            return [torch.from_numpy(cam(input_tensor=images, targets=None))]

    return Side(run, close=cam.activations_and_grads.release)


def _case(network: str, options: Options) -> Case:
    batch, size, layer = 1, 64 if options.quick else 224, LAYERS[network]

    def build() -> dict[str, Callable[[], Side]]:
        images, _ = _steps.batch(batch, size, options, torch.float32)

        def model() -> nn.Module:
            return copy.deepcopy(_steps.network(network)).to(options.device).eval()

        return {
            "passes": lambda: _passes(model(), images),
            "ours": lambda: _ours(_swapped(model()), layer, images, torch.channels_last),
            "ours NHWC": lambda: _ours(model(), layer, images, torch.channels_last),
            "ours NCHW": lambda: _ours(model(), layer, images, None),
            "torch-cam": lambda: _torch_cam(model(), layer, images),
            "pytorch-grad-cam": lambda: _grad_cam(model(), layer, images),
        }

    def check() -> None:
        quick = _case(network, Options(device=options.device, quick=True)).build()
        _steps.check_maps(quick["ours"](), quick["torch-cam"](), "Score-CAM")

    facts = {"model": network, "layer": layer, "batch": batch, "image_size": size,
             "pictures_per_forward": AT_ONCE}  # fmt: skip
    name = f"{network} {layer} {batch}x{size}"
    return Case(name, build, check=check, rounds=(3, 7), facts=facts)


BENCHMARK = Benchmark(
    name="step_score_cam",
    about="Score-CAM of pictures, at equal pictures per forward",
    cases=lambda options: [_case(network, options) for network in LAYERS],
    baseline="passes",
    seconds=40.0,
    isolate=True,
    needs_torchvision=True,
    caveats=(
        "passes: every channel's; ours leaves out those that are constant over the picture",
        "NHWC is an option of ours, as ck.swap_in is; the peers take the network as it is given",
    ),
)
