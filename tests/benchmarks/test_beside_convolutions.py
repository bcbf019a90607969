"""The engine's step with fills in the place of convolutions."""

from __future__ import annotations

import pytest
import torch

from benchmarks import beside_convolutions as beside
from camkernels import backends
from camkernels.engine import conv_norm

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None, reason="needs the C++ kernels"
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [*beside.LAYOUTS])
def test_fills_have_the_shapes_of_convolutions(
    dtype: str, layout: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    convolve, shapes = conv_norm.convolve, []
    filled = beside.Fills.filled

    def seen(self: beside.Fills, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        if like.device.type == "cpu":
            shapes.append(shape)
        return filled(self, shape, like)

    monkeypatch.setattr(beside.Fills, "filled", seen)
    options = ["--model", "resnet18", "--batch", "2", "--size", "33", "--rounds", "1"]
    beside.main([*options, "--dtype", dtype, "--layout", layout])
    out = capsys.readouterr().out
    assert out.startswith(f"resnet18 2x33 {dtype} {layout}: median ")
    # 20 convolutions: forward, tangent; three data gradients but one (pictures are not read in the
    # last backward); two weight gradients
    assert len(shapes) == 4 * (20 * 7 - 1)
    assert conv_norm.convolve is convolve
