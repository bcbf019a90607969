"""InputGradient, GuidedBackprop, GuidedGradCAM, SmoothGrad: against captum and plain autograd; what
they leave as it was; bad input."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum import attr
from torch import Tensor, nn

import camkernels as ck


class Net(nn.Module):
    """Modules, functions and in-place ReLUs; BatchNorm and dropout, whose state must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.drop = nn.Conv2d(8, 6, 3, padding=1), nn.Dropout(0.5)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.conv2(x))
        x = torch.relu(x - 0.1).mean((2, 3))
        logits: Tensor = self.fc(self.drop(x))
        return logits


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(3)
    made = Net().to(dtype)
    with torch.no_grad():
        made.bn1.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
    return made


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 9, 7, generator=torch.Generator().manual_seed(1)).double()


TARGETS = torch.tensor([0, 3, 1, 4])


def guided_by_hand(model: Net, x: Tensor, classes: Tensor) -> Tensor:
    """Each ReLU once more, with the rule of the paper."""

    class Guided(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, u: Tensor) -> Tensor:
            ctx.save_for_backward(u)
            return u.clamp(min=0)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return torch.where(ctx.saved_tensors[0] > 0, grad.clamp(min=0), 0.0)

    relu: Any = Guided.apply
    leaf = x.clone().requires_grad_()
    model = copy.deepcopy(model).eval()
    h = relu(model.bn1(model.conv1(leaf)))
    h = relu(relu(model.conv2(h)) - 0.1).mean((2, 3))
    return torch.autograd.grad(model.fc(h).gather(1, classes[:, None]).sum(), leaf)[0]


def test_input_gradient_is_that_of_autograd() -> None:
    model, x = net(), images()
    leaf = x.clone().requires_grad_()
    score = copy.deepcopy(model).eval()(leaf).gather(1, TARGETS[:, None]).sum()
    (expected,) = torch.autograd.grad(score, leaf)
    torch.testing.assert_close(ck.InputGradient(model)(x, TARGETS), expected)
    assert not ck.InputGradient(model)(x, TARGETS).requires_grad


def test_guided_backprop_is_the_rule_of_the_paper() -> None:
    model, x = net(), images()
    expected = guided_by_hand(model, x, TARGETS)
    found = ck.GuidedBackprop(model)(x, TARGETS)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, ck.InputGradient(model)(x, TARGETS))
    swapped = ck.swap_in(copy.deepcopy(model))
    torch.testing.assert_close(ck.GuidedBackprop(swapped)(x, TARGETS), expected)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "vgg11_bn"])
def test_networks_against_captum(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=7).eval()
    x, classes = torch.rand(2, 3, 64, 64), torch.tensor([2, 5])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum tells that it sets hooks
        theirs = copy.deepcopy(model)
        for module in theirs.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # captum's hooks cannot take it
        if name == "resnet18":
            # and see a module that is called twice once only
            expected = None
        else:
            expected = attr.GuidedBackprop(theirs).attribute(x, target=classes)
        plain = attr.Saliency(theirs).attribute(x.clone(), target=classes, abs=False)
    torch.testing.assert_close(ck.InputGradient(model)(x, classes), plain, rtol=1e-4, atol=1e-7)
    found = ck.GuidedBackprop(model)(x, classes)
    if expected is not None:
        scale = float(expected.abs().max())
        assert float((found - expected).abs().max()) <= 1e-5 * scale
    swapped = ck.GuidedBackprop(ck.swap_in(copy.deepcopy(model)))(x, classes)
    torch.testing.assert_close(swapped, found, rtol=1e-3, atol=1e-5 * float(found.abs().max()))


