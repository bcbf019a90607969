"""warp, ssim and warped_ssim by the public functions: against PyTorch's own resizing, the formulas
of pytorch-msssim and scikit-image, and the float64 truth, on every backend."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from ops.base import device_of, every_backend, has_double
from ops.oracle import LAYOUTS, lay_out
from torch import Tensor

import camkernels as ck
from camkernels import backends

DOUBLE = torch.float64
# The interpreter takes a second per call; test_similarity_triton.py has more for it.
SLOW = backends.triton_interpreted()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def views(seed: int, batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Boxes, among them the whole picture, and flips."""
    g = generator(seed)
    h = torch.randint(1, height + 1, (batch,), generator=g)
    w = torch.randint(1, width + 1, (batch,), generator=g)
    if batch > 2:
        h[0], w[0] = height, width
    top = (torch.rand(batch, generator=g) * (height - h + 1)).long()
    left = (torch.rand(batch, generator=g) * (width - w + 1)).long()
    return torch.stack([top, left, h, w], 1), torch.rand(batch, generator=g) < 0.5


def crops(images: Tensor, boxes: Tensor, flips: Tensor, via: Any, size: Any) -> Tensor:
    """What a user writes: one image at a time."""
    if via is not None and tuple(images.shape[2:]) != tuple(via):
        images = F.interpolate(images, via, mode="bilinear")
    found = []
    for image, (t, left, h, w), flip in zip(images, boxes.tolist(), flips.tolist(), strict=True):
        crop = F.interpolate(image[None, :, t : t + h, left : left + w], size, mode="bilinear")[0]
        found.append(crop.flip(-1) if flip else crop)
    return torch.stack(found)


def both(
    function: Any, truth: Any, tensors: list[Tensor], backend: str, seed: int = 7
) -> list[tuple[str, Tensor, Tensor]]:
    """Values and gradients of both sides, ours on its device, the truth in float64."""
    ours = [t.to(device_of(backend)).detach().requires_grad_() for t in tensors]
    theirs = [t.double().requires_grad_() for t in tensors]
    with ck.backend(backend):
        value = function(*ours)
        expected = truth(*theirs)
        cotangent = torch.randn(expected.shape, generator=generator(seed), dtype=DOUBLE)
        given = cotangent.to(value.device, value.dtype)
        found = torch.autograd.grad(value, ours, given)
    wanted = torch.autograd.grad(expected, theirs, cotangent)
    pairs = [("value", value.detach().cpu(), expected.detach())]
    return pairs + [
        (f"gradient {i}", f.cpu(), w) for i, (f, w) in enumerate(zip(found, wanted, strict=True))
    ]


def compare(pairs: list[tuple[str, Tensor, Tensor]], tolerance: float) -> None:
    for label, found, expected in pairs:
        assert found.shape == expected.shape, label
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        error = float((found.double() - expected).abs().max()) if expected.numel() else 0.0
        rounding = 2 * torch.finfo(found.dtype).eps
        assert error <= (tolerance + rounding) * (scale + 1e-6), f"{label}: {error} of {scale}"


def dtypes(backend: str) -> list[torch.dtype]:
    floats = [torch.float32] if SLOW else [torch.float32, torch.bfloat16, torch.float16]
    return [*floats, DOUBLE] if has_double(backend) else floats


# ---- warp ----

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


# ---- ssim ----


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


def plain_ssim(x: Tensor, y: Tensor, weights: Any, pad: Any, c1: float, c2: float) -> Tensor:
    """The formula once more, with one two-dimensional window."""
    window = (weights[0][:, None] * weights[1][None, :]).double()[None, None]

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values[:, None], window, padding=pad)

    mu, nu = mean(x), mean(y)
    xx, yy, xy = mean(x * x) - mu * mu, mean(y * y) - nu * nu, mean(x * y) - mu * nu
    found = (2 * mu * nu + c1) * (2 * xy + c2) / ((mu * mu + nu * nu + c1) * (xx + yy + c2))
    return found.flatten(1).mean(1)


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


def weights_of(length: int, options: dict[str, Any]) -> Tensor:
    n = min(options.get("window_size", 11), length if length % 2 else max(length - 1, 1))
    if options.get("window") == "uniform":
        return torch.full((n,), 1 / n, dtype=DOUBLE)
    offset = torch.arange(n, dtype=DOUBLE) - n // 2
    g = torch.exp(-(offset**2) / (2 * options.get("sigma", 1.5) ** 2))
    return g / g.sum()


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


# ---- warped_ssim ----

PAIRS = {
    "maps of a picture": ((7, 7), (7, 7), (32, 40), (24, 30), {}),
    "other sizes": ((5, 9), (3, 4), (28, 25), (33, 17), {"padding": "same"}),
    "one pixel": ((1, 1), (6, 7), (16, 16), (16, 16), {}),
    "small": ((4, 4), (4, 4), (8, 8), (6, 5), {"window": "uniform", "window_size": 3}),
}


