"""warped_ssim by the public function, and what it has in common with warp and ssim: further orders,
memory, bad values, boxes. Bad arguments: test_view_arguments.py."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from ops.base import device_of, every_backend, has_double
from ops.oracle import LAYOUTS, lay_out, storages
from ops.two_views import (
    DOUBLE,
    SLOW,
    both,
    compare,
    crops,
    dtypes,
    generator,
    plain_ssim,
    views,
    weights_of,
)
from torch import Tensor

import camkernels as ck
from camkernels.ops.warp.op import warp_fwd
from camkernels.ops.warped_ssim.op import warped_ssim_fwd

PAIRS = {
    "maps of a picture": ((7, 7), (7, 7), (32, 40), (24, 30), {}),
    "other sizes": ((5, 9), (3, 4), (28, 25), (33, 17), {"padding": "same"}),
    "one pixel": ((1, 1), (6, 7), (16, 16), (16, 16), {}),
    "smaller than the window": ((7, 7), (5, 4), (16, 20), (9, 6), {}),
    "small": ((4, 4), (4, 4), (8, 8), (6, 5), {"window": "uniform", "window_size": 3}),
}


def composed(
    maps: Tensor, others: Tensor, boxes: Tensor, flips: Tensor, via: Any, size: Any, options: Any
) -> Tensor:
    u = crops(maps[:, None], boxes, flips, via, size)[:, 0]
    v = F.interpolate(others[:, None], size, mode="bilinear")[:, 0]
    weights = [weights_of(n, options) for n in size]
    pad = tuple(len(w) // 2 for w in weights) if options.get("padding") == "same" else 0
    return plain_ssim(
        u, v, weights, pad, options.get("k1", 0.01) ** 2, options.get("k2", 0.03) ** 2
    )


@every_backend
@pytest.mark.parametrize("name", PAIRS)
def test_warped_ssim_is_the_composition(name: str, backend: str) -> None:
    shape, other, via, size, options = PAIRS[name]
    boxes, flips = views(5, 4, *via)
    for dtype in dtypes(backend):
        for layout in ("transposed",) if SLOW else ("contiguous", "transposed", "expanded_batch"):
            maps = torch.rand(4, *shape, generator=generator(1), dtype=DOUBLE).to(dtype)
            others = torch.rand(4, *other, generator=generator(2), dtype=DOUBLE).to(dtype)
            compare(
                both(
                    lambda a, b: ck.warped_ssim(
                        a, b, boxes.to(a.device), flips.to(a.device), size, source_size=via,
                        **options,
                    ),
                    lambda a, b: composed(a, b, boxes, flips, via, size, options),
                    [lay_out(maps, layout), lay_out(others, layout)],
                    backend,
                ),
                1e-10 if dtype == DOUBLE else 1e-4,
            )  # fmt: skip


@every_backend
def test_the_size_of_the_paper_by_pytorch_msssim_and_scikit_image(backend: str) -> None:
    """Against what a user has: all of 224 x 224 in PyTorch, then either package."""
    if SLOW:
        pytest.skip("minutes in the interpreter")
    import pytorch_msssim
    from skimage import metrics

    size = (224, 224)
    boxes, flips = views(5, 3, *size)
    tensors = [torch.rand(3, 7, 7, generator=generator(s)) for s in (1, 2)]
    exact = weights_of(224, {})[None, None, None]

    def ours(a: Tensor, b: Tensor) -> Tensor:
        return ck.warped_ssim(a, b, boxes.to(a.device), flips.to(a.device))

    def pictures(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        u = crops(a[:, None], boxes, flips, size, size)
        return u, F.interpolate(b[:, None], size, mode="bilinear")

    def theirs(a: Tensor, b: Tensor, win: Tensor | None = exact) -> Tensor:
        options = {"data_range": 1.0, "size_average": False, "win": win}
        return pytorch_msssim.ssim(*pictures(a, b), **options)

    wide = [t.double() for t in tensors]
    if has_double(backend):
        compare(both(ours, theirs, wide, backend), 1e-10)
    pairs = both(ours, theirs, tensors, backend)
    compare(pairs, 5e-5)
    values = pairs[0][1].double()
    # Its own weights are of float32 and do not quite sum to 1: 7e-6 of these 1e-5.
    torch.testing.assert_close(values, theirs(*wide, None), rtol=0, atol=1e-5)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for value, u, v in zip(values, *pictures(*wide), strict=True):
        by_skimage = metrics.structural_similarity(
            u[0].numpy(), v[0].numpy(), data_range=1.0, **options
        )
        assert abs(float(value) - by_skimage) <= 2e-6


@every_backend
@hypothesis.given(data=st.data())
def test_warped_ssim_of_any_shape(backend: str, data: Any) -> None:
    def sides(most: int) -> Any:
        return data.draw(st.tuples(*[st.just(1) | st.integers(2, most)] * 2))

    shape, other, size = sides(9), sides(9), sides(36)
    via = sides(40) if data.draw(st.booleans()) else None
    options = {
        "window": data.draw(st.sampled_from(["gaussian", "uniform"])),
        "window_size": data.draw(st.sampled_from([11, 7, 3, 1])),
        "padding": data.draw(st.sampled_from(["valid", "same"])),
        "k1": 0.1, "k2": 0.3,  # well above what rounding leaves of a variance of 0
    }  # fmt: skip
    batch, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 999))
    dtype = data.draw(st.sampled_from(dtypes(backend)))
    boxes, flips = views(seed, batch, *(via or size))
    tensors = [
        lay_out(
            torch.rand(batch, *s, generator=generator(seed + i), dtype=DOUBLE).to(dtype),
            data.draw(st.sampled_from(LAYOUTS)),
        )
        for i, s in enumerate((shape, other))
    ]
    compare(
        both(
            lambda a, b: ck.warped_ssim(
                a, b, boxes.to(a.device), flips.to(a.device), size, source_size=via, **options
            ),
            lambda a, b: composed(a, b, boxes, flips, via or size, size, options),
            tensors,
            backend,
        ),
        1e-10 if dtype == DOUBLE else 1e-4,
        floor=0.01,  # the gradient of equal maps is what cancels
    )


@every_backend
@pytest.mark.parametrize("name", ["warp", "warped_ssim"])
def test_int32_boxes_are_int64_ones(name: str, backend: str) -> None:
    has_kernel(name, backend)
    boxes, flips = (t.to(device_of(backend)) for t in views(2, 3, 9, 8))
    x, y = (torch.rand(3, 4, 5).to(boxes.device).requires_grad_() for _ in range(2))
    found = []
    for given in (boxes, boxes.int(), boxes.int().t().contiguous().t()):
        with ck.backend(backend):
            value = FUNCTIONS[name](x, y, given, flips)
            found.append([value, *torch.autograd.grad(value.sum(), (x, y))])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


# ---- further orders, memory, bad values ----

FUNCTIONS: dict[str, Any] = {
    "warp": lambda x, y, b, f: ck.warp(x, b, f, (4, 5), source_size=(9, 8)) * y.mean(),
    "ssim": lambda x, y, b, f: ck.ssim(x, y, window_size=3),
    "warped_ssim": lambda x, y, b, f: ck.warped_ssim(
        x, y, b, f, (6, 5), source_size=(9, 8), window_size=3
    ),
}


def has_kernel(name: str, backend: str) -> None:
    if (name, backend) == ("warp", "cuda"):
        pytest.skip("backend cuda has no kernel of warp")


@every_backend
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck_and_gradgradcheck(name: str, backend: str) -> None:
    if not has_double(backend):
        pytest.skip("takes no float64")
    boxes, flips = views(2, 2, 9, 8)
    x, y = (torch.rand(2, 4, 5, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    with ck.backend(backend):
        function = lambda a, b: FUNCTIONS[name](a, b, boxes, flips)  # noqa: E731
        assert torch.autograd.gradcheck(function, (x, y))
        assert torch.autograd.gradgradcheck(function, (x, y))


@every_backend
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.usefixtures("poisoned_allocations")
def test_every_output_is_written_and_one_gradient_can_be_asked_for(name: str, backend: str) -> None:
    has_kernel(name, backend)
    boxes, flips = (t.to(device_of(backend)) for t in views(2, 3, 9, 8))
    x, y = (torch.rand(3, 4, 5).to(device_of(backend)) for _ in range(2))
    with ck.backend(backend):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        whole = torch.autograd.grad(FUNCTIONS[name](a, b, boxes, flips).sum(), (a, b))
        assert all(bool(g.isfinite().all()) and bool(g.any()) for g in whole)
        for i, (one, other) in enumerate([(a, y), (b, x)]):
            pair = (one, other) if i == 0 else (other, one)
            (alone,) = torch.autograd.grad(FUNCTIONS[name](*pair, boxes, flips).sum(), one)
            assert torch.equal(alone, whole[i])


def allocated(step: Any) -> list[int]:
    """Bytes of each allocation, inside ops too: a dispatch mode does not see these."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


