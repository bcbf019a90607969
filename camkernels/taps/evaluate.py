"""Grad-CAM maps and their statistics of a tapped forward, by closed form or by autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from camkernels import functional as F
from camkernels import modes
from camkernels.nn._kinds import is_sharded
from camkernels.taps.graph import STATIC_GRAPH, has_static_graph, obstacle
from camkernels.taps.head import ClosedFormHead
from camkernels.taps.modules import SHARDED
from camkernels.taps.tap import Tap, TapError
from camkernels.taps.targets import check_device

# Where reading the self-check would stall a GPU it is read at every so-manieth call only.
GUARD_EVERY = 64
ReshapeTransform = Callable[[Tensor], Tensor]
# Maps (B, h, w) of activations and gradients (B, K, h, w), which have one dtype.
Maps = Callable[[Tensor, Tensor], Tensor]
# Scores (B,) of logits (B, C).
ScoreFn = Callable[[Tensor], Tensor]


@dataclass
class Evaluation:
    """Maps (B, h, w) of one layer, and their statistics; connected to the user's graph."""

    statistics: F.MapStatistics
    maps: Tensor


class Evaluator:
    """Evaluates a tap's latest forward.

    Args:
        tap: where activations come from.
        relu: keep the positive part of the maps only.
        reshape_transform: tokens (B, N, D), or whatever the layer returns, to (B, K, h, w).
    """

    def __init__(self, tap: Tap, relu: bool, reshape_transform: ReshapeTransform | None) -> None:
        self.tap = tap
        self.relu = relu
        self.reshape_transform = reshape_transform
        self.maps: Maps | None = None
        """Another method than Grad-CAM."""
        self._held = False
        self._calls = 0
        self._deviation: Tensor | None = None

    def __call__(self, logits: Tensor, classes: Tensor | ScoreFn) -> list[Evaluation]:
        """One evaluation per tapped layer, for one class per sample, (B,) int64, or for scores."""
        activations = self.tap.activations()
        for name, tensor in zip(self.tap.names, activations, strict=True):
            if tensor.shape[0] != logits.shape[0]:
                raise TapError(
                    f"stale forward: layer {name!r} last saw a batch of {tensor.shape[0]}, the "
                    f"logits hold {logits.shape[0]}"
                )
        pairs = zip(activations, self.tap.names, strict=True)
        values = [spatial(a, name, self.reshape_transform) for a, name in pairs]
        head = None if self.reshape_transform is not None else self.tap.usable_head()
        with modes.no_autocast(logits.device):
            if head is not None:
                check_device(logits, activations[0].device)
                chosen = classes if isinstance(classes, Tensor) else _slopes(logits, classes)
                evaluation = self._by_closed_form(head, values[0], logits, chosen)
                if evaluation is not None:
                    return [evaluation]
            return self._by_autograd(activations, values, logits, classes)

    def check_device(self, logits: Tensor) -> None:
        """Raise unless maps and logits, of which a criterion makes one loss, are on one device."""
        check_device(logits, self.tap.activations()[0].device)

    def other_classes(self, logits: Tensor, classes: Tensor) -> tuple[F.MapStatistics, int, Tensor]:
        """Statistics of the maps of every class but ``classes``, one layer only.

        Returns:
            statistics of B * C maps, their number of pixels, and which maps count (B, C): those
            of all classes but the one given.
        """
        head = None if self.reshape_transform is not None else self.tap.usable_head()
        count = logits.shape[1]
        counted = torch.arange(count, device=logits.device)[None] != classes[:, None]
        with modes.no_autocast(logits.device):
            if head is None:
                maps = self._maps_of_all_classes_by_autograd(logits)
            else:
                (activations,) = self.tap.activations()
                maps = _maps_of_all_classes(head, activations, self.relu)
            return F.map_statistics(maps.flatten(0, 1)), maps.shape[2] * maps.shape[3], counted

    # -- closed form ---------------------------------------------------------------------------

    def _by_closed_form(
        self, head: ClosedFormHead, activations: Tensor, logits: Tensor, classes: Tensor
    ) -> Evaluation | None:
        """``classes``: (B,) int64, or d score / d logits (B, C)."""
        jacobian = head.jacobian(classes)
        weights = jacobian / (activations.shape[2] * activations.shape[3])
        statistics, maps, total = F.cam_statistics_and_total(
            activations, weights=weights, relu=self.relu
        )
        if not self._guard(head, jacobian, total, activations, logits, classes):
            return None
        if self.maps is not None:
            slopes = weights.to(activations.dtype)[:, :, None, None].expand_as(activations)
            return self._by_method(activations, slopes, 1.0)
        return Evaluation(statistics, maps)

    def _by_method(self, activations: Tensor, gradients: Tensor, scale: float) -> Evaluation:
        assert self.maps is not None
        if scale != 1.0:  # float16; unlike Grad-CAM other methods are not linear in the gradients
            activations, gradients = activations.float(), gradients.float() / scale
        maps = self.maps(activations, gradients)
        return Evaluation(F.map_statistics(maps), maps)

    @torch.no_grad()
    def _guard(
        self,
        head: ClosedFormHead,
        jacobian: Tensor,
        total: Tensor,
        activations: Tensor,
        logits: Tensor,
        classes: Tensor,
    ) -> bool:
        """Hold sum_ij L_ij + b_c = y_c against the logits that the user passed.

        It breaks on a wrong head, active dropout, a stale forward and altered activations. Where
        reading it would stall a GPU it is read on the first call, at every ``GUARD_EVERY``-th,
        and when terms are logged; no deviation in between is forgotten.

        Returns:
            False where the closed form has never held (a hook alters the head's values, say): the
            head is then given up for autograd. Once it has held, breaking it raises.
        """
        if logits.shape[0] == 0 or logits.is_meta:
            return True
        if classes.is_floating_point():
            score = (logits.detach() * classes).sum(1).to(total.dtype)
        else:
            score = logits.detach().gather(1, classes[:, None])[:, 0].to(total.dtype)
        offset = head.offset(classes)
        scale = head.magnitude(jacobian) + offset.abs() + torch.finfo(total.dtype).tiny
        # How far the identity is broken, relative to the rounding of the least precise dtype.
        deviation = ((total + offset - score).abs() / scale).nan_to_num(0.0, 0.0, 0.0).max()
        deviation = deviation / _guard_tolerance(activations, logits)
        previous = self._deviation
        self._deviation = deviation if previous is None else torch.maximum(previous, deviation)
        self._calls += 1
        due = logits.device.type == "cpu" or not self._held or self._calls % GUARD_EVERY == 0
        capturing = logits.is_cuda and torch.cuda.is_current_stream_capturing()
        if due and not capturing:
            if not self._held and float(deviation) > 1.0 and self.tap.head_choice == "auto":
                self._deviation = None
                self.tap.give_up_head("the closed form does not reproduce the logits")
                return False
            self.read_guard()
            self._held = True
        return True

    def read_guard(self) -> None:
        """Raise if the closed form failed its self-check since it was last read."""
        deviation, self._deviation = self._deviation, None
        if deviation is not None and float(deviation) > 1.0:
            raise TapError(
                "the closed form of the head does not reproduce the logits (sum of the map + bias "
                f"differs by {float(deviation):.3g} times the tolerance): these logits are not of "
                "the latest forward (a stale forward), or the activations or the head were altered "
                "in between; if neither, pass head='autograd'"
            )

    # -- autograd ------------------------------------------------------------------------------

    def _by_autograd(
        self,
        activations: list[Tensor],
        values: list[Tensor],
        logits: Tensor,
        classes: Tensor | ScoreFn,
    ) -> list[Evaluation]:
        graph_logits = self.tap.connected(logits)
        gradients, scales = self._gradients(activations, graph_logits, classes)
        results = []
        for one, gradient, scale in zip(values, gradients, scales, strict=True):
            if self.reshape_transform is not None:
                gradient = self.reshape_transform(gradient)
            if self.maps is not None:
                found = self._by_method(one, gradient, scale)
                statistics, maps, scale = found.statistics, found.maps, 1.0
            else:
                statistics, maps = F.cam_statistics(one, gradient, relu=self.relu, return_maps=True)
            if not torch.is_grad_enabled():  # under no_grad the tapped layer is a leaf of ours
                statistics = F.MapStatistics(*(s.detach() for s in statistics))
                maps = maps.detach()
            results.append(_unscale(Evaluation(statistics, maps), scale))
        return results

    def _gradients(
        self, activations: list[Tensor], logits: Tensor, classes: Tensor | ScoreFn
    ) -> tuple[list[Tensor], list[float]]:
        """d (sum of scores) / d A per layer, times a scale that keeps float16 from underflow."""
        train = torch.is_grad_enabled()
        scales = [_score_scale(a) for a in activations]
        scale = max(scales)
        if not logits.requires_grad or not all(a.requires_grad for a in activations):
            raise TapError(self._unconnected())
        if has_static_graph(logits):
            raise TapError(STATIC_GRAPH)
        if train:
            self._refuse_first_order_only(activations, logits)
        with torch.inference_mode(False), torch.enable_grad():
            score = _scores(logits, classes).float().sum() * scale
            if not score.requires_grad:
                raise TapError(_DETACHED)
            with modes.no_weight_gradients():  # nobody would read them
                found = torch.autograd.grad(
                    score, activations, create_graph=train, retain_graph=True, allow_unused=True
                )
        gradients = []
        for gradient in found:
            if gradient is None:
                raise TapError(self._unconnected())
            gradients.append(gradient)
        return gradients, [scale] * len(gradients)

    def _refuse_first_order_only(self, activations: list[Tensor], logits: Tensor) -> None:
        """The map's gradient is a second derivative of all that lies behind the layer."""
        why = f"the head has no closed form ({self.tap.head_reason})"
        if any(is_sharded(module) for module in self.tap.model.modules()):
            raise TapError(f"{why}, and {SHARDED}")
        for name, one in zip(self.tap.names, activations, strict=True):
            found = obstacle(logits, one)
            if found is not None:
                raise TapError(f"layer {name!r}: {why}, and behind it {found}")

    def _maps_of_all_classes_by_autograd(self, logits: Tensor) -> Tensor:
        activations = self.tap.activations()
        maps = []
        for index in range(logits.shape[1]):
            classes = torch.full((logits.shape[0],), index, device=logits.device)
            values = [spatial(activations[0], self.tap.names[0], self.reshape_transform)]
            maps.append(self._by_autograd(activations, values, logits, classes)[0].maps)
        return torch.stack(maps, 1)

    def _unconnected(self) -> str:
        layers = ", ".join(repr(name) for name in self.tap.names)
        return (
            f"the logits are not connected to the output of layer {layers} by autograd: they are "
            "of another forward (a stale forward) or detached, the layer's output was replaced (by "
            "a later hook, or a compiled region that ends behind it), or it does not lead to them"
        )


