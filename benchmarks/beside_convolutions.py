"""What a step of the engine takes beside its convolutions.

    python -m benchmarks.beside_convolutions [--dtype bfloat16] [--layout nchw] [--rounds 15]

A step of interpretable gradients (ResNet-50, fast, 8 pictures of 192 x 192 unless told otherwise)
whose convolutions are tensors of the right shapes, filled with a constant; the time of the filling
is taken off. So a change of anything else shows on a machine whose convolutions are slow, or whose
CPU has none of the dtype. The classifier is computed in float32 for the same reason. Two commits
are compared by running it in a clone of each, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camkernels as ck
from camkernels import modes
from camkernels.engine import conv_norm
from camkernels.ops.conv2d import pointwise

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class Fills:
    """Stands for the convolutions; ``seconds``: what the filling took."""

    def __init__(self, layout: torch.memory_format) -> None:
        self.layout, self.seconds = layout, 0.0

    def filled(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        start = time.perf_counter()
        made = torch.empty(
            shape, dtype=like.dtype, device=like.device, memory_format=self.layout
        ).fill_(0.37)
        self.seconds += time.perf_counter() - start
        return made

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, spec: Any) -> Tensor:
        sizes = zip(x.shape[2:], spec.padding, spec.dilation, weight.shape[2:], spec.stride,
                    strict=True)  # fmt: skip
        plane = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes]
        return self.filled((x.shape[0], weight.shape[0], *plane), x)

    def gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, spec: Any, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        to_x = None
        if wanted[0]:
            read = self.strided(grad, weight, spec)
            size = (x.shape[2], x.shape[3])
            to_x = self.filled(tuple(x.shape), grad) if read is None else (
                pointwise.spread(read, size, spec.stride, self.layout)
            )  # fmt: skip
        return to_x, self.filled(tuple(weight.shape), grad) if wanted[1] else None, None

    def strided(self, grad: Tensor, weight: Tensor, spec: Any) -> Tensor | None:
        if tuple(weight.shape[2:]) != (1, 1) or tuple(spec.stride) == (1, 1):
            return None
        return self.filled((grad.shape[0], weight.shape[1], *grad.shape[2:]), grad)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The engine's convolutions are fills in the block."""
        with mock.patch.multiple(conv_norm, convolve=self.convolve, gradients=self.gradients):
            if not hasattr(conv_norm, "strided_gradient"):  # before it was an operation of its own
                yield
                return
            with mock.patch.object(conv_norm, "strided_gradient", self.strided):
                yield


class Head(nn.Linear):
    """In float32, also under autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float())


def step(model: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
    leaf = images.clone().requires_grad_()
    modes.mark_unread(leaf)
    autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
    with autocast:
        logits = model(leaf)
    score = F.cross_entropy(logits, torch.zeros(len(images), dtype=torch.long))
    delta, guided = ck.input_gradients(score, logits, leaf)
    (score - F.cosine_similarity(delta.flatten(1), guided.flatten(1)).mean()).backward()
    for p in model.parameters():
        p.grad = None


def measure(
    name: str, batch: int, side: int, dtype: torch.dtype, layout: str, rounds: int
) -> list[float]:
    """Milliseconds of each round, smallest first."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name).train()
    model.fc.__class__ = Head
    model = model.to(memory_format=LAYOUTS[layout])
    images = torch.randn(batch, 3, side, side).contiguous(memory_format=LAYOUTS[layout])
    model = ck.swap_in(model, engine=True, memory="fast")
    fills, found = Fills(LAYOUTS[layout]), []
    with fills.in_place():
        for _ in range(rounds + 3):
            fills.seconds, start = 0.0, time.perf_counter()
            step(model, images, dtype)
            found.append(1e3 * (time.perf_counter() - start - fills.seconds))
    return sorted(found[3:])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beside_convolutions")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="channels_last")
    parser.add_argument("--rounds", type=int, default=15)
    o = parser.parse_args(arguments)
    found = measure(o.model, o.batch, o.size, getattr(torch, o.dtype), o.layout, o.rounds)
    median, fifth = statistics.median(found), found[len(found) // 5]
    print(f"{o.model} {o.batch}x{o.size} {o.dtype} {o.layout}: median {median:.0f} ms, "
          f"fastest fifth {fifth:.0f} ms, fastest {found[0]:.0f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