PICTURE = (768, 48)
MEMORY: dict[str, Any] = {
    "warp": lambda x, y, b, f: ck.warp(x, b, f, (16, 16), source_size=PICTURE).square().sum(),
    "warped_ssim": lambda x, y, b, f: ck.warped_ssim(x, y, b, f, PICTURE).sum(),
}


@every_backend
@pytest.mark.parametrize("name", MEMORY)
def test_nothing_of_the_size_of_the_picture_is_allocated_or_saved(name: str, backend: str) -> None:
    has_kernel(name, backend)
    if SLOW and name == "warped_ssim":
        pytest.skip("minutes in the interpreter")
    torch.set_num_threads(1)  # scratch is per thread
    boxes, flips = (t.to(device_of(backend)) for t in views(5, 1, *PICTURE))
    x, y = (torch.rand(1, 7, 7).to(boxes.device).requires_grad_() for _ in range(2))
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    def step() -> None:
        with ck.backend(backend):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                value = MEMORY[name](x, y, boxes, flips)
            torch.autograd.grad(value, (x, y), allow_unused=True)

    largest = max(allocated(step))
    kept = sum(storages(saved).values())
    picture = math.prod(PICTURE) * x.element_size()
    if (name, backend) == ("warped_ssim", "reference"):  # which makes it: that would be seen
        assert largest >= picture
        assert kept >= picture
    else:
        assert largest <= picture // 2
        assert kept <= picture // 50


