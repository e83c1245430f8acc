"""Where a model keeps its blocks, its backbone and its head.

Every causal LM of mlx-lm is a chain: tokens → prologue (embedding, masks) → blocks → tail (final norm) → head (logits).
The chain is found by looking, not by knowing models: the blocks are the model's list of layers, the backbone is the
module that owns them, the head is whatever the model does with what its backbone returns. Nothing here is trusted
until `verify.py` has compared it with the model's own logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.engine.hold import Hold, own_call
from mlxlora.engine.precision import tolerance
from mlxlora.parameters import bytes_of, number


class Reached(Exception):
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
    vocabulary, width, dtype: of the logits and of the hidden states
    """

    network: nn.Module
    backbone: nn.Module | None
    blocks: tuple[nn.Module, ...]
    paths: tuple[str, ...]
    vocabulary: int
    width: int = 0
    dtype: mx.Dtype = mx.float32

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


def dissect(network: nn.Module, notes: list[str]) -> Anatomy:
    """Find the parts of `network`, and keep only what a small batch confirms; what does not hold goes to `notes`."""
    tokens = mx.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    plain: mx.array = network(mx.zeros((1, 2), mx.int32))
    vocabulary = plain.shape[-1]
    tokens = tokens % vocabulary
    owner, blocks, paths = _blocks(network)
    whole = Anatomy(network, None, blocks, paths, vocabulary)
    if owner is None or owner is network:
        notes.append("logits are made for every position: the model has no backbone of its own")
        return whole
    try:
        anatomy = replace(whole, backbone=owner)
        hidden = anatomy.hidden(tokens)
        logits = anatomy.logits(hidden)
        error = relative_error(logits, network(tokens))
    except (ValueError, TypeError, AttributeError, IndexError, KeyError) as failure:
        notes.append(f"logits are made for every position: backbone and head cannot be told apart ({failure})")
        return whole
    if not error <= tolerance(logits.dtype):
        notes.append(f"logits are made for every position: backbone and head differ from the model by {error:.1e}")
        return whole
    return replace(anatomy, width=hidden.shape[-1], dtype=hidden.dtype)


def relative_error(found: mx.array, expected: mx.array) -> float:
    """max |found − expected| / max |expected|; infinite where shapes differ or a number is none."""
    if found.shape != expected.shape:
        return math.inf
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    error = number(mx.max(mx.abs(found - expected)) / mx.maximum(mx.max(mx.abs(expected)), 1e-30))
    return math.inf if math.isnan(error) else error


def _blocks(network: nn.Module) -> tuple[nn.Module | None, tuple[nn.Module, ...], tuple[str, ...]]:
    """The model's own `layers` where it names them, else the list of modules that holds the most weights; and its
    owner."""
    named = getattr(network, "layers", None)
    wanted = id(named[0]) if isinstance(named, list) and named and isinstance(named[0], nn.Module) else None
    best: tuple[int, str, nn.Module, list[nn.Module]] | None = None
    for path, owner, modules in _lists(network):
        size = sum(bytes_of(module.parameters()) for module in modules)
        if any(id(module) == wanted for module in modules):
            size = 1 << 62
        if best is None or size > best[0]:
            best = (size, path, owner, modules)
    if best is None:
        return None, (), ()
    _, path, owner, modules = best
    return owner, tuple(modules), tuple(f"{path}.{index}" for index in range(len(modules)))


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
