"""The network ops as functions: differentiable twice, guided where the backward says so.

Each stands in the place of functions of ``torch.nn.functional`` and gives the same numbers. Their
backward passes can be guided (:class:`camkernels.guided`) and can leave out the gradients of
weights (:class:`camkernels.no_weight_gradients`). Under ``torch.autocast`` convolutions run in the
autocast dtype, BatchNorm in that of its input with statistics in float32.

They run eagerly: inside a compiled region they are a graph break (an error with ``fullgraph``),
``torch.func`` transforms and forward-mode differentiation raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from camkernels import backends
from camkernels.nn._arguments import Pair, check_affine, conv_spec, convolution_inputs, pair
from camkernels.ops import _validate
from camkernels.ops.batch_norm_relu import norm
from camkernels.ops.batch_norm_relu import reference as _reference
from camkernels.ops.batch_norm_relu.norm import NormSpec, Statistics
from camkernels.ops.batch_norm_relu.op import BatchNormReLUFunction
from camkernels.ops.batch_norm_relu.recipe import Recipe, attach
from camkernels.ops.conv2d.op import conv2d as _conv2d
from camkernels.ops.conv_bn_act import inference
from camkernels.ops.conv_bn_act.inference import Constants
from camkernels.ops.conv_bn_act.op import ConvBNActFunction
from camkernels.ops.max_pool.op import max_pool2d as _max_pool2d
from camkernels.ops.max_pool.op import window_of
from camkernels.ops.relu.op import relu as _relu

Function = TypeVar("Function", bound=Callable[..., Any])


def _eager(function: Function) -> Function:
    """Never traced: compilers drop the second order of an autograd.Function, or repair a guided
    ReLU into a plain one, without a word (measured, see CONTRIBUTING.md)."""
    disabled: Function = torch.compiler.disable(function)
    return disabled


@_eager
def relu(input: Tensor, inplace: bool = False, save: str = "mask") -> Tensor:
    """max(input, 0), plain or guided in the backward.

        plain: grad_u = 1[u > 0] grad_v        guided: grad_u = 1[u > 0] max(grad_v, 0)

    Args:
        input: any shape; float32, bfloat16, float16 or float64.
        inplace: write into ``input``.
        save: what is kept for the backward: the ``"mask"``, one bit per element, or the
            ``"output"``, which costs nothing where the next op keeps it anyway.

    Raises:
        TypeError: another dtype. ValueError: an unknown ``save``.
        RuntimeError: at the backward, guided mode together with ``create_graph=True``.

    Source: Springenberg et al., Striving for Simplicity: The All Convolutional Net, sec. 3.4.

    Example:
        >>> import torch, camkernels as ck
        >>> ck.nn.functional.relu(torch.tensor([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """
    return _relu(input, inplace, save)


@_eager
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """2d convolution whose derivatives of every order are the library's true convolutions.

    PyTorch's double backward makes the second weight gradient by a convolution with batch and
    channels exchanged, which is slow (pytorch#22577); here it is a weight-gradient convolution.

    Args:
        input: (N, C, H, W), contiguous or channels_last.
        weight: (K, C / groups, kh, kw). bias: (K,) or None.
        stride, padding, dilation: ints or pairs; groups: int.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices.

    Example:
        >>> import torch, camkernels as ck
        >>> ck.nn.functional.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).item()
        9.0
    """
    spec = conv_spec(stride, padding, dilation, groups)
    input, weight, bias = convolution_inputs(input, weight, bias)
    return _conv2d(input, weight, bias, spec)


@_eager
def max_pool2d(
    input: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Max pooling that keeps one byte per window for its derivatives of every order.

    PyTorch's keeps the input and an int64 index.

    Args:
        input: (B, C, H, W), contiguous or channels_last (another layout is copied once).
        kernel_size, stride, padding, dilation, ceil_mode: as ``torch.nn.functional.max_pool2d``.

    Raises:
        TypeError: a dtype that is not floating. ValueError: more than 256 elements in a window, a
        window that covers no pixel, other shapes.

    Example:
        >>> import torch, camkernels as ck
        >>> ck.nn.functional.max_pool2d(torch.arange(4.0).view(1, 1, 2, 2), 2).item()
        3.0
    """
    kernel = pair("kernel_size", kernel_size, 1)
    steps = kernel if stride is None else pair("stride", stride, 1)
    padded, spread = pair("padding", padding, 0), pair("dilation", dilation, 1)
    return _max_pool2d(input, window_of(kernel, steps, padded, spread, bool(ceil_mode)))


@_eager
def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    process_group: Any = None,
) -> Tensor:
    """relu(batch_norm(input) + residual), one op.

    Args:
        input: (N, C, H, W), contiguous or channels_last (another layout is copied once); float32,
            bfloat16, float16, or float64.
        running_mean, running_var: (C,); updated when ``training``; None: batch statistics.
        weight, bias: gamma and beta (C,), or None.
        training: normalise by the statistics of the batch.
        momentum: share of the batch in the running statistics.
        eps: added to the variance.
        residual: of the shape of ``input``, added before the ReLU.
        relu: apply a ReLU.
        process_group: share the statistics of the batch between the processes of this group
            (``torch.distributed.group.WORLD`` for all).

    Returns:
        (N, C, H, W) in the dtype and layout of ``input``.

    Raises:
        ValueError: one value per channel when training, or wrong shapes. TypeError: wrong dtypes.

    Source: Ioffe and Szegedy, Batch Normalization; He et al., Deep Residual Learning.

    Example:
        >>> import torch, camkernels as ck
        >>> x = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
        >>> ck.nn.functional.batch_norm_relu(x, None, None, eps=0.0).flatten().tolist()
        [0.0, 1.0]
    """
    z = norm.dense(_validate.floating_tensor("input", input, 4, "(N, C, H, W)"))
    check_affine(z.shape[1], z, running_mean, running_var, weight, bias)
    batch_statistics = training or running_mean is None
    if batch_statistics:
        norm.check_count(z, process_group)
    norm.check_residual(residual, z)
    backend = _backend(z)
    if backend == "reference":
        return _by_formula(
            z, running_mean, running_var, weight, bias, batch_statistics, momentum, eps, residual,
            relu, process_group, training,
        )  # fmt: skip
    spec = NormSpec(batch_statistics, eps, relu, process_group, backend)
    constants = (None, None) if batch_statistics else (running_mean, running_var)
    output: Tensor
    output, mean, var, rstd, count = BatchNormReLUFunction.apply(
        z, weight, bias, residual, *constants, spec
    )
    if training:
        norm.update_running(running_mean, running_var, Statistics(mean, var, rstd, count), momentum)
    if residual is None and output.requires_grad:
        attach(output, z, weight, bias, Recipe(mean, rstd, var, spec))
    return output


@_eager
def conv_bn_act(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = True,
    process_group: Any = None,
) -> Tensor:
    """relu(batch_norm(conv2d(input)) + residual), the unit that keeps least for a double backward.

    The convolution's output is kept once; its input is not kept where it came out of
    ``conv_bn_act`` or ``batch_norm_relu`` without a residual, from which it is made again. Safe at
    gamma = 0. On the CPU, where no gradient is recorded and ``training`` is off, BatchNorm goes
    into the convolution's weights, unless they outnumber the images' elements (float32 and
    float64; equal up to rounding).

    Since what lies between two such ops is made again from what came before it, the gradient of a
    penalty on *weight gradients* goes around it: right for parameters and inputs of the network,
    but not to be asked of the activation in between.

    Args: as for :func:`conv2d` (``conv_weight``, ``conv_bias``, ``stride`` and so on) and
        :func:`batch_norm_relu`; ``residual`` has the shape of the output.

    Returns:
        (N, K, H', W').

    Raises:
        As both.

    Example:
        >>> import torch, camkernels as ck
        >>> x, w = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3)
        >>> ck.nn.functional.conv_bn_act(x, w, None, None, None, None, None).shape
        torch.Size([2, 4, 6, 6])
    """
    conv = conv_spec(stride, padding, dilation, groups)
    x, kernel, conv_bias = convolution_inputs(input, conv_weight, conv_bias)
    backend = _backend(x)
    if backend == "reference":
        z = _conv2d(x, kernel, conv_bias, conv)
        return batch_norm_relu(
            z, running_mean, running_var, weight, bias, training, momentum, eps, residual=residual,
            relu=relu, process_group=process_group,
        )  # fmt: skip
    check_affine(kernel.shape[0], x, running_mean, running_var, weight, bias)
    batch_statistics = training or running_mean is None
    if not batch_statistics and inference.is_suited(x, kernel, conv_bias, weight, bias, residual):
        assert running_mean is not None
        assert running_var is not None
        constant = Constants(weight, bias, running_mean, running_var, eps)
        return inference.conv_bn_act(x, kernel, conv_bias, constant, residual, relu, conv)
    spec = NormSpec(batch_statistics, eps, relu, process_group, backend)
    constants = (None, None) if batch_statistics else (running_mean, running_var)
    output: Tensor
    output, z, mean, var, rstd, count = ConvBNActFunction.apply(
        x, kernel, conv_bias, weight, bias, residual, *Recipe.arguments_of(x), *constants,
        conv, spec,
    )  # fmt: skip
    if training:
        norm.update_running(running_mean, running_var, Statistics(mean, var, rstd, count), momentum)
    if residual is None and output.requires_grad:
        attach(output, z, weight, bias, Recipe(mean, rstd, var, spec))
    return output


def bn_relu_conv(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    process_group: Any = None,
) -> Tensor:
    """conv2d(relu(batch_norm(input))), as pre-activation networks have it. What lies between the
    two is not kept but made again from ``input``.

    Args, Raises: as for :func:`batch_norm_relu` and :func:`conv2d`.

    Returns:
        (N, K, H', W').

    Example:
        >>> import torch, camkernels as ck
        >>> x, w = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3)
        >>> ck.nn.functional.bn_relu_conv(x, None, None, None, None, w).shape
        torch.Size([2, 4, 6, 6])
    """
    between = batch_norm_relu(
        input, running_mean, running_var, weight, bias, training, momentum, eps, relu=relu,
        process_group=process_group,
    )  # fmt: skip
    return conv2d(between, conv_weight, conv_bias, stride, padding, dilation, groups)


def _backend(tensor: Tensor) -> str:
    """As resolved; the formula where a tracer (fake tensors, make_fx) wants PyTorch's own ops."""
    if torch._C._len_torch_dispatch_stack() > 0:
        proxy = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
        if proxy is not None or isinstance(tensor, FakeTensor):
            return "reference"
    return backends.resolve_network(tensor.device, tensor.dtype)


def _by_formula(
    z: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    batch_statistics: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    process_group: Any,
    training: bool,
) -> Tensor:
    """Plain PyTorch around our ReLU, which alone knows the guided rule."""
    if process_group is not None and batch_statistics:
        raise NotImplementedError("process_group: not supported by the reference backend")
    constants = (None, None) if batch_statistics else (running_mean, running_var)
    mean, var = (None if v is None else _reference.wide(v) for v in constants)
    u = _reference.batch_norm_relu(z, weight, bias, residual, mean, var, eps, False)
    if training:
        spec = NormSpec(True, eps, relu, None, "reference")
        with torch.no_grad():
            found = norm.statistics(z, None, None, spec)
        norm.update_running(running_mean, running_var, found, momentum)
    return _relu(u, False, "output") if relu else u
