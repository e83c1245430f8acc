"""When two blocks are the same program over different arrays, so that one compiled function serves both."""

from __future__ import annotations

import types
from collections.abc import Mapping
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.engine.hold import own_class
from mlxlora.engine.slots import Slots

_PLAIN = (int, float, str, bool, bytes, type(None), mx.Dtype)
PRIVATE = frozenset({"_no_grad", "_training", "_held_call", "_dropout_key"})  # on a module beside what it computes with


def structure(block: nn.Module) -> tuple[Any, ...]:
    """Equal for two blocks exactly when the code of one, run over the arrays of the other, is the other's.

    Classes, array shapes and dtypes, what is trainable, and every attribute that a method reads: numbers and strings by
    value, anything else (configurations, functions) by identity. Attributes that no method reads, such as the number
    that many models write on a layer, do not count.
    """
    slots = Slots(block)
    arrays = tuple((path, array.shape, str(array.dtype)) for path, array in zip(slots.paths, slots.get(), strict=True))
    inside = {id(module): path for path, module in block.named_modules()}
    return (arrays, tuple(slots.trainable), _attributes(block, inside))


def _attributes(value: Any, inside: Mapping[int, str], *, apart: bool = False) -> Any:
    """inside: the modules of the block, by identity.

    apart: reached through a plain attribute: arrays there are no parameters of the block and count by identity;
    adapters that live on a model are kept that way. A module that stands elsewhere in the block counts as its place.
    """
    if isinstance(value, mx.array):
        return id(value) if apart else "array"
    if apart and id(value) in inside:
        return ("inside", inside[id(value)])
    if isinstance(value, nn.Module):
        cls = own_class(value)
        read = _names_read(cls)
        own = {name: item for name, item in vars(value).items() if name not in PRIVATE and name in read}
        children = {name: item for name, item in value.items() if apart or not isinstance(item, mx.array)}
        parts = {name: _attributes(item, inside, apart=True) for name, item in own.items()}
        parts |= {name: _attributes(item, inside, apart=apart) for name, item in children.items()}
        return (cls, value.training, *sorted(parts.items()))
    if isinstance(value, _PLAIN):
        return (type(value).__name__, value)
    if isinstance(value, (list, tuple)):
        return tuple(_attributes(item, inside, apart=apart) for item in value)
    if isinstance(value, dict):
        return tuple(
            (str(name), _attributes(item, inside, apart=apart))
            for name, item in sorted(value.items(), key=lambda pair: str(pair[0]))
        )
    return id(value)


@cache
def _names_read(cls: type) -> frozenset[str]:
    """Every name that a method of `cls` (its makers aside) mentions."""
    found: set[str] = set()
    for base in cls.__mro__:
        for name, function in vars(base).items():
            if name in ("__init__", "__post_init__") or base is object:
                continue
            if isinstance(function, property):
                function = function.fget
            code = getattr(function, "__code__", None)
            stack = [code] if isinstance(code, types.CodeType) else []
            while stack:
                code = stack.pop()
                found |= {*code.co_names, *code.co_freevars}
                found |= {text for text in code.co_consts if isinstance(text, str)}  # getattr(self, "name")
                stack += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
    return frozenset(found)
