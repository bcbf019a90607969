"""max_pool: the positions are those of PyTorch, gather and scatter are each other's transpose."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from ops.base import device_of, every_backend, has_double
from torch import Tensor

from camkernels import backends
from camkernels.ops._chain import implementation
from camkernels.ops.max_pool import meta
from camkernels.ops.max_pool.reference import Window, is_channels_last

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
SMALL = backends.triton_interpreted()
STEM = Window((3, 3), (2, 2), (1, 1), (1, 1))
# Of the largest sum: float32 sums are rounded once (and in the interpreter bfloat16 is truncated).
TOLERANCE = {
    torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(2)


@dataclasses.dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    window: Window
    dtype: torch.dtype
    layout: torch.memory_format
    kind: str  # normal, ties, nan, lowest, mixed
    seed: int


def values(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(case.seed)
    x = torch.randn(case.shape, generator=generator)
    if case.kind == "ties":
        x = x.round()  # zeros of both signs among them
    elif case.kind == "lowest":
        x = torch.full(case.shape, -math.inf)
    elif case.kind != "normal":
        chance = torch.rand(case.shape, generator=generator)
        x = x.masked_fill(chance < 0.2, math.nan)
        if case.kind == "mixed":
            x = x.masked_fill(chance > 0.4, -math.inf).masked_fill(chance > 0.95, math.inf)
    return x.to(case.dtype).contiguous(memory_format=case.layout)


def gradients(case: Case, like: Tensor) -> Tensor:
    """Signed, exact in every dtype."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    grad = torch.randint(-8, 9, like.shape, generator=generator) / 4
    return grad.to(like.dtype).contiguous(memory_format=case.layout)


@st.composite
def windows(draw: Any) -> Window:
    largest = 4 if SMALL else 7
    pairs = [st.tuples(*(st.integers(1, n) for _ in range(2))) for n in (largest, 4, 2)]
    kernel, stride, dilation = (draw(pair) for pair in pairs)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    return Window(kernel, stride, padding, dilation, draw(st.booleans()))


@st.composite
def cases(draw: Any) -> Case:
    window = draw(windows())
    # One dimension sometimes longer than two vectors of the widest instruction set, so that edges,
    # whole vectors and what is left of them meet in one row.
    lengths = [st.integers(1, 12), st.integers(1, 12 if SMALL else 90)]
    channels = st.one_of(st.integers(1, 5), st.integers(1, 5 if SMALL else 70))
    height, width = (draw(length) for length in lengths)
    try:
        window.output_size(height, width)
    except ValueError:  # too small for this window
        spans = [(k - 1) * d + 1 for k, d in zip(window.kernel, window.dilation, strict=True)]
        height, width = max(height, spans[0]), max(width, spans[1])
    shape = (draw(st.integers(0, 2)), draw(channels), height, width)
    kinds = st.sampled_from(("normal", "ties", "nan", "lowest", "mixed"))
    return Case(
        shape, window, torch.float32, draw(st.sampled_from(LAYOUTS)), draw(kinds),
        draw(st.integers(0, 1000)),
    )  # fmt: skip


def positions_of(index: Tensor, width: int, window: Window) -> Tensor:
    """PyTorch's indices into planes as positions in windows, each by counting."""
    tops = torch.arange(index.shape[2]) * window.stride[0] - window.padding[0]
    lefts = torch.arange(index.shape[3]) * window.stride[1] - window.padding[1]
    down = index.div(width, rounding_mode="floor") - tops[:, None]
    right = index % width - lefts
    assert bool((down % window.dilation[0] == 0).all())
    assert bool((right % window.dilation[1] == 0).all())
    return down // window.dilation[0] * window.kernel[1] + right // window.dilation[1]


def equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def kernels(backend: str) -> tuple[Callable[..., Any], ...]:
    names = ("max_pool_fwd", "max_pool_gather", "max_pool_scatter")
    return tuple(implementation("max_pool", name, backend) for name in names)


def lies_as(tensor: Tensor, layout: torch.memory_format) -> bool:
    return tensor.is_contiguous(memory_format=layout)


def check(backend: str, case: Case) -> None:
    """All three kernels against PyTorch."""
    forward, gather, scatter = kernels(backend)
    device, window, size = device_of(backend), case.window, case.shape[2:]
    x = values(case)
    y, index = aten.max_pool2d_with_indices(x, *window.arguments)
    grad = gradients(case, y)
    again = gradients(case, x)
    on = [t.to(device) for t in (x, grad, again)]
    before = [t.clone() for t in on]

    found, positions = forward(on[0], window)
    equal(found, y)
    assert positions.dtype == torch.uint8
    equal(positions.long(), positions_of(index, size[1], window))
    equal(gather(on[0], positions, window), y)
    moved = again.flatten(2).gather(2, index.flatten(2)).view(y.shape)
    equal(gather(on[2], positions, window), moved)

    scattered = scatter(on[1], positions, window, size)
    expected = aten.max_pool2d_with_indices_backward(
        grad.double(), x.double(), *window.arguments, index
    )
    assert scattered.dtype == case.dtype
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        scattered.cpu().double(), expected, rtol=0, atol=TOLERANCE[case.dtype] * scale
    )
    assert lies_as(found, case.layout)
    assert lies_as(positions, case.layout)
    if y.shape[2:] != (1, 1):  # planes of one pixel are of either layout
        assert lies_as(scattered, case.layout)
    for tensor, untouched in zip(on, before, strict=True):
        equal(tensor, untouched.cpu())


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    return DTYPES if has_double(backend) else DTYPES[:3]


