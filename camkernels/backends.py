"""Which implementation runs an op: ``reference``, ``cpu``, ``triton`` or ``cuda``.

``auto`` is the only choice that chooses. A backend asked for by name works or raises with its
reason; it never falls back. The choice is read once, in the forward; the backward of the same
call uses the same backend, also when autograd runs it on another thread.

Environment: ``CAMKERNELS_BACKEND`` sets the default of the process.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Literal

import torch

BackendName = Literal["auto", "reference", "cpu", "triton", "cuda"]
NAMES: tuple[str, ...] = ("auto", "reference", "cpu", "triton", "cuda")
ENVIRONMENT_VARIABLE = "CAMKERNELS_BACKEND"


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot run here, or not on these tensors."""


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: unknown backend {name!r}, allowed are {', '.join(NAMES)}")
    return name


# None stands for "whatever the environment says", so that the variable is read lazily and an
# invalid value raises where it is used, with its name.
_selected: ContextVar[str | None] = ContextVar("camkernels_backend", default=None)


class backend:  # noqa: N801 - reads as a function: ck.backend("cpu")
    """Choose the backend for this thread, as a function or as a context manager.

    ``ck.backend("reference")`` switches until the next switch; ``with ck.backend("reference"):``
    switches back at the end of the block. The setting belongs to the calling thread (and async
    context); ``CAMKERNELS_BACKEND`` sets the default for all of them.

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``. The last has
            kernels for relu, cam, map_statistics, cam_statistics, ssim and warped_ssim; other ops
            raise.

    Raises:
        ValueError: for an unknown name.
        BackendUnavailableError: if the named backend cannot work here; the message says why.

    Example:
        >>> import camkernels as ck
        >>> with ck.backend("reference"):
        ...     ck.current_backend()
        'reference'
    """

    def __init__(self, name: BackendName) -> None:
        self.name = _check_name(name, "backend")
        reason = unavailable_reason(self.name)
        if reason is not None:
            raise BackendUnavailableError(f"backend {name!r} cannot work here: {reason}")
        self._tokens: list[Token[str | None]] = [_selected.set(self.name)]

    def __enter__(self) -> backend:
        if not self._tokens:  # the same object entered a second time
            self._tokens.append(_selected.set(self.name))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _selected.reset(self._tokens.pop())


def current_backend() -> str:
    """The backend in force on this thread: a name, or ``"auto"``."""
    name = _selected.get()
    if name is None:
        name = _check_name(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)
    return name


@functools.cache
def _cpu_reason() -> str | None:
    try:
        importlib.import_module("camkernels._cpu")
    except ImportError as error:
        return f"the C++ module camkernels._cpu does not import ({error})"
    return None


@functools.cache
def _triton_reason() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton does not import ({error}); pip install triton"
    if triton_interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device is available (TRITON_INTERPRET=1 runs the kernels on CPU tensors)"
    return None


@functools.cache
def _cuda_reason() -> str | None:
    try:
        module = importlib.import_module("camkernels._cuda")
    except ImportError as error:
        return (
            f"the CUDA module camkernels._cuda does not import ({error}); it is built where nvcc "
            "is found (CAMKERNELS_CUDA=1 pip install . says why not)"
        )
    if module.archs == "host":
        return None
    driver, runtime = module.versions()
    if driver == 0:
        return "no NVIDIA driver is installed"
    if driver // 1000 < runtime // 1000:
        return (
            f"the NVIDIA driver supports CUDA {_version(driver)}, camkernels was built with CUDA "
            f"{_version(runtime)}: update the driver, or build with an older nvcc"
        )
    if not torch.cuda.is_available():
        return "torch finds no CUDA device" if torch.version.cuda else "torch is a CPU build"
    status = module.device_status()
    if status:
        major, minor = torch.cuda.get_device_capability()
        return (
            f"the kernels do not run on this device (sm_{major}{minor}): "
            f"{module.error_name(status)}; they were built for {module.archs}, "
            "CAMKERNELS_CUDA_ARCHS chooses"
        )
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def cuda_on_host() -> bool:
    """Whether the CUDA kernels are the tests' build for the host, on CPU tensors."""
    module = sys.modules.get("camkernels._cuda")
    return getattr(module, "archs", None) == "host"


def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True")


def unavailable_reason(name: str) -> str | None:
    """Why backend ``name`` cannot work on this machine; None where it can."""
    if name == "cpu":
        return _cpu_reason()
    if name == "triton":
        return _triton_reason()
    if name == "cuda":
        return _cuda_reason()
    return None


def _unsuited_reason(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why backend ``name`` cannot take tensors of this device and dtype; None where it can."""
    if name == "cpu" and device.type != "cpu":
        return f"it takes CPU tensors, got {device}"
    if name in ("triton", "cuda"):
        if dtype == torch.float64:
            return "it takes float32, bfloat16 and float16, got float64"
        if triton_interpreted() if name == "triton" else cuda_on_host():
            if device.type != "cpu":
                how = "under TRITON_INTERPRET" if name == "triton" else "built for the host"
                return f"{how} it takes CPU tensors, got {device}"
        elif device.type != "cuda":
            return f"it takes CUDA tensors, got {device}"
    return None


def resolve(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs an op on tensors of this device and dtype.

    ``auto`` prefers C++ on the CPU and Triton on CUDA, and takes the reference where neither is
    to be had (float64 on CUDA, other devices, no compiler at build time).

    Raises:
        BackendUnavailableError: a backend named by the user cannot take these tensors.
    """
    name = current_backend()
    if name == "auto":
        preferred = {"cpu": "cpu", "cuda": "triton"}.get(device.type)
        if (
            preferred is None
            or unavailable_reason(preferred) is not None
            or _unsuited_reason(preferred, device, dtype) is not None
        ):
            return "reference"
        return preferred
    reason = unavailable_reason(name) or _unsuited_reason(name, device, dtype)
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} was asked for by name: {reason}")
    return name


def resolve_network(device: torch.device, dtype: torch.dtype) -> str:
    """:func:`resolve` for the network ops, whose kernels have stand-ins that only allocate.

    On the meta device, where a step is run to predict its memory, the reference would allocate what
    no training does.
    """
    if device.type == "meta" and current_backend() == "auto":
        return "meta"
    return resolve(device, dtype)
