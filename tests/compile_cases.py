"""One step of training, or one explanation, of a tiny network of which a part is compiled, beside
the same without a compiler. What came of it, in the words of docs/compile.md."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import camkernels as ck
from camkernels import metrics

LAYER = "body.layer"
BOXES = torch.tensor([[0, 0, 8, 10], [1, 2, 9, 9], [2, 1, 10, 8], [0, 3, 7, 9]])
FLIPS = torch.tensor([True, False, True, False])


class Net(nn.Module):
    """A stem below the tapped layer, the layer, and a head behind it."""

    def __init__(self, head: str) -> None:
        super().__init__()
        stem = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        )
        layer = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU())
        self.body = nn.Sequential(OrderedDict(stem=stem, layer=layer))
        linears: dict[str, list[nn.Module]] = {
            "linear": [nn.Linear(6, 5)],
            "tanh": [nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)],
        }
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *linears[head])

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


# --- what is used --------------------------------------------------------------------------------

Criterion = Callable[[Tensor, Tensor], Tensor]
Explain = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Tool:
    """Made of the model as the trainer calls it: a criterion of logits, or an explainer of
    images."""

    make: Callable[[nn.Module], Any]
    head: str = "linear"
    network: str = "plain"
    explains: bool = False


def _views(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    return BOXES[:batch], FLIPS[:batch]


def entropy(model: nn.Module, **options: Any) -> ck.CAMEntropyLoss:
    return ck.CAMEntropyLoss(model, LAYER, 3.0, "dispersion", **options)


def consistency(model: nn.Module, views: str = "separate") -> ck.CAMConsistencyLoss:
    return ck.CAMConsistencyLoss(
        model, LAYER, 5.0, 0.1, transform=_views, target="true", window_size=3, views=views
    )


def gradient(model: nn.Module, **options: Any) -> ck.InterpretableGradientLoss:
    return ck.InterpretableGradientLoss(model, weight=100.0, **options)


def combined(model: nn.Module) -> ck.CombinedLoss:
    return ck.CombinedLoss({"e": entropy(model), "c": consistency(model)})


def everything(model: nn.Module) -> ck.CombinedLoss:
    return ck.CombinedLoss({"e": entropy(model), "c": consistency(model), "g": gradient(model)})


class OwnLoss(nn.Module):
    """Of the maps of a GradCAM, by the functions over tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.cam = [ck.GradCAM(model, LAYER)]

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        maps = ck.min_max_normalize(self.cam[0](logits, targets))  # type: ignore[arg-type]
        again = ck.warped_ssim(maps, maps.flip(2), BOXES, FLIPS, (12, 12), source_size=(12, 12),
                               window_size=3)  # fmt: skip
        norm = ck.lp_norm(maps, 2.0, size=(12, 12)).sum()
        return F.cross_entropy(logits, targets) + ck.cam_entropy(maps).sum() - again.sum() + norm


def _drop(model: nn.Module) -> Explain:
    weights = torch.linspace(0, 1, 12, dtype=torch.float64).expand(4, 12, 12)

    def measure(images: Tensor, targets: Tensor) -> Tensor:
        score = metrics.class_score(model, targets)
        return metrics.drop(*metrics.confidence_change(score, images, weights))

    return measure


def _cross_entropy(model: nn.Module) -> nn.Module:
    return nn.CrossEntropyLoss()


TOOLS: dict[str, Tool] = {
    "cross-entropy, swap_in": Tool(_cross_entropy, network="swapped"),
    "cross-entropy, engine": Tool(_cross_entropy, network="engine"),
    "CAMEntropyLoss": Tool(entropy),
    "CAMEntropyLoss, autograd": Tool(entropy, "tanh"),
    "CAMEntropyLoss, swap_in": Tool(entropy, network="swapped"),
    "CAMEntropyLoss, engine": Tool(entropy, network="engine"),
    "CAMConsistencyLoss": Tool(consistency),
    "CAMConsistencyLoss, joint": Tool(lambda m: consistency(m, "joint")),
    "CAMConsistencyLoss, autograd": Tool(consistency, "tanh"),
    "InterpretableGradientLoss": Tool(lambda m: gradient(m, plain_relus="ignore"), "tanh"),
    "InterpretableGradientLoss, swap_in": Tool(gradient, "tanh", "swapped"),
    "InterpretableGradientLoss, engine": Tool(gradient, "tanh", "engine"),
    "CombinedLoss": Tool(combined),
    "CombinedLoss, swap_in": Tool(everything, network="swapped"),
    "GradCAM": Tool(OwnLoss),
    "GradCAM, autograd": Tool(OwnLoss, "tanh"),
    "GradCAM.explain": Tool(lambda m: ck.GradCAM(m, LAYER).explain, "tanh", explains=True),
    "ScoreCAM.explain": Tool(lambda m: ck.ScoreCAM(m, LAYER).explain, explains=True),
    "InputGradient": Tool(ck.InputGradient, "tanh", explains=True),
    "GuidedBackprop": Tool(ck.GuidedBackprop, "tanh", explains=True),
    "metrics": Tool(_drop, explains=True),
}


# --- what is compiled ----------------------------------------------------------------------------


@dataclass
class Setting:
    """What the trainer holds."""

    net: Net
    model: Any
    tool: Any
    call: Callable[[], Any]
    backward: bool = True
    step: Any = None


Compile = Callable[[Any], Any]


def _usual(net: Net, model: Any, tool: Tool, data: tuple[Tensor, Tensor]) -> Setting:
    images, targets = data
    made = tool.make(model)
    if tool.explains:
        return Setting(net, model, made, lambda: made(images, targets))
    return Setting(net, model, made, lambda: made(model(images), targets))


