"""Watches a forward while torch.fx traces it: what it reads besides tensors, and what it does.

A graph repeats the tensor operations of one run. Whatever else a forward reads must be the same
when the graph runs, so it is recorded and compared; whatever else it does (draw random numbers,
write attributes, enter a context manager) a graph would lose, so the tracing is refused.
"""

from __future__ import annotations

import builtins
import dis
import gc
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MISSING = object()
_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_SIMPLE = (
    type(None), bool, int, float, complex, str, bytes, type(...), range, slice,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
# Attributes that every module has; hooks, children and the like, which are no state of a forward.
_OF_ALL_MODULES = frozenset(vars(nn.Module())) - {"training"} | {
    "forward", "__class__", "__dict__", "_compiled_call_impl", "_replicate_for_data_parallel",
}  # fmt: skip
# Instructions, names and functions whose effect a graph of tensor operations would lose.
_BLOCKS = {
    "SETUP_FINALLY", "PUSH_EXC_INFO", "CHECK_EXC_MATCH", "SETUP_WITH", "BEFORE_WITH",
    "SETUP_ASYNC_WITH", "BEFORE_ASYNC_WITH", "LOAD_SPECIAL",
}  # fmt: skip
_WRITES = {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "DELETE_SUBSCR"}
_TELLTALE_BUILTINS = {
    "print", "type", "input", "open", "exec", "eval", "id", "hash", "globals", "vars", "setattr",
    "delattr",
}  # fmt: skip
_TELLTALE = {
    "is_grad_enabled", "set_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled",
    "is_autocast_cpu_enabled", "is_compiling", "urandom", "perf_counter", "monotonic",
}  # fmt: skip
_FOREIGN = ("utils/checkpoint.py", "autograd/grad_mode.py", "amp/autocast_mode.py", "_dynamo/")


class RefusedError(Exception):
    """Why a forward is left as it is."""


def is_users(code: types.CodeType) -> bool:
    """Whether ``code`` is neither PyTorch's nor the tracer's."""
    return not code.co_filename.startswith((_TORCH, _HERE))


@dataclass
class Read:
    """A value that a forward read, and how to read it again."""

    what: str
    again: Callable[[], Any]
    value: Any

    def holds(self) -> bool:
        now = self.again()
        if now is self.value:
            return True
        try:
            return type(now) is type(self.value) and bool(now == self.value)
        except Exception:
            return False


def _remembered(value: Any) -> Any:
    """``value`` in a form that later changes of it cannot reach.

    Raises:
        RefusedError: a tensor (it would be baked in) or an object whose changes cannot be seen.
    """
    if isinstance(value, Tensor):
        raise RefusedError("a tensor that is neither parameter nor buffer")
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value)(map(_remembered, value)) if type(value) in _COLLECTIONS else value
    if type(value) is dict:
        return {key: _remembered(v) for key, v in value.items()}
    if value is MISSING or isinstance(value, (*_SIMPLE, nn.Module)) or _is_code(value):
        return value
    raise RefusedError(f"an object of type {type(value).__name__}")


_COLLECTIONS = (list, tuple, set, frozenset, torch.Size)
_CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def _is_code(value: Any) -> bool:
    """Whether ``value`` is a function or class, and not an object that happens to be callable."""
    library = type(value).__module__.partition(".")[0] in ("torch", "functools", "typing", "numpy")
    return isinstance(value, _CODE) or (callable(value) and library)


