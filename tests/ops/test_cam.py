"""cam: grad_cam(A, G) and class_activation_map(A, weights)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from ops.base import OpTests, Request, device_of, every_backend
from ops.inputs import activations_and_seeds, extreme_activations
from ops.oracle import Case, derivatives
from torch import Tensor

from camkernels import backends
from camkernels.ops.cam import reference
from camkernels.ops.cam.op import cam_fwd


class TestCam(OpTests):
    op = "cam"
    option = "relu"
    arguments = 2
    variants = ("gradients", "weights")
    kinds = ("normal", "sparse", "integers", "constant", "smooth")
    outputs = ("maps",)

    def run(self, backend: str) -> Callable[..., Sequence[Tensor]]:
        return lambda a, g, relu: (cam_fwd(a, g, relu, backend=backend)[0],)

    def formula(self, *tensors: Tensor, **options: bool) -> Sequence[Tensor]:
        return (reference.cam(*tensors, options["relu"]),)

    def build(self, request: Request) -> Case:
        a, g = activations_and_seeds(request)
        return Case(
            (a, g),
            {"relu": request.option},
            request.wanted,
            self.cotangents(request, [(a.shape[0], *a.shape[2:])]),
            request.cotangent_layout,
        )

    def extremes(self, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
        for name, a, g in extreme_activations(dtype):
            cotangents = self.cotangents(Request(), [(a.shape[0], *a.shape[2:])])
            tensors = (a.to(dtype), g.to(dtype))
            for relu in (True, False):
                yield (
                    f"{name}, relu={relu}",
                    Case(tensors, {"relu": relu}, (True, True), cotangents),
                )

    def saved_bytes(self, case: Case) -> int:
        """A for the cotangent of G, alpha for that of A, the maps for the ReLU; never G."""
        activations, gradients = case.tensors
        batch, channels, height, width = activations.shape
        to_activations, to_gradients = case.wanted
        needed = 4 * batch * height * width if case.options["relu"] else 0
        if to_gradients:
            needed += activations.untyped_storage().nbytes()
        if to_activations:
            needed += 4 * batch * channels
        assert gradients.dtype == torch.float32
        return needed

    def check_wanted(self, case: Case, arguments: tuple[Any, ...], result: Any) -> None:
        _, activations, alpha, maps, _, _ = arguments
        assert (alpha is not None, activations is not None) == case.wanted
        assert [bool(r.numel()) for r in result] == list(case.wanted)
        assert maps is not None

    @every_backend
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_layout_of_the_gradients(self, backend: str, channels_last: bool) -> None:
        layout = "channels_last" if channels_last else "contiguous"
        case = self.example(layouts=(layout, "contiguous")).to(device_of(backend))
        a, g = (t.detach().requires_grad_() for t in case.tensors)
        maps = cam_fwd(a, g, True, backend=backend)[0]
        to_a, to_g = torch.autograd.grad(maps.sum(), (a, g))
        assert to_a.stride() == a.stride()
        assert to_g.stride()[2:] == (0, 0), "filled instead of expanded"
        assert to_g.untyped_storage().nbytes() == 4 * a.shape[0] * a.shape[1]
        assert to_g.shape == g.shape

    @every_backend
    def test_expanded_gradient_arrives_at_the_node_before(self, backend: str) -> None:
        """As in training: G is made by autograd, and its cotangent goes on into that graph."""
        case = self.example().to(device_of(backend))
        a, g = (t.detach().requires_grad_() for t in case.tensors)
        seen: list[tuple[int, ...]] = []
        produced = g * 2
        produced.register_hook(lambda grad: seen.append(grad.stride()))
        cam_fwd(a, produced, True, backend=backend)[0].square().sum().backward()
        assert seen
        assert all(stride[2:] == (0, 0) for stride in seen)

    @every_backend
    def test_by_hand(self, backend: str) -> None:
        """Two channels, two pixels: alpha = (2, -1), L = (2 - 1, 0 - 3)."""
        device = device_of(backend)
        a = torch.tensor([[[[1.0, 0.0]], [[1.0, 3.0]]]], device=device)
        g = torch.tensor([[[[1.0, 3.0]], [[-2.0, 0.0]]]], device=device)
        plain = cam_fwd(a, g, False, backend=backend)[0]
        assert plain.tolist() == [[[1.0, -3.0]]]
        assert cam_fwd(a, g, True, backend=backend)[0].tolist() == [[[1.0, 0.0]]]
        weights = torch.tensor([[2.0, -1.0]], device=device)
        assert torch.equal(cam_fwd(a, weights, False, backend=backend)[0], plain)
        leaves = [t.requires_grad_() for t in (a, g)]
        to_a, to_g = torch.autograd.grad(cam_fwd(*leaves, True, backend=backend)[0].sum(), leaves)
        assert to_a.tolist() == [[[[2.0, 0.0]], [[-1.0, 0.0]]]]  # alpha_k 1[L > 0]
        assert to_g.tolist() == [[[[0.5, 0.5]], [[0.5, 0.5]]]]  # A_k at the live pixel / 2

    @every_backend
    def test_relu_keeps_nan(self, backend: str) -> None:
        a = torch.tensor([[[[float("nan"), -1.0, 2.0]]]], device=device_of(backend))
        maps = cam_fwd(a, torch.ones_like(a), True, backend=backend)[0].flatten().tolist()
        assert maps[0] != maps[0]
        assert maps[1:] == [0.0, 2.0]

    @every_backend
    def test_equals_the_head_of_pooling_and_linear(self, backend: str) -> None:
        """G by autograd through mean and linear: the map is relu(sum_k W_ck A_k) / Z."""
        torch.manual_seed(2)
        device = device_of(backend)
        a = torch.rand(3, 5, 4, 4, device=device, requires_grad=True)
        weight = torch.randn(7, 5, device=device)
        targets = torch.tensor([6, 0, 3], device=device)
        score = (a.mean((2, 3)) @ weight.T).gather(1, targets[:, None]).sum()
        (g,) = torch.autograd.grad(score, a)
        expected = (weight[targets][:, :, None, None] * a).sum(1).relu() / 16
        found = cam_fwd(a, g, True, backend=backend)[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


needs_cpu = pytest.mark.skipif(
    backends.triton_interpreted() or backends.unavailable_reason("cpu") is not None,
    reason=f"backend cpu: {backends.unavailable_reason('cpu') or 'not tested in this process'}",
)
BIG = 2**31


@needs_cpu
class TestCamBeyond32Bits:
    """Offsets and counts over 2^31. The storage is virtual: only what is touched is committed."""

    def test_more_elements_than_31_bits(self) -> None:
        channels = BIG // 1024 + 3
        one = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float16)
        a = one.expand(1, channels, 32, 32)
        assert a.numel() > BIG
        weights = torch.zeros(1, channels)
        weights[0, 0], weights[0, -1] = 1.0, 2.0
        weights.requires_grad_()
        maps = cam_fwd(a, weights, True, backend="cpu")[0]
        assert bool((maps == 1.5).all())
        (found,) = torch.autograd.grad(maps.sum(), weights)
        assert bool((found == 512).all())

    @pytest.mark.parametrize("far", ["batch", "channel", "row", "column"])
    def test_offsets_over_31_bits(self, far: str) -> None:
        shape = (2, 2, 2, 2)
        stride = [8, 4, 2, 1]
        stride[["batch", "channel", "row", "column"].index(far)] = BIG + 17
        storage = torch.empty(BIG + 40, dtype=torch.float16)
        a = storage.as_strided(shape, stride)
        values = torch.arange(16.0).view(shape)
        a.copy_(values)
        for seeds in (a, torch.tensor([[1.0, 2.0], [3.0, -1.0]])):
            near = values if seeds is a else seeds
            case = Case((a, seeds), {"relu": True}, (True, True), (torch.ones(2, 2, 2).double(),))
            close = Case((values.half(), near.to(seeds.dtype)), *_rest(case))
            run = TestCam().run("cpu")
            found, expected = derivatives(run, case, 1), derivatives(run, close, 1)
            for label, value in expected.items():
                torch.testing.assert_close(found[label], value, msg=label)


def _rest(case: Case) -> tuple[Any, ...]:
    return case.options, case.wanted, case.cotangents