@every_backend
@pytest.mark.usefixtures("poisoned_allocations")
@hypothesis.given(case=cases())
def test_all_equals_pytorch(backend: str, case: Case) -> None:
    for dtype in dtypes_of(backend):
        check(backend, dataclasses.replace(case, dtype=dtype))


NAMED = {
    "stem": ((2, 3, 20, 21), STEM),
    "wide rows": ((1, 2, 5, 300), STEM),
    "many channels": ((2, 70, 4, 5), STEM),
    "halves": ((2, 3, 8, 70), Window((2, 2), (2, 2), (0, 0), (1, 1))),
    "stride 1": ((1, 2, 9, 40), Window((3, 3), (1, 1), (1, 1), (1, 1))),
    "stride 3": ((1, 2, 9, 70), Window((3, 2), (2, 3), (1, 1), (1, 1))),
    "gaps": ((2, 3, 11, 12), Window((2, 1), (4, 3), (1, 0), (1, 1))),
    "ceil": ((2, 2, 8, 9), Window((3, 3), (2, 2), (0, 0), (1, 1), True)),
    "dilated": ((1, 2, 9, 44), Window((3, 3), (2, 2), (1, 1), (2, 3))),
    "one pixel": ((3, 5, 1, 1), Window((3, 3), (2, 2), (1, 1), (1, 1))),
    "to one pixel": ((2, 20, 3, 4), Window((3, 4), (1, 1), (0, 0), (1, 1))),
    "256 taps": ((1, 2, 9, 10), Window((16, 16), (1, 1), (8, 8), (1, 1))),
    "no batch": ((0, 3, 6, 7), STEM),
}


@every_backend
@every_layout
@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("name", NAMED)
def test_named_cases(backend: str, layout: torch.memory_format, name: str) -> None:
    shape, window = NAMED[name]
    brief = SMALL and name != "stem"
    for dtype in (torch.float32,) if brief else dtypes_of(backend):
        for kind in ("mixed",) if brief else ("ties", "mixed"):
            check(backend, Case(shape, window, dtype, layout, kind, 3))


@every_backend
@every_layout
def test_scatter_is_the_transpose_of_gather(backend: str, layout: torch.memory_format) -> None:
    forward, gather, scatter = kernels(backend)
    for dtype in (torch.float64, torch.float32) if has_double(backend) else (torch.float32,):
        for name, (shape, window) in NAMED.items():
            if SMALL and name == "256 taps":
                continue
            x = values(Case(shape, window, dtype, layout, "normal", 0)).to(device_of(backend))
            y, positions = forward(x, window)
            g = torch.randn(y.shape, dtype=dtype).to(x.device)
            one = scatter(g, positions, window, shape[2:]).double() * x.double()
            other = g.double() * gather(x, positions, window).double()
            tolerance = 1e-13 if dtype == torch.float64 else 1e-5
            torch.testing.assert_close(
                one.sum(), other.sum(), rtol=0, atol=tolerance * (1 + float(other.abs().sum()))
            )


@every_backend
def test_sums_of_16_bit_types_round_once(backend: str) -> None:
    """25 windows share a maximum, and each alone vanishes beside the first ones in 16 bits."""
    _, _, scatter = kernels(backend)
    window = Window((5, 5), (1, 1), (2, 2), (1, 1))
    rows, columns = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    near = ((rows - 4).abs() <= 2) & ((columns - 4).abs() <= 2)
    code = (4 - rows + 2) * 5 + 4 - columns + 2
    positions = torch.where(near, code, 12).to(torch.uint8).expand(1, 20, 9, 9)
    for layout in LAYOUTS:
        for dtype, step in ((torch.bfloat16, 2.0**-9), (torch.float16, 2.0**-12)):
            g = torch.where(near, step, 0.0).to(dtype).expand(1, 20, 9, 9).clone()
            g[:, :, 2, 2] = 1.0
            lay = [
                t.contiguous(memory_format=layout).to(device_of(backend)) for t in (g, positions)
            ]
            found = scatter(*lay, window, (9, 9)).cpu()
            expected = torch.tensor(1 + 24 * step, dtype=torch.float64).to(dtype)
            assert bool((found[:, :, 4, 4] - expected).abs().max() <= 4 * step)
            assert bool((found[:, :, 4, 4] > 1 + 20 * step).all())


