"""Training steps captured as CUDA graphs and replayed over other inputs."""

from __future__ import annotations

import pytest
import torch
from gpu.steps import ON_GPU, STEPS, batch, close, every_step
from torch import Tensor

import camkernels as ck

pytestmark = ON_GPU


def warmed_up(run: object) -> None:
    """Three runs on a stream of their own, as capturing asks for; kernels are compiled there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()  # type: ignore[operator]
    torch.cuda.current_stream().wait_stream(stream)


@every_step
def test_a_captured_step_is_the_eager_one(kind: str) -> None:
    images, targets = batch("cuda")
    step, eager = STEPS[kind]("cuda"), STEPS[kind]("cuda")
    warmed_up(lambda: step(images, targets))
    graph = torch.cuda.CUDAGraph()
    step.clear()
    with torch.cuda.graph(graph):
        found = step(images, targets)
    for seed in (2, 3, 4):
        other, classes = batch("cuda", seed=seed)
        images.copy_(other)
        targets.copy_(classes)
        graph.replay()
        torch.cuda.synchronize()
        close(found, eager(other, classes))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_replays_on_two_streams_do_not_meet(backend: str) -> None:
    """Counters by which blocks find the last one belong to a graph."""
    reason = ck.backends.unavailable_reason(backend)
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    inputs = [torch.randn(2, 1024, 14, 14, device="cuda") for _ in range(2)]
    graphs, outputs = [], []
    with ck.backend(backend):  # type: ignore[arg-type]
        expected = [ck.grad_cam(a, a) for a in inputs]
        for a in inputs:

            def run(a: Tensor = a) -> Tensor:
                return ck.grad_cam(a, a)

            warmed_up(run)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs.append(run())
            graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, outputs, expected))
