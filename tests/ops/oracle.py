"""Derivatives of a function of tensors, and the comparison of two sides with the truth.

Tolerance by oracle. The truth is the reference formula in float64 with plain autograd, on the very
values that the op gets (already rounded to its dtype). An implementation may be wrong by

    4 x the error of eager PyTorch running the same formula in the dtype of the op
  + 8 x what the truth moves by when every input moves by one rounding of the accumulating dtype
  + a few roundings of the result itself, and of the terms that cancel in it,

each the largest of its sample. The first term grants what the dtype costs anyone; the second what
is lost to an ill-conditioned input however it is computed (and keeps a lucky exact eager result
from setting a bound of zero); none depends on the problem's scale, so nothing is hidden by a big
number elsewhere, and a dropped term or factor is thousands of times the bound.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

EAGER_FACTOR = 4.0
CONDITION_FACTOR = 8.0
ROUNDINGS = 16.0
PERTURBATIONS = 3

LAYOUTS = (
    "contiguous",
    "expanded_batch",
    "expanded_second",
    "sliced",
    "transposed",
    "offset",
    "channels_last",
)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """``values`` in other strides; an expanded layout repeats its first entry."""
    values = values.detach()
    if layout == "channels_last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "expanded_batch":
        return values[:1].clone().expand(values.shape)
    if layout == "expanded_second" and values.dim() > 1:
        return values[:, :1].clone().expand(values.shape)
    if layout == "sliced":  # every other entry of a tensor twice as large in two dimensions
        index = tuple(slice(None, None, 2) if d in (0, values.dim() - 1) else slice(None)
                      for d in range(values.dim()))  # fmt: skip
        shape = [2 * n if d in (0, values.dim() - 1) else n for d, n in enumerate(values.shape)]
        return values.new_full(shape, float("nan"))[index].copy_(values)
    if layout == "transposed" and values.dim() > 1:
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "offset":
        storage = values.new_full((values.numel() + 5,), float("nan"))
        return storage[5:].view(values.shape).copy_(values)
    return values.contiguous().clone()


@dataclasses.dataclass
class Case:
    """One call: what goes in, which derivatives are asked for, with which cotangents."""

    tensors: tuple[Tensor, ...]
    """Differentiable arguments, in the dtype and strides that the op gets."""
    options: dict[str, bool]
    wanted: tuple[bool, ...]
    """Which of ``tensors`` require grad."""
    cotangents: tuple[Tensor | None, ...]
    """float64, one per output; None where the output is not used."""
    layout: str = "contiguous"
    """Of the cotangents."""
    units: tuple[float, ...] = ()
    """Size of the terms that an output is summed from, where it can be far less itself; an entropy
    of 0 is a sum of terms of about 1. Zero for outputs that cancel nothing."""
    left_out: frozenset[int] = frozenset()
    """Outputs that are not compared (the op's ``build`` says why, as a Hypothesis event)."""

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    def __repr__(self) -> str:  # what Hypothesis prints when a property fails
        parts = [f"{tuple(t.shape)} {t.dtype} strides {t.stride()}" for t in self.tensors]
        used = [c is not None for c in self.cotangents]
        return (
            f"Case({'; '.join(parts)}; {self.options}; wanted {self.wanted}; used {used}; "
            f"cotangents {self.layout}; left out {sorted(self.left_out)})"
        )

    def truth(self) -> Case:
        """The same values in float64."""
        return dataclasses.replace(self, tensors=tuple(t.double() for t in self.tensors))

    def perturbed(self, seed: int) -> Case:
        """In float64, every value moved by about one rounding of the accumulating dtype."""
        epsilon = torch.finfo(_accumulated(self.dtype)).eps
        generator = torch.Generator().manual_seed(seed)

        def move(values: Tensor) -> Tensor:
            noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
            return values.double() * (1 + epsilon * noise)

        return dataclasses.replace(
            self,
            tensors=tuple(move(t) for t in self.tensors),
            cotangents=tuple(
                None if c is None else move(lay_out(c, self.layout)) for c in self.cotangents
            ),
            layout="contiguous",
        )

    def to(self, device: str) -> Case:
        """On a device, strides kept."""
        if device == "cpu":
            return self
        moved = []
        for t in self.tensors:
            target = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device)
            moved.append(target.copy_(t) if 0 not in t.stride() else lay_out_like(t, device))
        return dataclasses.replace(self, tensors=tuple(moved))


