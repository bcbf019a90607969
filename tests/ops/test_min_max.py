"""min_max: maps normalised to [0, 1] per sample, with the gradient of the extremes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from ops.base import OpTests, Request, device_of, every_backend
from ops.oracle import Case, rounded
from torch import Tensor

import camkernels as ck
from camkernels.ops.min_max import reference
from camkernels.ops.min_max.op import min_max_fwd


def values_of(request: Request) -> Tensor:
    generator = torch.Generator().manual_seed(request.seed)
    shape = (request.batch, request.height, request.width)
    normal = torch.randn(shape, generator=generator)
    if request.kind == "sparse":  # ties for the minimum
        return normal.relu()
    if request.kind == "smooth":  # no ties
        steps = torch.randperm(shape[1] * shape[2], generator=generator) + 1.0
        return steps.view(1, *shape[1:]).expand(shape) * (torch.arange(shape[0]) + 1)[:, None, None]
    return normal


class TestMinMax(OpTests):
    op = "min_max"
    option = ""
    arguments = 1
    kinds = ("normal", "sparse", "smooth")
    outputs = ("normalized",)

    def run(self, backend: str) -> Callable[..., Sequence[Tensor]]:
        return lambda maps: (min_max_fwd(maps, backend=backend)[0],)

    def formula(self, *tensors: Tensor, **options: Any) -> Sequence[Tensor]:
        return (reference.min_max_fwd(tensors[0])[0],)

    def build(self, request: Request) -> Case:
        power = 10.0 ** (0 if torch.float16 in request.dtypes else request.exponent)
        maps = rounded(values_of(request) * power, request.dtypes[0], request.layouts[0])
        return self.case(maps, request)

    def case(self, maps: Tensor, request: Request | None = None) -> Case:
        request = request or Request()
        cotangents = self.cotangents(request, [tuple(maps.shape)])
        if cotangents[0] is None:
            cotangents = (torch.zeros(maps.shape, dtype=torch.float64),)
        layout = request.cotangent_layout
        return Case((maps,), {}, request.wanted[:1], cotangents, layout, (1.0,))

    def extremes(self, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
        generator = torch.Generator().manual_seed(3)
        m = torch.randn(2, 4, 5, generator=generator).to(dtype)
        ties = m.round()
        pixel = torch.zeros_like(m)
        pixel[:, 2, 3] = 2.0
        one_constant = m.clone()
        one_constant[1] = 0.3
        for name, maps in (
            ("1 x 1", m[:, :1, :1]),
            ("one row", m[:, :1]),
            ("one column", m[:, :, :1]),
            ("constant", torch.full_like(m, 0.3)),
            ("all zero", torch.zeros_like(m)),
            ("one of two constant", one_constant),
            ("ties", ties),
            ("one pixel", pixel),
            ("one dark pixel", -pixel),
            ("huge", m * 1e30),
            ("tiny", m * 1e-30),
            ("empty batch", m[:0]),
            ("many pixels", torch.randn(1, 37, 61, generator=generator).to(dtype)),
        ):
            yield name, self.case(maps)

    def saved_bytes(self, case: Case) -> int:
        maps = case.tensors[0]
        wide = 8 if maps.dtype == torch.float64 else 4
        return maps.untyped_storage().nbytes() + 2 * wide * maps.shape[0]

    def check_wanted(self, case: Case, arguments: tuple[Any, ...], result: Any) -> None:
        assert isinstance(result, Tensor)

    # ---- closed values ----

    def gradient(self, backend: str, maps: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        leaf = maps.to(device_of(backend)).requires_grad_()
        found, _ = min_max_fwd(leaf, backend=backend)
        (grad,) = torch.autograd.grad(found, leaf, cotangent.to(found.device, found.dtype))
        return found.detach().cpu(), grad.cpu()

    @every_backend
    def test_known_values(self, backend: str) -> None:
        maps = torch.tensor([[[-1.0, 0.0, 3.0]], [[2.0, 6.0, 2.0]]])
        found, grad = self.gradient(backend, maps, torch.tensor([[[1.0, 2.0, 4.0]]] * 2))
        assert found.tolist() == [[[0.0, 0.25, 1.0]], [[0.0, 1.0, 0.0]]]
        # The minimum gets (1 + 2 (1/4 - 1) - 1) / 4 and so on; a tie shares.
        expected = torch.tensor([[[-1.5, 2.0, -0.5]], [[-1.5, 0.0, 1.5]]]) / 4
        torch.testing.assert_close(grad, expected)

    @every_backend
    def test_ties_share(self, backend: str) -> None:
        maps = torch.tensor([[[5.0, 1.0, 3.0, 5.0, 1.0, 5.0]]])
        _, grad = self.gradient(backend, maps, torch.tensor([[[0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]]))
        expected = [-1 / 24, -1 / 16, 1 / 4, -1 / 24, -1 / 16, -1 / 24]
        torch.testing.assert_close(grad.flatten(), torch.tensor(expected) * 1.0)

    @every_backend
    def test_a_constant_map_is_zero_without_gradient(self, backend: str) -> None:
        for value in (0.0, 0.3, -7e30, 1e-42):
            maps = torch.full((2, 3, 4), value)
            found, grad = self.gradient(backend, maps, torch.randn(2, 3, 4))
            assert not found.any()
            assert not grad.any()
        small = torch.tensor([[[0.0, 2.0**-126], [2.0**-127, 0.0]]])  # a range that is not seen
        found, grad = self.gradient(backend, small, torch.ones(1, 2, 2))
        assert not found.any()
        assert not grad.any()

    @every_backend
    def test_range_and_invariance(self, backend: str) -> None:
        maps = torch.randn(3, 6, 7)
        found, grad = self.gradient(backend, maps, torch.randn(3, 6, 7))
        torch.testing.assert_close(found.amin((1, 2)), torch.zeros(3))
        torch.testing.assert_close(found.amax((1, 2)), torch.ones(3))
        scaled, _ = self.gradient(backend, maps * 2.0**40, torch.randn(3, 6, 7))
        assert torch.equal(scaled, found)
        # Adding a constant, or scaling, changes nothing: so does the gradient along these.
        torch.testing.assert_close(grad.sum((1, 2)), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close((grad * maps).sum((1, 2)), torch.zeros(3), atol=1e-5, rtol=0)

    @every_backend
    def test_extremes_as_the_reference_says(self, backend: str) -> None:
        maps = torch.randn(5, 3, 4)
        maps[1, 2, 1], maps[2, 0, 0], maps[3, 1, 1] = math.nan, math.inf, -math.inf
        maps[4] = math.inf
        expected, extremes = reference.min_max_fwd(maps)
        found, ours = min_max_fwd(maps.to(device_of(backend)), backend=backend)
        torch.testing.assert_close(ours.cpu(), extremes, equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(found.cpu(), expected, equal_nan=True)
        assert found.cpu().isnan().flatten(1).all(1).tolist() == [False, True, True, True, True]
        _, grad = self.gradient(backend, maps, torch.ones(5, 3, 4))
        assert grad.isnan().flatten(1).all(1).tolist() == [False, True, True, True, True]

    @every_backend
    def test_bad_cotangents_stay_in_their_sample(self, backend: str) -> None:
        for bad in (math.nan, math.inf):
            cotangent = torch.ones(3, 4, 5)
            cotangent[1, 2, 3] = bad
            _, grad = self.gradient(backend, torch.randn(3, 4, 5), cotangent)
            assert grad.isnan().flatten(1).all(1).tolist() == [False, True, False]
            assert grad[[0, 2]].isfinite().all()

    @every_backend
    def test_a_range_beyond_the_dtype_is_seen(self, backend: str) -> None:
        maps = torch.tensor([[[-3e38, 0.0, 3e38]]])
        found, _ = self.gradient(backend, maps, torch.ones(1, 1, 3))
        assert found.isnan().all()


# ---- the public function ----


def test_public_function() -> None:
    maps = torch.randn(3, 4, 5, requires_grad=True)
    with ck.backend("reference"):
        expected = ck.min_max_normalize(maps)
    found = ck.min_max_normalize(maps)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(3, 4, 5)
    one, other = (torch.autograd.grad((f * weight).sum(), maps)[0] for f in (found, expected))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("maps", "raised", "words"),
    [
        (torch.ones(2, 3), ValueError, r"\(B, h, w\)"),
        (torch.ones(2, 0, 3), ValueError, "maps"),
        (torch.ones(2, 3, 3).long(), TypeError, "expected float32"),
        (None, TypeError, "expected a tensor"),
    ],
)
def test_wrong_arguments(maps: Any, raised: Any, words: str) -> None:
    with pytest.raises(raised, match=words):
        ck.min_max_normalize(maps)


def test_under_vmap_and_compile() -> None:
    maps = torch.randn(4, 2, 3, 5)
    expected = ck.min_max_normalize(maps.flatten(0, 1)).view(4, 2, 3, 5)
    torch.testing.assert_close(torch.vmap(ck.min_max_normalize)(maps), expected)
    leaf, weight = maps[0].clone().requires_grad_(), torch.randn(2, 3, 5)
    compiled = torch.compile(ck.min_max_normalize, backend="aot_eager", fullgraph=True)
    (found,) = torch.autograd.grad((compiled(leaf) * weight).sum(), leaf)
    (plain,) = torch.autograd.grad((ck.min_max_normalize(leaf) * weight).sum(), leaf)
    torch.testing.assert_close(found, plain)
