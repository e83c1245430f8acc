"""Which randomness each adapted layer sees: a function of one key, so that a recomputation sees the same masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from mlxlora.adapters import set_dropout_keys
from mlxlora.engine.anatomy import Anatomy


def split_key(key: mx.array, blocks: int) -> list[mx.array]:
    """One key for each block, and a last one for everything outside of the blocks."""
    parts = mx.random.split(key, blocks + 1)
    return [parts[index] for index in range(blocks + 1)]


def set_keys(anatomy: Anatomy, keys: Sequence[mx.array] | None) -> None:
    """Give all adapted layers their keys (see `split_key`); None switches dropout off."""
    set_dropout_keys(anatomy.network, None if keys is None else keys[-1])
    if keys is not None:
        for block, key in zip(anatomy.blocks, keys, strict=False):
            set_dropout_keys(block, key)


def set_block_key(block: nn.Module, key: mx.array | None) -> None:
    """The same for one block."""
    set_dropout_keys(block, key)


@contextmanager
def no_dropout_after(anatomy: Anatomy) -> Iterator[None]:
    """Take all keys away when the block ends: they may be arrays of a trace that is over."""
    try:
        yield
    finally:
        set_keys(anatomy, None)
