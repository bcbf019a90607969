"""The host side of the CUDA kernels, of which none runs here: no build of them is needed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from camkernels.ops import _cuda_launch


def test_a_launch_goes_to_the_device_of_its_operands_and_its_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    streams = {None: 1, "cuda:1": 77}
    current: list[str | None] = [None]

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(str(chosen))
        yield
        current.pop()

    def kernel(*arguments: Any) -> int:
        seen.append((current[-1], arguments))
        return 0

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=streams[current[-1]])
    )
    monkeypatch.setattr(_cuda_launch, "module", lambda: SimpleNamespace(foo_fwd=kernel))
    operand: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    _cuda_launch.run("foo_fwd", (operand,), 5, 6)
    assert seen == [("cuda:1", (77, 5, 6))]
    assert current == [None]


def huge(*shape: int) -> Tensor:
    """One element, expanded: a shape that costs nothing."""
    return torch.zeros(1).expand(shape)


SIDES = 2**16, 2**15  # each of which check_axis admits
SMALL = huge(1, 3, 4)
WARPED = (torch.tensor([[0, 0, 5, 5]]), torch.tensor([False]), (5, 5), (5, 5), (1.0,), (1.0,), 1, 1)
PICTURES = huge(1, 1, *SIDES)


@pytest.mark.parametrize(
    ("kernel", "name", "arguments"),
    [
        ("cam_fwd", "activations", (PICTURES, PICTURES, True)),
        ("cam_statistics_fwd", "activations", (PICTURES, PICTURES, True)),
        ("map_statistics_fwd", "maps", (PICTURES[0], False)),
        ("ssim_fwd", "x", (PICTURES, PICTURES, (1.0,), (1.0,), 1.0, 1.0, False)),
        ("warped_ssim_fwd", "maps", (PICTURES[0], SMALL, *WARPED, False)),
        ("warped_ssim_fwd", "others", (SMALL, PICTURES[0], *WARPED, False)),
    ],
)
def test_maps_beyond_32_bit_pixels_are_refused(kernel: str, name: str, arguments: Any) -> None:
    op = importlib.import_module(f"camkernels.ops.{kernel.removesuffix('_fwd')}.cuda")
    with pytest.raises(ValueError, match=rf"^{name}: .* up to 2\^30 pixels, got 2147483648"):
        getattr(op, kernel)(*arguments)