@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_values_stay_in_their_sample(name: str, bad: float, backend: str) -> None:
    has_kernel(name, backend)
    if name == "warp":
        FUNCTIONS_OF = lambda x, y, b, f: ck.warp(x, b, f, (4, 5), source_size=(9, 8))  # noqa: E731
    else:
        FUNCTIONS_OF = FUNCTIONS[name]
    boxes = torch.tensor([[0, 0, 9, 8]] * 3).to(device_of(backend))
    flips = torch.zeros(3, dtype=torch.bool).to(device_of(backend))
    x, y = (torch.rand(3, 4, 5).to(device_of(backend)) for _ in range(2))
    broken = x.clone()
    broken[1, 2, 2] = bad
    with ck.backend(backend):
        clean, found = (FUNCTIONS_OF(t, y, boxes, flips) for t in (x, broken))
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    assert not bool(found[1].isfinite().all())


BAD_BOXES = [
    (-1, 0, 2, 2), (0, 0, 0, 2), (0, 0, 2, -3), (8, 0, 2, 2), (0, 0, 2, 9), (2**40, 0, 2, 2),
    (1, 1, 2**63 - 1, 2),
]  # fmt: skip


@every_backend
def test_a_bad_box_makes_its_sample_nan_both_ways(backend: str) -> None:
    """Where the values of boxes are not checked, as on a GPU."""
    boxes = torch.tensor([(0, 0, 9, 8), *BAD_BOXES, (1, 2, 3, 4)]).to(device_of(backend))
    flips = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    maps, others = (torch.rand(len(boxes), 4, 5).to(boxes.device).requires_grad_() for _ in "ab")
    options = ((9, 8), (6, 7), [1 / 3] * 3, [1 / 3] * 3, 1e-4, 9e-4, False)
    found = []
    if backend != "cuda":  # which has no kernel of warp
        warped = warp_fwd(maps[:, None], boxes, flips, *options[:2], backend=backend)
        found += [warped, *torch.autograd.grad(warped.sum(), maps)]
    values = warped_ssim_fwd(maps, others, boxes, flips, *options, backend=backend)
    found += [values, *torch.autograd.grad(values.sum(), (maps, others))]
    for result in found:
        bad = result.detach().flatten(1) if result.dim() > 1 else result.detach()[:, None]
        assert bool(bad[1:-1].isnan().all())
        assert bool(bad[[0, -1]].isfinite().all())


@every_backend
@pytest.mark.parametrize("name", FUNCTIONS)
def test_empty_batch(name: str, backend: str) -> None:
    has_kernel(name, backend)
    device = device_of(backend)
    x, y = (torch.rand(0, 4, 5, device=device, requires_grad=True) for _ in range(2))
    boxes = torch.zeros(0, 4, dtype=torch.long, device=device)
    flips = torch.zeros(0, dtype=torch.bool, device=device)
    function = FUNCTIONS[name] if name != "warp" else lambda x, y, b, f: ck.warp(x, b, f, (4, 5))
    with ck.backend(backend):
        value = function(x, y, boxes, flips)
        assert value.shape[0] == 0
        (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.shape == x.shape


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    boxes, flips = views(5, 6, 64, 64)
    maps, others = (torch.rand(6, 7, 7, generator=generator(s)) for s in (1, 2))
    images = torch.rand(6, 3, 64, 64)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            a, b, c = (t.clone().requires_grad_() for t in (maps, others, images))
            with ck.backend("cpu"):
                values = ck.warped_ssim(a, b, boxes, flips, (96, 96), source_size=(64, 64))
                warped = ck.warp(c, boxes, flips, (96, 96))
                similar = ck.ssim(c, images.flip(-1))
            total = values.sum() + warped.square().sum() + similar.sum()
            found.append([values.detach(), *torch.autograd.grad(total, (a, b, c))])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(p, q) for p, q in zip(found[0], other, strict=True))
