"""How a BatchNorm's output can be made again, so that the op after it need not keep it.

batch_norm_relu and conv_bn_act keep z for their own backward. Their output relu(bn(z)), which the
next convolution needs for its weight gradient, is one elementwise pass away from it. So they write
a recipe on the tensor they return (a Python attribute), and a convolution that is given that very
tensor keeps z, which costs nothing more, in place of the output.

A recipe is void once its tensor was changed in place. A tensor made from it (a view, a sum) has
none.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from camkernels.ops._chain import implementation
from camkernels.ops.batch_norm_relu.norm import NormSpec

_ATTRIBUTE = "_camkernels_recipe"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What makes relu(bn(z)) again, besides z, gamma and beta, which are saved through autograd."""

    mean: Tensor
    rstd: Tensor
    var: Tensor
    spec: NormSpec

    def make(self, z: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        """The output; connected to z, gamma and beta where a graph is being made."""
        if torch.is_grad_enabled():
            from camkernels.ops.batch_norm_relu.op import BatchNormReLUFunction

            constants = (None, None) if self.spec.training else (self.mean, self.var)
            connected: Tensor = BatchNormReLUFunction.apply(
                z, gamma, beta, None, *constants, self.spec
            )[0]
            return connected
        run = implementation("batch_norm_relu", "bn_fwd", self.spec.backend)
        wide_gamma, wide_beta = self.spec.per_channel(gamma, z), self.spec.per_channel(beta, z)
        output: Tensor = run(
            z.detach(), self.mean, self.rstd, wide_gamma, wide_beta, None, self.spec.relu, False
        )[0]
        return output

    @staticmethod
    def arguments_of(x: Tensor) -> tuple[Any, ...]:
        """z, gamma, beta and the recipe of x; four times None where it has none."""
        found: _Attached | None = getattr(x, _ATTRIBUTE, None)
        if found is None or found.version != x._version:
            return (None, None, None, None)
        return found.arguments


@dataclasses.dataclass(frozen=True)
class _Attached:
    version: int
    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a tensor that is saved or pickled leaves its recipe behind


def attach(
    output: Tensor, z: Tensor, gamma: Tensor | None, beta: Tensor | None, recipe: Recipe
) -> Tensor:
    """Write the recipe of ``output`` on it."""
    setattr(output, _ATTRIBUTE, _Attached(output._version, (z, gamma, beta, recipe)))
    return output