def lay_out_like(tensor: Tensor, device: str) -> Tensor:
    """A stride-0 tensor on another device, still stride-0."""
    index = tuple(slice(0, 1) if s == 0 else slice(None) for s in tensor.stride())
    return tensor[index].to(device).expand(tensor.shape)


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def directions_for(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Signed random cotangents; quarters, which every dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(-12, 13, t.shape, generator=generator) / 4).to(t.device, t.dtype)
        for t in tensors
    ]


def derivatives(
    function: Callable[..., Sequence[Tensor]], case: Case, order: int
) -> dict[str, Tensor]:
    """Outputs of ``function`` and their derivatives up to ``order``, by name.

    The first order goes to the wanted tensors. Each further order contracts the one before with
    fixed random directions and goes to the wanted tensors and to the cotangents.
    """
    leaves = [
        t.detach().requires_grad_(wanted)
        for t, wanted in zip(case.tensors, case.wanted, strict=True)
    ]
    outputs = function(*leaves, **case.options)
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if order == 0 or not any(case.wanted):
        return results
    used = [
        (o, lay_out(c.to(o.device, o.dtype), case.layout).requires_grad_(order > 1))
        for o, c in zip(outputs, case.cotangents, strict=True)
        if c is not None and o.requires_grad
    ]
    if not used:
        return results
    sources = [leaf for leaf in leaves if leaf.requires_grad]
    values, weights = [o for o, _ in used], [c for _, c in used]
    for level in range(1, order + 1):
        further = level < order
        found = torch.autograd.grad(
            values,
            sources,
            weights,
            create_graph=further,
            allow_unused=True,
            materialize_grads=True,
        )
        results.update({f"order {level}, {i}": g.detach() for i, g in enumerate(found)})
        if level == 1:
            sources = [*sources, *weights]
        pairs = zip(found, directions_for(found, 100 + level), strict=True)
        chosen = [(g, d) for g, d in pairs if g.requires_grad]
        if not chosen:
            break
        values, weights = [g for g, _ in chosen], [d for _, d in chosen]
    return results


def _per_sample(error: Tensor) -> Tensor:
    """The largest entry of each sample, shaped so that it broadcasts."""
    if error.dim() == 0 or error.numel() == 0:
        return error
    return (
        error.flatten(1).amax(1).view(-1, *(1,) * (error.dim() - 1)) if error.dim() > 1 else error
    )


def _sample_maximum(values: Tensor) -> Tensor:
    finite = values.detach().double().abs().nan_to_num(0.0, 0.0, 0.0)
    return finite.flatten(1).amax(1) if finite.dim() > 1 and finite.numel() else finite.view(-1)


