"""The calls whose kernels triton_aot.py compiles: every op, layout, dtype that changes the code."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from camkernels.ops.max_pool.reference import Window

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Case(NamedTuple):
    """One call of an op; ``wanted`` says which cotangents its backward makes.

    Of cam_weights: ``pooled`` with eps; of cam_pixels: LayerCAM with a ReLU, or HiResCAM without.
    Of batch_norm_relu, relu and max_pool, all kernels: ``pooled`` with residual, mask and all that
    is optional, or with none of it (max_pool: two windows). Of warp: ``pooled`` where boxes are
    counted in pixels of another size than the source's. Of ssim and warped_ssim: ``pooled`` for
    the usual window, or for long ones; shape is that of the maps.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "nchw"  # or channels_last, sliced
    pooled: bool = True
    wanted: str = "both"  # or activations, weights
    relu: bool = True


SPLIT, WHOLE = (2, 512, 28, 28), (600, 512, 14, 14)
CAM = (
    (WHOLE, "float32", "nchw", True),
    (SPLIT, "float32", "nchw", False),
    (SPLIT, "float32", "channels_last", True),
    (WHOLE, "bfloat16", "nchw", False),
    (SPLIT, "bfloat16", "channels_last", True),
    (WHOLE, "float16", "channels_last", False),
    # One element a load, hence most addresses: the first to spill.
    ((20, 2048, 7, 7), "float32", "nchw", True),
    ((20, 2048, 6, 6), "bfloat16", "sliced", False),
)
MAPS = (
    Case("map_statistics", (64, 6, 6)),
    Case("map_statistics", (64, 28, 28), "bfloat16", relu=False),
    Case("map_statistics", (64, 14, 14), "float16", "sliced"),
)
# Every vector width, ragged rows, the most registers (what is optional, in float32).
NETWORK = (
    ((64, 256, 14, 14), "bfloat16", "channels_last", True),
    ((64, 64, 56, 56), "float32", "channels_last", True),
    ((64, 64, 56, 56), "float32", "nchw", False),
    ((64, 512, 7, 7), "float16", "nchw", True),
)
# The stem of ResNets (``pooled``), and a window of many taps.
POOLING = (
    ((64, 64, 112, 112), "float32", "nchw", True),
    ((64, 64, 112, 112), "bfloat16", "channels_last", True),
    ((20, 512, 13, 13), "float16", "nchw", False),
)
# Registers grow with a tile's pixels, and of warped_ssim with the pixels of the maps.
SIMILARITY = (
    ("warp", (8, 3, 224, 224), "float32", "nchw", True),
    ("warp", (8, 3, 224, 224), "bfloat16", "channels_last", False),
    ("warp", (8, 1, 1, 1), "float16", "sliced", True),
    ("ssim", (8, 3, 224, 224), "float32", "nchw", True),
    ("ssim", (8, 3, 224, 224), "float32", "sliced", False),
    ("ssim", (8, 1, 40, 1), "bfloat16", "channels_last", True),
    ("warped_ssim", (64, 14, 14), "float32", "nchw", True),
    ("warped_ssim", (64, 14, 14), "bfloat16", "sliced", False),
    ("warped_ssim", (8, 30, 20), "float32", "nchw", True),
    ("warped_ssim", (8, 64, 64), "float32", "nchw", True),
    ("warped_ssim", (8, 64, 64), "float32", "nchw", False),
    ("warped_ssim", (8, 1, 1), "float16", "nchw", True),
    ("min_max", (64, 14, 14), "float32", "nchw", True),
    ("min_max", (8, 100, 77), "bfloat16", "sliced", True),
    ("lp_norm", (8, 3, 224, 224), "float32", "nchw", False),
    ("lp_norm", (64, 14, 13), "bfloat16", "sliced", False),
    ("lp_norm", (64, 14, 14), "bfloat16", "sliced", True),
    ("lp_norm", (8, 64, 64), "float32", "nchw", True),
)

METHODS = (
    ((64, 512, 14, 14), "float32", "nchw", True),
    ((64, 512, 14, 14), "bfloat16", "channels_last", True),
    ((20, 2048, 7, 7), "float32", "sliced", False),
)

