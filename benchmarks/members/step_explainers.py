"""Maps of pictures, against pytorch-grad-cam: the whole call, from pictures to maps of their size.

network           the passes that a map needs: a forward, and the gradient of the scores to the
                  layer
ours              ck's explainer on a forward under no_grad, maps enlarged and scaled to [0, 1]
pytorch-grad-cam  the same by that library
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
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

METHODS = ("GradCAM", "GradCAMPlusPlus", "LayerCAM")
CASES = [("resnet18", layer, method) for layer in ("layer4", "layer2") for method in METHODS]


def _network(model: nn.Module, layer: str, images: Tensor) -> Side:
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        kept[:] = [leaf]
        torch.set_grad_enabled(True)
        return leaf

    handle = model.get_submodule(layer).register_forward_hook(keep)

    def run() -> list[Tensor]:
        before = torch.is_grad_enabled()
        try:
            torch.set_grad_enabled(False)
            logits = model(images)
            score = logits.amax(1).sum()
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            return list(torch.autograd.grad(score, kept))
        finally:
            torch.set_grad_enabled(before)
            for parameter in model.parameters():
                parameter.requires_grad_(True)

    return Side(run, close=handle.remove)


def _ours(model: nn.Module, layer: str, method: str, images: Tensor) -> Side:
    options = {"eps": 1e-6} if method == "GradCAMPlusPlus" else {}
    cam = getattr(ck, method)(model, layer, **options)
    size = (images.shape[2], images.shape[3])

    def run() -> list[Tensor]:
        with torch.no_grad():
            maps = cam(model(images))
            large = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)
            return [ck.min_max_normalize(large[:, 0])]

    return Side(run, close=cam.close)


def _peer(model: nn.Module, layer: str, method: str, images: Tensor) -> Side:
    try:
        import pytorch_grad_cam
    except ImportError as error:
        raise UnsupportedError(f"pytorch-grad-cam does not import ({error})") from error
    cam = getattr(pytorch_grad_cam, method)(model, [model.get_submodule(layer)])

    def run() -> list[Tensor]:
        return [torch.from_numpy(cam(input_tensor=images, targets=None))]

    return Side(run, close=cam.activations_and_grads.release)


def _case(name: str, layer: str, method: str, options: Options) -> Case:
    batch, size = (2, 64) if options.quick else (64, 224)

    def build() -> dict[str, Callable[[], Side]]:
        images, _ = _steps.batch(batch, size, options, torch.float32)

        def model() -> nn.Module:
            return copy.deepcopy(_steps.network(name)).to(options.device).eval()

        return {
            "network": lambda: _network(model(), layer, images),
            "ours": lambda: _ours(model(), layer, method, images),
            "pytorch-grad-cam": lambda: _peer(model(), layer, method, images),
        }

    def check() -> None:
        quick = _case(name, layer, method, Options(device=options.device, quick=True)).build()
        _steps.check_maps(quick["ours"](), quick["pytorch-grad-cam"](), f"{method} at {layer}")

    facts = {"model": name, "layer": layer, "method": method, "batch": batch, "image_size": size}
    return Case(
        f"{method} {name} {layer} {batch}x{size}", build, check=check, rounds=(5, 21), facts=facts
    )


BENCHMARK = Benchmark(
    name="step_explainers",
    about="maps of pictures, from the pictures to maps of their size",
    cases=lambda options: [_case(*case, options) for case in CASES],
    baseline="network",
    seconds=40.0,
    isolate=True,
    needs_torchvision=True,
    caveats=(
        "network: one forward, and the gradient of the scores to the layer, of no weight",
        "ours: behind layer4 the head has a closed form, and no backward is made",
        "pytorch-grad-cam: as its users call it; it goes back to the image, through all weights",
    ),
)
