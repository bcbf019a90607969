"""timm's BatchNorm with activation; imported only where a model brings timm along."""

from __future__ import annotations

from typing import Any

from timm.layers.norm_act import BatchNormAct2d as TimmBatchNormAct2d
from torch import Tensor, nn

from camkernels.nn import modules


class BatchNormAct2d(TimmBatchNormAct2d):
    """timm's BatchNormAct2d with ReLU, or none, in one operation."""

    def forward(self, x: Tensor) -> Tensor:
        if not modules.is_plain_tensor(x):
            return super().forward(x)
        self._check_input_dim(x)
        if can_fuse_activation(self):
            return modules._normalize(self, x, None, relu=type(self.act) is not nn.Identity)
        x = modules._normalize(self, x, None, relu=False)
        return self.act(self.drop(x))


def can_fuse_activation(module: Any) -> bool:
    """Whether drop is the identity, act ReLU or none, and nobody listens to either."""
    drop, act = module.drop, module.act
    return (
        type(drop) is nn.Identity
        and type(act) in (modules.ReLU, nn.Identity)
        and modules.runs_only_its_forward(drop)
        and modules.runs_only_its_forward(act)
        and not modules.global_hooks_exist()
    )