# One of each op, and what once spilled: kernels with dot products take many seconds to compile.
FEW_SIMILARITY = (0, 3, 5, 6, 12, 13, 14, 16)
FEWEST_SIMILARITY = (0, 3, 6, 12, 14, 16)


# Compiled in full by default; of the others what takes the most registers, and every kernel.
MAIN = 90
# Groups of benchmarks/kernels.py.
TABLES = ("table", "few")


def default_cases(few: bool) -> Iterator[Case]:
    yield from MAPS[:1] if few else MAPS
    # whole and split, the most addresses
    for op, case in itertools.product(
        ("cam", "cam_statistics"), (CAM[0], CAM[2], CAM[7]) if few else CAM
    ):
        yield Case(op, *case)
    for case in (NETWORK[1],) if few else NETWORK:
        yield Case("batch_norm_relu", *case)
    yield from (Case("relu", (64, 64, 56, 56), dtype) for dtype in ("float32", "bfloat16"))
    yield Case("gradient_error", (8, 3, 224, 224))
    for case in POOLING[:1] if few else POOLING:
        yield Case("max_pool", *case)
    for op, *rest in (SIMILARITY[i] for i in (FEWEST_SIMILARITY if few else FEW_SIMILARITY)):
        yield Case(op, *rest)  # type: ignore[arg-type]
    for op, case in itertools.product(
        ("cam_weights", "cam_pixels"), METHODS[2:] if few else METHODS
    ):
        yield Case(op, *case)


def cases(group: str, capability: int = MAIN) -> Iterator[Case]:
    if group in ("default", "table"):
        yield from default_cases(few=group == "default" and capability != MAIN)
        return
    if group == "few":  # quick to compile: elementwise, sums, and a kernel of the maps
        yield Case("relu", (64, 64, 56, 56), "bfloat16")
        yield Case("batch_norm_relu", *NETWORK[1])
        yield MAPS[0]
        return
    yield from MAPS
    shapes = (SPLIT, WHOLE, (20, 2048, 6, 6), (600, 30, 7, 7), (1, 3, 224, 224), (2, 1, 1, 1))
    layouts = ("nchw", "channels_last", "sliced")
    for op, shape, dtype, layout, pooled in itertools.product(
        ("cam", "cam_statistics"), shapes, DTYPES, layouts, (True, False)
    ):
        for wanted in ("both", "activations", "weights") if shape == SPLIT else ("both",):
            yield Case(op, shape, dtype, layout, pooled, wanted, relu=shape != WHOLE)
    shapes = ((64, 64, 56, 56), (64, 2048, 7, 7), (2, 100, 14, 14), (64, 3, 224, 224), (9, 5, 1, 1))
    for shape, dtype, layout, pooled in itertools.product(
        shapes, DTYPES, ("nchw", "channels_last"), (True, False)
    ):
        yield Case("batch_norm_relu", shape, dtype, layout, pooled)
    for shape, dtype in itertools.product(((64, 64, 56, 56), (3, 5, 7, 9)), DTYPES):
        yield Case("relu", shape, dtype)
    shapes = ((64, 64, 112, 112), (20, 512, 13, 13), (9, 5, 7, 6))
    for shape, dtype, layout, pooled in itertools.product(
        shapes, DTYPES, ("nchw", "channels_last"), (True, False)
    ):
        yield Case("max_pool", shape, dtype, layout, pooled)
    shapes = ((64, 512, 14, 14), (20, 2048, 7, 7), (8, 3, 224, 224), (2, 1, 1, 1))
    for op, shape, dtype, layout, pooled in itertools.product(
        ("cam_weights", "cam_pixels"), shapes, DTYPES, layouts, (True, False)
    ):
        yield Case(op, shape, dtype, layout, pooled)
    for (op, shape, *_), dtype, layout, pooled in itertools.product(
        SIMILARITY, DTYPES, ("nchw", "channels_last", "sliced"), (True, False)
    ):
        if len(shape) == 4 or layout != "channels_last":
            yield Case(op, shape, dtype, layout, pooled)


