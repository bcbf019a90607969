"""One small call of every op that has CUDA kernels, of which several blocks meet where they can."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import camkernels as ck
from camkernels import backends
from camkernels.nn.functional import relu

DEVICE = (
    "cuda" if backends.unavailable_reason("cuda") is None and not backends.cuda_on_host() else "cpu"
)


def _statistics(maps: Tensor) -> Tensor:
    found = ck.map_statistics(maps)
    return found.entropy + found.area + found.variance


def _cam_statistics(activations: Tensor, gradients: Tensor) -> Tensor:
    found, maps = ck.cam_statistics(activations, gradients, return_maps=True)
    return found.entropy + found.area + maps.sum((1, 2))


def _warped_ssim(maps: Tensor, others: Tensor) -> Tensor:
    boxes = torch.tensor([[1, 2, 20, 9]], device=maps.device).repeat(len(maps), 1)
    return ck.warped_ssim(maps, others, boxes, size=(20, 18), source_size=(24, 12), window_size=3)


# A function of tensors, and their shapes behind the batch.
OPS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "relu": (relu, ((3, 5),)),
    "grad_cam": (ck.grad_cam, ((40, 3, 5), (40, 3, 5))),
    "class_activation_map": (ck.class_activation_map, ((40, 3, 5), (40,))),
    "map_statistics": (_statistics, ((3, 5),)),
    "cam_statistics": (_cam_statistics, ((40, 3, 5), (40, 3, 5))),
    "ssim": (lambda x, y: ck.ssim(x, y, window_size=3), ((2, 20, 6), (2, 20, 6))),
    "warped_ssim": (_warped_ssim, ((4, 5), (3, 4))),
}
WAYS = ("fwd", "bwd")


def kernel_of(op: str, way: str) -> str:
    return {"grad_cam": "cam", "class_activation_map": "cam"}.get(op, op) + f"_{way}"


def leaves_of(op: str, batch: int) -> list[Tensor]:
    """Positive, so that no map is dead."""
    generator = torch.Generator().manual_seed(0)
    made = (torch.rand((batch, *shape), generator=generator) for shape in OPS[op][1])
    return [t.to(DEVICE).requires_grad_() for t in made]


def forward(op: str, leaves: list[Tensor]) -> Tensor:
    with ck.backend("cuda"):
        return OPS[op][0](*leaves)


def both_ways(op: str, leaves: list[Tensor]) -> list[Tensor]:
    """The value and its gradients."""
    value = forward(op, leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]