@every_backend
def test_what_lies_otherwise_is_copied(backend: str) -> None:
    forward, gather, scatter = kernels(backend)
    case = Case((2, 6, 9, 11), STEM, torch.float32, torch.contiguous_format, "normal", 0)
    x = values(case).to(device_of(backend))
    y, positions = forward(x, STEM)
    g = gradients(case, y.cpu()).to(x.device)
    to_x = scatter(g, positions, STEM, (9, 11))
    last = torch.channels_last
    others = [
        x.contiguous(memory_format=last),
        x.repeat_interleave(2, 3)[..., ::2],
        torch._neg_view(-x),
    ]
    for other in others:
        equal(forward(other, STEM)[0], y.cpu())
        equal(gather(other, positions, STEM), y.cpu())
    for other in (g.contiguous(memory_format=last), g[:, :, :1].expand_as(g), torch._neg_view(-g)):
        equal(
            scatter(other, positions, STEM, (9, 11)),
            scatter(other.clone().contiguous(), positions, STEM, (9, 11)).cpu(),
        )
    lying = positions.contiguous(memory_format=last)
    equal(scatter(g, lying, STEM, (9, 11)), to_x.cpu())
    assert lies_as(scatter(g, lying, STEM, (9, 11)), last)


@pytest.mark.skipif(SMALL, reason="of the C++ kernels")
@every_layout
@pytest.mark.parametrize("dtype", DTYPES)
def test_thread_counts_give_equal_bits(layout: torch.memory_format, dtype: torch.dtype) -> None:
    forward, gather, scatter = kernels("cpu")
    case = Case((3, 7, 41, 47), STEM, dtype, layout, "normal", 0)
    x, results = values(case), []
    assert x.numel() > 1 << 15, "one thread would do it all"
    g = torch.randn(aten.max_pool2d_with_indices(x, *STEM.arguments)[0].shape).to(dtype)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y, positions = forward(x, STEM)
        results.append(
            (y, positions, gather(x, positions, STEM), scatter(g, positions, STEM, (41, 47)))
        )
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert torch.equal(one, other)


@every_backend
@every_layout
def test_shapes_are_those_predicted(backend: str, layout: torch.memory_format) -> None:
    forward, gather, scatter = kernels(backend)
    for name in ("stem", "ceil", "to one pixel", "no batch"):
        shape, window = NAMED[name]
        x = values(Case(shape, window, torch.float32, layout, "normal", 0)).to(device_of(backend))
        y, positions = forward(x, window)
        found = (y, positions, gather(x, positions, window),
                 scatter(y, positions, window, shape[2:]))  # fmt: skip
        blank, blank_positions = meta.max_pool_fwd(x.to("meta"), window)
        predicted = (
            blank, blank_positions, meta.max_pool_gather(x.to("meta"), blank_positions, window),
            meta.max_pool_scatter(blank, blank_positions, window, shape[2:]),
        )  # fmt: skip
        for one, other in zip(found, predicted, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            if y.shape[2:] != (1, 1):
                assert is_channels_last(one) == is_channels_last(other)


@hypothesis.given(windows(), st.integers(1, 40), st.integers(1, 40))
def test_output_sizes_are_those_of_pytorch(window: Window, height: int, width: int) -> None:
    x = torch.empty(1, 1, height, width, device="meta")
    try:
        size = window.output_size(height, width)
    except ValueError as error:
        if "no window" in str(error):
            with pytest.raises(RuntimeError, match="too small"):
                torch.max_pool2d(x, *window.arguments)  # type: ignore[arg-type]
        return
    assert tuple(torch.max_pool2d(x, *window.arguments).shape[2:]) == size  # type: ignore[arg-type]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"kernel: .* at most 256 .* got \(16, 17\)"):
        Window((16, 17), (1, 1), (0, 0), (1, 1))
    with pytest.raises(ValueError, match=r"padding: .* at most half .* got \(1, 2\)"):
        Window((3, 3), (1, 1), (1, 2), (1, 1))
    with pytest.raises(ValueError, match=r"stride: expected at least 1, got \(0, 1\)"):
        Window((3, 3), (0, 1), (1, 1), (1, 1))
    with pytest.raises(ValueError, match="no window"):
        Window((3, 3), (1, 1), (0, 0), (1, 1)).output_size(2, 5)
    with pytest.raises(ValueError, match="covers none"):  # PyTorch's index is outside the plane
        Window((2, 2), (1, 1), (1, 1), (2, 2)).output_size(1, 5)


@every_backend
def test_positions_of_other_windows_raise(backend: str) -> None:
    forward, gather, scatter = kernels(backend)
    x = torch.randn(1, 2, 8, 8).to(device_of(backend))
    _, positions = forward(x, STEM)
    with pytest.raises(ValueError, match=r"positions: expected uint8 \(1, 2, 5, 4\) for 9 x 8"):
        scatter(x[:, :, :4, :4], positions, STEM, (9, 8))
    with pytest.raises(ValueError, match="positions: expected uint8"):
        gather(x, positions.long(), STEM)
    with pytest.raises(ValueError, match="positions: expected uint8"):
        gather(x[:, :1], positions, STEM)
    with pytest.raises(ValueError, match="grad: expected the shape of the positions"):
        scatter(x[:, :, :2, :2], positions, STEM, (8, 8))
