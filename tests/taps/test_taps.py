"""Taps and GradCAM: what is seen of a forward, and what is refused."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nets import SmallNet, batch, eager_loss, eager_maps
from torch import Tensor, nn

import camkernels as ck


def test_maps_equal_eager_for_any_class() -> None:
    model = SmallNet("tanh").double()
    twin = copy.deepcopy(model)
    images, targets = batch()
    with ck.GradCAM(model, "body") as cam:
        logits = model(images)
        for classes in (targets, (targets + 1) % 5):
            expected = eager_maps(twin, "body", images, classes)[1]
            torch.testing.assert_close(cam(logits, classes), expected)
        predicted = eager_maps(twin, "body", images, logits.argmax(1))[1]
        torch.testing.assert_close(cam(logits), predicted)
        statistics = cam.statistics(logits, targets)
        expected_statistics = ck.map_statistics(cam(logits, targets))
        for ours, theirs in zip(statistics, expected_statistics, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert cam(logits, targets).requires_grad
    with pytest.raises(ck.TapError, match="closed"):
        cam(logits, targets)


def test_layer_by_module_and_several_layers() -> None:
    model = SmallNet().double()
    images, targets = batch()
    with ck.GradCAM(model, [model.body[2], "body"]) as cam:
        maps = cam(model(images), targets)
        assert [tuple(m.shape) for m in maps] == [(4, 12, 12), (4, 6, 6)]
    with pytest.raises(ValueError, match="not a submodule"):
        ck.GradCAM(model, nn.ReLU())
    with pytest.raises(ValueError, match="twice"):
        ck.GradCAM(model, ["body", model.body])
    with pytest.raises(TypeError, match="name or a module"):
        ck.GradCAM(model, 4)  # type: ignore[arg-type]


def test_relu_off_keeps_negative_values() -> None:
    model = SmallNet().double()
    images, targets = batch()
    with ck.GradCAM(model, "body", relu=False) as plain, ck.GradCAM(model, "body") as positive:
        logits = model(images)
        torch.testing.assert_close(plain(logits, targets).relu(), positive(logits, targets))
        assert (plain(logits, targets) < 0).any()


class Tokens(nn.Module):
    """Patches to tokens (B, N, D), and a mean over tokens: a transformer's outline."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 4, stride=4)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.LayerNorm(6))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.block(self.patch(x).flatten(2).transpose(1, 2))
        logits: Tensor = self.fc(tokens.mean(1).tanh())
        return logits


def test_token_maps() -> None:
    model = Tokens().double()
    images, targets = batch()

    def to_map(tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, (3, 3))

    with ck.GradCAM(model, "block", reshape_transform=to_map) as cam:
        maps = cam(model(images), targets)
    kept: list[Tensor] = []
    model.block.register_forward_hook(lambda m, i, o: kept.append(o))
    logits = model(images)
    score = logits.gather(1, targets[:, None]).sum()
    (gradients,) = torch.autograd.grad(score, kept[0])
    expected = (gradients.mean(1, keepdim=True) * kept[0]).sum(2).relu().view(4, 3, 3)
    torch.testing.assert_close(maps, expected)
    with ck.GradCAM(model, "block") as cam, pytest.raises(ck.TapError, match="reshape_transform"):
        cam(model(images), targets)


