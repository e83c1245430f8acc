"""Where a model keeps its blocks, its backbone and its head.

Every causal LM of mlx-lm is a chain: tokens → prologue (embedding, masks) → blocks → tail (final norm) → head (logits).
The chain is found by looking, not by knowing models: the blocks are the model's list of layers, the backbone is the module
that owns them, the head is whatever the model does with what its backbone returns. Nothing here is trusted until
`verify.py` has compared it with the model's own logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.engine.hold import Hold, own_call


class Reached(Exception):  # noqa: N818 - control flow, not an error
    """The backbone has returned: carries its output past the head."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The parts of a network.

    backbone: the module that owns the blocks, or None where the network itself does (its head cannot be told apart)
    blocks:   the blocks in the order of their paths
    paths:    their paths
    """

    network: nn.Module
    backbone: nn.Module | None
    blocks: tuple[nn.Module, ...]
    paths: tuple[str, ...]

    def hidden(self, tokens: mx.array) -> mx.array:
        """What the backbone makes of `tokens` [B, T]: [B, T, hidden]."""
        assert self.backbone is not None
        inner = own_call(self.backbone)

        def reach(*args: Any, **kwargs: Any) -> Any:
            raise Reached(inner(*args, **kwargs))

        try:
            with Hold().on(self.backbone, reach):
                self.network(tokens)
        except Reached as reached:
            value: mx.array = reached.value
            return value
        raise ValueError("the model never calls its backbone")

    def logits(self, hidden: mx.array) -> mx.array:
        """What the model makes of hidden states [B, T, hidden] after its backbone: [B, T, vocabulary]."""
        assert self.backbone is not None
        with Hold().on(self.backbone, lambda *_args, **_kwargs: hidden):
            out: mx.array = self.network(mx.zeros(hidden.shape[:2], mx.int32))
        return out


def dissect(network: nn.Module) -> Anatomy:
    """Find the parts of `network`: the list of modules that holds the most weights, and who owns it."""
    best: tuple[int, str, nn.Module, list[nn.Module]] | None = None
    named = getattr(network, "layers", None)
    wanted = id(named[0]) if isinstance(named, list) and named and isinstance(named[0], nn.Module) else None
    for path, owner, modules in _lists(network):
        size = sum(array.nbytes for module in modules for array in _arrays(module))
        if wanted is not None and id(modules[0]) == wanted:
            best = (size, path, owner, modules)
            break
        if best is None or size > best[0]:
            best = (size, path, owner, modules)
    if best is None:
        return Anatomy(network, None, (), ())
    _, path, owner, modules = best
    paths = tuple(f"{path}.{index}" for index in range(len(modules)))
    return Anatomy(network, None if owner is network else owner, tuple(modules), paths)


def _lists(network: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    for path, module in _modules(network, ""):
        for name, value in module.items():
            if isinstance(value, list) and value and all(isinstance(item, nn.Module) for item in value):
                yield (f"{path}.{name}" if path else name), module, value


def _modules(value: Any, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module below `value`, outer ones first."""
    if isinstance(value, nn.Module):
        yield path, value
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in items:
            yield from _modules(child, f"{path}.{key}" if path else str(key))


def _arrays(module: nn.Module) -> list[mx.array]:
    from mlx.utils import tree_flatten

    return [array for _, array in tree_flatten(module.parameters())]


Logits = Callable[[mx.array], mx.array]
