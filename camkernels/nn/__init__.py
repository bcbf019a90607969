"""Modules whose backward can be differentiated and guided, and swapping them into a network."""

from camkernels.nn import functional
from camkernels.nn.modules import (
    BatchNorm2d,
    BatchNormReLU2d,
    Conv2d,
    MaxPool2d,
    ReLU,
    SyncBatchNorm,
)
from camkernels.nn.report import SwapReport
from camkernels.nn.swap import swap_in, swap_out, swap_report

__all__ = [
    "BatchNorm2d",
    "BatchNormReLU2d",
    "Conv2d",
    "MaxPool2d",
    "ReLU",
    "SwapReport",
    "SyncBatchNorm",
    "functional",
    "swap_in",
    "swap_out",
    "swap_report",
]
