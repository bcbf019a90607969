"""The head between a tapped layer and the logits, and its Jacobian in closed form.

Behind average pooling and a stack of linear layers and ReLUs the logits are piecewise linear in
the pooled activations f = mean_ij A:

    y_c = J_c f + b_c,     J_c = W_n[c] D_{n-1} W_{n-1} ... D_1 W_1,     D_l = diag 1[h_l > 0]

so d y_c / d A_kij = J_ck / Z at every pixel: the channel weights of Grad-CAM are alpha = J_c / Z,
differentiable in the weights, with no backward pass. Whether a head is of this kind is not
guessed from its class but seen in a forward: each module's input must be the very memory that
the module before it returned, unchanged.

Every use is guarded by an identity: sum_ij L_ij (before ReLU) + b_c = y_c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from camkernels.nn._kinds import is_sharded
from camkernels.nn.modules import ReLU

_RELUS = (nn.ReLU, ReLU)
_NEUTRAL = (nn.Identity, nn.Flatten)
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def version_of(tensor: Tensor) -> int:
    """The in-place version counter; tensors made in inference mode have none."""
    return -1 if tensor.is_inference() else tensor._version


@dataclass
class Step:
    """One leaf module that ran behind the tapped layer."""

    module: nn.Module
    input: Tensor | None
    input_version: int
    output: Tensor | None
    output_version: int = -1

    @classmethod
    def of(cls, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Step:
        source = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], Tensor) else None
        result = output if isinstance(output, Tensor) else None
        return cls(
            module,
            source,
            -1 if source is None else version_of(source),
            result,
            -1 if result is None else version_of(result),
        )


@dataclass
class ClosedFormHead:
    """Pooling and a linear/ReLU stack, and what the last forward put into it."""

    linears: list[nn.Linear]
    rectified: list[bool]
    """Per linear layer: a ReLU stands before it."""
    dropouts: list[nn.Module]
    description: str
    inputs: dict[int, Tensor] = field(default_factory=dict)
    """Position of a linear layer -> its input in the last forward."""

    def unusable(self) -> str | None:
        """Why the closed form does not hold for the last forward; None where it does."""
        for dropout in self.dropouts:
            if dropout.training and dropout.p > 0:  # type: ignore[operator]
                return f"dropout (p={dropout.p}) is active in the head"
        for position, linear in enumerate(self.linears):
            if position not in self.inputs:
                return "the head has changed since it was examined"
            if (reason := _linear_reason(linear)) is not None:
                return reason
        return None

    def jacobian(self, classes: Tensor) -> Tensor:
        """J (B, K) of one class per sample, (B,) int64, or of d score / d logits (B, C)."""
        if classes.is_floating_point():
            weight = _upcast(self.linears[-1].weight)
            return self._through(classes.to(weight.dtype) @ weight)
        # embedding and not indexing: its backward is deterministic on every device.
        rows = nn.functional.embedding(classes, _upcast(self.linears[-1].weight))
        return self._through(rows)

    def all_jacobians(self) -> Tensor:
        """J (C, K), or (B, C, K) where ReLUs make it depend on the sample."""
        return self._through(_upcast(self.linears[-1].weight), every_class=True)

    def _through(self, rows: Tensor, every_class: bool = False) -> Tensor:
        for position in range(len(self.linears) - 1, 0, -1):
            if self.rectified[position]:
                mask = self.inputs[position].detach() > 0
                rows = rows * (mask[:, None] if every_class else mask)
            rows = rows @ _upcast(self.linears[position - 1].weight)
        return rows

    def offset(self, classes: Tensor) -> Tensor:
        """b_c (B,) with no graph: what the biases alone add to the logit of each sample's class,
        or to the logits times d score / d logits (B, C)."""
        with torch.no_grad():
            last = self.linears[-1]
            weight, bias = _upcast(last.weight), None if last.bias is None else _upcast(last.bias)
            if classes.is_floating_point():
                slopes = classes.to(weight.dtype)
                rows, result = slopes @ weight, 0.0 if bias is None else slopes @ bias
            else:
                rows, result = weight[classes], 0.0 if bias is None else bias[classes]
            for position in range(len(self.linears) - 1, 0, -1):
                if self.rectified[position]:
                    rows = rows * (self.inputs[position] > 0)
                linear = self.linears[position - 1]
                if linear.bias is not None:
                    result = result + rows @ _upcast(linear.bias)
                rows = rows @ _upcast(linear.weight)
            return torch.as_tensor(result, device=classes.device).expand(classes.shape[:1])

    def magnitude(self, jacobian: Tensor) -> Tensor:
        """|J| |f| (B,): the scale at which the guarding identity is rounded."""
        pooled = self.inputs[0].detach().flatten(1).to(jacobian.dtype)
        return jacobian.detach().norm(dim=1) * pooled.norm(dim=1)


def _upcast(parameter: Tensor) -> Tensor:
    return parameter if parameter.dtype == torch.float64 else parameter.float()


def _linear_reason(linear: nn.Module) -> str | None:
    if parametrize.is_parametrized(linear):
        return "a linear layer of the head is parametrized"
    if not isinstance(linear.weight, nn.Parameter):
        return "a linear layer of the head recomputes its weight (old-style weight norm, pruning)"
    whole = type(linear.weight) is nn.Parameter and linear.weight.dim() == 2
    if is_sharded(linear) and not whole:
        return (
            "FSDP holds a linear layer of the head in shards after its forward (fully_shard with "
            "reshard_after_forward=False leaves it whole)"
        )
    return None


def _is_global_average_pool(module: nn.Module, source: Tensor) -> bool:
    kind = type(module)
    if kind is nn.AdaptiveAvgPool2d:
        size = module.output_size
        return size in (1, (1, 1), [1, 1])
    if kind is nn.AvgPool2d:
        whole = nn.modules.utils._pair(module.kernel_size) == tuple(source.shape[-2:])
        unpadded = module.padding in (0, (0, 0)) and module.divisor_override is None
        return bool(whole and unpadded)
    # timm's own spelling of mean((2, 3))
    return kind.__name__ == "FastAdaptiveAvgPool" and kind.__module__.startswith("timm.")


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.numel() == b.numel()
        and a.dtype == b.dtype
        and a.shape[0] == b.shape[0]
    )


_VIEWS = ("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "SqueezeBackward")


def _pooled_by_function(pooled: Tensor, activations: Tensor) -> bool:
    """Whether ``pooled`` (B, K) is the mean of ``activations``, by the autograd graph's record."""
    node, source = pooled.grad_fn, activations.grad_fn
    while node is not None and node.name().startswith((*_VIEWS, "ToCopyBackward")):
        node = node.next_functions[0][0]
    if node is None or pooled.numel() != activations.shape[0] * activations.shape[1]:
        return False
    pools = node.name().startswith("AdaptiveAvgPool2DBackward")
    if node.name().startswith("MeanBackward1"):
        rank = activations.dim()
        dims = getattr(node, "_saved_dim", ())  # negative dims are stored as unsigned
        pools = sorted((d if d < rank else d - 2**64) % rank for d in dims) == [2, 3]
    if not pools:
        return False
    parent, index = node.next_functions[0]
    if source is None:  # a leaf: its node is its gradient accumulator
        return getattr(parent, "variable", None) is activations
    return parent is source and index == activations.output_nr


