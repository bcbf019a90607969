"""gradient_error: five errors between the input gradient and the guided one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from ops.base import OpTests, Request, device_of, every_backend
from ops.oracle import Case, rounded
from torch import Tensor

import camkernels as ck
from camkernels.ops import _cpu_view
from camkernels.ops.gradient_error import reference
from camkernels.ops.gradient_error.op import gradient_error_fwd

ATTEMPTS = 40


def values_of(request: Request, seed: int) -> Tensor:
    shape = (request.batch, request.channels, request.height, request.width)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if request.kind == "sparse":
        return normal.relu()
    if request.kind == "smooth":  # away from 0, signed
        return (torch.rand(shape, generator=generator) + 0.5) * normal.sign()
    return normal


def near_a_tie(d: Tensor, g: Tensor, error: str) -> bool:
    """Whether rounding decides which side is smaller, or the sum of a sample nearly vanishes."""
    if not error.startswith("histogram") or not d.numel():
        return False
    a, b = d.double().abs().flatten(1), g.double().abs().flatten(1)
    if error == "histogram":
        a, b = (x / x.sum(1, keepdim=True).clamp_min(1e-300) for x in (a, b))
    return bool((((a - b).abs() < 1e-4 * torch.maximum(a, b)) & (a > 0)).any())


class TestGradientError(OpTests):
    op = "gradient_error"
    option = ""
    arguments = 1
    variants = reference.ERRORS
    kinds = ("normal", "sparse", "smooth")
    outputs = ("errors",)

    def run(self, backend: str) -> Callable[..., Sequence[Tensor]]:
        def call(delta: Tensor, guided: Tensor, error: str) -> tuple[Tensor]:
            if guided.device != delta.device:
                guided = guided.to(delta.device)
            return (gradient_error_fwd(delta, guided, error, backend=backend)[0],)

        return call

    def formula(self, *tensors: Tensor, **options: Any) -> Sequence[Tensor]:
        (delta,), guided = tensors, options["guided"]
        guided = guided.double() if delta.dtype == torch.float64 else guided
        return (reference.gradient_error_fwd(delta, guided, options["error"])[0],)

    def build(self, request: Request) -> Case:
        power = 10.0 ** (0 if torch.float16 in request.dtypes else request.exponent)
        for attempt in range(ATTEMPTS):
            seed = request.seed + 7919 * attempt
            d = rounded(values_of(request, seed) * power, request.dtypes[0], request.layouts[0])
            g = rounded(values_of(request, seed + 1), request.dtypes[1], request.layouts[1])
            if not near_a_tie(d, g, request.variant):
                break
        return self.case(d, g, request.variant, request)

    def case(self, d: Tensor, g: Tensor, error: str, request: Request | None = None) -> Case:
        request = request or Request()
        request = dataclasses.replace(request, used=None)
        return Case(
            (d,),
            {"error": error, "guided": g},  # type: ignore[dict-item]
            request.wanted[:1],
            self.cotangents(request, [(d.shape[0],)]),
            request.cotangent_layout,
            self.units(d, g, error),
        )

    def units(self, d: Tensor, g: Tensor, error: str) -> tuple[float, ...]:
        """Signed terms that cancel: |g| sums to far more than g does."""
        if error == "cosine":
            return (1.0,)
        if error.startswith("histogram") or not g.numel():
            return (0.0,)
        return (float(g.double().abs().flatten(1).sum(1).amax()),)

    def extremes(self, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
        generator = torch.Generator().manual_seed(3)
        d = torch.randn(2, 3, 4, 5, generator=generator).to(dtype)
        g = torch.randn(2, 3, 4, 5, generator=generator).to(dtype)
        one_zero = d.clone()
        one_zero[1] = 0
        pixel = torch.zeros_like(d)
        pixel[:, 1, 2, 3] = 2.0
        long = torch.randn(1, 40000, generator=generator).to(dtype)
        for error in self.variants:
            for name, x, y in (
                ("one entry", d[:, :1, :1, :1], g[:, :1, :1, :1]),
                ("d zero", torch.zeros_like(d), g),
                ("g zero", d, torch.zeros_like(g)),
                ("one of two zero", one_zero, g),
                ("one pixel", pixel, g),
                ("equal", d, d),
                ("opposite", d, -d),
                ("constant", torch.full_like(d, 0.3), torch.full_like(d, -0.7)),
                ("empty batch", d[:0], g[:0]),
                ("saturated", d * 90, g),
                ("huge d", d * 1e30, g),
                ("tiny d", d * 1e-30, g),
                ("huge g", d, g * 1e30),
                ("tiny g", d, g * 1e-30),
                ("tiny both", d * 1e-15, g * 1e-15),
                ("of rank 2, long", long, long.flip(1)),
            ):
                yield f"{name}, {error}", self.case(x, y, error)

    def saved_bytes(self, case: Case) -> int:
        d, g = case.tensors[0], case.options["guided"]
        assert isinstance(g, Tensor)
        both = d.untyped_storage().nbytes() + g.untyped_storage().nbytes()
        return both + 4 * reference.STATISTICS * d.shape[0]

    def check_wanted(self, case: Case, arguments: tuple[Any, ...], result: Any) -> None:
        assert isinstance(result, Tensor)

    def errors(self, backend: str, d: Tensor, g: Tensor, error: str) -> Tensor:
        device = device_of(backend)
        return gradient_error_fwd(d.to(device), g.to(device), error, backend=backend)[0].cpu()

    # ---- closed values ----

    @every_backend
    def test_known_values(self, backend: str) -> None:
        d, g = torch.tensor([[3.0, 0.0, -4.0]]), torch.tensor([[0.0, 2.0, -2.0]])
        sigmoid = -(2 * 0.5 - 2 / (1 + math.exp(4)))
        mean = -1 / 3
        centered = -(2 / (1 + math.exp(mean)) - 2 / (1 + math.exp(4 + mean)))
        expected = {
            "sigmoid": sigmoid,
            "centered_sigmoid": centered,
            "cosine": -8 / (5 * math.sqrt(8)),
            "histogram": -0.5,
            "histogram_paper": -2 / (7 * 4),
        }
        for error, value in expected.items():
            found = self.errors(backend, d, g, error).item()
            assert found == pytest.approx(value, rel=1e-6), error

    @every_backend
    def test_bounds_and_scale_invariance(self, backend: str) -> None:
        d, g = torch.randn(4, 3, 5, 6), torch.randn(4, 3, 5, 6)
        for error in ("cosine", "histogram"):
            for scale in (2.0**-80, 2.0**60):
                one = self.errors(backend, d, g, error)
                torch.testing.assert_close(self.errors(backend, d * scale, g, error), one)
                torch.testing.assert_close(self.errors(backend, d, g * scale, error), one)
            found = self.errors(backend, d, d * 3, error)
            torch.testing.assert_close(found, torch.full_like(found, -1.0))
        opposite = self.errors(backend, d, -d, "cosine")
        torch.testing.assert_close(opposite, torch.ones(4))

    @every_backend
    def test_the_printed_histogram_is_not_scale_invariant(self, backend: str) -> None:
        """E(s d, s g) = E(d, g) / s: see second-order.md."""
        d, g = torch.randn(4, 3, 5, 6), torch.randn(4, 3, 5, 6)
        one = self.errors(backend, d, g, "histogram_paper")
        found = self.errors(backend, d * 4, g * 4, "histogram_paper")
        torch.testing.assert_close(found, one / 4)

    @every_backend
    @pytest.mark.parametrize("error", ["cosine", "histogram", "histogram_paper"])
    def test_zero_norms(self, backend: str, error: str) -> None:
        """No error, no gradient, also where all is too small to be a normal number."""
        x = torch.randn(3, 2, 4, 4)
        for small in (0.0, 1e-42):
            for left, right in ((x * small, x), (x, x * small), (x * small, x * small)):
                leaf = left.to(device_of(backend)).requires_grad_()
                guided = right.to(device_of(backend))
                errors = gradient_error_fwd(leaf, guided, error, backend=backend)[0]
                (found,) = torch.autograd.grad(errors.sum(), leaf)
                assert not bool(errors.any())
                assert not bool(found.any())

    @every_backend
    def test_bad_guided_values_stay_in_their_sample(self, backend: str) -> None:
        for error in self.variants:
            for bad in (math.nan, math.inf, -math.inf):
                d, g = torch.rand(3, 2, 3, 3) + 0.5, torch.rand(3, 2, 3, 3) + 0.5
                g[1, 1, 0, 2] = bad
                found = self.errors(backend, d, g, error).isfinite().tolist()
                assert found == [True, False, True], (error, bad)

    # ---- layouts ----

    @every_backend
    def test_a_shared_layout_is_read_without_a_copy(
        self, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copies: list[int] = []
        original = Tensor.copy_
        monkeypatch.setattr(
            Tensor, "copy_", lambda self, *a, **k: (copies.append(1), original(self, *a, **k))[1]
        )
        d, g = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
        if backend == "reference":
            pytest.skip("plain PyTorch copies as it likes")
        last = torch.channels_last
        for x, y, expected in (
            (d, g, 0),
            (d.contiguous(memory_format=last), g.contiguous(memory_format=last), 0),
            (d[:1].expand(2, -1, -1, -1), g, 0),
            (d, g.contiguous(memory_format=last), 1),
            (d[..., ::2], g[..., ::2], 2),
        ):
            copies.clear()
            x, y = x.to(device_of(backend)), y.to(device_of(backend))
            copies.clear()
            gradient_error_fwd(x, y, "cosine", backend=backend)
            assert len(copies) == expected

    @every_backend
    def test_the_gradient_lies_as_delta_does(self, backend: str) -> None:
        for layout in (torch.contiguous_format, torch.channels_last):
            d = torch.randn(2, 3, 4, 5, device=device_of(backend)).contiguous(memory_format=layout)
            leaf = d.requires_grad_()
            errors = gradient_error_fwd(leaf, torch.randn_like(d), "cosine", backend=backend)[0]
            (found,) = torch.autograd.grad(errors.sum(), leaf)
            assert found.stride() == leaf.stride()

    @every_backend
    def test_long_samples_over_several_blocks(self, backend: str) -> None:
        entries = 5000 if backend == "triton" else 50001
        d, g = torch.randn(2, entries), torch.randn(2, entries)
        for error in self.variants:
            if near_a_tie(d, g, error):  # some of so many are: the value alone
                case = dataclasses.replace(self.case(d, g, error), wanted=(False,))
            else:
                case = self.case(d, g, error)
            self.check(backend, case)


# ---- the C++ kernels ----


def errors_and_gradient(d: Tensor, g: Tensor, error: str) -> tuple[Tensor, Tensor]:
    leaf = d.clone().requires_grad_()
    errors = gradient_error_fwd(leaf, g, error, backend="cpu")[0]
    cotangent = torch.linspace(0.5, 2.0, len(d), dtype=errors.dtype)
    return errors.detach(), torch.autograd.grad(errors @ cotangent, leaf)[0] / cotangent[:, None]


@pytest.mark.parametrize("error", reference.ERRORS)
def test_a_sample_does_not_depend_on_its_batch(error: str) -> None:
    """Threads have samples of their own from some batch on, and share samples below it."""
    d, g = torch.randn(9, 40001), torch.randn(9, 40001)
    single = [
        gradient_error_fwd(d[i : i + 1], g[i : i + 1], error, backend="cpu") for i in range(9)
    ]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for batch in (2, 5, 9):
                found = gradient_error_fwd(d[:batch], g[:batch], error, backend="cpu")
                for i in range(2):
                    expected = torch.cat([parts[i] for parts in single[:batch]])
                    assert torch.equal(found[i], expected), (threads, batch)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("error", reference.ERRORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_gradient_stored_past_the_caches(
    error: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for entries in (1, 8, 17, 515, 1500, 1536):  # samples at any alignment, and at the best
        d, g = torch.randn(3, entries, dtype=dtype), torch.randn(3, entries, dtype=dtype)
        expected = errors_and_gradient(d, g, error)[1]
        with monkeypatch.context() as patched:
            patched.setattr(_cpu_view, "_STREAM_FROM", 0)
            found = errors_and_gradient(d, g, error)[1]
        assert torch.equal(found, expected), entries


def test_the_sigmoid_keeps_its_digits_at_both_ends() -> None:
    d = torch.linspace(-100, 100, 20001)[:, None]
    errors, slopes = errors_and_gradient(d, torch.ones_like(d), "sigmoid")
    sigma = torch.sigmoid(d.double())[:, 0]
    slope = sigma * torch.sigmoid(-d.double())[:, 0]
    # 87: beyond, the smaller side is 0
    torch.testing.assert_close(-errors.double(), sigma, rtol=3e-7, atol=1.7e-38)
    torch.testing.assert_close(-slopes[:, 0].double(), slope, rtol=4e-7, atol=1.7e-38)


def test_a_mean_out_of_range_is_seen() -> None:
    d = torch.full((1, 64), 3e38)
    assert not bool(gradient_error_fwd(d, d, "centered_sigmoid", backend="cpu")[0].isfinite())


# ---- the public function ----


def test_public_function() -> None:
    d, g = torch.randn(3, 2, 4, 4, requires_grad=True), torch.randn(3, 2, 4, 4)
    for error in reference.ERRORS:
        with ck.backend("reference"):
            expected = ck.gradient_error(d, g, error)  # type: ignore[arg-type]
        found = ck.gradient_error(d, g, error)  # type: ignore[arg-type]
        assert found.shape == (3,)
        torch.testing.assert_close(found, expected)
        one, other = (torch.autograd.grad(e.sum(), d)[0] for e in (found, expected))
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(ck.gradient_error(d, g), ck.gradient_error(d, g, "cosine"))


def test_mixed_dtypes_come_out_wide() -> None:
    found = ck.gradient_error(torch.randn(2, 5).bfloat16(), torch.randn(2, 5).half())
    assert found.dtype == torch.float32
    assert ck.gradient_error(torch.randn(2, 5).double(), torch.randn(2, 5).double()).dtype == (
        torch.float64
    )


@pytest.mark.parametrize(
    ("d", "g", "error", "raised", "words"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), "cos", ValueError, "sigmoid, centered_sigmoid, cos"),
        (torch.ones(2, 3), torch.ones(2, 3).requires_grad_(), "cosine", ValueError, "detach it"),
        (torch.ones(2, 3), torch.ones(3, 2), "cosine", ValueError, "the shape of gradients"),
        (torch.ones(2), torch.ones(2), "cosine", ValueError, r"\(B, ...\)"),
        (torch.ones(2, 0), torch.ones(2, 0), "cosine", ValueError, "only the batch"),
        (torch.ones(2, 3).double(), torch.ones(2, 3), "cosine", TypeError, "float64 goes with"),
        (torch.ones(2, 3).long(), torch.ones(2, 3), "cosine", TypeError, "expected float32"),
        (None, torch.ones(2, 3), "cosine", TypeError, "expected a tensor"),
    ],
)
def test_wrong_arguments(d: Any, g: Any, error: Any, raised: Any, words: str) -> None:
    with pytest.raises(raised, match=words):
        ck.gradient_error(d, g, error)


@pytest.mark.parametrize("error", reference.ERRORS)
def test_under_vmap_and_compile(error: Any) -> None:
    d, g = torch.randn(4, 2, 3, 5), torch.randn(4, 2, 3, 5)
    expected = ck.gradient_error(d.flatten(0, 1), g.flatten(0, 1), error).view(4, 2)
    mapped = torch.vmap(lambda a, b: ck.gradient_error(a, b, error))(d, g)
    torch.testing.assert_close(mapped, expected)
    leaf = d[0].clone().requires_grad_()
    compiled = torch.compile(ck.gradient_error, backend="aot_eager", fullgraph=True)
    (found,) = torch.autograd.grad(compiled(leaf, g[0], error).sum(), leaf)
    (plain,) = torch.autograd.grad(ck.gradient_error(leaf, g[0], error).sum(), leaf)
    torch.testing.assert_close(found, plain)