def composed(
    maps: Tensor, others: Tensor, boxes: Tensor, flips: Tensor, via: Any, size: Any, options: Any
) -> Tensor:
    u = crops(maps[:, None], boxes, flips, via, size)[:, 0]
    v = F.interpolate(others[:, None], size, mode="bilinear")[:, 0]
    weights = [weights_of(n, options) for n in size]
    pad = tuple(len(w) // 2 for w in weights) if options.get("padding") == "same" else 0
    return plain_ssim(u, v, weights, pad, 1e-4, 9e-4)


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
def test_the_size_of_the_paper(backend: str) -> None:
    if backend == "triton":
        pytest.skip("minutes in the interpreter")
    boxes, flips = views(5, 3, 224, 224)
    maps, others = (torch.rand(3, 7, 7, generator=generator(s)) for s in (1, 2))
    compare(
        both(
            lambda a, b: ck.warped_ssim(a, b, boxes, flips),
            lambda a, b: composed(a, b, boxes, flips, (224, 224), (224, 224), {}),
            [maps, others],
            backend,
        ),
        5e-5,
    )


# ---- further orders, memory, bad values ----

FUNCTIONS: dict[str, Any] = {
    "warp": lambda x, y, b, f: ck.warp(x, b, f, (4, 5), source_size=(9, 8)) * y.mean(),
    "ssim": lambda x, y, b, f: ck.ssim(x, y, window_size=3),
    "warped_ssim": lambda x, y, b, f: ck.warped_ssim(
        x, y, b, f, (6, 5), source_size=(9, 8), window_size=3
    ),
}


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


@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_values_stay_in_their_sample(name: str, bad: float, backend: str) -> None:
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


@every_backend
@pytest.mark.parametrize("name", FUNCTIONS)
def test_empty_batch(name: str, backend: str) -> None:
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


# ---- bad arguments ----

GOOD = (torch.rand(2, 7, 7), torch.tensor([[0, 0, 7, 7]] * 2), torch.tensor([False, True]))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[0, 0, 7, 8], [0, 0, 7, 7]], "leaves a picture of 7 x 7"),
        ([[0, 0, 7, 7], [-1, 0, 7, 7]], "sample 1"),
        ([[0, 0, 0, 7], [0, 0, 7, 7]], "is empty"),
        ([[6, 6, 2, 2], [0, 0, 7, 7]], "leaves"),
        ([[5, 5, 2, -2], [0, 0, 7, 7]], "is empty"),
        ([[1, 1, 2**63 - 1, 2], [0, 0, 7, 7]], "leaves"),  # top + height overflows
        ([[1, 1, 2, 2**63 - 1], [0, 0, 7, 7]], "leaves"),
        ([[2**63 - 1, 0, 1, 1], [0, 0, 7, 7]], "leaves"),
        ([[-(2**63), 0, 7, 7], [0, 0, 7, 7]], "leaves"),
        ([[0, 0, 7, 7]], r"expected \(2, 4\) for this batch"),
    ],
)
def test_boxes_that_are_none(boxes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ck.warp(GOOD[0], torch.tensor(boxes))
    with pytest.raises(ValueError, match=message):
        ck.warped_ssim(GOOD[0], GOOD[0], torch.tensor(boxes), size=(7, 7))


def test_wrong_arguments() -> None:
    maps, boxes, flips = GOOD
    with pytest.raises(TypeError, match="boxes: expected an int64"):
        ck.warp(maps, boxes.float())
    with pytest.raises(TypeError, match="flips: expected a bool"):
        ck.warp(maps, boxes, flips.long())
    with pytest.raises(ValueError, match="flips: expected"):
        ck.warp(maps, boxes, flips[:1])
    with pytest.raises(TypeError, match="images: expected float32"):
        ck.warp(maps.long(), boxes)
    with pytest.raises(ValueError, match="images"):
        ck.warp(maps[0], boxes)
    for size in ((0, 4), (4,), (4.0, 4), 7):
        with pytest.raises(ValueError, match="size: expected two positive integers"):
            ck.warp(maps, boxes, flips, size)  # type: ignore[arg-type]
    for options, name in (
        ({"window_size": 4}, "window_size"),
        ({"window_size": 0}, "window_size"),
        ({"sigma": 0.0}, "sigma"),
        ({"data_range": -1.0}, "data_range"),
        ({"window": "box"}, "window"),
        ({"padding": "reflect"}, "padding"),
        ({"k1": -1.0}, "k1"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            ck.ssim(maps, maps, **options)
    with pytest.raises(ValueError, match="y: expected the shape of x"):
        ck.ssim(maps, maps[:, :3])
    with pytest.raises(TypeError, match="float64 goes with float64"):
        ck.ssim(maps, maps.double())
    with pytest.raises(ValueError, match="others: expected a batch of 2"):
        ck.warped_ssim(maps, maps[:1], boxes)