def _whole(net: Net, tool: Tool, data: tuple[Tensor, Tensor], compiled: Compile) -> Setting:
    return _usual(net, compiled(net), tool, data)


def _method(net: Net, tool: Tool, data: tuple[Tensor, Tensor], compiled: Compile) -> Setting:
    net.compile(backend=compiled.backend)
    return _usual(net, net, tool, data)


def _part(name: str) -> Callable[..., Setting]:
    def make(net: Net, tool: Tool, data: tuple[Tensor, Tensor], compiled: Compile) -> Setting:
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, compiled(net.get_submodule(name)))
        return _usual(net, net, tool, data)

    return make


def _criterion(net: Net, tool: Tool, data: tuple[Tensor, Tensor], compiled: Compile) -> Setting:
    images, targets = data
    made = compiled(tool.make(net))
    if tool.explains:
        return Setting(net, net, made, lambda: made(images, targets))
    return Setting(net, net, made, lambda: made(net(images), targets))


def _step(net: Net, tool: Tool, data: tuple[Tensor, Tensor], compiled: Compile) -> Setting:
    setting = _usual(net, net, tool, data)
    setting.call = compiled(setting.call)
    return setting


def _step_backward(net: Net, tool: Tool, data: tuple[Tensor, Tensor], compiled: Compile) -> Setting:
    setting = _usual(net, net, tool, data)
    call = setting.call

    def step() -> Tensor:
        loss = call()
        loss.backward()
        return loss

    setting.call, setting.backward = compiled(step), False
    return setting


def _optimizer(net: Net, tool: Tool, data: tuple[Tensor, Tensor], compiled: Compile) -> Setting:
    setting = _usual(net, net, tool, data)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    setting.step = compiled(optimizer.step)
    return setting


@dataclass
class Place:
    """What is compiled, and what tells that it was: a name in the graphs."""

    make: Callable[..., Setting]
    marks: tuple[str, ...] = ("conv2d",)  # of forwards: PyTorch calls it convolution in backwards
    explains: bool = True
    """Explainers have this place too."""


PLACES: dict[str, Place] = {
    "torch.compile(model)": Place(_whole),
    "model.compile()": Place(_method),
    "below the layer": Place(_part("body.stem")),
    "around the layer": Place(_part("body")),
    "the layer": Place(_part("body.layer")),
    "behind the layer": Place(_part("head"), ("linear", "addmm")),
    "the criterion": Place(_criterion, ("cross_entropy", "camkernels")),
    "forward and criterion": Place(_step),
    "forward, criterion and backward": Place(_step_backward, explains=False),
    "the optimizer's step": Place(_optimizer, ("",), explains=False),
}


# --- what comes of it ----------------------------------------------------------------------------

STEPS = 3


class Compiler:
    """torch.compile by one backend, with a record of what was compiled."""

    def __init__(self, name: str, **options: Any) -> None:
        self.backend = CompileCounterWithBackend(name)
        self.options = options

    def __call__(self, what: Any) -> Any:
        return torch.compile(what, backend=self.backend, **self.options)

    @property
    def frames(self) -> int:
        return int(self.backend.frame_count)

    def made(self, marks: tuple[str, ...]) -> bool:
        """Whether one of ``marks`` stands in a graph."""
        names = [str(n.target) for g in self.backend.graphs for n in g.graph.nodes]
        return any(mark in name for name in names for mark in marks)


def network(tool: Tool) -> Net:
    torch.manual_seed(3)
    net = Net(tool.head).double()
    if tool.network == "plain":
        return net
    ck.swap_in(net, engine=tool.network == "engine")
    return net


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(4, 3, 12, 12, dtype=torch.float64, generator=generator), torch.arange(4)


def results(setting: Setting) -> list[Tensor]:
    """The loss and the gradients (or the weights after a step), or what an explainer gives."""
    setting.net.zero_grad()
    value = setting.call()
    if not value.requires_grad:
        return [value]
    if setting.backward:
        value.backward()
    gradients = [p.grad for p in setting.net.parameters()]
    found = [torch.zeros(()) if g is None else g.clone() for g in gradients]
    if setting.step is not None:
        setting.step()
        found += [p.detach().clone() for p in setting.net.parameters()]
    return [value.detach(), *found]


def alike(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-7, atol=1e-9)
        for a, b in zip(found, expected, strict=True)
    )


class _Nothing:
    """In the place of a compiler."""

    backend = "eager"

    def __call__(self, what: Any) -> Any:
        return what


def truth(place: Place, tool: Tool) -> list[list[Tensor]]:
    """The same without a compiler."""
    with torch.compiler.set_stance("force_eager"):
        setting = place.make(network(tool), tool, data(), _Nothing())
        return [results(setting) for _ in range(STEPS)]


def outcome(place_name: str, tool_name: str, backend: str, **options: Any) -> str:
    """In the words of the table."""
    place, tool = PLACES[place_name], TOOLS[tool_name]
    torch._dynamo.reset()
    compiled = Compiler(backend, **options)
    found, frames = [], []
    try:
        setting = place.make(network(tool), tool, data(), compiled)
        for _ in range(STEPS):
            found.append(results(setting))
            frames.append(compiled.frames)
    except (ck.TapError, ck.EngineError) as error:
        return f"raises {type(error).__name__}: {error}"
    finally:
        torch._dynamo.reset()
    for number, (one, other) in enumerate(zip(found, truth(place, tool), strict=True)):
        assert alike(one, other), f"step {number} is wrong"
    assert frames[1:] == frames[1:2] * (STEPS - 1), f"compiled anew at every step: {frames}"
    return "right" if compiled.made(place.marks) else "right, uncompiled"