_DETACHED = "targets: the scores of the callable are detached from the logits"


def _slopes(logits: Tensor, scores: ScoreFn) -> Tensor:
    """d score / d logits (B, C), with a graph where gradients are on."""
    train = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        own = train and logits.requires_grad
        values = logits if own else logits.detach().clone().requires_grad_()
        score = scores(values)
        found = None
        if score.requires_grad:
            (found,) = torch.autograd.grad(
                score.float().sum(), values, create_graph=own, retain_graph=True, allow_unused=True
            )
        if found is None:
            raise TapError(_DETACHED)
        return found


def _scores(logits: Tensor, classes: Tensor | ScoreFn) -> Tensor:
    if not isinstance(classes, Tensor):
        return classes(logits)
    if classes.is_inference():
        classes = classes.clone()  # an inference tensor cannot enter a graph
    return logits.gather(1, classes[:, None])


def spatial(values: Tensor, name: str, reshape_transform: ReshapeTransform | None) -> Tensor:
    """What layer ``name`` gave, as (B, K, h, w)."""
    if reshape_transform is not None:
        values = reshape_transform(values)
    if values.dim() != 4:
        raise TapError(
            f"layer {name!r} gives shape {tuple(values.shape)}, expected (B, K, h, w); "
            "for tokens pass reshape_transform"
        )
    return values


