"""Inputs and sides that the benchmarks of the ops share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Options, Side, UnsupportedError

SHAPES = ((20, 2048, 6, 6), (64, 512, 28, 28))
QUICK_SHAPES = ((2, 16, 6, 6),)
LAYOUTS = ("nchw", "channels_last")
FORMS = ("weights", "gradients")


def activations_and_second(
    shape: tuple[int, int, int, int], layout: str, form: str, options: Options
) -> tuple[Tensor, Tensor]:
    """Leaves A (B, K, h, w), and weights (B, K) or gradients (B, K, h, w) in A's layout.

    A quarter of the pixels is negative in every channel and all weights are positive: the sign of
    each map value is certain, so that a ReLU cannot fall differently on two sides by rounding.
    Channels look at different rows and the upper ones weigh most: were the channels alike, the
    entropy's gradient to the weights, sum_ij D A_k, would cancel (sum D M = 0) down to rounding.
    """
    generator = torch.Generator().manual_seed(sum(shape))
    b, k, h, w = shape
    signs = torch.where(torch.rand(b, 1, h, w, generator=generator) < 0.25, -1.0, 1.0)
    centre = torch.rand(1, k, 1, 1, generator=generator)
    rows = torch.linspace(0, 1, h)[:, None]
    activations = torch.rand(shape, generator=generator).add_(0.1)
    activations *= signs * torch.exp(-3 * (rows - centre).abs())
    second = (torch.rand((b, k), generator=generator) + 0.1) * torch.exp(-3 * centre[..., 0, 0])
    if form == "gradients":
        second = torch.rand(shape, generator=generator) * second[:, :, None, None] / (h * w)
    return tuple(_leaf(t, layout, options) for t in (activations, second))  # type: ignore[return-value]


def _leaf(tensor: Tensor, layout: str, options: Options) -> Tensor:
    tensor = tensor.to(options.device, options.torch_dtype)
    if layout == "channels_last" and tensor.dim() == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor.requires_grad_()


def autograd_side(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Side:
    """Forward of a function of tensors, then the gradients of all inputs by autograd."""
    cotangents: list[Tensor] = []

    def forward() -> Sequence[Tensor]:
        return function(*inputs)

    def backward(outputs: Sequence[Tensor]) -> list[Tensor]:
        if not cotangents:  # the same ones for every side, none of them constant
            for output in outputs:
                ramp = torch.linspace(0.5, 1.5, output.numel(), device=output.device)
                cotangents.append(ramp.to(output.dtype).view(output.shape))
        return list(torch.autograd.grad(tuple(outputs), tuple(inputs), cotangents))

    return Side(forward, backward)


def compiled_side(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Side:
    """:func:`autograd_side` of ``torch.compile(function)``; compiles at once."""
    torch._dynamo.reset()
    side = autograd_side(torch.compile(function, fullgraph=True, dynamic=False), inputs)
    try:
        side.step()
    except Exception as error:  # whatever inductor lacks here: a compiler, Triton, a lowering
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedError(f"torch.compile failed: {reason}") from error
    return side


def op_sides(
    ours: Callable[..., Sequence[Tensor]],
    eager: Callable[..., Sequence[Tensor]],
    make_inputs: Callable[[], Sequence[Tensor]],
) -> Callable[[], dict[str, Callable[[], Side]]]:
    """The builder of a case of an op: ours, the careful eager one, and that one compiled."""

    def build() -> dict[str, Callable[[], Side]]:
        inputs = make_inputs()
        return {
            "eager": lambda: autograd_side(eager, inputs),
            "ours": lambda: autograd_side(ours, inputs),
            "compile": lambda: compiled_side(eager, inputs),
        }

    return build


def cam_traffic(shape: tuple[int, int, int, int], form: str, options: Options) -> dict[str, Any]:
    """Ideal bytes and operations of forward and backward.

    Forward reads A (and G) and writes the maps; backward reads A, the maps and their cotangent and
    writes the cotangents of A and alpha. Per element of A: a multiply-add forward, one for the
    cotangent of alpha, a product for that of A (and an addition for the mean of G).
    """
    b, k, h, w = shape
    elements, maps, channels = b * k * h * w, b * h * w, b * k
    item = options.torch_dtype.itemsize
    gradients = form == "gradients"
    big = elements * item * (4 if gradients else 3)
    return {
        "ideal_bytes": big + 3 * maps * 4 + channels * 4 * 3,
        "operations": elements * (6 if gradients else 5),
    }