def make(shape: tuple[int, ...], dtype: str, layout: str) -> Tensor:
    """An uninitialised tensor; its memory is never touched."""
    if layout == "sliced":
        wide = torch.empty((*shape[:-1], 2 * shape[-1] + 1), dtype=DTYPES[dtype])
        return wide[..., 1::2]
    if layout == "channels_last":
        return torch.empty(shape, dtype=DTYPES[dtype], memory_format=torch.channels_last)
    return torch.empty(shape, dtype=DTYPES[dtype])


def call_cam_weights(case: Case, backend: Any) -> None:
    a, g = (make(case.shape, case.dtype, case.layout) for _ in "ag")
    weights = torch.empty(case.shape[:2])
    for method in ("gradcam++", "xgradcam"):
        backend.cam_weights_fwd(a, g, method, 1e-6 if case.pooled else 0.0)
        for wanted in ((True, True), (True, False), (False, True)):
            backend.cam_weights_bwd(weights, a, g, method, 1e-6 if case.pooled else 0.0, *wanted)


def call_cam_pixels(case: Case, backend: Any) -> None:
    a, g = (make(case.shape, case.dtype, case.layout) for _ in "ag")
    maps = torch.empty((case.shape[0], *case.shape[2:]))
    backend.cam_pixels_fwd(a, g, case.pooled, case.pooled)
    for wanted in ((True, True), (True, False), (False, True)):
        backend.cam_pixels_bwd(maps, a, g, maps if case.pooled else None, case.pooled, *wanted)


def call_relu(case: Case, backend: Any) -> None:
    u = make(case.shape, case.dtype, case.layout)
    for want_mask in (True, False):
        v, mask = backend.relu_fwd(u, True, want_mask)
        backend.relu_bwd(u, mask if want_mask else v, want_mask)


def call_batch_norm_relu(case: Case, backend: Any) -> None:
    z, rich = make(case.shape, case.dtype, case.layout), case.pooled
    residual, vector = z if rich else None, torch.empty(case.shape[1])
    norms, sums = (vector,) * 4, torch.empty(3, case.shape[1])
    backend.bn_stats(z)
    _, mask = backend.bn_fwd(z, *norms, residual, True, rich)
    backend.bn_bwd_reduce(z, z, *norms, mask, True, rich)
    backend.bn_bwd(z, z, *norms, mask, sums[:2], 0.1, True, rich, rich, residual, rich)
    backend.bn_bwd_bwd_reduce(z, z, z, vector, vector)
    cotangents = (vector, vector) if rich else (None, None)
    backend.bn_bwd_bwd(
        z, residual, z, z, *norms, mask, sums[:2], sums, 0.1, *cotangents, True, rich
    )


def call_gradient_error(case: Case, backend: Any) -> None:
    delta = make(case.shape, case.dtype, case.layout)
    for error in backend.ERRORS:
        errors, statistics = backend.gradient_error_fwd(delta, delta, error)
        backend.gradient_error_bwd(errors, delta, delta, statistics, error)


def call_max_pool(case: Case, backend: Any) -> None:
    x, size = make(case.shape, case.dtype, case.layout), (case.shape[2], case.shape[3])
    stem, many = ((3, 3), (2, 2), (1, 1), (1, 1)), ((5, 5), (1, 1), (2, 2), (1, 1))
    window = Window(*(stem if case.pooled else many))
    y, positions = backend.max_pool_fwd(x, window)
    backend.max_pool_gather(x, positions, window)
    backend.max_pool_scatter(y, positions, window, size)


BOXES, FLIPS = torch.empty(64, 4, dtype=torch.int64), torch.empty(64, dtype=torch.bool)


def call_warp(case: Case, backend: Any) -> None:
    source, shape = make(case.shape, case.dtype, case.layout), case.shape[2:]
    boxes, flips, via = BOXES[: len(source)], FLIPS[: len(source)], (99, 77)
    out = backend.warp_fwd(source, boxes, flips, via if case.pooled else shape, (224, 224))
    backend.warp_bwd(out, boxes, flips, shape, via if case.pooled else shape)
    backend.warp_bwd(source, boxes, flips, (7, 7), via if case.pooled else (7, 7))


