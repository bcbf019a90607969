"""cam_weights (Grad-CAM++, XGrad-CAM) and cam_pixels (LayerCAM, HiResCAM)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from ops.base import OpTests, Request, device_of, every_backend
from ops.inputs import activations_and_seeds, extreme_activations
from ops.oracle import Case
from torch import Tensor

from camkernels.ops.cam_pixels import reference as pixels_reference
from camkernels.ops.cam_pixels.op import cam_pixels_fwd
from camkernels.ops.cam_weights import reference as weights_reference
from camkernels.ops.cam_weights.op import cam_weights_fwd


def pair(request: Request, positive: bool) -> tuple[Tensor, Tensor]:
    """A, not negative where its sum is divided by, and G of the same dtype."""
    request = dataclasses.replace(
        request, dtypes=(request.dtypes[0],) * 2, variant="gradients", option=False
    )
    a, g = activations_and_seeds(request)
    if positive:
        a = a.abs() if 0 in a.stride() else a.copy_(a.abs())
    return a, g


class Methods(OpTests):
    arguments = 2
    kinds = ("normal", "sparse", "integers", "constant", "smooth")

    def check_wanted(self, case: Case, arguments: tuple[Any, ...], result: Any) -> None:
        assert arguments[-2:] == case.wanted
        assert [bool(r.numel()) for r in result] == list(case.wanted)

    def saved_bytes(self, case: Case) -> int:
        return sum(t.untyped_storage().nbytes() for t in case.tensors)

    @every_backend
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
    @pytest.mark.parametrize("shape", [(1, 300, 2, 3), (2, 70, 5, 7), (1, 3, 30, 41)])
    def test_more_than_one_block(
        self, backend: str, layout: str, shape: tuple[int, int, int, int]
    ) -> None:
        """Of channels, of pixels, and of both."""
        names = ("batch", "channels", "height", "width")
        sizes: dict[str, Any] = dict(zip(names, shape, strict=True))
        for variant in self.variants:
            self.check(backend, self.example(variant=variant, layouts=(layout, layout), **sizes))

    def of_extremes(
        self, dtype: torch.dtype, method: str, flags: Sequence[bool]
    ) -> Iterator[tuple[str, Case]]:
        for name, a, g in extreme_activations(dtype):
            if g.dim() != 4 or (method == "xgradcam" and not bool(a.any()) and len(a)):
                continue  # 0 / 0
            if method == "xgradcam" and "tiny A, huge" in name:
                continue  # G / S is 1e60
            for flag in flags:
                shape = (a.shape[0], a.shape[1]) if self.op == "cam_weights" else (
                    a.shape[0], *a.shape[2:]
                )  # fmt: skip
                yield (
                    f"{name}, {method}, {flag}",
                    Case(
                        (a.to(dtype), g.to(dtype)),
                        {self.option: flag, "method": method},  # type: ignore[dict-item]
                        (True, True),
                        self.cotangents(Request(), [shape]),
                    ),
                )


class TestCamWeights(Methods):
    op = "cam_weights"
    option = "parity"
    variants = weights_reference.METHODS
    outputs = ("weights",)

    def run(self, backend: str) -> Callable[..., Sequence[Tensor]]:
        return lambda a, g, parity, method: (
            cam_weights_fwd(a, g, method, 1e-6 if parity else 0.0, backend=backend),
        )

    def formula(self, *tensors: Tensor, **options: bool) -> Sequence[Tensor]:
        eps = 1e-6 if options["parity"] else 0.0
        return (weights_reference.cam_weights(*tensors, str(options["method"]), eps),)

    def build(self, request: Request) -> Case:
        a, g = pair(request, True)
        return Case(
            (a, g),
            {"parity": request.option, "method": request.variant},  # type: ignore[dict-item]
            request.wanted,
            self.cotangents(request, [tuple(a.shape[:2])]),
            "contiguous",
        )

    def extremes(self, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
        for method in self.variants:
            yield from self.of_extremes(dtype, method, (True, False))

    @every_backend
    @pytest.mark.parametrize("eps", [0.0, 1e-6])
    def test_the_formula_of_the_paper(self, backend: str, eps: float) -> None:
        """As pytorch-grad-cam writes it, in numpy."""
        generator = torch.Generator().manual_seed(2)
        a = torch.rand(3, 4, 5, 6, generator=generator)
        g = torch.randn(3, 4, 5, 6, generator=generator) * 0.1
        g[0, 0, 0] = 0
        values, slopes = a.double().numpy(), g.double().numpy()
        below = 2 * slopes**2 + values.sum((2, 3))[:, :, None, None] * slopes**3 + eps
        share = np.where(slopes > 0, slopes**2 / np.where(slopes > 0, below, 1.0), 0.0)
        plus = (np.maximum(slopes, 0) * share).sum((2, 3))
        axiom = (slopes * values).sum((2, 3)) / (values.sum((2, 3)) + eps)
        for method, expected in (("gradcam++", plus), ("xgradcam", axiom)):
            found = cam_weights_fwd(
                a.to(device_of(backend)), g.to(device_of(backend)), method, eps, backend=backend
            )
            np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=2e-5, atol=1e-8)


class TestCamPixels(Methods):
    op = "cam_pixels"
    option = "relu"
    variants = ("layercam", "hirescam")
    outputs = ("maps",)

    def run(self, backend: str) -> Callable[..., Sequence[Tensor]]:
        return lambda a, g, relu, method: (
            cam_pixels_fwd(a, g, method == "layercam", relu, backend=backend),
        )

    def formula(self, *tensors: Tensor, **options: bool) -> Sequence[Tensor]:
        positive = str(options["method"]) == "layercam"
        return (pixels_reference.cam_pixels_fwd(*tensors, positive, options["relu"]),)

    def build(self, request: Request) -> Case:
        for attempt in range(20):
            tried = dataclasses.replace(request, seed=request.seed + 104729 * attempt)
            a, g = pair(tried, False)
            if not request.option or not self.ambiguous(a, g, request.variant):
                break
        else:
            a, g = pair(dataclasses.replace(request, kind="smooth"), True)
            g = g.abs() if 0 in g.stride() else g.copy_(g.abs())
        return Case(
            (a, g),
            {"relu": request.option, "method": request.variant},  # type: ignore[dict-item]
            request.wanted,
            self.cotangents(request, [(a.shape[0], *a.shape[2:])]),
            request.cotangent_layout,
        )

    def ambiguous(self, a: Tensor, g: Tensor, method: str) -> bool:
        """A pixel within rounding of 0 by cancellation: the ReLU's mask is anyone's guess."""
        values, slopes = a.double(), g.double()
        slopes = slopes.relu() if method == "layercam" else slopes
        maps = (slopes * values).sum(1).abs()
        terms = (slopes * values).abs().sum(1)
        return bool(((maps < 1e-4 * terms) & (terms > 0)).any())

    def extremes(self, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
        for method in self.variants:
            yield from self.of_extremes(dtype, method, (True, False))

    def saved_bytes(self, case: Case) -> int:
        batch, _, height, width = case.tensors[0].shape
        maps = 4 * batch * height * width if case.options["relu"] else 0
        return super().saved_bytes(case) + maps

    @every_backend
    def test_by_hand(self, backend: str) -> None:
        device = device_of(backend)
        a = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]], device=device, requires_grad=True)
        g = torch.tensor([[[[1.0, -1.0]], [[-2.0, 0.5]]]], device=device, requires_grad=True)
        layer = cam_pixels_fwd(a, g, True, False, backend=backend)
        assert layer.tolist() == [[[1.0, 2.0]]]
        assert cam_pixels_fwd(a, g, False, False, backend=backend).tolist() == [[[-5.0, 0.0]]]
        assert cam_pixels_fwd(a, g, False, True, backend=backend).tolist() == [[[0.0, 0.0]]]
        to_a, to_g = torch.autograd.grad(layer.sum(), (a, g))
        assert to_a.tolist() == [[[[1.0, 0.0]], [[0.0, 0.5]]]]
        assert to_g.tolist() == [[[[1.0, 0.0]], [[0.0, 4.0]]]]


@every_backend
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_cotangents_keep_the_memory_format(backend: str, layout: torch.memory_format) -> None:
    a = torch.rand(2, 6, 4, 5).to(memory_format=layout).to(device_of(backend)).requires_grad_()  # type: ignore[call-overload]
    g = torch.randn(2, 6, 4, 5).to(a.device).requires_grad_()
    for output in (
        cam_weights_fwd(a, g, "gradcam++", 0.0, backend=backend),
        cam_weights_fwd(a, g, "xgradcam", 0.0, backend=backend),
        cam_pixels_fwd(a, g, True, True, backend=backend),
    ):
        to_a, to_g = torch.autograd.grad(output.sum(), (a, g))
        assert to_a.stride() == a.stride()
        assert to_g.stride() == g.stride()
