"""``python -m camkernels.doctor``: versions, and which backends work here and why the others don't.

Each backend is not only imported but run on a small map and held against the reference.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys

import torch

import camkernels as ck
from camkernels import backends

_TOLERANCE = 1e-5


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Versions of what the kernels stand on."""
    found = {
        "camkernels": ck.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda (torch)": torch.version.cuda or "none: CPU build",
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "nvcc": shutil.which("nvcc") or "not on PATH",
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            found[f"gpu {index}"] = f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"
    else:
        found["gpu"] = "none that torch can use"
    return found


def check_backend(name: str) -> tuple[bool, str]:
    """Whether backend ``name`` works here, and a line that says how it was seen or why not."""
    reason = backends.unavailable_reason(name)
    if reason is not None:
        return False, reason
    on_gpu = name == "triton" and not backends.triton_interpreted()
    on_gpu = on_gpu or (name == "cuda" and not backends.cuda_on_host())
    found = []
    try:
        for chosen in (name, "reference"):
            with ck.backend(chosen):  # type: ignore[arg-type]
                found.append(_probe(torch.device("cuda" if on_gpu else "cpu"), name != "cuda"))
    except Exception as error:  # whatever a broken toolchain throws is the answer
        return False, f"{type(error).__name__}: {error}"
    ours, reference = found
    difference = max(float((x - y).abs().max()) for x, y in zip(ours, reference, strict=True))
    if not difference <= _TOLERANCE:
        return False, f"runs, but differs from the reference by {difference:.2g}"
    return True, _how(name)


def _probe(device: torch.device, network: bool) -> list[torch.Tensor]:
    """A map op and its gradients, and where wanted the second-order gradient of a network op."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 5, 4, 3, generator=generator).to(device).requires_grad_()
    g = torch.randn(2, 5, 4, 3, generator=generator).to(device).requires_grad_()
    entropy = ck.cam_statistics(a, g).entropy
    found = [entropy, *torch.autograd.grad(entropy.sum(), (a, g))]
    if not network:
        return [tensor.detach() for tensor in found]
    w = (0.3 * torch.randn(4, 5, 3, 3, generator=generator)).to(device).requires_grad_()
    output = ck.nn.functional.conv_bn_act(a, w, None, None, None, None, None, padding=1)
    (delta,) = torch.autograd.grad(output.square().sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(delta.square().mean(), w)
    return [tensor.detach() for tensor in (*found, output, delta, second)]


def _how(name: str) -> str:
    if name == "cpu":
        module = importlib.import_module("camkernels._cpu")
        return f"C++, vector width {module.simd_level()}"
    if name == "triton":
        return "Triton's interpreter, on CPU tensors" if backends.triton_interpreted() else "GPU"
    if name == "cuda":
        return f"CUDA C++ for {importlib.import_module('camkernels._cuda').archs}"
    return "plain PyTorch"


def main() -> int:
    """Print the report; the exit status is 0 where a backend faster than the reference works."""
    for key, value in versions().items():
        print(f"{key:>14}  {value}")
    print()
    working = []
    for name in backends.NAMES[1:]:
        works, line = check_backend(name)
        working += [name] if works else []
        print(f"{name:>14}  {'works' if works else 'does not work'}: {line}")
    asked = os.environ.get(backends.ENVIRONMENT_VARIABLE)
    print(f"\n{'chosen':>14}  {backends.ENVIRONMENT_VARIABLE}={asked or 'auto (not set)'}")
    return 0 if {"cpu", "triton", "cuda"} & set(working) else 1


if __name__ == "__main__":
    sys.exit(main())