def similarity_options(case: Case, size: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    for length in (11,) if case.pooled else (33, 49):
        yield (*([1.0] * min(length, side) for side in size), 1e-4, 9e-4, True)


def call_ssim(case: Case, backend: Any) -> None:
    x = make(case.shape, case.dtype, case.layout)
    for options in similarity_options(case, case.shape[2:]):
        values = backend.ssim_fwd(x, x, *options)
        for want in ((True, True), (True, False), (False, True)):
            backend.ssim_bwd(values, x, x, *options, *want)


def call_warped_ssim(case: Case, backend: Any) -> None:
    maps = make(case.shape, case.dtype, case.layout)
    boxes, flips, size = BOXES[: len(maps)], FLIPS[: len(maps)], (224, 224)
    for window, via in itertools.product(similarity_options(case, size), (size, case.shape[1:])):
        options = (boxes, flips, via, size, *window)
        values = backend.warped_ssim_fwd(maps, maps, *options)
        for want in ((True, True), (True, False), (False, True)):
            backend.warped_ssim_bwd(values, maps, maps, *options, *want)


def call_min_max(case: Case, backend: Any) -> None:
    maps = make(case.shape, case.dtype, case.layout)
    out, extremes = backend.min_max_fwd(maps)
    backend.min_max_bwd(out, maps, extremes)
    backend.min_max_bwd(out.mT.contiguous().mT, maps, extremes)


def call_lp_norm(case: Case, backend: Any) -> None:
    values = make(case.shape, case.dtype, case.layout)
    size = [224, 224] if case.pooled and len(case.shape) == 3 else []
    for p in (0.0, 1.0, 2.0, 3.0, float("inf")):
        norms = backend.lp_norm_fwd(values, p, size)
        backend.lp_norm_bwd(norms, values, norms, p, size)


def call(case: Case) -> None:
    """Forward and backward of one case, as the ops call the backend."""
    backend = importlib.import_module(f"camkernels.ops.{case.op}.triton")
    own = {
        "relu": call_relu,
        "batch_norm_relu": call_batch_norm_relu,
        "gradient_error": call_gradient_error,
        "max_pool": call_max_pool,
        "warp": call_warp,
        "ssim": call_ssim,
        "warped_ssim": call_warped_ssim,
        "min_max": call_min_max,
        "lp_norm": call_lp_norm,
        "cam_weights": call_cam_weights,
        "cam_pixels": call_cam_pixels,
    }
    if case.op in own:
        own[case.op](case, backend)
        return
    statistics = importlib.import_module("camkernels.ops.map_statistics.triton")
    batch = case.shape[0]
    grads = (*(torch.empty(1).expand(batch) for _ in range(3)), *(torch.empty(batch),) * 2)
    grads = (*grads, torch.empty(batch, 2), torch.empty(batch, 2, 2))
    if case.op == "map_statistics":
        maps = make(case.shape, case.dtype, case.layout)
        outputs = backend.map_statistics_fwd(maps, not case.relu)
        backend.map_statistics_bwd(maps, *outputs, *grads, not case.relu)
        return
    channels_last = case.layout == "channels_last"
    a = make(case.shape, case.dtype, case.layout)
    g = make(case.shape, case.dtype, case.layout) if case.pooled else torch.empty(case.shape[:2])
    maps, alpha, *rest = getattr(backend, f"{case.op}_fwd")(a, g, case.relu)
    alpha = alpha if case.pooled else g
    wanted = (
        None if case.wanted == "activations" else a,
        None if case.wanted == "weights" else alpha,
    )
    if case.op == "cam":
        masks = maps if case.relu else None
        backend.cam_bwd(torch.empty_like(maps), *wanted, masks, channels_last, a.dtype)
    else:
        used = grads if case.pooled else (grads[0], *(None,) * (statistics.COUNT - 1))
        grad_maps = torch.empty_like(maps) if case.pooled else None
        backend.cam_statistics_bwd(
            maps, *wanted, grad_maps, *rest[1:], *used, case.relu, channels_last, a.dtype
        )
