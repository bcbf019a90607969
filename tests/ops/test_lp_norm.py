"""lp_norm: p-norms per sample, also of maps that are enlarged first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops.base import OpTests, Request, device_of, every_backend, has_double
from ops.oracle import Case, rounded
from torch import Tensor

import camkernels as ck
from camkernels import backends
from camkernels.ops.lp_norm import reference
from camkernels.ops.lp_norm.op import lp_norm_fwd

ORDERS = (0.0, 1.0, 1.5, 2.0, 3.0, math.inf)
# The interpreter takes a second per call.
TESTED = (0.0, 3.0, math.inf) if backends.triton_interpreted() else ORDERS
ATTEMPTS = 40
# Of the maps that the tests build: smaller than most, larger than all; the last takes two tiles of
# the Triton kernels, or four.
LARGER = [7, 18] if backends.triton_interpreted() else [19, 18]
SIZES: dict[str, list[int]] = {"plain": [], "smaller": [3, 4], "larger": LARGER}
NAMES = {f"{p} {name}": (p, size) for p in ORDERS for name, size in SIZES.items()}


def values_of(request: Request, seed: int) -> Tensor:
    plain = NAMES[request.variant][1] == []
    shape = (request.batch, request.height, request.width)
    if plain and request.height % 2 == 0:  # every rank from 2 on is taken
        shape = (request.batch, request.channels, request.height, request.width)  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if request.kind == "sparse":
        return normal.relu() if plain else normal
    if request.kind == "smooth":  # away from 0; one sign where maps are enlarged
        away = torch.rand(shape, generator=generator) + 0.5
        return away * normal.sign() if plain else away
    return normal


def near_a_kink(values: Tensor, p: float, size: list[int]) -> bool:
    """Whether rounding decides which values are the largest, or the sign of one."""
    if not values.numel() or p in (1.5, 2.0, 3.0):
        return False
    rows = reference._rows(values.double(), size)
    if p != math.inf:
        return bool(size) and bool((rows.abs() < 1e-5 * values.abs().max()).any())
    largest = rows.abs().amax(1, keepdim=True)
    return bool((((rows.abs() - largest).abs() < 1e-5 * largest) & (rows.abs() != largest)).any())


class TestLpNorm(OpTests):
    op = "lp_norm"
    option = ""
    arguments = 1
    variants = (
        ("1.0 plain", "2.0 larger", "3.0 smaller")
        if backends.triton_interpreted()
        else tuple(NAMES)
    )
    kinds = ("normal", "sparse", "smooth")
    outputs = ("norms",)

    def run(self, backend: str) -> Callable[..., Sequence[Tensor]]:
        return lambda values, p, size: (lp_norm_fwd(values, p, size, backend=backend),)

    def formula(self, *tensors: Tensor, **options: Any) -> Sequence[Tensor]:
        return (reference.lp_norm_fwd(tensors[0], options["p"], options["size"]),)

    def build(self, request: Request) -> Case:
        power = 10.0 ** (0 if torch.float16 in request.dtypes else request.exponent)
        p, size = NAMES[request.variant]
        for attempt in range(ATTEMPTS):
            found = values_of(request, request.seed + 7919 * attempt) * power
            values = rounded(found, request.dtypes[0], request.layouts[0])
            if not near_a_kink(values, p, size):
                break
        return self.case(values, p, size, request)

    def case(
        self, values: Tensor, p: float, size: list[int], request: Request | None = None
    ) -> Case:
        request = dataclasses.replace(request or Request(), used=None)
        cotangents = self.cotangents(request, [(values.shape[0],)])
        return Case(
            (values,),
            {"p": p, "size": size},  # type: ignore[dict-item]
            request.wanted[:1],
            cotangents,
            request.cotangent_layout,
        )

    def extremes(self, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
        generator = torch.Generator().manual_seed(3)
        v = torch.randn(2, 4, 5, generator=generator).to(dtype)
        ties = v.sign() * torch.tensor([1.0, 2.0, 3.0, 3.0, 0.0]).to(dtype)
        pixel = torch.zeros_like(v)
        pixel[:, 2, 3] = -2.0
        one_zero = v.clone()
        one_zero[1] = 0
        for p in TESTED:
            for name, values in (
                ("1 x 1", v[:, :1, :1]),
                ("one row", v[:, :1]),
                ("one column", v[:, :, :1]),
                ("constant", torch.full_like(v, 0.5)),
                ("all zero", torch.zeros_like(v)),
                ("one of two zero", one_zero),
                ("one pixel", pixel),
                ("huge", v * 1e30),
                ("tiny", v * 1e-30),
                ("empty batch", v[:0]),
            ):
                for place, size in (("", []), (", smaller", [2, 3]), (", larger", [9, 7])):
                    yield f"{name}{place}, p = {p}", self.case(values, p, size)
            yield f"ties, p = {p}", self.case(ties, p, [])
            yield f"of rank 2, p = {p}", self.case(v.flatten(1), p, [])
            yield f"of rank 4, empty batch, p = {p}", self.case(v[:0, None], p, [])

    def saved_bytes(self, case: Case) -> int:
        values = case.tensors[0]
        wide = 8 if values.dtype == torch.float64 else 4
        return values.untyped_storage().nbytes() + wide * values.shape[0]

    def check_wanted(self, case: Case, arguments: tuple[Any, ...], result: Any) -> None:
        assert isinstance(result, Tensor)

    @every_backend
    def test_third_order(self, backend: str) -> None:
        """Of the norms that have one; p = 0, 1 and inf are linear between their kinks."""
        dtype = torch.float64 if has_double(backend) else torch.float32
        for variant, (p, _) in NAMES.items():
            order = 3 if p in (1.5, 2.0, 3.0) else 2
            case = self.example(dtypes=(dtype,) * 2, variant=variant, kind="smooth")
            self.check(backend, case, order)

    # ---- closed values ----

    def gradient(
        self, backend: str, values: Tensor, p: float, size: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        leaf = values.to(device_of(backend)).requires_grad_()
        norms = lp_norm_fwd(leaf, p, size or [], backend=backend)
        (found,) = torch.autograd.grad(norms.sum(), leaf)
        return norms.detach().cpu(), found.cpu()

    @every_backend
    def test_known_values(self, backend: str) -> None:
        values = torch.tensor([[3.0, 0.0, -4.0], [0.0, 0.0, 0.0]])
        third = (27 + 64) ** (1 / 3)
        expected = {
            0.0: (2.0, [0.0, 0.0, 0.0]),
            1.0: (7.0, [1.0, 0.0, -1.0]),
            2.0: (5.0, [0.6, 0.0, -0.8]),
            3.0: (third, [9 / third**2, 0.0, -16 / third**2]),
            math.inf: (4.0, [0.0, 0.0, -1.0]),
        }
        for p, (norm, gradient) in expected.items():
            norms, found = self.gradient(backend, values, p)
            torch.testing.assert_close(norms, torch.tensor([norm, 0.0]))
            torch.testing.assert_close(found, torch.tensor([gradient, [0.0] * 3]))

    @every_backend
    @pytest.mark.parametrize("p", ORDERS)
    def test_as_pytorch_computes_it(self, backend: str, p: float) -> None:
        generator = torch.Generator().manual_seed(5)
        values = torch.rand(2, 6, 7, generator=generator) + 0.1
        for size in ([], [3, 5], [17, 40]):
            leaf = values.double().requires_grad_()
            rows = leaf
            if size:
                rows = F.interpolate(leaf[:, None], size, mode="bilinear")[:, 0]
            expected = torch.linalg.vector_norm(rows.flatten(1), p, dim=1)
            norms, found = self.gradient(backend, values, p, size)
            torch.testing.assert_close(norms.double(), expected.detach(), rtol=2e-6, atol=0)
            if p == 0:
                assert not found.any()
                continue
            (gradient,) = torch.autograd.grad(expected.sum(), leaf)
            torch.testing.assert_close(found.double(), gradient, rtol=1e-5, atol=1e-6)

    @every_backend
    def test_ties_for_the_largest_share(self, backend: str) -> None:
        values = torch.tensor([[[2.0, -2.0, 1.0, 2.0, -0.5]]])
        _, found = self.gradient(backend, values, math.inf)
        torch.testing.assert_close(found, torch.tensor([[[1.0, -1.0, 0.0, 1.0, 0.0]]]) / 3)
        corner = torch.zeros(1, 3, 3)
        corner[0, 0, 0] = -4.0  # enlarged to 4 pixels that tie
        norms, found = self.gradient(backend, corner, math.inf, [12, 12])
        assert norms.item() == 4.0
        torch.testing.assert_close(found, -(corner != 0).float())

    @every_backend
    def test_scaling_is_exact(self, backend: str) -> None:
        """No power of a value leaves the range of the type, whatever p."""
        values = torch.rand(2, 5, 6) + 0.5
        for p in (1.5, 2.0, 3.0, 40.0):
            for size in ([], [9, 8]):
                one, slope = self.gradient(backend, values, p, size)
                for scale in (2.0**-100, 2.0**100):
                    norms, found = self.gradient(backend, values * scale, p, size)
                    torch.testing.assert_close(norms / scale, one)
                    torch.testing.assert_close(found, slope)

    @every_backend
    def test_bad_values_as_the_reference_says(self, backend: str) -> None:
        values = torch.rand(4, 5, 6) + 0.5
        values[1, 2, 3], values[2, 0, 0], values[3, 4, 5] = math.nan, math.inf, -math.inf
        for p in TESTED:
            expected = reference.lp_norm_fwd(values, p, [])
            norms, _ = self.gradient(backend, values, p)
            torch.testing.assert_close(norms, expected, equal_nan=True)
            for size in ([4, 3], [20, 21]):
                norms, _ = self.gradient(backend, values, p, size)
                assert norms.isfinite().tolist() == [True, False, False, False], (p, size)

    @every_backend
    @pytest.mark.parametrize("p", ORDERS)
    def test_long_samples_over_several_blocks(self, backend: str, p: float) -> None:
        entries = 5000 if backend == "triton" else 50001
        generator = torch.Generator().manual_seed(2)
        values = torch.randn(2, entries, generator=generator)
        values[:, 4000] = 9.0
        values[1] *= 1e-20
        self.check(backend, self.case(values, p, []), 2)

    @every_backend
    @pytest.mark.parametrize("p", [1.0, 1.5, 2.0, math.inf])
    def test_maps_of_several_chunks(self, backend: str, p: float) -> None:
        """Wider than a tile of the kernels, transposed, to sizes with ragged tiles."""
        generator = torch.Generator().manual_seed(4)
        values = (torch.rand(2, 18, 35, generator=generator) + 0.5).mT
        for size in ([33, 20], [41, 50]):
            self.check(backend, self.case(values, p, size))


# ---- what the Triton kernels do not take ----


def test_larger_maps_raise() -> None:
    triton = pytest.importorskip("camkernels.ops.lp_norm.triton")
    values, norms = torch.ones(1, 65, 3), torch.ones(1)
    with pytest.raises(ValueError, match="enlarge maps up to 64 x 64, got 65 x 3"):
        triton.lp_norm_fwd(values, 2.0, [70, 70])
    with pytest.raises(ValueError, match="enlarge maps up to 64 x 64, got 65 x 3"):
        triton.lp_norm_bwd(norms, values, norms, 2.0, [70, 70])


# ---- the public function ----


@pytest.mark.parametrize("p", ORDERS)
def test_public_function(p: float) -> None:
    values = torch.rand(3, 4, 5, requires_grad=True)
    for size in (None, (6, 9)):
        with ck.backend("reference"):
            expected = ck.lp_norm(values, p, size=size)
        found = ck.lp_norm(values, p, size=size)
        torch.testing.assert_close(found, expected)
        one, other = (torch.autograd.grad(f.sum(), values)[0] for f in (found, expected))
        torch.testing.assert_close(one, other)
    assert ck.lp_norm(values, 2).dtype == torch.float32
    torch.testing.assert_close(ck.lp_norm(values), values.abs().sum((1, 2)))


@pytest.mark.parametrize(
    ("values", "options", "raised", "words"),
    [
        (torch.ones(2, 3), {"p": 0.5}, ValueError, "0, a number from 1 on, or inf"),
        (torch.ones(2, 3), {"p": -1.0}, ValueError, "0, a number from 1 on, or inf"),
        (torch.ones(2, 3), {"p": math.nan}, ValueError, "0, a number from 1 on, or inf"),
        (torch.ones(2, 3), {"p": True}, ValueError, "0, a number from 1 on, or inf"),
        (torch.ones(2), {}, ValueError, r"\(B, ...\)"),
        (torch.ones(2, 0), {}, ValueError, "only the batch"),
        (torch.ones(2, 3), {"size": (4, 4)}, ValueError, r"\(B, h, w\), as size is given"),
        (torch.ones(2, 3, 3), {"size": (4, 0)}, ValueError, "two positive integers"),
        (torch.ones(2, 3).long(), {}, TypeError, "expected float32"),
        (None, {}, TypeError, "expected a tensor"),
    ],
)
def test_wrong_arguments(values: Any, options: Any, raised: Any, words: str) -> None:
    with pytest.raises(raised, match=words):
        ck.lp_norm(values, **options)


@pytest.mark.parametrize("size", [None, (7, 9)])
def test_under_vmap_and_compile(size: Any) -> None:
    values = torch.randn(4, 2, 3, 5)
    expected = ck.lp_norm(values.flatten(0, 1), 3, size=size).view(4, 2)
    mapped = torch.vmap(lambda v: ck.lp_norm(v, 3, size=size))(values)
    torch.testing.assert_close(mapped, expected)
    leaf = values[0].clone().requires_grad_()
    compiled = torch.compile(ck.lp_norm, backend="aot_eager", fullgraph=True)
    (found,) = torch.autograd.grad(compiled(leaf, 3, size=size).sum(), leaf)
    (plain,) = torch.autograd.grad(ck.lp_norm(leaf, 3, size=size).sum(), leaf)
    torch.testing.assert_close(found, plain)
