"""The six kernels of batch_norm_relu against their reference in float64."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from ops.base import device_of, every_backend, has_double, tested_backends
from ops.batch_norm_cases import DIMS, NAMES, Case, build, call, check
from torch import Tensor

from camkernels import backends
from camkernels.ops import _cpu_view, _layout
from camkernels.ops._chain import implementation
from camkernels.ops.batch_norm_relu import reference
from camkernels.ops.batch_norm_relu.reference import channelwise

every_kernel_backend = pytest.mark.parametrize(
    "backend", [b for b in tested_backends() if b != "reference"]
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SMALL = backends.triton_interpreted()


# ---- values ----


def cases(backend: str) -> st.SearchStrategy[Case]:
    dtypes = (*FLOATS, torch.float64) if has_double(backend) else FLOATS
    sizes = st.sampled_from([1, 2, 3, 7] if SMALL else [1, 2, 3, 7, 8, 9, 14])
    channels = st.sampled_from([1, 2, 5, 9] if SMALL else [1, 2, 3, 8, 15, 16, 17, 32, 63, 65])
    return st.builds(
        Case,
        shape=st.tuples(st.integers(0, 2 if SMALL else 3), channels, sizes, sizes),
        dtype=st.sampled_from(dtypes),
        channels_last=st.booleans(),
        affine=st.sampled_from(["none", "normal", "zero", "negative", "gamma", "beta"]),
        residual=st.booleans(),
        relu=st.booleans(),
        guided=st.booleans(),
        training=st.booleans(),
        scaled=st.booleans(),
        addend=st.booleans(),
        cotangents=st.booleans(),
        inplace=st.booleans(),
        reuse_prime=st.booleans(),
        seed=st.integers(0, 2**31),
    )


@every_kernel_backend
@hypothesis.given(data=st.data())
def test_values_equal_the_truth(backend: str, data: Any) -> None:
    check(backend, data.draw(cases(backend)))


# One vector and less, rows that end within one, many pixels in few planes, more than one task.
SHAPES = [
    (2, 3, 1, 1), (1, 1, 1, 1), (3, 1, 9, 7), (2, 63, 1, 1), (2, 8, 7, 9), (1, 19, 3, 21),
]  # fmt: skip
if not SMALL:
    SHAPES += [(1, 2, 80, 70), (2, 257, 5, 5), (4, 40, 33, 31), (1, 1, 1, 9000), (1, 4099, 3, 3)]


@every_kernel_backend
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend: str, shape: tuple[int, int, int, int], channels_last: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for residual in (False, True):
            check(
                backend,
                Case(shape, dtype, channels_last, residual=residual, cotangents=residual, seed=1),
            )


@pytest.mark.skipif("cpu" not in tested_backends(), reason="the C++ kernels are not tested here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_larger_tasks_of_large_tensors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from camkernels.ops.batch_norm_relu import cpu

    z = torch.empty(8, 40, 65, 63, dtype=dtype).contiguous(memory_format=torch.channels_last)
    usual = cpu._plan("bn_stats", z.shape, dtype, True).block
    # What shapes decide is remembered: neither the old block here, nor the new one afterwards.
    monkeypatch.setattr(cpu, "_plan", cpu._plan.__wrapped__)
    monkeypatch.setattr(cpu, "_TASKS", 1)
    assert cpu._plan("bn_stats", z.shape, dtype, True).block > usual
    check("cpu", Case(tuple(z.shape), dtype, True, seed=6))


OPTIONS = [
    {"guided": True}, {"guided": True, "residual": True}, {"relu": False},
    {"relu": False, "guided": True}, {"relu": False, "residual": True}, {"addend": True},
    {"scaled": False}, {"training": False}, {"training": False, "cotangents": True},
    {"cotangents": True, "residual": True}, {"inplace": True}, {"affine": "none"},
    {"affine": "zero"}, {"affine": "negative", "residual": True},
    {"inplace": True, "residual": True, "cotangents": True, "addend": True},
    {"reuse_prime": True}, {"reuse_prime": True, "inplace": True, "training": False},
]  # fmt: skip


@every_kernel_backend
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(map(str, o)))
def test_options(backend: str, options: dict[str, Any]) -> None:
    doubles = (torch.float64,) if has_double(backend) else ()
    for dtype in (torch.float32,) if SMALL else (*FLOATS, *doubles):
        for channels_last in (False, True):
            shape = (2, 11, 5, 7)
            check(backend, Case(shape, dtype, channels_last, seed=2, **options))


@every_kernel_backend
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("offset", [1e3, -1e4])
def test_large_mean(backend: str, offset: float, channels_last: bool) -> None:
    shape = (2, 5, 6, 9) if SMALL else (3, 19, 30, 41)
    check(backend, Case(shape, torch.float32, channels_last, offset=offset, seed=3))


@every_kernel_backend
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["first", "ramp", "constant", "step"])
def test_statistics_of_what_deceives(backend: str, kind: str, channels_last: bool) -> None:
    """Where the first values say nothing of the mean, or nothing varies."""
    pixels = (6, 10) if SMALL else (65, 70)
    z = torch.randn(2, 9, *pixels, generator=torch.Generator().manual_seed(4))
    flat = z.permute(1, 0, 2, 3).reshape(9, -1)
    if kind == "first":
        flat[:, :40] = 1e4
    elif kind == "ramp":
        flat += torch.arange(flat.shape[1]) * 10.0
    elif kind == "constant":
        flat.fill_(1234.5678)
    else:
        flat[:, flat.shape[1] // 2 :] += 1e4
    z = flat.reshape(9, 2, *pixels).permute(1, 0, 2, 3)
    z = z.contiguous(memory_format=_layout.memory_format(channels_last))
    mean, squares = reference.bn_stats(z.double())
    kernel = implementation("batch_norm_relu", "bn_stats", backend)
    got_mean, got_squares = (t.cpu().double() for t in kernel(z.to(device_of(backend))))
    assert bool(((got_mean - mean).abs() <= 1e-6 * z.double().abs().mean(DIMS)).all())
    count, eps = z.numel() / 9, torch.finfo(torch.float32).eps
    bound = 4e-6 * squares + count * (eps * mean).square()
    assert bool(((got_squares - squares).abs() <= bound).all())
    assert bool((got_squares >= 0).all())


# ---- signs ----


@every_kernel_backend
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_kernel_draws_the_same_line(backend: str, channels_last: bool) -> None:
    """Also where rounding decides about the sign of u, and in what is left over of a row."""
    generator = torch.Generator().manual_seed(5)
    shape = (2, 13, 5, 7) if SMALL else (2, 37, 9, 17)
    mean, rstd, gamma, beta = torch.randn(4, shape[1], generator=generator)
    rstd = rstd.abs()
    border = channelwise(mean - beta / (gamma * rstd))
    noise = torch.randint(-3, 4, shape, generator=generator) * 6e-8
    z = (border * (1 + noise)).contiguous(memory_format=_layout.memory_format(channels_last))
    device = device_of(backend)
    z, mean, rstd, gamma, beta = (t.to(device) for t in (z, mean, rstd, gamma, beta))
    run = functools.partial(implementation, "batch_norm_relu", backend=backend)
    a, mask = run("bn_fwd")(z, mean, rstd, gamma, beta, None, True, True)
    u, _ = run("bn_fwd")(z, mean, rstd, gamma, beta, None, False, False)
    line = reference.unpack_mask(mask, z)
    assert 0 < int(line.sum()) < line.numel()
    assert torch.equal(line, a > 0)
    assert torch.equal(line, u > 0)
    sums, ones = torch.zeros(2, shape[1], device=device), torch.ones_like(z)
    arguments = (z, mean, rstd, gamma, beta)
    for kept in (None, mask):
        g, residual = run("bn_bwd")(
            ones, *arguments, kept, sums, 0.0, True, False, False, None, True
        )
        assert torch.equal(line, g == 1)
        assert torch.equal(line, residual == 1)
        count = run("bn_bwd_reduce")(ones, *arguments, kept, True, False)[0]
        assert torch.equal(count, line.sum(DIMS).float())
        to_grad, _ = run("bn_bwd_bwd")(
            ones, None, ones, *arguments, kept, sums, torch.zeros(3, shape[1], device=device), 0.0,
            None, torch.full_like(mean, 100.0), True, False,
        )  # fmt: skip
        assert torch.equal(line, to_grad != 0)


# ---- bad values ----

FULL_SIZE = ("z", "grad", "residual", "addend", "grad_grad", "grad_grad_residual", "grad_prime")
ROWS = ("mean", "rstd", "gamma", "beta", "sums", "grad_sums", "c_gamma", "c_beta")


@every_kernel_backend
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_values_are_seen_where_the_reference_sees_them(
    backend: str, bad: float, channels_last: bool
) -> None:
    shape = (2, 5, 3, 5) if SMALL else (2, 11, 5, 7)
    run = functools.partial(implementation, "batch_norm_relu", backend=backend)
    dtypes = (torch.float32,) if SMALL else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        for residual in (False, True):
            clean = build(
                Case(shape, dtype, channels_last, residual=residual, addend=True, cotangents=True)
            )
            for field in (*FULL_SIZE, *ROWS):
                if getattr(clean, field) is None:
                    continue
                broken = clean.map(Tensor.clone)
                if field in FULL_SIZE:
                    getattr(broken, field)[1, 2, 1, 3] = bad
                else:
                    getattr(broken, field)[..., 2] = bad
                for name in NAMES:
                    got = call(run, name, broken.on(device_of(backend)))
                    expected = call(functools.partial(getattr, reference), name, broken)
                    for g, e in zip(got, expected, strict=True):
                        if g.is_floating_point():
                            same = torch.equal(g.cpu().isfinite(), e.isfinite())
                            assert same, f"{name}, {bad} in {field}, {dtype}, {residual}"


# ---- memory ----


@every_kernel_backend
@pytest.mark.usefixtures("poisoned_allocations")
def test_every_output_is_written(backend: str) -> None:
    shapes = [(2, 5, 3, 7), (2, 3, 1, 1)] if SMALL else [(2, 35, 9, 11), (2, 9, 65, 70)]
    for shape in shapes:
        for channels_last in (False, True):
            for residual in (False, True):
                check(backend, Case(shape, torch.float32, channels_last, residual=residual))


@every_kernel_backend
def test_inputs_stay(backend: str) -> None:
    run = functools.partial(implementation, "batch_norm_relu", backend=backend)
    for channels_last in (False, True):
        case = Case(
            channels_last=channels_last, residual=True, addend=True, cotangents=True, guided=True
        )
        given = build(case).on(device_of(backend))
        before = dataclasses.replace(given.map(Tensor.clone))
        fields = [f.name for f in dataclasses.fields(given)]
        owned = {t.data_ptr() for f in fields if isinstance(t := getattr(given, f), Tensor)}
        for name in NAMES:
            results = [r for r in call(run, name, given) if r.numel()]
            assert not owned & {r.data_ptr() for r in results}
            for field in fields:
                if isinstance(value := getattr(given, field), Tensor):
                    assert torch.equal(value, getattr(before, field)), f"{name} wrote {field}"


@every_backend
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("options", [(True, False), (False, True), (True, True)])
def test_memory_given_over_changes_no_bit(
    backend: str, options: tuple[bool, bool], channels_last: bool
) -> None:
    """The cotangent of g in the memory of h, and that of z in the memory of g'."""
    run = functools.partial(implementation, "batch_norm_relu", backend=backend)
    inplace, reuse_prime = options
    doubles = (torch.float64,) if has_double(backend) else ()
    # rows of whole vectors, and rows that end within one
    for shape in ((2, 5, 3, 7), (1, 8, 2, 4)) if SMALL else ((2, 11, 5, 7), (2, 64, 16, 16)):
        for dtype in (torch.float32, torch.bfloat16, *doubles):
            for residual in (False, True):
                case = Case(shape, dtype, channels_last, residual=residual, cotangents=residual)
                given = build(case).on(device_of(backend))
                apart = call(run, "bn_bwd_bwd", given)
                own = given.grad_grad.data_ptr(), given.grad_prime.data_ptr()
                assert [r.data_ptr() in own for r in apart] == [False, False]
                kept = given.map(Tensor.clone)
                results = implementation("batch_norm_relu", "bn_bwd_bwd", backend)(
                    given.grad_grad, given.grad_grad_residual, given.grad_prime, given.z,
                    *given.per_channel, given.mask, given.sums, given.grad_sums, given.inv_count,
                    given.c_gamma, given.c_beta, case.relu, inplace, reuse_prime,
                )  # fmt: skip
                for result, alone in zip(results, apart, strict=True):
                    assert torch.equal(result, alone)
                    assert result.stride() == given.z.stride()
                for given_over, result, name, place in zip(
                    options, results, ("grad_grad", "grad_prime"), own, strict=True
                ):
                    assert (result.data_ptr() == place) == given_over
                    if not given_over:
                        assert torch.equal(getattr(given, name), getattr(kept, name)), name
                for name in ("z", "mean", "rstd", "sums", "grad_sums", "grad_grad_residual"):
                    if getattr(given, name) is not None:
                        assert torch.equal(getattr(given, name), getattr(kept, name)), name