def _score_scale(activations: Tensor) -> float:
    """Power of two that undoes the 1 / Z of pooling in float16 gradients; 1 for other dtypes."""
    if activations.dtype != torch.float16:
        return 1.0
    pixels = math.prod(activations.shape[2:]) if activations.dim() == 4 else activations.shape[1]
    return float(min(1 << (pixels - 1).bit_length(), 1 << 12))


def _unscale(evaluation: Evaluation, scale: float) -> Evaluation:
    if scale == 1.0:
        return evaluation
    s = evaluation.statistics  # all else is invariant to the scale of the map
    statistics = s._replace(mean=s.mean / scale, variance=s.variance / scale**2)
    return Evaluation(statistics, evaluation.maps / scale)


def _guard_tolerance(activations: Tensor, logits: Tensor) -> float:
    """Relative rounding that the guarding identity may show; a wrong head breaks it by about 1."""
    if torch.float16 in (activations.dtype, logits.dtype):
        return 1e-2
    if torch.bfloat16 in (activations.dtype, logits.dtype):
        return 6e-2
    # On a GPU float32 layers may run in TF32, whose rounding is that of float16.
    return 1e-2 if logits.is_cuda else 1e-4


def _maps_of_all_classes(head: ClosedFormHead, activations: Tensor, relu: bool) -> Tensor:
    """Maps (B, C, h, w): one matrix product of the Jacobians with A in the dtype of sums."""
    jacobian = head.all_jacobians() / (activations.shape[2] * activations.shape[3])
    values = activations if activations.dtype == torch.float64 else activations.float()
    maps = (jacobian @ values.flatten(2)).unflatten(2, values.shape[2:])
    return maps.relu() if relu else maps
