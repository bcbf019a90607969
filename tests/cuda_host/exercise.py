"""Every CUDA kernel once or more, in several orders of threads and blocks, against the reference.

``python exercise.py MODULE`` takes a host build (see build.py), perhaps of a copy of the sources
with a fault; it prints what was found, and exits with 1 where anything was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cuda_host.build import load

ORDERS = (0, 1, 7)
# Planes by vectors, also where they end in the next channel; planes beyond one block; any strides;
# channels by vectors, whole and not; more channels than one block takes.
ACTIVATIONS = (
    ((2, 40, 7, 7), "nchw"),
    ((2, 17, 8, 8), "nchw"),
    ((1, 3, 50, 50), "nchw"),
    ((1, 5, 17, 19), "nchw"),
    ((2, 40, 7, 7), "channels_last"),
    ((2, 16, 7, 7), "channels_last"),
    ((2, 300, 3, 5), "channels_last"),
    ((1, 33, 50, 50), "channels_last"),
    ((2, 20, 6, 5), "strided"),
    ((1, 600, 1, 1), "nchw"),
)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values in other strides."""
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return values.repeat_interleave(2, 3)[..., ::2]
    return values


def calls() -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Name, and an op with its gradients on the backend in force."""
    import camkernels as ck

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape, layout in ACTIVATIONS:
            a = lay_out(torch.rand(shape).to(dtype), layout).requires_grad_()
            g = lay_out(torch.randn(shape).to(dtype), layout).requires_grad_()

            def cam(a: Tensor = a, g: Tensor = g) -> list[Tensor]:
                statistics, maps = ck.cam_statistics(a, g, return_maps=True)
                loss = maps.square().sum() + statistics.entropy.sum() + statistics.area.sum()
                plain = ck.grad_cam(a, g)
                weighted = ck.class_activation_map(a, g.float().mean((2, 3)))
                loss = loss + plain.square().sum() + weighted.square().sum()
                found = [maps, plain, weighted, *statistics, *torch.autograd.grad(loss, (a, g))]
                return [x.detach() for x in found]

            yield f"cam {shape} {layout} {dtype}", cam
        maps = torch.rand(3, 9, 40).to(dtype).requires_grad_()

        def statistics(maps: Tensor = maps) -> list[Tensor]:
            found = ck.map_statistics(maps)
            loss = found.entropy.sum() + found.area.sum() + found.variance.sum()
            return [x.detach() for x in (*found, *torch.autograd.grad(loss, maps))]

        yield f"map_statistics {dtype}", statistics
        yield from similarities(dtype)
        yield from rectifiers(dtype)


def rectifiers(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """relu by its mask and by its output, plain and guided; the cotangent is signed."""
    import camkernels as ck
    from camkernels.nn.functional import relu

    u = torch.randn(5003).to(dtype).requires_grad_()
    cotangent = torch.randn(5003).to(dtype)
    for save in ("mask", "output"):
        for guided in (False, True):

            def rectified(save: str = save, guided: bool = guided) -> list[Tensor]:
                v = relu(u, save=save)
                with ck.guided() if guided else nullcontext():
                    return [v.detach(), *torch.autograd.grad(v, u, cotangent)]

            yield f"relu {save} {'guided' if guided else 'plain'} {dtype}", rectified


def similar(dtype: torch.dtype, *shape: int) -> list[Tensor]:
    """Two tensors whose similarity is not by chance next to 0, which is then what errors are of."""
    x, y = torch.rand(2, *shape)
    return [t.to(dtype).requires_grad_() for t in (x, 0.5 * (x + y))]


def similarities(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """ssim and warped_ssim: windows of one span and of several, maps that several blocks join."""
    import camkernels as ck

    x, y = similar(dtype, 2, 2, 40, 37)
    maps, others = similar(dtype, 2, 20, 9)
    boxes = torch.tensor([[0, 0, 40, 37], [3, 5, 20, 11]])
    flips = torch.tensor([False, True])
    for length in (5, 21):

        def stored(length: int = length) -> list[Tensor]:
            value = ck.ssim(x, y, window_size=length)
            return [value.detach(), *torch.autograd.grad(value.sum(), (x, y))]

        def warped(length: int = length) -> list[Tensor]:
            value = ck.warped_ssim(
                maps, others, boxes, flips, (50, 37), source_size=(40, 37), window_size=length
            )
            return [value.detach(), *torch.autograd.grad(value.sum(), (maps, others))]

        yield f"ssim {length} {dtype}", stored
        yield f"warped_ssim {length} {dtype}", warped


def compare(name: str, found: list[Tensor], expected: list[Tensor], first: list[Tensor]) -> str:
    for i, (x, y, one) in enumerate(zip(found, expected, first, strict=True)):
        scale = float(y.double().abs().max()) + 1e-6
        tolerance = 2e-5 if x.dtype == torch.float32 else 2e-2
        error = float((x.double() - y.double()).abs().max())
        if not error <= tolerance * scale:
            return f"{name}: result {i} is off by {error:.3g} of {scale:.3g}"
        if not torch.equal(x, one):
            return f"{name}: result {i} depends on the order of threads"
    return ""


def exercise(module: Any) -> list[str]:
    """What is wrong."""
    import camkernels as ck

    torch.manual_seed(0)
    faults = []
    for name, call in calls():
        with ck.backend("reference"):
            expected = call()
        first: list[Tensor] | None = None
        for order in ORDERS:
            module.set_order(order)
            try:
                with ck.backend("cuda"):
                    found = call()
            except RuntimeError as error:
                faults.append(f"{name}, order {order}: {error}")
                break
            first = first or found
            if fault := compare(f"{name}, order {order}", found, expected, first):
                faults.append(fault)
                break
    module.set_order(0)
    return faults


if __name__ == "__main__":
    found = exercise(load(Path(sys.argv[1])))
    print("\n".join(found))
    sys.exit(1 if found else 0)