@every_backend
@pytest.mark.parametrize("channels_last", [False, True])
def test_empty_batch(backend: str, channels_last: bool) -> None:
    """Of nothing every sum, mean and deviation is 0, and no result is NaN."""
    run = functools.partial(implementation, "batch_norm_relu", backend=backend)
    case = Case((0, 5, 3, 4), channels_last=channels_last, residual=True)
    given = build(case).on(device_of(backend))
    for name in NAMES:
        for result in call(run, name, given):
            assert result.numel() == 0 or not bool(result.any()), name
    for result in call(run, "bn_stats", given):
        assert result.tolist() == [0.0] * 5


# ---- order of sums ----


@every_kernel_backend
@pytest.mark.parametrize("channels_last", [False, True])
def test_deterministic(backend: str, channels_last: bool) -> None:
    """Bit for bit over repeats; the C++ kernels over thread counts too."""
    run = functools.partial(implementation, "batch_norm_relu", backend=backend)
    shapes = [(2, 5, 3, 7)] if SMALL else [(4, 24, 40, 41), (1, 1, 200, 300), (3, 200, 9, 9)]
    for shape in shapes:
        for dtype in FLOATS[:1] if SMALL else FLOATS:
            given = build(Case(shape, dtype, channels_last, residual=True)).on(device_of(backend))
            for name in NAMES:
                results = []
                for threads in (1, 2, 3, 1):
                    torch.set_num_threads(threads)
                    results.append(call(run, name, given))
                for other in results[1:]:
                    assert all(map(torch.equal, results[0], other)), f"{name}, {shape}, {dtype}"


