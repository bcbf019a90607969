"""A stage as autograd sees it.

Two Functions. ``StageFunction`` is the forward; its backward is the guided gradient, an input
gradient, or the last backward, as the modes and autograd say. Where an input gradient keeps its
graph it is an ``InputGradientFunction``, whose backward is the tangent pass.

The tangent pass leaves cotangents of z that the last backward must find. A score that is linear in
the logits leaves no edge between the two; a token, an output of the one and an input of the other,
is that edge. Weight gradients of both leave together, by the last backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from camkernels import modes
from camkernels.engine.passes import Run, parameters_of
from camkernels.engine.plan import Stage
from camkernels.engine.units import Record, Second, Stream
from camkernels.ops.batch_norm_relu.norm import GUIDED_TWICE, THIRD_ORDER

LINKS = "_camkernels_links"
"""Attribute of a network's output: the stages that made it."""
WEIGHTS_TWICE = (
    "a gradient of a gradient of parameters (a penalty on weight gradients) is not supported by "
    "the engine; ck.swap_in(model) without engine=True differentiates it"
)


def run_stage(stage: Stage, inputs: list[Tensor]) -> tuple[list[Tensor], Link | None]:
    """The stage's outputs, and what :func:`stage_gradients` needs of it."""
    parameters = [p for p in parameters_of(stage) if p.requires_grad]
    wanted = torch.is_grad_enabled() and bool(parameters or any(x.requires_grad for x in inputs))
    run = Run(stage, inputs, wanted)
    with modes.no_autocast(inputs[0].device):
        if not wanted:
            with torch.no_grad():
                return run.forward(inputs), None
        found = StageFunction.apply(run, len(inputs), *inputs, *parameters)
    outputs, token = list(found[:-1]), found[-1]
    return outputs, Link(run, inputs, token, [get_gradient_edge(y) for y in outputs])


class Link:
    """A stage's place in the graph of one forward."""

    def __init__(
        self, run: Run, inputs: list[Tensor], token: Tensor, edges: list[GradientEdge]
    ) -> None:
        self.run, self.inputs, self.token, self.edges = run, inputs, token, edges


def link_between(logits: Tensor, leaf: Tensor) -> Link | None:
    """The one stage that leads from ``leaf`` to these very logits; None where there is another
    way, or more than one stage."""
    links: list[Link] = getattr(logits, LINKS, None) or []
    if len(links) != 1 or len(links[0].inputs) != 1:
        return None
    source = links[0].inputs[0]
    if source is leaf:
        return links[0]
    joins = source.grad_fn is not None and source.grad_fn.name() == "JoinFunctionBackward"
    return links[0] if joins else None


def stage_gradients(
    score: Tensor, link: Link, create_graph: bool
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of ``score`` by the stage's inputs, plain and guided, in one pass.

    What lies behind the stage is differentiated by autograd, twice; inside the two go side by side
    and share what is made again.
    """
    with modes.no_weight_gradients():
        with modes.guided():
            guided = torch.autograd.grad(score, link.edges, retain_graph=True, allow_unused=True)
        plain = torch.autograd.grad(
            score, link.edges, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        with torch.set_grad_enabled(create_graph):
            found = InputGradientFunction.apply(
                link.run, link.token, create_graph, False, len(plain), *plain, *guided
            )
    count = len(link.inputs)
    return list(found[:count]), list(found[count : 2 * count])


def _second(run: Run) -> Second:
    """Where tangent passes and last backward of one call of autograd meet."""
    task = torch._C._current_graph_task_id()
    return run.second.setdefault(task, Second())


def _keeps_graph() -> bool:
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


class StageFunction(torch.autograd.Function):
    """inputs and parameters to outputs and a token."""

    @staticmethod
    def forward(ctx: Any, run: Run, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        token = tensors[0].new_zeros((), dtype=torch.float32)
        outputs = run.forward(tensors[:count])
        ctx.run, ctx.count = run, count
        ctx.parameters = tensors[count:]
        ctx.relu = run.stage.relu
        ctx.save_for_backward(token)
        ctx.set_materialize_grads(False)
        return (*outputs, token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        run: Run = ctx.run
        (token,) = ctx.saved_tensors
        guided, weights = modes.guided_now(), modes.weight_gradients_wanted()
        given = grads[:-1]
        nothing = (None,) * len(ctx.parameters)
        if torch.is_grad_enabled():
            found = InputGradientFunction.apply(run, token, True, weights, len(given), *given)
            to_inputs = found[: ctx.count]
            to_parameters = found[ctx.count :] if weights else nothing
            return (None, None, *to_inputs, *to_parameters)
        stream = Stream(guided)
        last = not _keeps_graph()
        if weights:
            stream.second = run.second.pop(torch._C._current_graph_task_id(), None)
            stream.gradients = {} if stream.second is None else stream.second.of_parameters
        with modes.no_autocast(run.device):
            (to_inputs,) = run.reverse([given], [stream], last, unread=weights and not guided)
        if last:
            run.free()
        if stream.gradients is None:
            return (None, None, *to_inputs, *nothing)
        gradients, stream.gradients = stream.gradients, None
        return (None, None, *to_inputs, *(gradients.pop(p, None) for p in ctx.parameters))


class InputGradientFunction(torch.autograd.Function):
    """Cotangents of the outputs to those of the inputs, plain, guided where those were given too,
    and to those of the parameters where wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        token: Tensor,
        recording: bool,
        weights: bool,
        count: int,
        *grads: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        record = Record() if recording else None
        streams = [Stream(record=record, gradients={} if weights else None)]
        given = [grads[:count]]
        if len(grads) > count:
            streams.append(Stream(guided=True))
            given.append(grads[count:])
        with modes.no_autocast(run.device):
            found = run.reverse(given, streams, last=False)
        ctx.run, ctx.record, ctx.count = run, record, count
        ctx.given = [g is not None for g in grads[:count]]
        ctx.total = len(grads)
        ctx.inputs = len(found[0])
        ctx.set_materialize_grads(False)
        if len(found) > 1:
            ctx.mark_non_differentiable(*(g for g in found[1] if g is not None))
        results = [g for stream in found for g in stream]
        if weights:
            made = streams[0].gradients
            assert made is not None
            trained = (p for p in parameters_of(run.stage) if p.requires_grad)
            results += [made.get(p) for p in trained]
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *hs: Tensor | None) -> tuple[Any, ...]:
        run: Run = ctx.run
        if torch.is_grad_enabled():
            raise RuntimeError(THIRD_ORDER.format(op="the engine"))
        if modes.guided_now():
            raise RuntimeError(GUIDED_TWICE)
        if ctx.record is None:
            raise RuntimeError("the input gradient was taken without create_graph")
        if any(h is not None for h in hs[ctx.inputs :]):
            raise NotImplementedError(WEIGHTS_TWICE)
        run.keeps_graph, run.weights_wanted = _keeps_graph(), modes.weight_gradients_wanted()
        second = _second(run)
        with modes.no_autocast(run.device):
            found = run.tangent(ctx.record, hs[: ctx.inputs], second)
        # an output that the score does not depend on had no cotangent, and gets none
        cotangents = [h if given else None for h, given in zip(found, ctx.given, strict=True)]
        if not run.keeps_graph:
            ctx.record = None
        # the edge of the token, not this value, is what puts the last backward after this pass
        token = torch.zeros((), device=run.device)
        rest = (None,) * (ctx.total - ctx.count)
        return (None, token, None, None, None, *cotangents, *rest)
