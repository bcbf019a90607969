"""map_statistics where maps are larger than a block has threads: by vectors, and not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import camkernels as ck
from camkernels import backends

reason = backends.unavailable_reason("cuda")
pytestmark = pytest.mark.skipif(reason is not None, reason=f"backend cuda: {reason}")
DEVICE = "cpu" if reason is not None or backends.cuda_on_host() else "cuda"
# Runs of pixels that end in the next row, rows of several runs, one column, no whole runs.
SHAPES = ((2, 24, 19), (2, 3, 400), (1, 512, 1), (2, 17, 31))
LAYOUTS = ("dense", "offset", "rows apart", "columns apart", "maps apart", "one map")


def laid(maps: Tensor, layout: str) -> Tensor:
    """The same values; vectors can be read of "dense" and "one map" only."""
    batch, height, width = maps.shape
    if layout == "offset":
        return torch.cat((maps.new_zeros(1), maps.flatten()))[1:].view(maps.shape)
    if layout == "rows apart":
        return maps.new_zeros(batch, height, width + 8)[..., :width].copy_(maps)
    if layout == "columns apart":
        return maps.mT.contiguous().mT
    if layout == "maps apart":
        storage = maps.new_zeros(batch * (height * width + 1))
        return storage.as_strided(maps.shape, (height * width + 1, width, 1)).copy_(maps)
    return maps[:1].expand_as(maps) if layout == "one map" else maps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_of_large_maps(
    shape: tuple[int, int, int], layout: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    # more in one corner, so that rows and columns are told apart; a third is 0
    ramp = torch.linspace(1, 3, shape[1])[:, None] * torch.linspace(1, 2, shape[2])
    maps = laid(((torch.rand(shape, generator=generator) - 0.3).relu() * ramp).to(dtype), layout)

    def run(maps: Tensor, backend: str) -> list[Tensor]:
        leaf = maps.detach().requires_grad_()
        with ck.backend(backend):  # type: ignore[arg-type]
            found = ck.map_statistics(leaf)
        weighted = found.centroid * found.centroid.new_tensor([0.1, 0.3])
        loss = found.entropy.sum() + found.area.sum() + found.dispersion.sum() + weighted.sum()
        return [*(x.detach() for x in found), *torch.autograd.grad(loss, leaf)]

    found, expected = run(maps.to(DEVICE), "cuda"), run(maps.double(), "reference")
    for x, y in zip(found, expected, strict=True):
        error = float((x.double().cpu() - y).abs().max())
        assert error <= (3e-5 if x.dtype == torch.float32 else 1e-2) * float(y.abs().max()) + 1e-7