def test_layer_reached_twice_or_never() -> None:
    class Twice(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            self.body(x)
            return super().forward(x)

    images, targets = batch()
    model = Twice().double()
    with ck.GradCAM(model, "body") as cam, pytest.raises(ck.TapError, match="reached 2 times"):
        cam(model(images), targets)

    class Never(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.pool(self.body[3](self.body[0](x))))

    model = Never().double()
    with ck.GradCAM(model, "body.1") as cam, pytest.raises(ck.TapError, match="not reached"):
        cam(model(images), targets)


def test_layer_that_returns_no_tensor() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    model = nn.Sequential(Pair())
    with ck.GradCAM(model, "0"), pytest.raises(ck.TapError, match="returns tuple"):
        model(torch.ones(1, 1, 2, 2))


def test_output_replaced_by_a_later_hook_is_noticed() -> None:
    model = SmallNet("tanh").double()
    images, targets = batch()
    with ck.GradCAM(model, "body") as cam:
        handle = model.body.register_forward_hook(lambda m, i, o: o.detach() * 2)
        with pytest.raises(ck.TapError, match="not connected"):
            cam(model(images), targets)
        handle.remove()


def test_hooks_that_alter_activations_exclude_the_closed_form() -> None:
    model = SmallNet().double()
    images, targets = batch()
    model.pool.register_forward_hook(lambda m, i, o: o * 1.5)
    twin = copy.deepcopy(model)
    with ck.GradCAM(model, "body") as cam:
        maps = cam(model(images), targets)
        assert cam.head.startswith("autograd")
    torch.testing.assert_close(maps, eager_maps(twin, "body", images, targets)[1])


def test_self_check_notices_a_head_altered_after_the_examination() -> None:
    model = SmallNet().double()
    images, targets = batch()
    with ck.GradCAM(model, "body") as cam:
        cam(model(images), targets)
        assert cam.head == "closed form: pool -> linear"
        model.pool.register_forward_hook(lambda m, i, o: o * 1.5)
        with pytest.raises(ck.TapError, match="does not reproduce the logits"):
            cam(model(images), targets)


def test_self_check_notices_a_relu_in_place_behind_the_tap() -> None:
    class Late(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.body[:4](x)
            return self.fc(self.pool(x.relu_()))

    model = Late().double()
    images, targets = batch()
    with ck.GradCAM(model, "body.3") as cam, pytest.raises(ck.TapError, match="in place"):
        cam(model(images), targets)


def test_functional_relu_before_the_pool_is_not_taken_for_pooling() -> None:
    class Functional(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.relu(self.body(x))  # changes no value, but the gradient at 0
            return self.fc(x.mean((2, 3)))

    class Mean(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(x).mean((-2, -1)))

    class Sum(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(x).amax((2, 3)))

    images, targets = batch()
    for kind, closed in ((Functional, False), (Mean, True), (Sum, False)):
        model = kind().double()
        twin = copy.deepcopy(model)
        with ck.GradCAM(model, "body") as cam:
            maps = cam(model(images), targets)
            assert cam.head.startswith("closed form") == closed, (kind, cam.head)
        torch.testing.assert_close(maps, eager_maps(twin, "body", images, targets)[1])


def test_replaced_head_is_examined_anew() -> None:
    model = SmallNet().double()
    images, targets = batch()
    with ck.GradCAM(model, "body") as cam:
        cam(model(images), targets)
        model.fc = nn.Sequential(nn.Flatten(), nn.Linear(6, 5)).double()
        twin = copy.deepcopy(model)
        for _ in range(2):
            maps = cam(model(images), targets)
            torch.testing.assert_close(maps, eager_maps(twin, "body", images, targets)[1])
        assert cam.head == "closed form: pool -> linear"


def test_parametrized_head_takes_autograd() -> None:
    model = SmallNet().double()
    nn.utils.parametrizations.spectral_norm(model.fc[1])
    images, targets = batch()
    with ck.GradCAM(model, "body") as cam:
        cam(model(images), targets)
        assert cam.head.startswith("autograd")
    with ck.GradCAM(model, "body", head="closed_form") as cam:
        logits = model(images)
        with pytest.raises(ck.TapError, match="closed_form"):
            cam(logits, targets)


@pytest.mark.parametrize("kind", ["dict", "attribute"])
def test_closed_form_of_models_that_return_logits_by_name(kind: str) -> None:
    class Named(SmallNet):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            logits = super().forward(x)
            return {"logits": logits} if kind == "dict" else SimpleNamespace(logits=logits)

    model, images, targets = Named().double(), *batch()
    with ck.GradCAM(model, "body") as cam:
        out = model(images)
        logits = out["logits"] if kind == "dict" else out.logits
        maps = cam(logits, targets)
        assert cam.head.startswith("closed form")
    with ck.GradCAM(model, "body", head="autograd") as cam:
        out = model(images)
        logits = out["logits"] if kind == "dict" else out.logits
        torch.testing.assert_close(cam(logits, targets), maps)


def test_structured_output_under_no_grad() -> None:
    class Structured(SmallNet):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"logits": super().forward(x)}

    model = Structured("tanh").double()
    images, targets = batch()
    with ck.GradCAM(model, "body") as cam:
        expected = cam(model(images)["logits"], targets)
        with torch.no_grad():
            out = model(images)
            assert not out["logits"].requires_grad
            torch.testing.assert_close(cam(out["logits"], targets), expected)


@pytest.mark.parametrize("layers", [("body", "body"), ("body", "body.0"), ("body.0", "body")])
def test_two_taps_on_a_forward_without_gradients(layers: tuple[str, str]) -> None:
    """The tap reached first makes the graph, and detaches what the other one is asked of."""
    model = SmallNet("tanh").double()  # no closed form: autograd must do it
    images, targets = batch()
    expected = []
    for layer in layers:
        with ck.GradCAM(model, layer) as cam:
            expected.append(cam(model(images), targets).detach())
    with ck.GradCAM(model, layers[0]) as one, ck.GradCAM(model, layers[1]) as other:
        with torch.no_grad():
            logits = model(images)
            assert not logits.requires_grad
            found = one(logits, targets), other(logits, targets)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        kept = weakref.ref(one._tap.connected(logits))
    del logits, found, ours, one, other
    gc.collect()
    assert kept() is None  # nothing outlives the taps and the user's tensors


def test_activations_are_let_go() -> None:
    model = SmallNet().double()
    images, targets = batch()
    cam = ck.GradCAM(model, "body")
    logits = model(images)
    cam(logits, targets)
    kept = weakref.ref(cam._tap.activations()[0])
    cam.close()
    del logits
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("wrap", ["sub", "whole", "whole-first", "method"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_backbone_with_closed_form(wrap: str, compiler: str) -> None:
    torch._dynamo.reset()
    model = SmallNet().double()
    twin = copy.deepcopy(model)
    images, targets = batch()
    called: nn.Module = model
    if wrap == "sub":
        model.body = torch.compile(model.body, backend=compiler)
    elif wrap == "whole":
        called = torch.compile(model, backend=compiler)  # type: ignore[assignment]
    cam = ck.GradCAM(called, "body")
    if wrap == "whole-first":
        called = torch.compile(model, backend=compiler)  # type: ignore[assignment]
    elif wrap == "method":
        model.compile(backend=compiler)
    expected = torch.autograd.grad(
        eager_maps(twin, "body", images, targets)[1].square().sum(), list(twin.parameters())[:6]
    )
    for _ in range(2):
        found = torch.autograd.grad(
            cam(called(images), targets).square().sum(), list(model.parameters())[:6]
        )
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert cam.head.startswith("closed form")
    cam.close()


def test_compiled_backbone_with_autograd_head_raises_rather_than_drop_the_second_order() -> None:
    torch._dynamo.reset()
    model = SmallNet("tanh").double()
    compiled = torch.compile(model, backend="aot_eager")
    images, targets = batch()
    with ck.GradCAM(compiled, "body") as cam:  # type: ignore[arg-type]
        logits = compiled(images)
        with pytest.raises(ck.TapError, match=r"torch\.compile cannot differentiate twice"):
            cam(logits, targets)
    torch._dynamo.reset()


def test_data_parallel_replicas_are_refused() -> None:
    model = SmallNet()
    with ck.GradCAM(model, "body"):
        replica = model._replicate_for_data_parallel()
        with pytest.raises(TypeError, match="DataParallel"):
            replica(torch.randn(1, 3, 12, 12))


def test_distributed_data_parallel_is_opened(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model = SmallNet("tanh").double()
        twin = copy.deepcopy(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        images, targets = batch()
        criterion = ck.CAMEntropyLoss(wrapped, "body", 2.0)
        for _ in range(2):
            wrapped.zero_grad()
            criterion(wrapped(images), targets).backward()
        eager_loss(twin, "body", images, targets, 2.0).backward()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
        # With two processes the gradients would differ between them, without a word.
        static = nn.parallel.DistributedDataParallel(model, static_graph=True)
        with pytest.raises(ck.TapError, match="static_graph"):
            criterion(static(images), targets)
        logits = static(images)
        with pytest.raises(ck.TapError, match="static_graph"):
            criterion((logits.float()[:, :4] * 2).double(), targets.clamp(max=3))
        closed = SmallNet().double()
        static = nn.parallel.DistributedDataParallel(closed, static_graph=True)
        with_head = ck.CAMEntropyLoss(static, "body", 2.0, head="closed_form")
        with_head(static(images), targets).backward()
    finally:
        torch.distributed.destroy_process_group()