def examine(
    activations: Tensor, steps: Sequence[Step], logits: Tensor | None
) -> tuple[ClosedFormHead | None, str]:
    """The closed form of the head, or None and the reason why there is none.

    Args:
        activations: A (B, K, h, w), the tapped layer's output.
        steps: the leaf modules that ran behind it, in their order.
        logits: the model's output, if it is a tensor.
    """
    if logits is None or logits.dim() != 2:
        return None, "the model's output is not a tensor of logits (B, C)"
    linears: list[nn.Linear] = []
    rectified: list[bool] = []
    dropouts: list[nn.Module] = []
    names: list[str] = []
    current, version, pooled, relu = activations, version_of(activations), False, False
    for step in steps:
        module, source = step.module, step.input
        if source is None or step.output is None:
            return None, f"{type(module).__name__} in the head does not map a tensor to a tensor"
        # Steps are recorded after their module ran: an in-place one has bumped its input by then.
        bumped = int(getattr(module, "inplace", False) and version >= 0)
        linked = _same_memory(source, current) and step.input_version == version + bumped
        if not linked and not pooled and isinstance(module, (nn.Linear, *_NEUTRAL, *_DROPOUT)):
            linked = pooled = _pooled_by_function(source, current)
            names += ["mean"] if pooled else []
        if not linked:
            return None, f"an operation that is no module runs before {type(module).__name__}"
        reason = None
        if type(module) in _NEUTRAL:
            pass
        elif isinstance(module, _DROPOUT):
            dropouts.append(module)  # whether it is active is asked at each use
        elif not pooled and _is_global_average_pool(module, source):
            pooled = True
            names.append("pool")
        elif pooled and type(module) is nn.Linear:
            reason = _linear_reason(module)
            linears.append(module)
            rectified.append(relu)
            relu = False
            names.append("linear")
        elif linears and type(module) in _RELUS:
            relu = True
            names.append("relu")
        else:
            reason = f"{type(module).__name__} in the head has no closed form"
        if reason is not None:
            return None, reason
        current, version = step.output, step.output_version
    if not linears or relu or not _same_memory(logits, current) or version_of(logits) != version:
        return None, "the logits are not the output of a linear layer behind average pooling"
    return ClosedFormHead(linears, rectified, dropouts, " -> ".join(names)), ""
