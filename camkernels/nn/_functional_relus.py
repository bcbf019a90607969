"""Finds functional ReLUs in the source of a forward that cannot be traced."""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
import types
from typing import Any

from torch import nn

_NAMES = ("relu", "relu_")


def _methods(container: nn.Module) -> dict[str, types.FunctionType]:
    """The forward and those methods of the class that it, or they, mention."""
    found: dict[str, types.FunctionType] = {}
    pending = ["forward"]
    while pending:
        name = pending.pop()
        function = inspect.getattr_static(type(container), name, None)
        if isinstance(function, staticmethod):
            function = function.__func__
        if not isinstance(function, types.FunctionType) or name in found:
            continue
        if function.__module__.startswith("torch.nn.modules.module"):
            continue
        found[name] = inspect.unwrap(function)
        pending += _names_in(found[name].__code__)
    return found


def _names_in(code: types.CodeType) -> list[str]:
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names_in(constant)
    return names


def mentions_relu(container: nn.Module) -> bool:
    """Whether the forward, or a function that is an attribute, may be a functional ReLU."""
    if any(getattr(v, "__name__", None) in _NAMES for v in _functions(container)):
        return True
    return any(n in _NAMES for f in _methods(container).values() for n in _names_in(f.__code__))


def _functions(container: nn.Module) -> list[Any]:
    return [v for v in container.__dict__.values() if callable(v) and not isinstance(v, nn.Module)]


def lines_of_functional_relus(container: nn.Module) -> list[str]:
    """``file.py:12`` for each functional ReLU in the source; empty where there is none."""
    lines: list[str] = []
    for name, function in _methods(container).items():
        if not any(n in _NAMES for n in _names_in(function.__code__)):
            continue
        file = os.path.basename(function.__code__.co_filename)
        try:
            source = textwrap.dedent(inspect.getsource(function))
            calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
        except (OSError, SyntaxError):
            lines.append(f"{file} ({name}, no source)")
            continue
        first = function.__code__.co_firstlineno - 1
        found = [first + call.lineno for call in calls if _is_functional_relu(call, container)]
        lines += [f"{file}:{line}" for line in sorted(found)]
    functions = [v for v in _functions(container) if getattr(v, "__name__", None) in _NAMES]
    lines += [
        f"{type(container).__name__} keeps torch's {v.__name__} as attribute" for v in functions
    ]
    return lines


def _is_functional_relu(call: ast.Call, container: nn.Module) -> bool:
    function = call.func
    if isinstance(function, ast.Name):
        return function.id in _NAMES
    if not isinstance(function, ast.Attribute) or function.attr not in _NAMES:
        return False
    own = isinstance(function.value, ast.Name) and function.value.id == "self"
    return not own  # self.relu is a module, which is swapped, or an attribute, told apart
