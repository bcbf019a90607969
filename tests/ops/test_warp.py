"""warp by the public function: against PyTorch's own resizing of crops, on every backend."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from ops.base import device_of, every_backend
from ops.oracle import LAYOUTS, lay_out
from ops.two_views import (
    DOUBLE,
    SLOW,
    both,
    compare,
    crops,
    dtypes,
    generator,
    views,
)
from torch import Tensor

import camkernels as ck

SIZES = {
    "images": ((9, 13), None, (7, 8)),
    "enlarged": ((5, 4), None, (23, 17)),
    "a map of a picture": ((7, 7), (32, 40), (24, 20)),
    "a reduced picture": ((20, 31), (9, 10), (12, 5)),
    "one pixel": ((1, 1), (16, 16), (8, 8)),
    "to one pixel": ((6, 5), None, (1, 1)),
}


@every_backend
@pytest.mark.parametrize(
    "layout", ["sliced"] if SLOW else ["contiguous", "sliced", "channels_last", "expanded_batch"]
)
@pytest.mark.parametrize("name", SIZES)
def test_warp_is_crop_resize_flip(name: str, layout: str, backend: str) -> None:
    shape, via, size = SIZES[name]
    boxes, flips = views(3, 4, *(via or shape))
    for dtype in dtypes(backend):
        images = torch.randn(4, 2, *shape, generator=generator(1), dtype=DOUBLE).to(dtype)
        images = lay_out(images, layout)

        def ours(x: Tensor) -> Tensor:
            moved = (t.to(x.device) for t in (boxes, flips))
            return ck.warp(x, *moved, size, source_size=via)

        pairs = both(ours, lambda x: crops(x, boxes, flips, via, size), [images], backend)
        assert pairs[0][1].dtype == dtype
        compare(pairs, 1e-12 if dtype == DOUBLE else 3e-6)


@every_backend
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=3 if SLOW else 25)
def test_warp_of_any_shape(backend: str, data: Any) -> None:
    pair = st.tuples(st.integers(1, 12), st.integers(1, 12))
    shape, via, size = data.draw(pair), data.draw(st.none() | pair), data.draw(pair)
    batch, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 999))
    boxes, flips = views(seed, batch, *(via or shape))
    layout = data.draw(st.sampled_from(LAYOUTS))
    images = lay_out(torch.randn(batch, 2, *shape, generator=generator(seed)), layout)
    compare(
        both(
            lambda x: ck.warp(x, boxes.to(x.device), flips.to(x.device), size, source_size=via),
            lambda x: crops(x, boxes, flips, via, size),
            [images],
            backend,
        ),
        1e-5,
    )


@every_backend
def test_the_identity_is_exact(backend: str) -> None:
    images = torch.randn(2, 3, 6, 7).to(device_of(backend))
    whole = torch.tensor([[0, 0, 6, 7]] * 2, device=images.device)
    with ck.backend(backend):
        assert torch.equal(ck.warp(images, whole), images)
        mirrored = ck.warp(images, whole, torch.tensor([True, False], device=images.device))
    assert torch.equal(mirrored[0], images[0].flip(-1))
    assert torch.equal(mirrored[1], images[1])
