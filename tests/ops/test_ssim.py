"""ssim by the public function: against pytorch-msssim, scikit-image and the formula once more."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from ops.base import device_of, every_backend, has_double
from ops.oracle import LAYOUTS, lay_out
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


# What scikit-image calls it, and what we do.
SKIMAGE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gaussian": ({"gaussian_weights": True, "sigma": 1.5}, {}),
    "uniform 5": ({"win_size": 5}, {"window": "uniform", "window_size": 5}),
    "uniform 7": ({"win_size": 7}, {"window": "uniform", "window_size": 7}),
}


@every_backend
@pytest.mark.parametrize("data_range", [1.0, 255.0])
@pytest.mark.parametrize("window", SKIMAGE)
def test_ssim_is_that_of_scikit_image(window: str, data_range: float, backend: str) -> None:
    from skimage import metrics

    theirs, ours = SKIMAGE[window]
    x = torch.rand(2, 33, 40, generator=generator(1), dtype=DOUBLE) * data_range
    y = (x + 0.1 * data_range * torch.randn(x.shape, generator=generator(2))).clamp(0, data_range)
    expected = [
        metrics.structural_similarity(
            a.numpy(), b.numpy(), data_range=data_range, use_sample_covariance=False, **theirs
        )
        for a, b in zip(x, y, strict=True)
    ]
    for dtype in [torch.float32, DOUBLE] if has_double(backend) else [torch.float32]:
        a, b = (t.to(device_of(backend), dtype) for t in (x, y))
        with ck.backend(backend):
            found = ck.ssim(a, b, data_range=data_range, **ours)
        torch.testing.assert_close(
            found.cpu().double(),
            torch.tensor(expected, dtype=DOUBLE),
            rtol=0,
            atol=1e-10 if dtype == DOUBLE else 1e-5,
        )


# One pixel, axes shorter than the window of 11, and rows of more than one vector.
SIDES = st.just(1) | st.integers(2, 10) | st.integers(11, 40)


@every_backend
@hypothesis.given(data=st.data())
def test_ssim_of_any_shape(backend: str, data: Any) -> None:
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 2), SIDES, SIDES))
    options = {
        "window": data.draw(st.sampled_from(["gaussian", "uniform"])),
        "window_size": data.draw(st.sampled_from([11, 7, 3, 1])),
        "padding": data.draw(st.sampled_from(["valid", "same"])),
        "k1": 0.1, "k2": 0.3,  # well above what rounding leaves of a variance of 0
    }  # fmt: skip
    dtype, seed = data.draw(st.sampled_from(dtypes(backend))), data.draw(st.integers(0, 999))
    x = torch.rand(shape, generator=generator(seed), dtype=DOUBLE)
    y = (x + 0.3 * torch.randn(shape, generator=generator(seed + 1), dtype=DOUBLE)).abs()
    tensors = [lay_out(t.to(dtype), data.draw(st.sampled_from(LAYOUTS))) for t in (x, y)]
    weights = [weights_of(n, options) for n in shape[2:]]
    pad = tuple(len(w) // 2 for w in weights) if options["padding"] == "same" else 0

    def truth(a: Tensor, b: Tensor) -> Tensor:
        planes = plain_ssim(a.flatten(0, 1), b.flatten(0, 1), weights, pad, 0.01, 0.09)
        return planes.unflatten(0, shape[:2]).mean(1)

    compare(
        both(lambda a, b: ck.ssim(a, b, **options), truth, tensors, backend),
        1e-11 if dtype == DOUBLE else 1e-4,
    )


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