@pytest.mark.skipif(SMALL, reason="of the C++ kernels alone")
@pytest.mark.skipif(backends.unavailable_reason("cpu") is not None, reason="no C++ module")
@pytest.mark.parametrize("channels_last", [False, True])
def test_stores_past_the_caches(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = functools.partial(implementation, "batch_norm_relu", backend="cpu")
    for dtype in (*FLOATS, torch.float64):
        for shape in ((2, 64, 8, 16), (2, 32, 64, 65)):
            case = Case(shape, dtype, channels_last, residual=True, addend=True)
            for inplace in (False, True):
                for reuse_prime in (False, True):
                    given = build(
                        dataclasses.replace(case, inplace=inplace, reuse_prime=reuse_prime)
                    )
                    names = ("bn_fwd", "bn_bwd", "bn_bwd_bwd")
                    for name in names[2 - inplace :] if inplace or reuse_prime else names:
                        plain = call(run, name, given)
                        with monkeypatch.context() as patched:
                            patched.setattr(_cpu_view, "_STREAM_FROM", 0)
                            assert all(map(torch.equal, plain, call(run, name, given)))


@pytest.mark.skipif(SMALL, reason="of the C++ kernels alone")
@pytest.mark.skipif(backends.unavailable_reason("cpu") is not None, reason="no C++ module")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_larger_than_the_caches_give_over_their_memory(
    dtype: torch.dtype, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a size that is stored past the caches without a patch."""
    from camkernels.ops.batch_norm_relu import cpu as kernels  # where there is a C++ module

    shape = (2, 64, 256, 256 if dtype == torch.float32 else 512)
    layout = _layout.memory_format(channels_last)
    z = torch.empty(shape, dtype=dtype).normal_().contiguous(memory_format=layout)
    h, prime = z.flip(0).contiguous(memory_format=layout), (z * -0.5 + 1)
    mean, rstd, gamma, beta, *_ = rows = torch.randn(9, 64).unbind(0)
    rstd.abs_()
    sums, grad_sums = torch.stack(rows[4:6]), torch.stack(rows[6:9])
    streamed: list[bool] = []
    decide = kernels._streams
    monkeypatch.setattr(kernels, "_streams", lambda *a: streamed.append(decide(*a)) or streamed[-1])

    def run(inplace: bool, reuse_prime: bool) -> tuple[Tensor, Tensor]:
        return kernels.bn_bwd_bwd(
            h, None, prime, z, mean, rstd, gamma, beta, None, sums, grad_sums, 1e-3, None, None,
            True, inplace, reuse_prime,
        )  # fmt: skip

    assert z.numel() * z.itemsize >= _cpu_view._STREAM_FROM
    apart = run(False, False)
    to_grad, to_z = run(True, True)
    assert streamed == [True, True]
    assert (to_grad.data_ptr(), to_z.data_ptr()) == (h.data_ptr(), prime.data_ptr())
    assert torch.equal(to_grad, apart[0])
    assert torch.equal(to_z, apart[1])
