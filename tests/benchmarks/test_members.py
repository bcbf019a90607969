"""The members: their sides agree, and their checks notice a side that is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import harness, loops
from benchmarks.harness import Options, Side
from benchmarks.members import MEMBERS, step_cam_entropy, step_interpretable


@pytest.mark.parametrize("name", [n for n in MEMBERS if not n.startswith("step_")])
def test_sides_of_every_op_agree(name: str) -> None:
    options = Options(quick=True)
    for case in MEMBERS[name].cases(options):
        factories = case.build()
        factories.pop("compile", None)  # inductor takes seconds per case
        sides = {side: factory() for side, factory in factories.items()}
        harness.verify(case, sides, MEMBERS[name].baseline, options)
        assert MEMBERS[name].baseline in sides
        assert case.ideal_bytes


def test_ops_check_notices_a_wrong_side() -> None:
    options = Options(quick=True)
    for name in ("cam", "cam_statistics", "map_statistics"):
        case = MEMBERS[name].cases(options)[0]
        sides, _ = harness.build_sides(case, options, only="eager")
        wrong = Side(sides["eager"].forward, lambda out, s=sides["eager"]: _half(s.backward(out)))
        with pytest.raises(harness.SidesDisagreeError):
            harness.verify(case, {**sides, "ours": wrong}, "eager", options)


def _half(gradients: Any) -> list[torch.Tensor]:
    return [g / 2 for g in gradients]


def test_step_sides_agree_and_let_go() -> None:
    pytest.importorskip("torchvision")
    options = Options(quick=True)
    step_cam_entropy.check("layer4", options)
    (case, _) = MEMBERS["step_cam_entropy"].cases(options)
    side = case.build()["ours"]()
    gradients = side.step()
    assert len(gradients) == len(side.parameters)
    assert all(p.grad is None for p in side.parameters)


def test_guided_sides_are_not_plain_ones() -> None:
    options = Options(quick=True)
    found = {case.name: case for case in MEMBERS["relu"].cases(options)}
    plain, guided = (
        found[f"{kind} save=mask 3x8x5x7 nchw"].build()["eager"]().results()[0]
        for kind in ("backward", "guided")
    )
    assert torch.equal(guided, plain.clamp_min(0))
    assert not torch.equal(guided, plain)


def test_interpretable_sides_agree_and_let_go() -> None:
    pytest.importorskip("torchvision")
    options = Options(quick=True)
    setting = step_interpretable.Setting("resnet18", "float32", "channels_last")
    step_interpretable.check(setting, options)
    names = [case.name for case in MEMBERS["step_interpretable"].cases(options)]
    assert setting.name in names
    (case,) = (c for c in MEMBERS["step_interpretable"].cases(options) if c.name == setting.name)
    for factory in case.build().values():
        side = factory()
        assert len(side.step()) == len(side.parameters)
        assert all(p.grad is None for p in side.parameters)


def test_interpretable_check_notices_a_first_order_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The input gradient detached: a loss that reads well and regularises nothing."""
    pytest.importorskip("torchvision")
    grad = torch.autograd.grad

    def first_order(model: torch.nn.Module) -> Any:
        loop, close = loops.interpretable(model, step_interpretable.WEIGHT)

        def loss(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            def detached(*args: Any, create_graph: bool = False, **kwargs: Any) -> Any:
                return grad(*args, retain_graph=True)

            with monkeypatch.context() as patch:
                patch.setattr(torch.autograd, "grad", detached)
                return loop(images, targets)

        return loss, close

    right = step_interpretable.makers()
    plain = {"plain": right["plain"], "swapped_plain": right["plain"]}
    sides = {**plain, "eager": right["eager"], "ours": first_order}
    monkeypatch.setattr(step_interpretable, "makers", lambda: sides)
    setting = step_interpretable.Setting("resnet18", "float32", "nchw")
    with pytest.raises(harness.SidesDisagreeError, match="ours disagrees with eager in tensor 1"):
        step_interpretable.check(setting, Options(quick=True))


def test_step_check_notices_a_first_order_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A detached alpha, the mistake that is commonly made: loss equal, gradients not."""
    pytest.importorskip("torchvision")

    def first_order(model: torch.nn.Module) -> Any:
        kept = loops.Kept(model.get_submodule("layer4"))

        def loss(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits, activations = model(images), kept.take()
            score = logits.gather(1, targets[:, None]).sum()
            (g,) = torch.autograd.grad(score, activations, retain_graph=True)
            maps = loops.eager.cam(activations, g)
            penalty = loops.mean_over_live(loops.eager.entropy(maps), maps)
            cross_entropy = torch.nn.functional.cross_entropy(logits, targets)
            return cross_entropy + step_cam_entropy.BETA * penalty

        return loss, kept.handle.remove

    right = step_cam_entropy.makers("layer4")
    sides = {"plain": right["plain"], "careful": right["careful"], "ours": first_order}
    monkeypatch.setattr(step_cam_entropy, "makers", lambda layer: sides)
    with pytest.raises(harness.SidesDisagreeError, match="ours disagrees with careful in tensor 1"):
        step_cam_entropy.check("layer4", Options(quick=True))
