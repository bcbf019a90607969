"""Agreement of the input gradient with the guided one, as a regulariser of cross-entropy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor, nn

from camkernels import functional as F
from camkernels import modes
from camkernels.engine.gradients import input_gradients
from camkernels.losses._common import check_choice, loss_of, reduce
from camkernels.taps.graph import Survey, survey, total
from camkernels.taps.input_tap import UNCONNECTED, Connected, InputTap
from camkernels.taps.tap import TapError
from camkernels.taps.targets import check_device, check_logits, class_indices
from camkernels.taps.uncompiled import uncompiled

_REDUCTIONS = ("mean", "sum", "none")
_INNER_REDUCTIONS = ("mean", "sum")
_PLAIN_RELUS = ("raise", "warn", "ignore")
# By how much float16 gradients of one sample's cross-entropy are enlarged where nobody says.
_FLOAT16_SCALE = 2.0**10


class InterpretableGradientLoss(nn.Module):
    """Cross-entropy plus the error between the input gradient and its guided version.

        delta = d L_C / d x,  delta_G = the same by guided backpropagation, detached
        L = L_C + weight mean_i E(delta_i, delta_G,i)

    It stands in the place of ``nn.CrossEntropyLoss`` and uses the forward that training makes
    anyway: a hook puts a leaf of the criterion's own in the place of the images, and both gradients
    come from that one graph. ``x`` needs no ``requires_grad``, and ``x.grad`` is not written (where
    x does require a gradient, it stays connected and gets that of the whole loss)::

        model = ck.swap_in(model)                 # its ReLUs can run guided, its passes are fused
        criterion = ck.InterpretableGradientLoss(model, error="cosine", weight=1e-2)
        loss = criterion(model(x), y)
        loss.backward()

    **The scale of delta.** L_C is the mean over the batch, so delta_i carries 1 / B, and under
    DistributedDataParallel the B of one process. The cosine and ``"histogram"`` do not see scale;
    the sigmoid errors and ``"histogram_paper"`` do. ``inner_reduction="sum"`` takes delta of the
    sum, which depends on neither.

    **Under** ``torch.no_grad()``, as in validation, the loss is the cross-entropy alone, for a
    gradient would cost the memory of training; ``terms`` then holds nothing else.
    ``measure_without_grad=True`` pays it: the model's forward keeps its graph until the criterion
    has read it.

    Args:
        model: the classifier; DistributedDataParallel (without ``static_graph``) is opened. It is
            held, not registered: its parameters are not the criterion's.
        error: E, see :func:`camkernels.gradient_error`: ``"cosine"``, ``"histogram"``,
            ``"histogram_paper"``, ``"sigmoid"`` or ``"centered_sigmoid"``.
        weight: lambda, settable later. With 0 the loss is the cross-entropy alone, to the bit, and
            the terms are still measured.
        every: lazy regularisation: the regulariser at the first call and every so-manieth after
            it, with ``every`` times the weight; other calls cost what plain cross-entropy costs.
            This changes the stochastic gradient, not its expectation (with fixed BatchNorm
            statistics): an approximation, off by default. ``calls`` counts the calls made with
            gradients; it is not in the ``state_dict``, set it to go on where a run stopped.
        class_weight: ``weight`` of ``nn.CrossEntropyLoss``. ignore_index, label_smoothing: as
            there; they belong to L_C and so to delta. Ignored samples have no E.
        reduction: of the loss: ``"mean"``; ``"sum"``: sums of cross-entropy and of E; or
            ``"none"``: both per sample.
        inner_reduction: of the L_C that is differentiated by x: ``"mean"``, as in the paper, or
            ``"sum"``; the outer ``reduction`` does not touch it.
        grad_scaler: the ``torch.amp.GradScaler`` of a float16 training: the inner loss is scaled by
            it, and delta unscaled in float32. Overflow then shows in the loss and is skipped.
        inner_scale: the same, by a fixed number. With neither, float16 forwards take 1024 per
            sample, and others 1.
        input: name or position of the model's argument that holds the images, where it is not the
            first tensor.
        plain_relus: what to do about ReLUs on the way that are not camkernels' and would ignore
            guided mode: ``"raise"``, ``"warn"`` once, or ``"ignore"``.
        measure_without_grad: see above.
        keep_gradients: keep delta and delta_G of the last call, for :attr:`gradients`.

    Raises:
        ValueError: an unknown option. TypeError: ``nn.DataParallel``.

    Source: A Learning Paradigm for Interpretable Gradients, Algorithm 1, eqs. 7 to 14.

    Example:
        >>> import torch, camkernels as ck
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(),
        ...                           torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        ...                           torch.nn.Linear(8, 5))
        >>> net = ck.swap_in(net)
        >>> criterion = ck.InterpretableGradientLoss(net)
        >>> criterion(net(torch.rand(2, 3, 8, 8)), torch.tensor([1, 4])).backward()
        >>> sorted(criterion.terms)[:3]
        ['cross_entropy', 'gradient_error', 'gradient_norm']
    """

    class_weight: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        error: F.GradientError = "cosine",
        weight: float = 1e-2,
        *,
        every: int = 1,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        inner_reduction: str = "mean",
        grad_scaler: torch.amp.GradScaler | None = None,
        inner_scale: float | None = None,
        input: int | str | None = None,
        plain_relus: str = "raise",
        measure_without_grad: bool = False,
        keep_gradients: bool = False,
    ) -> None:
        super().__init__()
        check_choice("error", error, get_args(F.GradientError))
        check_choice("reduction", reduction, _REDUCTIONS)
        check_choice("inner_reduction", inner_reduction, _INNER_REDUCTIONS)
        check_choice("plain_relus", plain_relus, _PLAIN_RELUS)
        if not math.isfinite(weight):
            raise ValueError(f"weight: expected a finite number, got {weight!r}")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every: expected an integer of at least 1, got {every!r}")
        if inner_scale is not None and not 0 < inner_scale < math.inf:
            raise ValueError(f"inner_scale: expected a positive number, got {inner_scale!r}")
        if inner_scale is not None and grad_scaler is not None:
            raise ValueError("inner_scale, grad_scaler: expected one of them, got both")
        self.error: F.GradientError = error
        self.weight = weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.inner_reduction = inner_reduction
        self.grad_scaler = grad_scaler
        self.inner_scale = inner_scale
        self.plain_relus = plain_relus
        self.keep_gradients = keep_gradients
        self.register_buffer("class_weight", class_weight)
        self._tap = InputTap(model, input, every, without_grad=measure_without_grad)
        self._told: set[str] = set()
        self._terms: _Terms | None = None
        self._gradients: tuple[Tensor, Tensor] | None = None

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss.

        Args:
            logits: (B, C), of the latest forward of the model.
            targets: (B,) int64 class indices, or class probabilities (B, C).

        Returns:
            the loss, 0-dim (per sample (B,) with reduction ``"none"``).

        Raises:
            TapError: no forward, a stale forward, plain ReLUs, or a graph that cannot be
            differentiated twice (compiled, a reentrant checkpoint, ``nn.SyncBatchNorm``).
            IndexError: a class out of range. ValueError, TypeError: wrong shapes or dtypes.
        """
        return loss_of(*self.parts(logits, targets))

    @uncompiled
    def parts(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """The loss as its cross-entropy and lambda E, None where lambda is 0 or this call does not
        look at gradients; see :meth:`forward`."""
        check_logits(logits)
        valid = self._valid(logits, targets)
        connected = self._tap.connected(logits)
        cross_entropy = self._cross_entropy(logits, targets, self.reduction)
        self._terms = _Terms(cross_entropy)
        self._gradients = None
        if connected is None:
            return cross_entropy, None
        check_device(connected.logits, connected.leaf.device)
        self._examine(connected)
        # With weight 0 the gradients are measured, and nothing may reach those of the parameters.
        train = torch.is_grad_enabled() and self.weight != 0
        errors, plain, guided = self._errors(connected, targets, train)
        regularizer = reduce(errors, valid, self.reduction)
        self._terms.measured(regularizer, errors, plain, guided, valid)
        if self.keep_gradients:
            self._gradients = plain, guided
        if self.weight == 0:
            return cross_entropy, None
        weight = self.weight * (self.every if connected.training else 1)
        return cross_entropy, weight * regularizer

    def _valid(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Which samples count, (B,) bool."""
        if isinstance(targets, Tensor) and targets.is_floating_point():
            if targets.shape != logits.shape:
                raise ValueError(
                    f"targets: expected class indices (B,) or probabilities {tuple(logits.shape)}, "
                    f"got {targets.dtype} {tuple(targets.shape)}"
                )
            return torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
        class_indices(logits, targets, self.ignore_index)
        return targets != self.ignore_index

    def _cross_entropy(self, logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return nn.functional.cross_entropy(
            logits,
            targets,
            self.class_weight,
            ignore_index=self.ignore_index,
            reduction=reduction,
            label_smoothing=self.label_smoothing,
        )

    def _errors(
        self, connected: Connected, targets: Tensor, train: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """E of every sample (B,), differentiable where ``train``; delta and delta_G, detached."""
        leaf = connected.leaf
        no_autocast = modes.no_autocast(connected.logits.device)
        with torch.inference_mode(False), torch.enable_grad(), no_autocast:
            if targets.is_inference():
                targets = targets.clone()  # an inference tensor cannot enter a graph
            logits = _in_float32(connected.logits)
            inner = self._cross_entropy(logits, targets, self.inner_reduction)
            scale = self._scale(connected)
            scaled = inner if scale is None else inner * scale
            found = input_gradients(scaled, connected.logits, leaf, create_graph=train)
            plain, guided = (_in_float32(g) for g in found)
            if scale is not None:
                guided, plain = guided / scale, plain / scale
            errors = F.gradient_error(plain, guided, self.error)
        return errors, plain.detach(), guided

    def _scale(self, connected: Connected) -> Tensor | float | None:
        """What the inner loss is multiplied by; None: nothing."""
        if self.inner_scale is not None:
            return self.inner_scale
        scaler = self.grad_scaler
        if scaler is not None and scaler.is_enabled():
            # the scale as a tensor: reading it as a number would stall a GPU
            one = torch.ones((), device=connected.logits.device)
            return scaler.scale(one)
        if not connected.float16 and connected.logits.dtype != torch.float16:
            return None
        samples = connected.logits.shape[0] if self.inner_reduction == "mean" else 1
        return _FLOAT16_SCALE * (1 << max(samples - 1, 0).bit_length())

    def _examine(self, connected: Connected) -> None:
        """Look at the graph: is it this forward's, do its ReLUs obey guided mode."""
        found = survey(connected.logits, connected.leaf)
        if found is None:
            raise TapError(UNCONNECTED)
        if found.obstacle is not None:
            raise TapError(found.obstacle)
        plain = total(found.plain)
        if plain and self.plain_relus == "raise":
            raise TapError(_plain_relus(found))
        if plain and self.plain_relus == "warn":
            self._tell(_plain_relus(found))
        if not plain and not found.guided:
            self._tell(
                "the model has no ReLU: its guided gradient equals the plain one, and the "
                "regulariser has nothing to teach"
            )

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            warnings.warn(text, stacklevel=4)

    @property
    def every(self) -> int:
        """The regulariser is computed at every so-manieth call."""
        return self._tap.every

    @property
    def calls(self) -> int:
        """How many calls with gradients there were; settable."""
        return self._tap.calls

    @calls.setter
    def calls(self, calls: int) -> None:
        self._tap.calls = calls

    @property
    def terms(self) -> dict[str, Tensor]:
        """Parts of the last loss, detached and 0-dim, for logging.

        ``cross_entropy`` and ``regularizer`` (before lambda) as reduced (their means for reduction
        ``"none"``); means over the samples that are not ignored: ``gradient_error``, E;
        ``gradient_norm`` and ``guided_gradient_norm``, the 2-norms of delta and delta_G;
        ``zero_gradients``, the share with one of them zero, whose E is 0 and teaches nothing.

        A call that did not look at gradients (``every``, ``torch.no_grad()``) has
        ``cross_entropy`` alone. Empty before the first call.
        """
        return {} if self._terms is None else self._terms.compute()

    @property
    def gradients(self) -> tuple[Tensor, Tensor]:
        """(delta, delta_G) of the last call, shaped as the images, detached, at least float32.

        Raises:
            RuntimeError: without ``keep_gradients=True``, or where that call measured none.
        """
        if not self.keep_gradients:
            raise RuntimeError("gradients: not kept; pass keep_gradients=True")
        if self._gradients is None:
            raise RuntimeError("gradients: the last call measured none")
        return self._gradients

    def close(self) -> None:
        """Remove the hooks from the model."""
        self._tap.close()
        self._gradients = None

    def extra_repr(self) -> str:
        return (
            f"error={self.error!r}, weight={self.weight}, every={self.every}, "
            f"reduction={self.reduction!r}, inner_reduction={self.inner_reduction!r}"
        )

    def __getstate__(self) -> Mapping[str, object]:
        # tensors of one call, of use to nobody else
        return {**self.__dict__, "_terms": None, "_gradients": None}


class _Terms:
    """What the last call measured; means are taken when read, so that a step does not pay."""

    def __init__(self, cross_entropy: Tensor) -> None:
        # a copy: the loss may be it, and users divide losses in place
        self.cross_entropy = cross_entropy.detach().clone()
        self.regularizer: Tensor | None = None

    def measured(
        self, regularizer: Tensor, errors: Tensor, plain: Tensor, guided: Tensor, valid: Tensor
    ) -> None:
        self.regularizer, self.errors, self.valid = regularizer.detach(), errors.detach(), valid
        self.norms = _norms(plain), _norms(guided)  # of images: two numbers each are kept

    def compute(self) -> dict[str, Tensor]:
        terms = {"cross_entropy": self.cross_entropy.mean()}
        if self.regularizer is None:
            return terms
        plain, guided = self.norms
        zero = ((plain == 0) | (guided == 0)).to(plain.dtype)
        terms["regularizer"] = self.regularizer.mean()
        for name, values in (
            ("gradient_error", self.errors),
            ("gradient_norm", plain),
            ("guided_gradient_norm", guided),
            ("zero_gradients", zero),
        ):
            terms[name] = reduce(values, self.valid, "mean")
        return terms


def _plain_relus(found: Survey) -> str:
    nodes = ", ".join(f"{count} {name}" for name, count in sorted(found.plain.items()))
    return (
        f"{total(found.plain)} ReLUs of the model do not obey guided mode ({nodes}), so that the "
        "guided gradient would be wrong: call model = ck.swap_in(model), and in forwards of your "
        "own ck.nn.functional.relu in place of torch's; plain_relus='ignore' lets them pass"
    )


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _norms(gradients: Tensor) -> Tensor:
    """2-norm per sample (B,)."""
    return torch.linalg.vector_norm(gradients.flatten(1), dim=1)
