"""The forward that the engine puts in the place of a network's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from camkernels.engine import plan
from camkernels.engine.function import LINKS, Link, run_stage
from camkernels.engine.keep import Memory
from camkernels.engine.plan import Call, EngineError, Hooked, Program, Stage
from camkernels.engine.trace import Network, Op, trace_network
from camkernels.nn import modules
from camkernels.nn._fused import relu
from camkernels.nn._kinds import is_sharded
from camkernels.nn._trace import CallShape, default_shape
from camkernels.nn._watch import RefusedError

# A network whose forward is never the same twice is not traced for ever.
_MOST_NETWORKS = 16


class EngineForward:
    """Callable that runs a network by its program.

    The network is traced anew where a mode, a module or anything else that its forward read has
    changed; what cannot be planned then raises EngineError.
    """

    is_engine = True

    def __init__(self, model: nn.Module, memory: Memory) -> None:
        self.model, self.memory = model, memory
        self._forget()

    def _forget(self) -> None:
        self._networks: list[tuple[CallShape, Network]] = []
        self._programs: dict[tuple[int, frozenset[tuple[nn.Module, bool]]], Program] = {}

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the network's class."""
        return type(self.model).forward(self.model, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch._C._get_tracing_state() is not None or torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        try:
            shape, tensors = CallShape.of(args, kwargs)
        except RefusedError as refused:
            raise EngineError(f"engine: {refused} in the call; {plan.WAY_OUT}") from None
        return _execute(self.program(shape), tensors)

    def program(self, shape: CallShape) -> Program:
        """The program of a call with such arguments, in the present modes and with the present
        hooks."""
        network = self._network(shape)
        key = id(network), _hooked(network)
        if key not in self._programs:
            self._programs[key] = plan.make_program(network, key[1], self.memory)
        return self._programs[key]

    def program_of(self, *args: Any, **kwargs: Any) -> Program:
        """The program of this call."""
        return self.program(CallShape.of(args, kwargs)[0])

    def _network(self, shape: CallShape) -> Network:
        for known, network in self._networks:
            if known == shape and network.holds():
                return network
        kept = [(s, n) for s, n in self._networks if not _same_modes(n)]
        if len(kept) != len(self._networks):  # what has changed since will not come back
            self._networks = kept
            ids = {id(n) for _, n in kept}
            self._programs = {k: p for k, p in self._programs.items() if k[0] in ids}
        if len(self._networks) >= _MOST_NETWORKS:
            raise EngineError(
                "engine: what the forward reads or is given changes from call to call; "
                f"{plan.WAY_OUT}"
            )
        network = make_network(self.model, shape)
        self._networks.append((shape, network))
        return network

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineForward:
        result = EngineForward.__new__(EngineForward)
        memo[id(self)] = result
        result.model, result.memory = copy.deepcopy(self.model, memo), self.memory
        result._forget()
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "memory": self.memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.model, self.memory = state["model"], state["memory"]
        self._forget()

    def __repr__(self) -> str:
        return f"<forward of {type(self.model).__name__}, run by camkernels' engine>"


def _same_modes(network: Network) -> bool:
    return all(m.training is mode for m, mode in network.modules)


def make_network(model: nn.Module, shape: CallShape | None = None) -> Network:
    """A network that can be planned.

    Raises:
        EngineError: it cannot; names the module.
    """
    _refuse_compiled(model)
    try:
        network = trace_network(model, default_shape(model) if shape is None else shape)
    except RefusedError as refused:
        raise EngineError(
            f"engine: the forward of {type(model).__name__} cannot be traced: {refused}; "
            f"{plan.WAY_OUT}"
        ) from None
    plan.check(network)
    return network


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        wrapped = isinstance(module, torch._dynamo.eval_frame.OptimizedModule)
        if name and (wrapped or getattr(module, "_compiled_call_impl", None) is not None):
            raise EngineError(
                f"engine: {name} is compiled (torch.compile), and what the engine runs cannot be: "
                f"leave it uncompiled; or {plan.WAY_OUT}, of which the rest is compiled"
            )


def install(model: nn.Module, memory: str | int) -> EngineForward:
    """The forward for ``model``, which can be planned in training and in evaluation. Changes
    nothing.

    Raises:
        EngineError: it cannot. ValueError: an unknown ``memory``.
    """
    forward = EngineForward(model, Memory.of(memory))
    modes = [(m, m.training) for m in model.modules()]
    try:
        for training in (not model.training, model.training):
            model.train(training)
            make_network(model)
    finally:
        for module, training in modes:
            module.training = training
    return forward


# --- hooks ------------------------------------------------------------------------------------


def _hooked(network: Network) -> frozenset[tuple[nn.Module, bool]]:
    """Modules inside whose forward hooks are to be called, and whether one wants the inputs.

    Raises:
        EngineError: hooks that the engine cannot serve.
    """
    if modules.global_hooks_exist():
        raise EngineError(f"engine: hooks for all modules are registered; {plan.WAY_OUT}")
    found = set()
    called = network.called()
    for exit_ in network.exits:
        module = exit_.module
        if module in called or not exit_.name:  # the model itself, and the user's code, are called
            continue
        if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            what = "a forward pre-hook or a backward hook, which the engine does not call"
            if is_sharded(module):
                what = "hooks of FSDP, which the engine does not call: shard the network as a whole"
            raise EngineError(
                f"engine: {exit_.name} ({type(module).__name__}) has {what}; {plan.WAY_OUT}"
            )
        needs = {getattr(h, "engine_needs", "all") for h in module._forward_hooks.values()}
        if needs - {"nothing"}:
            found.add((module, "all" in needs))
    return frozenset(found)


def _call_hooks(step: Hooked, env: dict[Op, Any]) -> None:
    """As nn.Module.__call__ does; what a hook returns takes the place of the output."""
    module = step.exit.module

    def filled(structure: Any) -> Any:
        return pytree.tree_map_only(Op, lambda op: env.get(op), structure)

    output, inputs = filled(step.exit.output), tuple(filled(step.inputs))
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "engine_needs", "all") == "nothing":
            continue
        if key in module._forward_hooks_with_kwargs:
            replaced = hook(module, inputs, {}, output)
        else:
            replaced = hook(module, inputs, output)
        if replaced is not None:
            output = replaced
    leaves = pytree.tree_leaves(step.exit.output)
    for op, value in zip(leaves, pytree.tree_leaves(output), strict=True):
        if isinstance(op, Op):
            env[op] = value


