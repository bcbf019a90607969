"""map_statistics: entropy, area, dispersion, mean, variance, centroid, covariance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis
import pytest
import torch
from ops.base import OpTests, Request, device_of, every_backend, has_double
from ops.inputs import extreme_maps, maps_of, near_degenerate
from ops.oracle import Case, derivatives
from ops.test_cam import BIG, needs_cpu
from torch import Tensor

from camkernels.ops.map_statistics import reference
from camkernels.ops.map_statistics.op import map_statistics_fwd
from camkernels.ops.map_statistics.reference import Statistics

AREA = Statistics._fields.index("area")
UNITS = (1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0)  # oracle.Case.units: mean and variance have a scale


def shapes_of(batch: int) -> list[tuple[int, ...]]:
    return [(batch,)] * 5 + [(batch, 2), (batch, 2, 2)]


class TestMapStatistics(OpTests):
    op = "map_statistics"
    option = "clamp"
    arguments = 1
    variants = ("maps",)
    kinds = ("normal", "sparse", "integers", "constant", "smooth")
    outputs = Statistics._fields

    def run(self, backend: str) -> Callable[..., Sequence[Tensor]]:
        return lambda maps, clamp: map_statistics_fwd(maps, clamp, backend=backend)

    def formula(self, *tensors: Tensor, **options: bool) -> Sequence[Tensor]:
        return reference.map_statistics(*tensors, options["clamp"])

    def build(self, request: Request) -> Case:
        maps = maps_of(request)
        cotangents = list(self.cotangents(request, shapes_of(request.batch)))
        left_out: frozenset[int] = frozenset()
        if near_degenerate(maps.relu()):
            hypothesis.currently_in_test_context() and hypothesis.event(
                "area not compared: an ellipse so thin that float32 cancels its determinant"
            )
            cotangents[AREA], left_out = None, frozenset({AREA})
        return Case(
            (maps,),
            {"clamp": request.option},
            request.wanted[:1],
            tuple(cotangents),
            request.cotangent_layout,
            UNITS,
            left_out,
        )

    def extremes(self, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
        for name, maps in extreme_maps(dtype):
            cotangents = self.cotangents(Request(), shapes_of(maps.shape[0]))
            for clamp in (True, False):
                case = Case((maps.to(dtype),), {"clamp": clamp}, (True,), cotangents, units=UNITS)
                yield f"{name}, clamp={clamp}", case

    @every_backend
    def test_extremes_of_each_statistic_alone(self, backend: str) -> None:
        for name, case in self.extremes(torch.float32):
            if case.options["clamp"]:
                continue
            for i, cotangent in enumerate(case.cotangents):
                alone = tuple(cotangent if i == j else None for j in range(len(case.cotangents)))
                one = dataclasses.replace(case, cotangents=alone)
                try:
                    self.check(backend, one, 1 if "tiny" in name else 2)
                except AssertionError as error:
                    raise AssertionError(f"{name}, {self.outputs[i]}: {error}") from error

    def saved_bytes(self, case: Case) -> int:
        (maps,) = case.tensors
        return maps.untyped_storage().nbytes() + 4 * maps.shape[0] * (5 + 2 + 4)

    def check_wanted(self, case: Case, arguments: tuple[Any, ...], result: Any) -> None:
        count = len(self.outputs)
        cotangents = arguments[1 + count : 1 + 2 * count]
        assert [c is not None for c in cotangents] == [c is not None for c in case.cotangents]

    def statistics(self, backend: str, maps: Tensor, clamp: bool = False) -> Statistics:
        outputs = map_statistics_fwd(maps.to(device_of(backend)), clamp, backend=backend)
        return Statistics(*(o.cpu() for o in outputs))

    # ---- one cotangent at a time ----

    @every_backend
    @pytest.mark.parametrize("name", Statistics._fields)
    def test_each_statistic_alone(self, backend: str, name: str) -> None:
        used = tuple(field == name for field in self.outputs)
        for clamp in (True, False):
            case = self.example(batch=3, height=5, width=6, used=used, option=clamp, seed=4)
            self.check(backend, case, order=2)

    # ---- closed formulas ----

    @every_backend
    @pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (6, 6), (5, 8)])
    def test_uniform_map(self, backend: str, height: int, width: int) -> None:
        """ce = ln Z, cd = 0, centroid in the middle, C = diag((h^2 - 1)/12, (w^2 - 1)/12)."""
        found = self.statistics(backend, torch.full((1, height, width), 0.7))
        yy, xx = (height**2 - 1) / 12, (width**2 - 1) / 12
        expected = {
            "entropy": [math.log(height * width)],
            "area": [math.sqrt(yy * xx)],
            "dispersion": [0.0],
            "mean": [0.7],
            "variance": [0.0],
            "centroid": [[(height - 1) / 2, (width - 1) / 2]],
            "covariance": [[[yy, 0.0], [0.0, xx]]],
        }
        for name, values in expected.items():
            torch.testing.assert_close(
                getattr(found, name), torch.tensor(values), rtol=1e-5, atol=2e-6, msg=name
            )

    @every_backend
    def test_two_pixels(self, backend: str) -> None:
        """p = 3/4 at (0, 1), 1/4 at (2, 1): entropy of a coin, a line, so no area."""
        maps = torch.zeros(1, 3, 4)
        maps[0, 0, 1], maps[0, 2, 1] = 3.0, 1.0
        found = self.statistics(backend, maps)
        coin = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
        assert found.entropy.item() == pytest.approx(coin, rel=1e-6)
        assert found.area.item() == 0
        assert found.centroid.tolist() == [[0.5, 1.0]]
        assert found.covariance.tolist() == [[[0.75, 0.0], [0.0, 0.0]]]
        mean = 4 / 12
        variance = 10 / 12 - mean**2
        assert found.mean.item() == pytest.approx(mean)
        assert found.variance.item() == pytest.approx(variance)
        assert found.dispersion.item() == pytest.approx(variance / mean**2)

    @every_backend
    def test_gradient_of_two_pixels(self, backend: str) -> None:
        """d ce / d M = -(ln p + ce) / S where M > 0, nothing where M = 0."""
        maps = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]], device=device_of(backend))
        maps.requires_grad_()
        entropy = map_statistics_fwd(maps, False, backend=backend)[0]
        (found,) = torch.autograd.grad(entropy.sum(), maps)
        ce = entropy.item()
        live = [-(math.log(0.75) + ce) / 4, -(math.log(0.25) + ce) / 4]
        expected = torch.tensor([[[live[0], 0.0], [0.0, live[1]]]])
        torch.testing.assert_close(found.cpu(), expected)
        assert found[0, 0, 1] == found[0, 1, 0] == 0

    @every_backend
    def test_shifting_a_blob_shifts_the_centroid_alone(self, backend: str) -> None:
        blob = torch.rand(4, 3, generator=torch.Generator().manual_seed(5)) + 0.1
        maps = torch.zeros(2, 9, 11)
        maps[0, :4, :3], maps[1, 5:, 6:9] = blob, blob
        found = self.statistics(backend, maps)
        torch.testing.assert_close(found.centroid[1] - found.centroid[0], torch.tensor([5.0, 6.0]))
        for name in ("entropy", "area", "dispersion", "mean", "variance", "covariance"):
            one, other = getattr(found, name)
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)

    @every_backend
    @pytest.mark.parametrize("scale", [2.0**-90, 2.0**-20, 4.0, 2.0**40])
    def test_scale_invariance(self, backend: str, scale: float) -> None:
        """Powers of two, so that nothing but the scale changes."""
        maps = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(6))
        one, other = self.statistics(backend, maps), self.statistics(backend, maps * scale)
        for name in ("entropy", "area", "dispersion", "centroid", "covariance"):
            torch.testing.assert_close(
                getattr(other, name), getattr(one, name), rtol=1e-5, atol=1e-6, msg=name
            )
        torch.testing.assert_close(other.mean, one.mean * scale, rtol=1e-6, atol=0)

    @every_backend
    def test_area_is_the_root_of_the_product_of_eigenvalues(self, backend: str) -> None:
        found = self.statistics(backend, torch.rand(6, 7, 9))
        eigenvalues = torch.linalg.eigvalsh(found.covariance.double())
        torch.testing.assert_close(
            found.area.double(), eigenvalues.prod(1).sqrt(), rtol=1e-5, atol=0
        )
        assert torch.equal(found.covariance, found.covariance.mT)

    @every_backend
    def test_transposing_swaps_rows_and_columns(self, backend: str) -> None:
        maps = torch.rand(3, 5, 8)
        one, other = self.statistics(backend, maps), self.statistics(backend, maps.mT)
        torch.testing.assert_close(other.centroid, one.centroid.flip(1))
        torch.testing.assert_close(other.covariance, one.covariance.flip(1, 2))
        torch.testing.assert_close(other.area, one.area)

    # ---- invalid and dead maps ----

    @every_backend
    def test_a_negative_value_is_marked_by_nan_or_clamped(self, backend: str) -> None:
        maps = torch.rand(3, 4, 5) + 0.1
        maps[1, 2, 3] = -0.2
        found = self.statistics(backend, maps)
        for name in ("entropy", "area", "centroid", "covariance"):
            values = getattr(found, name)
            assert bool(values[1].isnan().all()), name
            assert bool(values[[0, 2]].isfinite().all()), name
        for name in ("dispersion", "mean", "variance"):
            assert bool(getattr(found, name).isfinite().all()), name
        clamped = self.statistics(backend, maps, clamp=True)
        for one, other in zip(clamped, self.statistics(backend, maps.relu()), strict=True):
            assert torch.equal(one, other)

    @every_backend
    @pytest.mark.parametrize("name", ["dispersion", "mean", "variance"])
    def test_signed_maps_keep_their_moments(self, backend: str, name: str) -> None:
        """What needs no probabilities has values and gradients on signed maps too."""
        used = tuple(field == name for field in self.outputs)
        case = self.example(batch=3, used=used)
        maps = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(8)) + 0.7
        case = dataclasses.replace(case, tensors=(maps,), options={"clamp": False})
        self.check(backend, case)

    @every_backend
    def test_a_signed_map_with_a_mean_of_zero(self, backend: str) -> None:
        """Its variance and mean have gradients, though the mean divides elsewhere."""
        maps = torch.tensor([[[-1.0, 1.0]], [[3.0, -3.0]]], device=device_of(backend))
        maps.requires_grad_()
        found = Statistics(*map_statistics_fwd(maps, False, backend=backend))
        assert found.variance.tolist() == [1.0, 9.0]
        (to_maps,) = torch.autograd.grad(found.variance.sum(), maps, retain_graph=True)
        assert to_maps.tolist() == [[[-1.0, 1.0]], [[3.0, -3.0]]]
        (to_maps,) = torch.autograd.grad(found.mean.sum(), maps)
        assert bool((to_maps == 0.5).all())

    @every_backend
    def test_dead_maps(self, backend: str) -> None:
        """All statistics 0; no gradient but that of the mean, 1/Z."""
        maps = torch.zeros(2, 4, 5, device=device_of(backend))
        maps[1] = 1e-40  # below the smallest normal number: dead, on any device
        maps.requires_grad_()
        for clamp in (True, False):
            outputs = Statistics(*map_statistics_fwd(maps, clamp, backend=backend))
            assert not any(bool(o.any()) for o in outputs)
            for name, output in outputs._asdict().items():
                (found,) = torch.autograd.grad(output.sum(), maps, retain_graph=True)
                if name != "mean":
                    assert not bool(found.any()), name
                elif not clamp:
                    torch.testing.assert_close(found, torch.full_like(found, 1 / 20))

    @every_backend
    def test_a_line_has_no_area_and_no_gradient_of_it(self, backend: str) -> None:
        """Rounding of the centroid must not pass for an ellipse, at any length or angle."""
        for size in (3, 14, 64):
            values = torch.rand(2, size, generator=torch.Generator().manual_seed(size)) + 1e-3
            for which in ("row", "column", "diagonal"):
                maps = torch.zeros(2, size, size)
                target = {
                    "row": maps[:, size - 1],
                    "column": maps[:, :, size // 2],
                    "diagonal": maps.diagonal(dim1=1, dim2=2),
                }[which]
                target.copy_(values)
                maps = maps.to(device_of(backend)).requires_grad_()
                area = map_statistics_fwd(maps, False, backend=backend)[AREA]
                (found,) = torch.autograd.grad(area.sum(), maps)
                assert not bool(area.any()), f"{which} of {size}: area {area.tolist()}"
                assert not bool(found.any()), f"{which} of {size}: {found.abs().max()}"

    @every_backend
    def test_near_degenerate_area_is_finite(self, backend: str) -> None:
        """Between a line and an ellipse float32 decides; it must decide for something finite."""
        for floor in (1e-12, 1e-9, 1e-7, 1e-5, 1e-3):
            maps = torch.full((1, 9, 9), floor)
            maps[0, 4] = 1.0
            maps = maps.to(device_of(backend)).requires_grad_()
            area = map_statistics_fwd(maps, False, backend=backend)[AREA]
            (found,) = torch.autograd.grad(area.sum(), maps)
            assert bool(area.isfinite().all())
            assert bool(found.isfinite().all())

    @every_backend
    def test_huge_values_do_not_overflow_inside(self, backend: str) -> None:
        """M^2 would overflow float32 at 1e30; only the variance itself is beyond it."""
        maps = (torch.rand(2, 5, 6) + 0.1) * 1e30
        found = self.statistics(backend, maps)
        for name in ("entropy", "area", "dispersion", "mean", "centroid", "covariance"):
            assert bool(getattr(found, name).isfinite().all()), name
        assert bool(found.variance.isinf().all())
        if has_double(backend):
            wide = self.statistics(backend, maps.double())
            assert bool(wide.variance.isfinite().all())


@needs_cpu
class TestMapStatisticsBeyond32Bits:
    @pytest.mark.parametrize("far", ["batch", "row", "column"])
    def test_offsets_over_31_bits(self, far: str) -> None:
        stride = [9, 3, 1]
        stride[["batch", "row", "column"].index(far)] = BIG + 17
        storage = torch.empty(2 * BIG + 60, dtype=torch.float16)
        maps = storage.as_strided((2, 3, 3), stride)
        values = (torch.arange(18.0).view(2, 3, 3) + 1).half()
        maps.copy_(values)
        cotangents = TestMapStatistics().cotangents(Request(), shapes_of(2))
        run = TestMapStatistics().run("cpu")
        found, expected = (
            derivatives(run, Case((m,), {"clamp": False}, (True,), cotangents), 1)
            for m in (maps, values)
        )
        for label, value in expected.items():  # other strides may sum in another order
            torch.testing.assert_close(found[label], value, msg=label)

    def test_more_elements_than_31_bits(self) -> None:
        side = 1024
        maps = torch.full((1, 1, 1), 0.5, dtype=torch.float16).expand(
            BIG // side**2 + 1, side, side
        )
        assert maps.numel() > BIG
        found = Statistics(*map_statistics_fwd(maps, False, backend="cpu"))
        torch.testing.assert_close(
            found.entropy, torch.full_like(found.entropy, math.log(side**2)), rtol=1e-5, atol=0
        )
        assert bool((found.mean == 0.5).all())