def magnitudes(case: Case, truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """Size (B,) of the terms that each derivative is summed from, by homogeneity: a derivative to x
    is a sum of terms about as large as the function over x."""
    directions = 3.0  # see directions_for
    units = case.units or (0.0,) * len(case.cotangents)
    outputs = [_sample_maximum(truth[f"output {i}"]) + unit for i, unit in enumerate(units)]
    sizes = {f"output {i}": size for i, size in enumerate(outputs)}
    used = [i for i, c in enumerate(case.cotangents) if c is not None]
    cotangents = {i: _sample_maximum(case.cotangents[i]) for i in used}  # type: ignore[arg-type]
    function = sum((cotangents[i] * outputs[i] for i in used), torch.zeros(()))
    sources = [
        _sample_maximum(t) for t, wanted in zip(case.tensors, case.wanted, strict=True) if wanted
    ]
    for level in (1, 2, 3):
        over = [torch.where(s > 0, function / s, 0.0) for s in sources]
        sizes.update({f"order {level}, {i}": size for i, size in enumerate(over)})
        if level == 1:
            sources = [*sources, *cotangents.values()]
        function = sum((directions * size for size in over), torch.zeros(()))
    return sizes


def assert_close_to_truth(
    label: str,
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    moved: Sequence[Tensor],
    terms: Tensor | None = None,
) -> None:
    """``actual`` is within the bound of the module's docstring, NaN and Inf where the truth is."""
    assert actual.shape == truth.shape, f"{label}: shape {actual.shape}, expected {truth.shape}"
    assert actual.dtype == eager.dtype, f"{label}: {actual.dtype}, expected {eager.dtype}"
    information = torch.finfo(actual.dtype)
    got, expected = actual.cpu().double(), truth
    rounded = expected.to(actual.dtype)
    finite = rounded.isfinite()
    same = torch.equal(got.isnan(), expected.isnan())
    counts = f"{int(got.isnan().sum())} of {got.numel()}, expected {int(expected.isnan().sum())}"
    assert same, f"{label}: NaN at other entries: {counts}"
    # Beyond the range of the dtype: Inf, or the largest number if rounding fell short of it.
    over = ~finite & ~expected.isnan()
    assert bool((got[over].abs() >= 0.99 * information.max).all()), f"{label}: overflow not seen"
    assert torch.equal(got[over].sign(), expected[over].sign()), f"{label}: sign of overflow"

    zero = torch.zeros((), dtype=torch.float64)
    reference = torch.where(finite, expected, zero)
    eager_error = torch.where(finite, eager.cpu().double() - reference, zero).abs()
    eager_error = torch.where(eager_error.isfinite(), eager_error, zero)
    condition = torch.zeros_like(reference)
    for other in moved:
        change = torch.where(finite, other - reference, zero).abs()
        condition = torch.maximum(condition, torch.where(change.isfinite(), change, zero))
    accumulated = torch.finfo(_accumulated(actual.dtype))
    bound = (
        EAGER_FACTOR * _per_sample(eager_error)
        + CONDITION_FACTOR * _per_sample(condition)
        + ROUNDINGS * accumulated.eps * _per_sample(reference.abs())
        + information.eps * reference.abs()
        + 4 * information.tiny * (information.eps if actual.dtype == torch.float16 else 1)
    )
    if terms is not None and reference.numel():
        # From the second order on autograd sums several paths, each rounded to the dtype.
        paths = 4 * information.eps if label.startswith(("order 2", "order 3")) else 0.0
        shape = (-1, *(1,) * (reference.dim() - 1))
        bound = bound + (ROUNDINGS * accumulated.eps + paths) * terms.view(shape)
    error = torch.where(finite, got - reference, zero).abs()
    wrong = ~(error <= bound)
    if bool(wrong.any()):
        worst = int((error / bound).nan_to_num(float("inf")).argmax())
        raise AssertionError(
            f"{label}: {int(wrong.sum())} of {wrong.numel()} entries out of bound; the worst, at "
            f"{worst}: got {got.flatten()[worst]:.8g}, truth {reference.flatten()[worst]:.8g}, "
            f"eager is off by {eager_error.flatten()[worst]:.3g}, allowed "
            f"{bound.broadcast_to(error.shape).flatten()[worst]:.3g}"
        )


def assert_as_good_as_eager(
    function: Callable[..., Sequence[Tensor]],
    formula: Callable[..., Sequence[Tensor]],
    case: Case,
    order: int,
    device: str = "cpu",
) -> None:
    """Outputs and derivatives of ``function`` against the float64 truth of ``formula``."""
    actual = derivatives(function, case.to(device), order)
    eager = derivatives(formula, case, order)
    truth = derivatives(formula, case.truth(), order)
    moved = [derivatives(formula, case.perturbed(seed), order) for seed in range(PERTURBATIONS)]
    assert actual.keys() == truth.keys(), f"{sorted(actual)} instead of {sorted(truth)}"
    terms = magnitudes(case, truth)
    for label, expected in truth.items():
        if label in {f"output {i}" for i in case.left_out}:
            continue
        assert_close_to_truth(
            f"{label} of {case}",
            actual[label],
            eager[label],
            expected,
            [m[label] for m in moved],
            terms[label],
        )


def identical(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, but that NaN equals NaN."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def storages(tensors: Sequence[Any]) -> dict[int, int]:
    """Bytes of each storage behind ``tensors``, by address."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def rounded(values: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
    """Values as a test gives them to an op."""
    return lay_out(values.to(dtype), layout)


def gradcheck_twice(function: Any, leaves: Sequence[Tensor]) -> None:
    """First and second order against differences: along random directions, which costs as many
    calls as there are leaves; by the thorough profile entry by entry."""
    fast = os.environ.get("HYPOTHESIS_PROFILE", "ci") == "ci"
    assert torch.autograd.gradcheck(function, leaves, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=fast)
