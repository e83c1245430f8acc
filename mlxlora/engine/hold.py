"""Steering a model from outside without changing it: a hold on single module instances, undone afterwards.

mlx-lm's models know nothing of this engine, and nothing of them is patched for the process: no class, no module.
While a step is traced, single *instances* are given a subclass of their own class whose `__call__` is ours; when the
trace is over, also by an exception, each has its own class back. Parameters, paths and attributes stay as they are.

A second tool: the function behind a method looks up names such as `scaled_dot_product_attention` among its globals. A
copy of the function over a copy of the globals (`rebound`) sees another one; the module that defined it does not
change.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Self

import mlx.nn as nn

Call = Callable[..., Any]


@cache
def _held_class(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass that looks like `original` and calls what the instance holds."""

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._held_call(*args, **kwargs)

    names = {"__call__": __call__, "__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (original,), names)


class Hold:
    """Other `__call__`s for some module instances, for as long as the `with` block runs.

    Holds nest: a module held twice gets the inner one until it ends.
    """

    def __init__(self) -> None:
        self._wanted: list[tuple[nn.Module, Call]] = []
        self._undo: list[tuple[nn.Module, type[nn.Module], Call | None]] = []

    def on(self, module: nn.Module, call: Call) -> Self:
        """Let `module(...)` be `call(...)`."""
        self._wanted.append((module, call))
        return self

    def __enter__(self) -> Self:
        for module, call in self._wanted:
            self._undo.append((module, type(module), module.__dict__.get("_held_call")))
            object.__setattr__(module, "__class__", _held_class(own_class(module)))
            object.__setattr__(module, "_held_call", call)
        return self

    def __exit__(self, *_: object) -> None:
        for module, cls, call in reversed(self._undo):
            object.__setattr__(module, "__class__", cls)
            if call is None:
                object.__delattr__(module, "_held_call")
            else:
                object.__setattr__(module, "_held_call", call)
        self._undo.clear()


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of `module` when nobody holds it."""
    cls = type(module)
    return cls.__mro__[1] if "_held_call" in module.__dict__ else cls


def own_call(module: nn.Module) -> Call:
    """What `module(...)` does when nobody holds it."""
    function: Any = own_class(module).__call__
    return types.MethodType(function, module)


def reads_global(function: Any, name: str) -> bool:
    """Whether a Python function (or one defined inside it) looks up `name` among its globals."""
    if not isinstance(function, types.FunctionType):
        return False
    stack = [function.__code__]
    while stack:
        code = stack.pop()
        if name in code.co_names:
            return name in function.__globals__
        stack += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return False


def rebound(function: types.FunctionType, names: Mapping[str, Any]) -> types.FunctionType:
    """A copy of `function` that sees `names` instead of its module's own globals of these names."""
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