@dataclass
class Watch:
    """What one traced forward read and ran."""

    reads: dict[tuple[int, str], Read] = field(default_factory=dict)
    frames: dict[types.CodeType, dict[str, Any]] = field(default_factory=dict)
    """Functions that ran, from the forward on, outside PyTorch; and their globals."""
    foreign: set[str] = field(default_factory=set)

    def read(self, what: str, holder: Any, name: str, again: Callable[[], Any]) -> None:
        key = (id(holder), name)
        if key not in self.reads:
            try:
                self.reads[key] = Read(what, again, _remembered(again()))
            except RefusedError as refused:
                raise RefusedError(f"forward reads {what}, {refused}") from None

    @contextmanager
    def watching(self, container: nn.Module) -> Iterator[None]:
        """Watch what runs in this block, the forward of ``container``."""
        function = type(container).forward
        self.frames[function.__code__] = function.__globals__
        before = _State.of(container)
        names = {id(module): name for name, module in container.named_modules()}
        profile, collects = sys.getprofile(), gc.isenabled()
        gc.disable()  # what runs when garbage is collected is no part of the forward
        nn.Module.__getattribute__ = self._recorder(names)  # type: ignore[method-assign,assignment]
        sys.setprofile(self._on_call)
        try:
            yield
        finally:
            sys.setprofile(profile)
            if collects:
                gc.enable()
            del nn.Module.__getattribute__
            effect = before.restore(container)
        if effect is not None:
            raise RefusedError(effect)
        if self.foreign:
            raise RefusedError(f"forward uses {', '.join(sorted(self.foreign))}")
        for code, names_of in self.frames.items():
            self._examine(code, names_of)
        self._closure(type(container).forward)

    def _on_call(self, frame: types.FrameType, event: str, argument: Any) -> None:
        if event != "call":
            return
        code, caller = frame.f_code, frame.f_back
        if code.co_filename.startswith(_TORCH):
            inner = code.co_filename[len(_TORCH) :].replace(os.sep, "/")
            if inner.startswith(_FOREIGN):
                self.foreign.add(f"torch/{inner}")
        elif is_users(code) and caller is not None and caller.f_code in self.frames:
            self.frames.setdefault(code, frame.f_globals)

    def _recorder(self, names: dict[int, str]) -> Callable[[nn.Module, str], Any]:
        plain = object.__getattribute__

        def getattribute(module: nn.Module, name: str) -> Any:
            users = sys._getframe(1).f_code in self.frames
            try:
                value = plain(module, name)
            except AttributeError:
                if users:
                    self._read_by_getattr(module, name, names)
                raise
            if users and name not in _OF_ALL_MODULES and not isinstance(value, types.MethodType):
                self._read_attribute(module, name, names)
            return value

        return getattribute

    def _read_by_getattr(self, module: nn.Module, name: str, names: dict[int, str]) -> None:
        """Parameters, buffers and children are nodes or compared elsewhere; that there is none,
        or that it is None, is a value that was read."""
        d = object.__getattribute__(module, "__dict__")
        stores = (d.get("_parameters", {}), d.get("_buffers", {}), d.get("_modules", {}))
        if all(store.get(name) is None for store in stores):
            self._read_attribute(module, name, names)

    def _read_attribute(self, module: nn.Module, name: str, names: dict[int, str]) -> None:
        path = ".".join(filter(None, ("self", names.get(id(module), "?"), name)))

        def again() -> Any:
            try:
                return object.__getattribute__(module, name)
            except AttributeError:
                d = module.__dict__
                for store in ("_parameters", "_buffers", "_modules"):
                    if name in d[store]:
                        return d[store][name]
                return MISSING

        self.read(path, module, name, again)

    def _examine(self, code: types.CodeType, names: dict[str, Any]) -> None:
        """The instructions of a function that the forward ran."""
        where = f"{code.co_name}, line {code.co_firstlineno}"
        holder: Any = None  # the module (file) whose attribute the next instruction reads
        for instruction in dis.get_instructions(code):
            name, argument = instruction.opname, instruction.argval
            if name in _BLOCKS:
                raise RefusedError(f"a context manager or try block in {where}")
            if name in _WRITES and not (name == "STORE_ATTR" and code.co_name == "__init__"):
                raise RefusedError(f"{where} writes {argument!r}")
            loads_global = name in ("LOAD_GLOBAL", "LOAD_NAME")
            if (loads_global and argument in _TELLTALE_BUILTINS) or (
                name.startswith("LOAD_") and argument in _TELLTALE
            ):
                raise RefusedError(f"{where} uses {argument}")
            if loads_global:
                holder = self._global(names, argument)
            elif isinstance(holder, types.ModuleType) and name in ("LOAD_ATTR", "LOAD_METHOD"):
                holder = self._attribute_of_file(holder, argument)
            else:
                holder = None

    def _global(self, names: dict[str, Any], name: str) -> Any:
        def again() -> Any:
            return names.get(name, getattr(builtins, name, MISSING))

        return self._static(f"the global {name}", names, name, again)

    def _attribute_of_file(self, file: types.ModuleType, name: str) -> Any:
        def again() -> Any:
            return getattr(file, name, MISSING)

        return self._static(f"{file.__name__}.{name}", file, name, again)

    def _static(self, what: str, holder: Any, name: str, again: Callable[[], Any]) -> Any:
        value = again()
        if isinstance(value, types.ModuleType):
            return value
        if isinstance(value, (list, dict, set)):
            raise RefusedError(f"forward reads {what}, which can be changed")
        if not _is_code(value):
            self.read(what, holder, name, again)
        return None

    def _closure(self, function: Any) -> None:
        names = function.__code__.co_freevars
        for name, cell in zip(names, function.__closure__ or (), strict=True):
            if name != "__class__":

                def again(cell: Any = cell) -> Any:
                    return cell.cell_contents

                self._static(f"the enclosing {name}", cell, name, again)


@dataclass
class _State:
    """What a forward may have changed: random states and the container's own attributes."""

    torch_state: Tensor
    cuda_state: Tensor | None
    python_state: Any
    numpy_state: Any
    attributes: dict[str, Any]
    contents: dict[str, Any]

    @classmethod
    def of(cls, container: nn.Module) -> _State:
        attributes = dict(container.__dict__)
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
            random.getstate(),
            np.random.get_state(legacy=True),
            attributes,
            {k: v.copy() for k, v in attributes.items() if isinstance(v, (list, dict, set))},
        )

    def restore(self, container: nn.Module) -> str | None:
        """Put all back; what had changed, if anything."""
        drawn = not torch.equal(self.torch_state, torch.get_rng_state())
        torch.set_rng_state(self.torch_state)
        if self.cuda_state is not None:
            drawn |= not torch.equal(self.cuda_state, torch.cuda.get_rng_state())
            torch.cuda.set_rng_state(self.cuda_state)
        drawn |= random.getstate() != self.python_state
        random.setstate(self.python_state)
        numpy_state: Any = np.random.get_state(legacy=True)
        drawn |= numpy_state[2] != self.numpy_state[2]
        drawn |= not np.array_equal(numpy_state[1], self.numpy_state[1])
        np.random.set_state(self.numpy_state)
        written = self._restore_attributes(container)
        if drawn:
            return "forward draws random numbers"
        return f"forward changes self.{written}" if written is not None else None

    def _restore_attributes(self, container: nn.Module) -> str | None:
        d, written = container.__dict__, None
        for name in [n for n in d if n not in self.attributes]:
            if not name.startswith("_tensor_constant"):  # torch.fx's: the tracer sees to these
                del d[name]
                written = name
        for name, value in self.attributes.items():
            if d.get(name, MISSING) is not value:
                d[name] = value
                written = name
        for name, contents in self.contents.items():
            value = d[name]
            if not _same_contents(value, contents):
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(contents)
                written = name
        return written


def _same_contents(a: Any, b: Any) -> bool:
    """Equal by identity of the elements: comparing tensors has no truth value."""
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True)
        return all(k is m and v is w for (k, v), (m, w) in pairs)
    return all(x is y for x, y in zip(a, b, strict=True))
