"""Arrays as plain things: a tree of them, such as a network's parameters, as a table by path; a scalar as a number."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

Flat = dict[str, mx.array]


def flat(tree: Any) -> Flat:
    """The arrays of a tree by their paths (`model.layers.0.mlp.up_proj.weight`), in its order."""
    found: Any = tree_flatten(tree)
    return dict(found)


def bytes_of(tree: Any) -> int:
    """How many bytes the arrays of a tree are."""
    return sum(array.nbytes for array in flat(tree).values())


def number(scalar: mx.array) -> float:
    """A scalar array as a Python float; waits for it."""
    value: Any = scalar.item()
    return float(value)
