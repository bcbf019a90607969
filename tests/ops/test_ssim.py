"""ssim by the public function: against pytorch-msssim, scikit-image and the formula once more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.base import device_of, every_backend
from ops.oracle import lay_out
from ops.two_views import (
    DOUBLE,
    SLOW,
    both,
    compare,
    dtypes,
    generator,
    plain_ssim,
    weights_of,
)
from torch import Tensor

import camkernels as ck


@every_backend
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(11, 11), (24, 35), (40, 12)])
def test_ssim_is_that_of_pytorch_msssim(backend: str, size: Any, channels: int) -> None:
    import pytorch_msssim

    x = torch.rand(3, channels, *size, generator=generator(1))
    y = (x + 0.2 * torch.randn(x.shape, generator=generator(2))).clamp(0, 1)

    def theirs(a: Tensor, b: Tensor) -> Tensor:
        found: Tensor = pytorch_msssim.ssim(a, b, data_range=1.0, size_average=False)
        return found

    compare(both(ck.ssim, theirs, [x, y], backend), 1e-5)


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_ssim_is_that_of_scikit_image(data_range: float) -> None:
    from skimage import metrics

    x = torch.rand(2, 33, 40, generator=generator(1), dtype=DOUBLE) * data_range
    y = (x + 0.1 * data_range * torch.randn(x.shape, generator=generator(2))).clamp(0, data_range)
    found = ck.ssim(x.float(), y.float(), data_range=data_range)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for i in range(2):
        expected = metrics.structural_similarity(
            x[i].numpy(), y[i].numpy(), data_range=data_range, **options
        )
        assert abs(float(found[i]) - expected) <= 1e-5


WINDOWS = {
    "gaussian": ({}, (30, 21)),
    "same": ({"padding": "same"}, (12, 21)),
    "uniform": ({"window": "uniform", "window_size": 5}, (9, 31)),
    "range and constants": ({"data_range": 4.0, "k1": 0.05, "k2": 0.1, "window_size": 3}, (9, 8)),
    "one pixel": ({}, (1, 1)),
    "window of one": ({"window_size": 1}, (5, 6)),
    "small, even": ({}, (6, 8)),
    "small, same": ({"padding": "same", "sigma": 0.8}, (4, 3)),
}


@every_backend
@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name: str, backend: str) -> None:
    options, size = WINDOWS[name]
    span = options.get("data_range", 1.0)
    x = torch.rand(3, *size, generator=generator(1), dtype=DOUBLE) * span
    y = (x + 0.3 * span * torch.randn(x.shape, generator=generator(2), dtype=DOUBLE)).abs()
    weights = [weights_of(n, options) for n in size]
    pad = tuple(len(w) // 2 for w in weights) if options.get("padding") == "same" else 0
    c1, c2 = (options.get("k1", 0.01) * span) ** 2, (options.get("k2", 0.03) * span) ** 2
    for dtype in dtypes(backend):
        for layout in ("transposed",) if SLOW else ("contiguous", "transposed", "expanded_batch"):
            tensors = [lay_out(t.to(dtype), layout) for t in (x, y)]
            compare(
                both(
                    lambda a, b: ck.ssim(a, b, **options),
                    lambda a, b: plain_ssim(a, b, weights, pad, c1, c2),
                    tensors,
                    backend,
                ),
                # a variance of 0 is what rounding leaves of it, beside C2 = 9e-4
                1e-11 if dtype == DOUBLE else 1e-4,
            )


@every_backend
def test_equal_pictures_have_similarity_1(backend: str) -> None:
    x = torch.rand(2, 3, 20, 20).to(device_of(backend))
    with ck.backend(backend):
        torch.testing.assert_close(ck.ssim(x, x).cpu(), torch.ones(2), rtol=0, atol=1e-6)
        constant = torch.zeros_like(x)
        assert torch.equal(ck.ssim(constant, constant).cpu(), torch.ones(2))
