"""Full fine-tuning: the weights themselves learn, as float32 masters that the forward pass sees in the base's dtype.

A small step on a bfloat16 weight is lost in rounding, so a chosen module holds its weights in float32 while it trains;
for that time its object has a subclass of its own class, which hands every weight to the layer's code in the dtype that
it had. Parameter paths stay as they are, and `close` puts the very arrays back that were there before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True, slots=True)
class Opened:
    """One module whose weights train: what it takes to put it back."""

    path: str
    module: nn.Module
    kind: type[nn.Module]
    originals: dict[str, mx.array]

    @property
    def names(self) -> list[str]:
        """Parameter paths of the weights that train."""
        return [f"{self.path}.{name}" if self.path else name for name in self.originals]


def trainable_arrays(module: nn.Module) -> dict[str, mx.array]:
    """The floating arrays that a module holds itself and that it had not frozen."""
    return {
        name: value
        for name, value in module.items()
        if isinstance(value, mx.array)
        and not name.startswith("_")
        and name not in module._no_grad
        and mx.issubdtype(value.dtype, mx.floating)
    }


def open_module(path: str, module: nn.Module, originals: dict[str, mx.array]) -> Opened:
    """Give `module` float32 masters of the arrays `originals`, which are its own, and let them train."""
    kind = type(module)
    narrow = {name: array.dtype for name, array in originals.items() if array.dtype != mx.float32}
    if narrow:
        for name in narrow:
            module[name] = originals[name].astype(mx.float32)
        object.__setattr__(module, "_narrow", narrow)
        module.__class__ = _narrowing(kind)
    module.unfreeze(recurse=False, keys=list(originals))
    return Opened(path, module, kind, originals)


def close_module(opened: Opened) -> None:
    """Put the arrays and the class back that the module had."""
    module = opened.module
    if "_narrow" in vars(module):
        module.__class__ = opened.kind
        for name in ("_narrow", "_computing"):
            vars(module).pop(name, None)
    for name, array in opened.originals.items():
        module[name] = array


def learned(opened: Opened) -> dict[str, mx.array]:
    """The trained weights by parameter path, in the dtype of the base."""
    return {
        path: dict.__getitem__(opened.module, name).astype(original.dtype)
        for path, (name, original) in zip(opened.names, opened.originals.items(), strict=True)
    }


@functools.cache
def _narrowing(base: type[Any]) -> type[Any]:
    """A subclass of `base` whose own code sees the masters in the dtype that `_narrow` names for them.

    An attribute is always handed out narrow. An item is while the module computes: outside, optimizers and tree
    functions read the items of modules, and they are to have the masters.
    """

    def narrowed(self: Any, name: str, value: Any) -> Any:
        dtype = vars(self).get("_narrow", {}).get(name)
        return value.astype(dtype) if dtype is not None and isinstance(value, mx.array) else value

    def __getattr__(self: Any, name: str) -> Any:
        return narrowed(self, name, base.__getattr__(self, name))

    def __getitem__(self: Any, name: str) -> Any:
        value = base.__getitem__(self, name)
        return narrowed(self, name, value) if vars(self).get("_computing") else value

    def get(self: Any, name: str, default: Any = None) -> Any:
        value = base.get(self, name, default)
        return narrowed(self, name, value) if vars(self).get("_computing") else value

    def computing(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(self: Any, *arguments: Any, **named: Any) -> Any:
            outer = vars(self).get("_computing", False)
            object.__setattr__(self, "_computing", True)
            try:
                return method(self, *arguments, **named)
            finally:
                object.__setattr__(self, "_computing", outer)

        return run

    members: dict[str, Any] = {"__getattr__": __getattr__, "__getitem__": __getitem__, "get": get}
    members |= {name: computing(getattr(base, name)) for name in ("__call__", "as_linear") if hasattr(base, name)}
    return type(base.__name__, (base,), {**members, "__module__": base.__module__})
