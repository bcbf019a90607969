"""The tests of the ops, tested: each wrong kernel below must turn the base checks red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.base import OpTests, device_of
from ops.test_cam import TestCam as CamTests
from ops.test_cam_statistics import TestCamStatistics as CamStatisticsTests
from ops.test_map_statistics import TestMapStatistics as MapStatisticsTests
from torch import Tensor

from camkernels import backends
from camkernels.ops import _chain
from camkernels.ops.map_statistics.reference import Statistics

for _tests in (CamTests, CamStatisticsTests, MapStatisticsTests):
    _tests.__test__ = False  # type: ignore[attr-defined]  # collected where they are defined
BACKEND = "triton" if backends.triton_interpreted() else "reference"
COUNT = len(Statistics._fields)
Kernel = Callable[..., Any]


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def change(edit: Callable[..., Any]) -> Callable[[Kernel], Kernel]:
    """A kernel whose results are edited."""

    def wrap(kernel: Kernel) -> Kernel:
        def changed(*arguments: Any) -> Any:
            result = kernel(*arguments)
            edited = tuple(edit(i, o) for i, o in enumerate(outputs(result)))
            return edited[0] if isinstance(result, Tensor) else edited

        return changed

    return wrap


def call_with(edit: Callable[[list[Any]], None]) -> Callable[[Kernel], Kernel]:
    """A kernel that is called with edited arguments."""

    def wrap(kernel: Kernel) -> Kernel:
        def changed(*arguments: Any) -> Any:
            edited = list(arguments)
            edit(edited)
            return kernel(*edited)

        return changed

    return wrap


def put(index: int, value: Any) -> Callable[[Kernel], Kernel]:
    def edit(arguments: list[Any]) -> None:
        arguments[index] = value

    return call_with(edit)


def scaled(index: int, factor: float) -> Callable[[Kernel], Kernel]:
    return change(lambda i, o: o * factor if i == index else o)


zeros = change(lambda i, o: torch.zeros_like(o))
unwritten = change(lambda i, o: torch.full_like(o, float("nan")))


def one_entry_missing(kernel: Kernel) -> Kernel:
    """The last entry of the first output is not reached, as by a wrong launch grid."""

    def drop(index: int, output: Tensor) -> Tensor:
        output = output.clone()
        if index == 0 and output.numel():
            output.view(-1)[-1] = 0
        return output

    return change(drop)(kernel)


MUTATIONS: list[tuple[type[OpTests], str, str, Callable[[Kernel], Kernel]]] = [
    (CamTests, "cam_fwd", "zeros", zeros),
    (CamTests, "cam_fwd", "unwritten", unwritten),
    (CamTests, "cam_fwd", "one entry missing", one_entry_missing),
    (CamTests, "cam_fwd", "no ReLU", put(2, False)),
    (CamTests, "cam_fwd", "wrong Z", scaled(0, 20 / 19)),
    (CamTests, "cam_fwd", "wrong alpha for the backward", scaled(1, 1.01)),
    (CamTests, "cam_bwd", "zeros", zeros),
    (CamTests, "cam_bwd", "unwritten", unwritten),
    (CamTests, "cam_bwd", "no mask", put(3, None)),
    (CamTests, "cam_bwd", "wrong cotangent of alpha", scaled(1, 1.001)),
    (CamTests, "cam_bwd", "wrong sign", scaled(0, -1.0)),
    (MapStatisticsTests, "map_statistics_fwd", "zeros", zeros),
    (MapStatisticsTests, "map_statistics_fwd", "unwritten", unwritten),
    (MapStatisticsTests, "map_statistics_fwd", "no clamp", put(1, False)),
    (MapStatisticsTests, "map_statistics_bwd", "zeros", zeros),
    (MapStatisticsTests, "map_statistics_bwd", "unwritten", unwritten),
    (MapStatisticsTests, "map_statistics_bwd", "no clamp", put(-1, False)),
    (CamStatisticsTests, "cam_statistics_fwd", "zeros", zeros),
    (CamStatisticsTests, "cam_statistics_fwd", "wrong total", scaled(2, 1.001)),
    (CamStatisticsTests, "cam_statistics_bwd", "zeros", zeros),
    (CamStatisticsTests, "cam_statistics_bwd", "unwritten", unwritten),
    (CamStatisticsTests, "cam_statistics_bwd", "no mask", put(-3, False)),
    (CamStatisticsTests, "cam_statistics_bwd", "cotangent of the maps dropped", put(3, None)),
]
MUTATIONS += [
    (MapStatisticsTests, "map_statistics_fwd", f"{name} off by 1e-4", scaled(i, 1 + 1e-4))
    for i, name in enumerate(Statistics._fields)
]
MUTATIONS += [
    (
        MapStatisticsTests,
        "map_statistics_bwd",
        f"cotangent of {n} dropped",
        put(1 + COUNT + i, None),
    )
    for i, n in enumerate(Statistics._fields)
]
MUTATIONS += [
    (
        CamStatisticsTests,
        "cam_statistics_bwd",
        f"cotangent of {n} dropped",
        put(4 + COUNT + i, None),
    )
    for i, n in enumerate(Statistics._fields)
]


def run_checks(tests: OpTests) -> None:
    for variant in tests.variants:
        for seed in (0, 1):
            tests.check(BACKEND, tests.example(variant=variant, seed=seed, channels=4), order=1)


@pytest.mark.parametrize("tests", [CamTests, MapStatisticsTests, CamStatisticsTests])
def test_checks_are_green_without_a_mutation(tests: type[OpTests]) -> None:
    run_checks(tests())


@pytest.mark.parametrize(
    ("tests", "kernel", "name", "mutation"), MUTATIONS, ids=[f"{m[1]}: {m[2]}" for m in MUTATIONS]
)
def test_a_wrong_kernel_is_seen(
    tests: type[OpTests],
    kernel: str,
    name: str,
    mutation: Callable[[Kernel], Kernel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = _chain.implementation

    def broken(op: str, wanted: str, backend: str) -> Kernel:
        function = original(op, wanted, backend)
        return mutation(function) if wanted == kernel else function

    monkeypatch.setattr(_chain, "implementation", broken)
    with pytest.raises(AssertionError):
        run_checks(tests())


def test_unwritten_memory_is_seen(
    poisoned_allocations: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The poison itself: a kernel that only allocates does not pass."""
    original = _chain.implementation

    def lazy(op: str, kernel: str, backend: str) -> Kernel:
        function = original(op, kernel, backend)
        allocate = change(lambda i, o: torch.empty_like(o))
        return allocate(function) if kernel == "cam_fwd" else function

    monkeypatch.setattr(_chain, "implementation", lazy)
    assert bool(torch.empty(3).isnan().all())
    assert bool(torch.ones(1).new_empty(3).isnan().all())
    with pytest.raises(AssertionError):
        run_checks(CamTests())


def test_a_written_cotangent_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _chain.implementation

    def writing(op: str, kernel: str, backend: str) -> Kernel:
        function = original(op, kernel, backend)

        def changed(*arguments: Any) -> Any:
            result = function(*arguments)
            if kernel == "cam_bwd":
                arguments[0].mul_(2)
            return result

        return changed

    monkeypatch.setattr(_chain, "implementation", writing)
    tests = CamTests()
    with pytest.raises(AssertionError, match="a cotangent was written"):
        tests._check_memory(BACKEND, tests.example().to(device_of(BACKEND)))


def test_a_kept_gradient_tensor_is_seen() -> None:
    """G kept for backward would be seen in the bytes saved."""
    tests = CamTests()
    case = tests.example(channels=16)
    activations, gradients = case.tensors
    kept = [activations, gradients, torch.empty(2, 16), torch.empty(2, 4, 5)]
    from ops.oracle import storages

    assert sum(storages(kept).values()) > tests.saved_bytes(case)
    assert tests.measure_saved(BACKEND, case.to(device_of(BACKEND))) == tests.saved_bytes(case)
