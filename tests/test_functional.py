"""The public functions: bad input, checks, agreement with their parts, doctests."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import camkernels as ck

A = torch.rand(2, 3, 4, 5)
G = torch.randn(2, 3, 4, 5)
W = torch.randn(2, 3)
WITH_GRADIENTS = [ck.grad_cam, ck.cam_statistics]
WITH_WEIGHTS = [ck.class_activation_map, lambda a, w: ck.cam_statistics(a, weights=w)]
OF_MAPS = [ck.map_statistics, ck.cam_entropy, ck.cam_area, ck.cam_dispersion]


@pytest.fixture
def checks() -> Iterator[None]:
    ck.set_checks(True)
    yield
    ck.set_checks(False)


BAD_GRADIENTS = [
    (A[0], G[0], ValueError, r"activations: expected shape \(B, K, h, w\), got \(3, 4, 5\)"),
    (A, G[0], ValueError, r"gradients: expected shape \(B, K, h, w\)"),
    (A, G[:, :2], ValueError, r"gradients: expected the shape of activations.*\(2, 2, 4, 5\)"),
    (A, G[..., :3], ValueError, r"gradients: expected the shape of activations.*\(2, 3, 4, 3\)"),
    (A, G[:1], ValueError, r"gradients: expected the shape of activations.*\(1, 3, 4, 5\)"),
    (A.int(), G, TypeError, r"activations: expected float32.*got torch.int32"),
    (A, G.long(), TypeError, r"gradients: expected float32.*got torch.int64"),
    (A.bool(), G, TypeError, r"activations: expected float32.*got torch.bool"),
    (A.to(torch.complex64), G, TypeError, r"activations: expected float32"),
    (
        A,
        G.to("meta"),
        ValueError,
        r"gradients: expected on the device of activations, cpu, got meta",
    ),
    (A.to("meta"), G, ValueError, r"expected on the device of activations, meta, got cpu"),
    (A.double(), G, TypeError, r"gradients: float64 goes with float64 only, got torch.float32"),
    (A, G.double(), TypeError, r"gradients: float64 goes with float64 only, got torch.float64"),
    (A.to_sparse(), G, TypeError, r"activations: expected a dense"),
    (A, G.to_sparse(), TypeError, r"gradients: expected a dense"),
    (A[:, :, :0], G[:, :, :0], ValueError, r"activations: only the batch may be empty"),
    (A[:, :0], G[:, :0], ValueError, r"activations: only the batch may be empty"),
    (A.numpy(), G, TypeError, r"activations: expected a tensor \(B, K, h, w\), got ndarray"),
    (A, None, (TypeError, ValueError), r"gradients"),
]


@pytest.mark.parametrize("function", WITH_GRADIENTS)
@pytest.mark.parametrize(("a", "g", "error", "message"), BAD_GRADIENTS)
def test_bad_activations_and_gradients(
    function: Callable[..., object], a: Tensor, g: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(a, g)


@pytest.mark.parametrize("function", WITH_WEIGHTS)
@pytest.mark.parametrize(
    ("w", "error", "message"),
    [
        (G, ValueError, r"weights: expected shape \(B, K\)"),
        (W[0], ValueError, r"weights: expected shape \(B, K\), got \(3,\)"),
        (
            W[:, :2],
            ValueError,
            r"weights: expected \(B, K\) = \(2, 3\) of activations, got \(2, 2\)",
        ),
        (W[:1], ValueError, r"weights: expected \(B, K\) = \(2, 3\) of activations, got \(1, 3\)"),
        (W.int(), TypeError, r"weights: expected float32.*got torch.int32"),
        (W.double(), TypeError, r"weights: float64 goes with float64 only"),
        (
            W.to("meta"),
            ValueError,
            r"weights: expected on the device of activations, cpu, got meta",
        ),
        (W.to_sparse(), TypeError, r"weights: expected a dense"),
    ],
)
def test_bad_weights(
    function: Callable[..., object], w: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(A, w)


@pytest.mark.parametrize("function", OF_MAPS)
@pytest.mark.parametrize(
    ("maps", "error", "message"),
    [
        (A, ValueError, r"maps: expected shape \(B, h, w\), got \(2, 3, 4, 5\)"),
        (A[0, 0], ValueError, r"maps: expected shape \(B, h, w\), got \(4, 5\)"),
        (A[0].int(), TypeError, r"maps: expected float32.*got torch.int32"),
        (A[0].to_sparse(), TypeError, r"maps: expected a dense"),
        (A[0, :, :0], ValueError, r"maps: only the batch may be empty, got shape \(3, 0, 5\)"),
        ([[1.0]], TypeError, r"maps: expected a tensor \(B, h, w\), got list"),
    ],
)
def test_bad_maps(
    function: Callable[..., object], maps: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(maps)


def test_exactly_one_of_gradients_and_weights() -> None:
    with pytest.raises(ValueError, match="exactly one of gradients and weights"):
        ck.cam_statistics(A)
    with pytest.raises(ValueError, match="exactly one of gradients and weights"):
        ck.cam_statistics(A, G, weights=W)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_values_do_not_crash(bad: float) -> None:
    for a, g in ((A.clone(), G.clone()), (A.clone(), G.clone())):
        a[0, 0, 0, 0] = bad
        a.requires_grad_()
        statistics, maps = ck.cam_statistics(a, g, relu=False, return_maps=True)
        (maps.sum() + statistics.entropy.sum() + statistics.area.sum()).backward()
        assert not bool(maps[0].isfinite().all())
        assert bool(maps[1].isfinite().all())


def test_checks_raise_on_bad_values(checks: None) -> None:
    maps = torch.rand(2, 3, 3)
    ck.map_statistics(maps)
    for bad in (math.nan, math.inf):
        spoilt = maps.clone()
        spoilt[1, 2, 0] = bad
        with pytest.raises(ValueError, match=r"maps: NaN or infinite values"):
            ck.map_statistics(spoilt)
    with pytest.raises(ValueError, match="negative values have no entropy"):
        ck.cam_entropy(-maps)
    ck.cam_entropy(-maps, clamp=True)
    spoilt_gradients = G.clone()
    spoilt_gradients[0] = math.nan
    for function in WITH_GRADIENTS:
        with pytest.raises(ValueError, match="NaN or infinite"):
            function(A, spoilt_gradients)


def test_checks_raise_on_dead_maps_where_asked(checks: None) -> None:
    dead = torch.zeros(3, 2, 2)
    ck.map_statistics(dead)
    ck.set_checks(True, dead_maps=True)
    with pytest.raises(ValueError, match="3 all-zero maps"):
        ck.map_statistics(dead)


def test_no_check_unless_asked() -> None:
    ck.map_statistics(torch.full((1, 2, 2), math.nan))


def test_live_tells_dead_maps() -> None:
    maps = torch.rand(3, 4, 4)
    maps[1] = 0
    assert ck.map_statistics(maps).live.tolist() == [True, False, True]


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_the_functions_agree_with_their_parts(name: str) -> None:
    with ck.backend(name):  # type: ignore[arg-type]
        maps = ck.grad_cam(A, G)
        pooled = ck.class_activation_map(A, G.mean((2, 3)))
        torch.testing.assert_close(maps, pooled)
        whole = ck.map_statistics(maps)
        fused, fused_maps = ck.cam_statistics(A, G, return_maps=True)
        torch.testing.assert_close(fused_maps, maps)
        for one, other in zip(fused, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert torch.equal(ck.cam_entropy(maps), whole.entropy)
        assert torch.equal(ck.cam_area(maps), whole.area)
        assert torch.equal(ck.cam_dispersion(maps), whole.dispersion)
        torch.testing.assert_close(
            ck.cam_entropy(maps, normalize=True), whole.entropy / math.log(20)
        )


def test_normalised_entropy_of_one_pixel_is_zero() -> None:
    assert ck.cam_entropy(torch.ones(2, 1, 1), normalize=True).tolist() == [0.0, 0.0]


def test_empty_batch() -> None:
    a = A[:0].clone().requires_grad_()
    statistics, maps = ck.cam_statistics(a, G[:0], return_maps=True)
    assert maps.shape == (0, 4, 5)
    assert statistics.covariance.shape == (0, 2, 2)
    (statistics.entropy.sum() + maps.sum()).backward()
    assert a.grad is not None
    assert a.grad.shape == a.shape


def modules() -> list[str]:
    found = pkgutil.walk_packages(ck.__path__, "camkernels.")
    return sorted(m.name for m in found if not m.name.endswith(("triton", "_cpu", "cpu")))


@pytest.mark.parametrize("name", ["camkernels", *modules()])
def test_doctests(name: str) -> None:
    if name.rpartition(".")[2].startswith("_triton"):
        pytest.skip("imports triton, which is optional")
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert not failed
