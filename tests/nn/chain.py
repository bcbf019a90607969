"""A small network of the network functions, for either side: ours, or eager."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from nn import eager
from ops.oracle import lay_out
from torch import Tensor

from camkernels.nn import functional as ours

DOUBLE = torch.float64
LAYOUTS = ("contiguous", "channels_last")
C, SIDE = 8, 7
PLANES = 2 * C * SIDE * SIDE  # elements of a z


def parameters(dtype: torch.dtype = DOUBLE) -> dict[str, Tensor]:
    """Of four convolutions with BatchNorm; one gamma is zero, one negative."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=DOUBLE)

    found = {}
    for i in range(4):
        gamma = draw(C).abs() + 0.5
        gamma[1], gamma[2] = 0.0, -gamma[2]
        found |= {f"w{i}": draw(C, C, 3, 3) / 5, f"g{i}": gamma, f"b{i}": draw(C) / 2}
    return {name: value.to(dtype) for name, value in found.items()}


def images(layout: str = "contiguous", dtype: torch.dtype = DOUBLE) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return lay_out(torch.randn(2, C, SIDE, SIDE, generator=generator, dtype=DOUBLE), layout).to(
        dtype
    )


def network(side: Any, x: Tensor, p: dict[str, Tensor], training: bool = True) -> Tensor:
    """conv_bn_act twice, a residual block of it, and BatchNorm-ReLU-convolution."""

    def unit(x: Tensor, i: int, **options: Any) -> Tensor:
        return side.conv_bn_act(
            x, p[f"w{i}"], None, None, None, p[f"g{i}"], p[f"b{i}"], padding=1, training=training,
            **options,
        )  # fmt: skip

    a = unit(x, 0)
    b = unit(unit(a, 1), 2, residual=a)
    c = side.batch_norm_relu(b, None, None, p["g3"], p["b3"], training)
    convolution = ours.conv2d if side is ours else F.conv2d
    return convolution(c, p["w3"], padding=1)


def sides(layout: str = "contiguous") -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    tensors = {"x": images(layout), **parameters()}
    return tensors, expected(layout), eager.signed(tensors["x"].shape, 1)


def expected(layout: str = "contiguous") -> dict[str, Tensor]:
    tensors = {"x": images(layout), **parameters()}
    return eager.two_orders(
        lambda x, **p: network(eager, x, p), tensors, eager.signed(tensors["x"].shape, 1)
    )


def mine(x: Tensor, **p: Tensor) -> Tensor:
    return network(ours, x, p)