class FunctionsOnly(nn.Module):
    """No ReLU module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(torch.relu(self.conv1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize("make", [net, FunctionsOnly])
@pytest.mark.parametrize(
    "swap", [{}, {"engine": True, "memory": "fast"}, {"engine": True, "memory": "lean"}]
)
def test_swapped_networks(make: Any, swap: dict[str, Any]) -> None:
    """The swapped forward is traced when the explainer calls it first, and is one for training."""
    model, x = make().float(), images().float()
    expected = ck.GuidedBackprop(copy.deepcopy(model))(x, TARGETS)
    assert not torch.allclose(expected, ck.InputGradient(model)(x, TARGETS))
    swapped = ck.swap_in(copy.deepcopy(model), **swap)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            torch.testing.assert_close(ck.GuidedBackprop(swapped)(x, TARGETS), expected)
    torch.testing.assert_close(swapped.eval()(x), model.eval()(x))
    torch.testing.assert_close(
        ck.InputGradient(swapped)(x, TARGETS), ck.InputGradient(model)(x, TARGETS)
    )


def test_guided_grad_cam_is_the_product() -> None:
    model, x = net(), images()
    found = ck.GuidedGradCAM(model, "conv2")(x, TARGETS)
    frozen = copy.deepcopy(model).eval()
    with ck.GradCAM(frozen, "conv2") as cam:
        maps = cam(frozen(x), TARGETS)
    assert isinstance(maps, Tensor)
    enlarged = F.interpolate(maps.detach()[:, None].double(), (9, 7), mode="bilinear")
    expected = guided_by_hand(model, x, TARGETS) * enlarged
    torch.testing.assert_close(found, expected)


def test_smooth_grad_is_a_mean_over_noise() -> None:
    model, x = net(), images()
    smooth = ck.SmoothGrad(model, samples=3, noise=0.2, seed=5)
    found = smooth(x, TARGETS)
    generator = torch.Generator().manual_seed(5)
    span = (x.flatten(1).amax(1) - x.flatten(1).amin(1)).view(-1, 1, 1, 1)
    total = torch.zeros_like(x)
    for _ in range(3):
        noise = torch.randn(x.shape[1:], generator=generator, dtype=torch.float64)
        total += ck.InputGradient(model)(x + 0.2 * span * noise, TARGETS)
    torch.testing.assert_close(found, total / 3)
    torch.testing.assert_close(smooth(x, TARGETS), found, rtol=0, atol=0)
    torch.testing.assert_close(smooth(x[2:3], TARGETS[2:3]), found[2:3])
    still = ck.SmoothGrad(ck.GuidedBackprop(model), samples=2, noise=0.0)
    torch.testing.assert_close(still(x), ck.GuidedBackprop(model)(x))


EXPLAINERS: dict[str, Any] = {
    "InputGradient": ck.InputGradient,
    "GuidedBackprop": ck.GuidedBackprop,
    "GuidedGradCAM": lambda model, **options: ck.GuidedGradCAM(model, "conv2", **options),
    "SmoothGrad": lambda model, **options: ck.SmoothGrad(
        ck.InputGradient(model, **options), samples=2
    ),
}
every_explainer = pytest.mark.parametrize("name", EXPLAINERS)


@every_explainer
def test_targets_batches_and_structured_outputs(name: str) -> None:
    class Structured(Net):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x)}

    model, x = net(), images()
    whole = EXPLAINERS[name](model)(x, TARGETS)
    if name != "SmoothGrad":  # whose noise is drawn for the batch
        torch.testing.assert_close(EXPLAINERS[name](model, batch_size=3)(x, TARGETS), whole)
    torch.testing.assert_close(EXPLAINERS[name](model)(x, TARGETS.tolist()), whole)
    structured = Structured().double()
    structured.load_state_dict(model.state_dict())
    taking = EXPLAINERS[name](structured, logits=lambda output: output["logits"])
    torch.testing.assert_close(taking(x, TARGETS), whole)
    with pytest.raises(TypeError, match="pass logits="):
        EXPLAINERS[name](structured)(x, TARGETS)
    one = EXPLAINERS[name](model)(x, 2)
    torch.testing.assert_close(one, EXPLAINERS[name](model)(x, [2, 2, 2, 2]))
    predicted = copy.deepcopy(model).eval()(x).argmax(1)
    torch.testing.assert_close(EXPLAINERS[name](model)(x), EXPLAINERS[name](model)(x, predicted))
    assert EXPLAINERS[name](model)(x[:0]).shape == (0, 3, 9, 7)


def test_a_callable_makes_the_score() -> None:
    model, x = net(), images()
    by_score = ck.InputGradient(model)(x, lambda logits: logits[:, 1] - logits[:, 2])
    parts = [ck.InputGradient(model)(x, index) for index in (1, 2)]
    torch.testing.assert_close(by_score, parts[0] - parts[1])
    with pytest.raises(ValueError, match=r"\(4,\) of the callable, got \(4, 5\)"):
        ck.InputGradient(model)(x, lambda logits: logits)
    for made in (ck.InputGradient(model), ck.GuidedGradCAM(model, "conv2")):
        expected = made(x, [3, 0, 1, 2])
        torch.testing.assert_close(
            made(x, lambda logits: logits.gather(1, torch.tensor([[3], [0], [1], [2]]))[:, 0]),
            expected,
        )
        rows = [lambda row, c=c: row[c] for c in (3, 0, 1, 2)]
        torch.testing.assert_close(made(x, rows), expected)
        with pytest.raises(ValueError, match="targets: expected one per image, 4, got 3"):
            made(x, rows[:3])


@every_explainer
@pytest.mark.parametrize("context", ["grad", "no_grad", "inference"])
def test_nothing_is_left_changed(name: str, context: str) -> None:
    model = net().train()
    model.conv1.eval()  # a mode of its own
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    x = images()
    kept = x.clone()
    contexts = {
        "grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode,
    }  # fmt: skip
    with contexts[context]():
        found = EXPLAINERS[name](model)(x, TARGETS)
    assert bool(found.any())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(x, kept)
    assert x.grad is None


@every_explainer
def test_an_error_in_the_forward_leaves_nothing_changed(name: str) -> None:
    model = net().train()
    explainer = EXPLAINERS[name](model)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError):
        explainer(torch.randn(2, 4, 9, 7).double(), [0, 1])  # four channels
    assert all(module.training for module in model.modules())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    with ck.guided():
        pass
    assert float(torch.relu(torch.tensor(-1.0))) == 0
    assert not torch._C._len_torch_function_stack()


def test_a_network_without_relu_is_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = images().float()
    with pytest.warns(UserWarning, match="calls no ReLU"):
        found = ck.GuidedBackprop(model)(x, 1)
    torch.testing.assert_close(found, ck.InputGradient(model)(x, 1))


@every_explainer
def test_bad_input(name: str) -> None:
    model, x = net(), images()
    explainer = EXPLAINERS[name](model)
    with pytest.raises(TypeError, match="images: expected a tensor"):
        explainer(x.tolist())
    with pytest.raises(TypeError, match="images: expected a floating-point"):
        explainer(x.long())
    with pytest.raises(ValueError, match=r"images: expected \(B, C, H, W\)"):
        explainer(x[0])
    with pytest.raises(ValueError, match="targets: expected one per image, 4, got 3"):
        explainer(x, TARGETS[:3])
    with pytest.raises(IndexError, match="class 9 is out of range"):
        explainer(x, 9)
    with pytest.raises(TypeError, match="targets"):
        explainer(x, 1.5)
    with pytest.raises(TypeError, match="targets"):
        explainer(x, TARGETS.double())


def test_wrong_options() -> None:
    model = net()
    with pytest.raises(ValueError, match="batch_size"):
        ck.InputGradient(model, batch_size=0)(images())
    with pytest.raises(TypeError, match=r"explainer: expected InputGradient.*got GradCAM"):
        ck.SmoothGrad(ck.GradCAM(model, "conv2"))
    with pytest.raises(ValueError, match="samples"):
        ck.SmoothGrad(model, samples=0)
    with pytest.raises(ValueError, match="noise"):
        ck.SmoothGrad(model, noise=-0.1)
    with pytest.raises(ValueError, match=r"no module named 'conv3'.*conv2"):
        ck.GuidedGradCAM(model, "conv3")

    class Detached(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(RuntimeError, match="does not depend on the images"):
        ck.InputGradient(Detached().double())(images())


def test_no_graph_is_kept() -> None:
    model, x = net(), images()
    found = ck.GuidedGradCAM(model, "conv2")(x, TARGETS)
    held = weakref.ref(found)
    del found
    gc.collect()
    assert held() is None
