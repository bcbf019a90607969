"""One specification per kernel; from it the autograd.Function and the library op.

Eager calls (and functorch transforms) run the Function, which calls the backend directly. While
``torch.compile`` or a dispatch mode traces, the library op of the same specification is taken:
compilers silently drop the second order of a Function (measured, see CONTRIBUTING.md), never that
of a library op.

An op is a chain of two: ``<op>_fwd`` differentiates by calling ``<op>_bwd``, and ``<op>_bwd``
differentiates through the reference formula, so that every further order is exact.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from camkernels import backends

_FORWARD_MODE = (
    "forward-mode differentiation through camkernels::{name} is not supported; use reverse mode "
    "(torch.func.jacrev twice in place of torch.func.hessian), or ck.backend('reference'), whose "
    "plain PyTorch formula supports every transform"
)


@functools.cache
def implementation(op: str, kernel: str, backend: str) -> Callable[..., Any]:
    """The function ``kernel`` of ``camkernels/ops/<op>/<backend>.py``.

    Raises:
        BackendUnavailableError: the CUDA backend, which has kernels for some ops, has none for it.
    """
    name = f"camkernels.ops.{op}.{backend}"
    if backend == "cuda" and importlib.util.find_spec(name) is None:
        raise backends.BackendUnavailableError(
            f"backend 'cuda' was asked for by name: it has no kernel {kernel}; backend 'triton' "
            "has, and 'auto' takes that"
        )
    module = importlib.import_module(name)
    found: Callable[..., Any] = getattr(module, kernel)
    return found


class Link:
    """One kernel of a chain, callable on tensors.

    Args:
        op: name of the op's folder.
        name: name of the kernel, ``<op>_fwd`` or ``<op>_bwd``.
        schema: its library schema. The last argument is ``str backend``: a name, or ``""`` for
            "resolve when run", which is what traced graphs hold.
        leader: which argument's device and dtype choose the backend.
        fake: shapes and dtypes of the outputs, for tracing.
        setup_context, backward: as for an autograd.Function; shared by Function and library op.
    """

    def __init__(
        self,
        op: str,
        name: str,
        schema: str,
        *,
        leader: int,
        fake: Callable[..., Any],
        setup_context: Callable[..., None],
        backward: Callable[..., Any],
    ) -> None:
        self.name = name
        self.leader = leader

        def run(*args: Any) -> Any:
            *inputs, backend = args
            chosen = backend or backends.resolve(args[leader].device, args[leader].dtype)
            return implementation(op, name, chosen)(*inputs)

        self.run = run
        self.function = _make_function(name, run, setup_context, backward)
        self.library = torch.library.custom_op(
            f"camkernels::{name}", run, mutates_args=(), schema=schema
        )
        self.library.register_fake(lambda *args: fake(*args[:-1]))
        self.library.register_autograd(backward, setup_context=setup_context)

    def __call__(self, *args: Any, backend: str) -> Any:
        if _is_traced():
            return self.library(*args, backend)
        return self.function.apply(*args, backend)


def _is_traced() -> bool:
    """Whether tensors may hold no data: under a compiler, or under a dispatch mode (fake tensors,
    make_fx, the tracing of AOTAutograd, which runs backwards outside ``is_compiling``)."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _make_function(
    name: str,
    run: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> type[torch.autograd.Function]:
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return _vmap_by_folding(made, info.batch_size, in_dims, args)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_FORWARD_MODE.format(name=name))

    class_name = "".join(part.capitalize() for part in name.split("_")) + "Function"
    made: type[torch.autograd.Function] = type(
        class_name,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(run),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
            "vmap": staticmethod(vmap),
            "jvp": staticmethod(jvp),
        },
    )
    return made


def _vmap_by_folding(
    function: type[torch.autograd.Function],
    size: int,
    in_dims: Sequence[int | None],
    args: Sequence[Any],
) -> tuple[Any, Any]:
    """Every tensor of every op leads with the batch, so a mapped dimension folds into it."""
    folded = []
    batch = None
    for value, dim in zip(args, in_dims, strict=True):
        if isinstance(value, Tensor) and value.numel() == 0 and value.dim() == 1 and dim is None:
            folded.append(value)  # a placeholder for an output that was not asked for
        elif isinstance(value, Tensor):
            stacked = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
            batch = stacked.shape[1]
            folded.append(stacked.flatten(0, 1))
        else:
            folded.append(value)
    outputs = function.apply(*folded)
    single = isinstance(outputs, Tensor)
    unfolded, out_dims = [], []
    for output in (outputs,) if single else outputs:
        placeholder = output.dim() == 1 and output.numel() == 0 and batch != 0
        unfolded.append(output if placeholder else output.unflatten(0, (size, batch)))
        out_dims.append(None if placeholder else 0)
    return (unfolded[0], out_dims[0]) if single else (tuple(unfolded), tuple(out_dims))


def reference_vjp(
    formula: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Vector-Jacobian product of a plain PyTorch formula, differentiable to any order.

    Args:
        formula: takes ``inputs``, returns a tuple of tensors.
        needs_grad: one flag per input; the product is taken to those that are set.
        cotangents: one per output of ``formula``; None where an output was not used.
    """
    chosen = [i for i, x in enumerate(inputs) if x is not None and needs_grad[i]]
    used = [i for i, c in enumerate(cotangents) if c is not None]
    results: list[Tensor | None] = [None] * len(inputs)
    if not chosen or not used:
        return results

    def restricted(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(inputs)
        for i, value in zip(chosen, values, strict=True):
            full[i] = value
        outputs = formula(*full)
        return tuple(outputs[i] for i in used)

    _, pull_back, *_ = torch.func.vjp(restricted, *(inputs[i] for i in chosen))
    for i, gradient in zip(chosen, pull_back(tuple(cotangents[i] for i in used)), strict=True):
        results[i] = gradient
    return results