# --- running ----------------------------------------------------------------------------------


def _execute(program: Program, tensors: list[Tensor]) -> Any:
    env: dict[Op, Any] = dict(zip(program.network.inputs, tensors, strict=True))
    links: list[Link] = []
    for step, ends in zip(program.steps, program.last_reads, strict=True):
        if isinstance(step, Stage):
            outputs, link = run_stage(step, [env[v] for v in step.inputs])
            env.update(zip(step.outputs, outputs, strict=True))
            if link is not None:
                links.append(link)
            del outputs
        elif isinstance(step, Hooked):
            _call_hooks(step, env)
        else:
            _call(step, env)
        for op in ends:
            env.pop(op, None)
    output = pytree.tree_map_only(Op, lambda op: env[op], program.output)
    if isinstance(output, Tensor) and links and program.only_stages_read_inputs:
        setattr(output, LINKS, links)
    return output


def _call(step: Call, env: dict[Op, Any]) -> None:
    op = step.op
    if op.kind != "eager":
        inputs = [env[v] for v in op.inputs]
        env[op] = _FUNCTIONS[op.kind](op, *inputs) if op.module is None else op.module(*inputs)
        return
    options = op.options
    args, kwargs = pytree.tree_map_only(Op, lambda v: env[v], (options["args"], options["kwargs"]))
    function = options["call"](op.module)
    env[op] = function(*args, **kwargs)


# Functional operations where no stage runs them.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "relu": lambda op, x: relu(x),
    "add": lambda op, a, b: a + b,
    "cat": lambda op, *parts: torch.cat(parts, 1),
    "max_pool": lambda op, x: torch.max_pool2d(x, *op.options["arguments"]),
    "avg_pool": lambda op, x: torch.ops.aten.avg_pool2d(x, *op.options["arguments"]),
}


__all__ = ["EngineError", "EngineForward", "install", "make_network"]
