"""What every op must keep, on every backend that this process can run.

An op's test file subclasses :class:`OpTests`, says how its inputs are built, and adds what is
special. ``TRITON_INTERPRET=1`` makes a process test Triton only, ``CAMKERNELS_CUDA_HOST=1`` the
host build of the CUDA kernels; any other process tests the reference through the chain, the C++
kernels, and Triton and CUDA where a GPU is present.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from ops.oracle import (
    LAYOUTS,
    Case,
    assert_as_good_as_eager,
    derivatives,
    gradcheck_twice,
    identical,
    storages,
)
from torch import Tensor

from camkernels import backends
from camkernels.ops import _chain

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DOUBLE = torch.float64


def tested_backends() -> list[Any]:
    """Parameters for pytest; what is absent is a skip with its reason, never a silence."""
    if backends.triton_interpreted():
        return ["triton"]
    if backends.cuda_on_host():
        return ["cuda"]
    parameters: list[Any] = ["reference"]
    for name in ("cpu", "triton", "cuda"):
        reason = backends.unavailable_reason(name)
        marks = [] if reason is None else [pytest.mark.skip(reason=f"backend {name}: {reason}")]
        parameters.append(pytest.param(name, marks=marks))
    return parameters


def device_of(backend: str) -> str:
    if backend == "cuda" and not backends.cuda_on_host():
        return "cuda"
    return "cuda" if backend == "triton" and not backends.triton_interpreted() else "cpu"


every_backend = pytest.mark.parametrize("backend", tested_backends())


def has_double(backend: str) -> bool:
    return backend not in ("triton", "cuda")


@dataclasses.dataclass
class Request:
    """What a test asks an op to build a case from."""

    batch: int = 2
    channels: int = 3
    height: int = 4
    width: int = 5
    variant: str = ""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float32)
    layouts: tuple[str, ...] = ("contiguous", "contiguous")
    option: bool = True
    wanted: tuple[bool, ...] = (True, True)
    used: tuple[bool, ...] | None = None
    cotangent_layout: str = "contiguous"
    kind: str = "normal"
    exponent: int = 0
    seed: int = 0


class OpTests:
    """Subclass, and fill in the names and the three functions below."""

    op: ClassVar[str]
    option: ClassVar[str]
    """The boolean of the op."""
    arguments: ClassVar[int]
    """How many differentiable arguments."""
    variants: ClassVar[tuple[str, ...]] = ("",)
    kinds: ClassVar[tuple[str, ...]]
    outputs: ClassVar[tuple[str, ...]]

    def run(self, backend: str) -> Callable[..., Sequence[Tensor]]:
        """The op on a backend, through the chain."""
        raise NotImplementedError

    def formula(self, *tensors: Tensor, **options: bool) -> Sequence[Tensor]:
        """The reference formula, plainly differentiable."""
        raise NotImplementedError

    def build(self, request: Request) -> Case:
        raise NotImplementedError

    def extremes(self, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
        """Named cases on the edges."""
        raise NotImplementedError

    def saved_bytes(self, case: Case) -> int:
        """What the backward of this case needs to keep, in bytes."""
        raise NotImplementedError

    # ---- checks, which test_mutations.py runs on broken kernels too ----

    def check(self, backend: str, case: Case, order: int = 1) -> None:
        device = device_of(backend)
        assert_as_good_as_eager(self.run(backend), self.formula, case, order, device)

    def example(self, **changes: Any) -> Case:
        return self.build(dataclasses.replace(Request(variant=self.variants[0]), **changes))

    def cotangents(self, request: Request, shapes: Sequence[tuple[int, ...]]) -> tuple[Any, ...]:
        """Signed, float32-exact; None where the request does not use the output."""
        generator = torch.Generator().manual_seed(request.seed + 1)
        used = request.used or (True,) * len(shapes)
        values = [torch.randn(shape, generator=generator).double() for shape in shapes]
        return tuple(v if u else None for v, u in zip(values, used, strict=False))

    # ---- properties ----

    @every_backend
    @hypothesis.given(data=st.data())
    def test_values_and_two_orders_equal_the_truth(self, backend: str, data: Any) -> None:
        self.check(backend, self.build(data.draw(self.requests(backend))), order=2)

    def requests(self, backend: str) -> st.SearchStrategy[Request]:
        small = backend == "triton" and backends.triton_interpreted()
        floats = st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS))
        doubles = st.just((DOUBLE, DOUBLE))
        subset = st.lists(st.booleans(), min_size=self.arguments, max_size=self.arguments)
        used = st.lists(st.booleans(), min_size=len(self.outputs), max_size=len(self.outputs))
        return st.builds(
            Request,
            batch=st.integers(0, 2 if small else 4),
            channels=st.integers(1, 5 if small else 20),
            height=st.integers(1, 5 if small else 9),
            width=st.integers(1, 5 if small else 17),
            variant=st.sampled_from(self.variants),
            dtypes=st.one_of(floats, doubles) if has_double(backend) else floats,
            layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
            option=st.booleans(),
            wanted=subset.filter(any).map(tuple),
            used=used.filter(any).map(tuple),
            cotangent_layout=st.sampled_from(LAYOUTS[:-1]),
            kind=st.sampled_from(self.kinds),
            exponent=st.integers(-6, 6),
            seed=st.integers(0, 2**31),
        )

    # ---- derivatives ----

    @every_backend
    @pytest.mark.parametrize("option", [True, pytest.param(False, marks=pytest.mark.slow)])
    def test_gradcheck_and_gradgradcheck(self, backend: str, option: bool) -> None:
        if not has_double(backend):
            pytest.skip("takes no float64; its second order is compared in float32")
        for variant in self.variants:
            case = self.example(
                batch=2, height=3, width=3, dtypes=(DOUBLE,) * 2, option=option, variant=variant,
                kind="smooth",
            )  # fmt: skip
            leaves = [t.detach().requires_grad_() for t in case.tensors]

            def function(*tensors: Tensor, options: Any = case.options) -> tuple[Tensor, ...]:
                outputs = self.run(backend)(*tensors, **options)
                return tuple(o for o in outputs if o.requires_grad)

            gradcheck_twice(function, leaves)

    @every_backend
    def test_third_order(self, backend: str) -> None:
        dtype = DOUBLE if has_double(backend) else torch.float32
        for variant in self.variants:
            case = self.example(dtypes=(dtype,) * 2, variant=variant, kind="smooth")
            found = derivatives(self.run(backend), case.to(device_of(backend)), 3)
            labels = [label for label in found if label.startswith("order 3")]
            assert any(bool(found[label].any()) for label in labels), "a third order of zeros"
            self.check(backend, case, order=3)

    # ---- strides and dtypes ----

    @every_backend
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_strides(self, backend: str, layout: str) -> None:
        for variant in self.variants:
            for other in (layout, "contiguous"):
                case = self.example(
                    batch=3, channels=6, height=4, width=6, layouts=(layout, other),
                    cotangent_layout=layout, variant=variant, seed=3,
                )  # fmt: skip
                self.check(backend, case)

    @every_backend
    @pytest.mark.parametrize("dtype", [*FLOATS, DOUBLE])
    def test_dtypes(self, backend: str, dtype: torch.dtype) -> None:
        if dtype == DOUBLE and not has_double(backend):
            pytest.skip("takes no float64")
        for variant in self.variants:
            for other in (DOUBLE,) if dtype == DOUBLE else FLOATS:
                case = self.example(
                    channels=7, height=3, dtypes=(dtype, other), variant=variant, seed=5
                )
                self.check(backend, case)
                outputs = self.run(backend)(*case.to(device_of(backend)).tensors, **case.options)
                wide = DOUBLE if dtype == DOUBLE else torch.float32
                assert all(o.dtype == wide for o in outputs)

    # ---- extremes ----

    @every_backend
    def test_extremes(self, backend: str) -> None:
        dtypes = (torch.float32, DOUBLE) if has_double(backend) else (torch.float32,)
        for dtype in dtypes:
            for name, case in self.extremes(dtype):
                # The second derivative of a logarithm at 1e-30 is 1e60, beyond float32.
                order = 1 if "tiny" in name and dtype != DOUBLE else 2
                try:
                    self.check(backend, case, order)
                except AssertionError as error:
                    raise AssertionError(f"{name}, {dtype}: {error}") from error

    @every_backend
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("option", [True, False])
    def test_bad_values_stay_in_their_sample(self, backend: str, bad: float, option: bool) -> None:
        for variant in self.variants:
            case = self.example(batch=4, channels=5, variant=variant, kind="smooth", option=option)
            for argument in range(self.arguments):
                broken = [t.clone() for t in case.tensors]
                broken[argument][2].view(-1)[1] = bad
                other = dataclasses.replace(case, tensors=tuple(broken))
                clean = derivatives(self.run(backend), case.to(device_of(backend)), 1)
                found = derivatives(self.run(backend), other.to(device_of(backend)), 1)
                for label, values in found.items():
                    kept = [0, 1, 3]
                    assert torch.equal(values[kept], clean[label][kept]), f"{label}: leaked"
                    assert bool(values[kept].isfinite().all()), label
                spoilt = derivatives(self.formula, other, 0)
                assert bad == -math.inf or not all(
                    bool(v.isfinite().all()) for v in spoilt.values()
                )
                for label, expected in spoilt.items():
                    marked = found[label].cpu().isfinite()
                    assert torch.equal(marked, expected.isfinite()), f"{label}: {bad} is not seen"

    # ---- memory ----

    @every_backend
    @pytest.mark.usefixtures("poisoned_allocations")
    def test_every_output_is_written(self, backend: str) -> None:
        for variant in self.variants:
            for wanted in ((True, True), (True, False), (False, True)):
                if not any(wanted[: self.arguments]):
                    continue
                for layout in ("contiguous", "channels_last"):
                    case = self.example(
                        batch=3, channels=9, height=5, width=7, variant=variant, wanted=wanted,
                        layouts=(layout, "contiguous"), kind="smooth",
                    )  # fmt: skip
                    self.check(backend, case)

    @every_backend
    def test_inputs_stay_and_outputs_are_their_own(self, backend: str) -> None:
        for variant in self.variants:
            for option in (True, False):
                case = self.example(variant=variant, option=option, height=1, width=1, channels=1)
                self._check_memory(backend, case)
                self._check_memory(backend, self.example(variant=variant, option=option))

    def _check_memory(self, backend: str, case: Case) -> None:
        case = case.to(device_of(backend))
        leaves = [t.detach().requires_grad_() for t in case.tensors]
        before = [t.clone() for t in case.tensors]
        outputs = self.run(backend)(*leaves, **case.options)
        addresses = [set(storages([o])) for o in [*outputs, *case.tensors]]
        for i, one in enumerate(addresses):
            for another in addresses[i + 1 :]:
                assert not one & another, "outputs share memory with inputs or one another"
        pairs = [
            (o, c.to(o.device, o.dtype))
            for o, c in zip(outputs, case.cotangents, strict=True)
            if c is not None and o.requires_grad
        ]
        kept_outputs = [o.detach().clone() for o in outputs]
        kept = [c.clone() for _, c in pairs]
        found = torch.autograd.grad([o for o, _ in pairs], leaves, [c for _, c in pairs])
        given = storages([*outputs, *case.tensors, *(c for _, c in pairs)])
        assert not set(storages(found)) & set(given), "a gradient shares memory with an input"
        for tensor, copy in zip(case.tensors, before, strict=True):
            assert identical(tensor, copy), "an input was written"
        for (_, cotangent), copy in zip(pairs, kept, strict=True):
            assert identical(cotangent, copy), "a cotangent was written"
        for output, copy in zip(outputs, kept_outputs, strict=True):
            assert identical(output, copy), "the backward wrote an output"

    @every_backend
    def test_bytes_saved_for_backward(self, backend: str) -> None:
        for variant in self.variants:
            for option in (True, False):
                for wanted in ((True, True), (True, False), (False, True), (False, False)):
                    case = self.example(
                        channels=16, variant=variant, option=option, wanted=wanted[: self.arguments]
                    )
                    case = case.to(device_of(backend))
                    got = self.measure_saved(backend, case)
                    expected = self.saved_bytes(case) if any(case.wanted) else 0
                    assert got == expected, f"{case}: saved {got} bytes, needs {expected}"

    def measure_saved(self, backend: str, case: Case) -> int:
        saved: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        leaves = [
            t.detach().requires_grad_(wanted)
            for t, wanted in zip(case.tensors, case.wanted, strict=True)
        ]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = self.run(backend)(*leaves, **case.options)
        found = sum(storages(saved).values())
        del outputs
        return found

    # ---- determinism ----

    @every_backend
    def test_deterministic(self, backend: str) -> None:
        """Bit for bit over repeats; the C++ kernels over thread counts too (PyTorch's may not)."""
        small = backend == "triton"
        for variant in self.variants:
            case = self.example(
                batch=2, channels=24 if small else 300, height=5 if small else 14, width=7,
                variant=variant, kind="smooth",
            )  # fmt: skip
            case = case.to(device_of(backend))
            first = derivatives(self.run(backend), case, 1)
            threads = (1, 2, 1) if backend == "cpu" else (torch.get_num_threads(),) * 2
            for count in threads:
                torch.set_num_threads(count)
                again = derivatives(self.run(backend), case, 1)
                for label, values in first.items():
                    assert torch.equal(values, again[label]), f"{label} at {count} threads"

    # ---- only what is wanted ----

    @every_backend
    def test_only_wanted_cotangents_are_computed(
        self, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[tuple[Any, ...], Any]] = []
        original = _chain.implementation

        def spy(op: str, kernel: str, name: str) -> Callable[..., Any]:
            assert name == backend, f"{kernel} ran on {name}"
            function = original(op, kernel, name)

            def wrapped(*args: Any) -> Any:
                result = function(*args)
                if kernel.endswith("_bwd"):
                    seen.append((args, result))
                return result

            return wrapped

        monkeypatch.setattr(_chain, "implementation", spy)
        for variant in self.variants:
            for wanted in ((True, True), (True, False), (False, True)):
                if not any(wanted[: self.arguments]):
                    continue
                case = self.example(variant=variant, wanted=wanted[: self.arguments])
                seen.clear()
                derivatives(self.run(backend), case.to(device_of(backend)), 1)
                assert len(seen) == 1, f"{len(seen)} backward kernels"
                self.check_wanted(case, *seen[0])
        seen.clear()
        case = self.example(wanted=(False,) * self.arguments)
        derivatives(self.run(backend), case.to(device_of(backend)), 1)
        assert not seen

    def check_wanted(self, case: Case, arguments: tuple[Any, ...], result: Any) -> None:
        """Arguments and result of the one backward kernel that ran."""
        raise NotImplementedError
