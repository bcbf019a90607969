"""cam_statistics: activations and gradients (or weights) straight to the statistics of the map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis
import pytest
import torch
from ops.base import OpTests, Request, device_of, every_backend
from ops.inputs import activations_and_seeds, extreme_activations, near_degenerate
from ops.oracle import Case, derivatives
from ops.test_cam import BIG, needs_cpu
from ops.test_map_statistics import UNITS, shapes_of
from torch import Tensor

from camkernels.ops.cam import reference as cam_reference
from camkernels.ops.cam.op import cam_fwd
from camkernels.ops.cam_statistics import reference
from camkernels.ops.cam_statistics.op import cam_statistics_fwd
from camkernels.ops.map_statistics.op import map_statistics_fwd
from camkernels.ops.map_statistics.reference import Statistics

MAPS, TOTAL, AREA = 0, 1, 2 + Statistics._fields.index("area")


class TestCamStatistics(OpTests):
    op = "cam_statistics"
    option = "relu"
    arguments = 2
    variants = ("gradients", "weights")
    kinds = ("normal", "sparse", "integers", "constant", "smooth")
    outputs = ("maps", "total", *Statistics._fields)

    def run(self, backend: str) -> Callable[..., Sequence[Tensor]]:
        def function(a: Tensor, g: Tensor, relu: bool) -> Sequence[Tensor]:
            outputs = cam_statistics_fwd(a, g, relu, backend=backend)
            maps, _, total, *statistics = outputs
            return maps, total.detach(), *statistics

        return function

    def formula(self, *tensors: Tensor, **options: bool) -> Sequence[Tensor]:
        outputs = reference.cam_statistics_fwd(*tensors, options["relu"])
        return outputs[0], *outputs[2:]

    def build(self, request: Request) -> Case:
        a, g = activations_and_seeds(request)
        return self._case(request, a, g, request.option)

    def _case(self, request: Request, a: Tensor, g: Tensor, relu: bool) -> Case:
        maps = cam_reference.cam(a.double(), g.double(), relu)
        shapes = [(a.shape[0], *a.shape[2:]), (a.shape[0],), *shapes_of(a.shape[0])]
        cotangents = list(self.cotangents(request, shapes))
        left_out: set[int] = set()
        if near_degenerate(maps):
            if hypothesis.currently_in_test_context():
                hypothesis.event(
                    "area not compared: an ellipse so thin that float32 cancels its determinant"
                )
            cotangents[AREA], left_out = None, {AREA}
        if not relu and bool((maps < 0).any()):
            # Marked by NaN (test_a_negative_value_...); only the moments have gradients.
            for name in ("entropy", "area", "centroid", "covariance"):
                cotangents[2 + Statistics._fields.index(name)] = None
            mean = maps.mean((1, 2)).abs()
            if bool((mean < 0.1 * maps.abs().amax((1, 2))).any()):
                if hypothesis.currently_in_test_context():
                    hypothesis.event(
                        "dispersion not compared: a signed map with a mean of nearly 0"
                    )
                dispersion = 2 + Statistics._fields.index("dispersion")
                cotangents[dispersion] = None
                left_out.add(dispersion)
        return Case(
            (a, g),
            {"relu": relu},
            request.wanted,
            tuple(cotangents),
            request.cotangent_layout,
            (0.0, 0.0, *UNITS),
            frozenset(left_out),
        )

    def extremes(self, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
        for name, a, g in extreme_activations(dtype):
            for relu in (True, False):
                tensors = a.to(dtype), g.to(dtype)
                # At 1e30 the variance, and with it the cotangent of A beside it, is beyond float32.
                used = tuple(o != "variance" or "huge maps" not in name for o in self.outputs)
                yield f"{name}, relu={relu}", self._case(Request(used=used), *tensors, relu)

    def saved_bytes(self, case: Case) -> int:
        """The maps and their statistics; A for the cotangent of G; alpha for that of A."""
        activations, _ = case.tensors
        batch, channels, height, width = activations.shape
        to_activations, to_gradients = case.wanted
        needed = 4 * batch * (height * width + 5 + 2 + 4)
        if to_gradients:
            needed += activations.untyped_storage().nbytes()
        if to_activations:
            needed += 4 * batch * channels
        return needed

    def check_wanted(self, case: Case, arguments: tuple[Any, ...], result: Any) -> None:
        _, activations, alpha, *_ = arguments
        assert (alpha is not None, activations is not None) == case.wanted
        assert [bool(r.numel()) for r in result] == list(case.wanted)

    # ---- what is special ----

    @every_backend
    @pytest.mark.parametrize("relu", [True, False])
    def test_equals_the_composition_of_its_parts(self, backend: str, relu: bool) -> None:
        for variant in self.variants:
            case = self.example(
                batch=3, channels=7, height=5, width=6, variant=variant, option=relu,
                kind="normal" if relu else "smooth",
            )  # fmt: skip
            a, g = case.to(device_of(backend)).tensors
            fused = self.run(backend)(a, g, relu)
            maps = cam_fwd(a, g, relu, backend=backend)[0]
            parts = map_statistics_fwd(maps, False, backend=backend)
            for one, other in zip((fused[0], *fused[2:]), (maps, *parts), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    @every_backend
    @pytest.mark.parametrize("relu", [True, False])
    def test_total_is_the_sum_before_the_relu(self, backend: str, relu: bool) -> None:
        for variant in self.variants:
            case = self.example(channels=9, variant=variant, option=relu, seed=8)
            a, g = case.to(device_of(backend)).tensors
            total = self.run(backend)(a, g, relu)[TOTAL]
            plain = cam_fwd(a.cpu().double(), g.cpu().double(), False, backend="reference")[0]
            torch.testing.assert_close(
                total.cpu().double(), plain.sum((1, 2)), rtol=1e-5, atol=1e-5
            )

    @every_backend
    def test_total_plus_bias_is_the_logit_of_pooling_and_linear(self, backend: str) -> None:
        """The free self-check of the closed form: alpha = W[c] / Z."""
        torch.manual_seed(4)
        head = torch.nn.Linear(6, 5)
        a, targets = torch.rand(3, 6, 4, 7), torch.tensor([4, 0, 2])
        logits = head(a.mean((2, 3)))
        weights = head.weight.detach()[targets] / 28
        device = device_of(backend)
        total = self.run(backend)(a.to(device), weights.to(device), True)[TOTAL].cpu()
        expected = logits.gather(1, targets[:, None])[:, 0].detach()
        torch.testing.assert_close(total + head.bias.detach()[targets], expected)

    @every_backend
    def test_total_has_no_gradient_in_public(self, backend: str) -> None:
        from camkernels import backend as choose
        from camkernels.functional import cam_statistics_and_total

        a = torch.rand(2, 3, 4, 4, device=device_of(backend), requires_grad=True)
        with choose(backend):  # type: ignore[arg-type]
            statistics, maps, total = cam_statistics_and_total(a, torch.rand_like(a))
        assert statistics.entropy.requires_grad
        assert maps.requires_grad
        assert not total.requires_grad

    @every_backend
    def test_a_negative_value_is_marked_by_nan(self, backend: str) -> None:
        a = torch.ones(2, 1, 2, 3, device=device_of(backend))
        a[1, 0, 1, 1] = -1
        weights = torch.ones(2, 1, device=device_of(backend))
        found = Statistics(*self.run(backend)(a, weights, False)[2:])
        assert found.entropy.isnan().tolist() == [False, True]
        assert found.area.isnan().tolist() == [False, True]
        assert bool(found.mean.isfinite().all())

    @every_backend
    def test_maps_and_statistics_share_one_backward(self, backend: str) -> None:
        """A cotangent of the maps beside those of the statistics: both arrive, summed."""
        case = self.example(kind="smooth", channels=4)
        only_maps = self.example(kind="smooth", channels=4, used=(True,) + (False,) * 8)
        only_rest = self.example(kind="smooth", channels=4, used=(False,) + (True,) * 8)
        both, one, other = (
            derivatives(self.run(backend), c.to(device_of(backend)), 1)
            for c in (case, only_maps, only_rest)
        )
        for label in ("order 1, 0", "order 1, 1"):
            assert bool(one[label].any())
            assert bool(other[label].any())
            torch.testing.assert_close(both[label], one[label] + other[label])


@needs_cpu
class TestCamStatisticsBeyond32Bits:
    def test_more_elements_than_31_bits(self) -> None:
        channels = BIG // 1024 + 3
        a = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float16).expand(1, channels, 32, 32)
        assert a.numel() > BIG
        weights = torch.zeros(1, channels)
        weights[0, -1] = 2.0
        outputs = TestCamStatistics().run("cpu")(a, weights, True)
        assert bool((outputs[MAPS] == 1).all())
        assert outputs[TOTAL].item() == 1024

    @pytest.mark.parametrize("far", ["batch", "channel", "row", "column"])
    def test_offsets_over_31_bits(self, far: str) -> None:
        stride = [18, 9, 3, 1]
        stride[["batch", "channel", "row", "column"].index(far)] = BIG + 17
        storage = torch.empty(2 * BIG + 90, dtype=torch.float16)
        a = storage.as_strided((2, 2, 3, 3), stride)
        values = (torch.arange(36.0).view(2, 2, 3, 3) / 8 + 1).half()
        a.copy_(values)
        weights = torch.tensor([[1.0, 2.0], [3.0, 0.5]])
        case = TestCamStatistics()._case(Request(), values, weights, True)
        run = TestCamStatistics().run("cpu")
        far_case = Case((a, weights), case.options, case.wanted, case.cotangents)
        found, expected = derivatives(run, far_case, 1), derivatives(run, case, 1)
        for label, value in expected.items():  # other strides may sum in another order
            torch.testing.assert_close(found[label], value, msg=label)
