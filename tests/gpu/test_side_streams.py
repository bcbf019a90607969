"""Steps and ops on streams other than the default one."""

from __future__ import annotations

import pytest
import torch
from gpu.steps import ON_GPU, STEPS, batch, close, every_step

import camkernels as ck

pytestmark = ON_GPU


@every_step
def test_a_step_on_a_side_stream(kind: str) -> None:
    images, targets = batch("cuda")
    expected = STEPS[kind]("cuda")(images, targets)
    step = STEPS[kind]("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(5):
        with torch.cuda.stream(stream):
            # what would run on the default stream finds it busy, and is seen to come too late
            found = step(images, targets)
        stream.synchronize()
        close(found, expected)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_two_streams_at_once(backend: str) -> None:
    reason = ck.backends.unavailable_reason(backend)
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [torch.randn(2, 2048, 14, 14, device="cuda", generator=generator) for _ in range(2)]
    with ck.backend(backend):  # type: ignore[arg-type]
        expected = [ck.cam_statistics(a, a).entropy for a in inputs]
        streams = [torch.cuda.Stream() for _ in inputs]
        torch.cuda.synchronize()
        found: list[list[torch.Tensor]] = [[], []]
        for _ in range(100):
            for stream, a, kept in zip(streams, inputs, found, strict=True):
                with torch.cuda.stream(stream):
                    kept.append(ck.cam_statistics(a, a).entropy)
        torch.cuda.synchronize()
    for kept, one in zip(found, expected, strict=True):
        assert all(torch.equal(entropy, one) for entropy in kept)
