"""llama.cpp's GELU put into our own forward pass, to see that nothing else differs.

On a CPU, llama.cpp takes GELU (tanh form) from a table: the argument is rounded to float16, and so is the value; up to
-10 it is 0, from 10 on the argument itself. (The exact form and the quick one it does not use in these families.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxlora_convert.llamacpp import LlamaCpp
from mlxlora_convert.probe import log_probs
from tests import tiny

# what mlx-lm's model calls; in starcoder2 that is the exact GELU, where its authors and llama.cpp take the tanh form
FAMILIES = {"gemma2": "gelu_approx", "gemma3_text": "gelu_approx", "starcoder2": "gelu"}


class Table:
    """The table; `unsure` tells [call, token] where a value lies so close to a border between two float16 numbers that
    rounding errors of the two programs may put it on either side.
    """

    def __init__(self) -> None:
        self.unsure: list[Any] = []

    def __call__(self, x: mx.array) -> mx.array:
        given = np.array(x)
        rounded = given.astype(np.float16).astype(np.float32)
        inner = np.float32(0.7978845608028654) * rounded * (1 + np.float32(0.044715) * rounded * rounded)
        value = np.float32(0.5) * rounded * (1 + np.tanh(inner))
        # a small argument is a sum of terms as large as those of its neighbours, and no surer than these
        largest = np.abs(given).max(axis=-1, keepdims=True)
        unsure = _unsure_of(given, np.maximum(1e-6 * (1 + np.abs(given)), 3e-7 * largest))
        unsure |= _unsure_of(value, 1e-7 * (1 + np.abs(value)))
        self.unsure.append(unsure.any(axis=-1)[0])
        looked_up = value.astype(np.float16).astype(np.float32)
        return mx.array(np.where(given <= -10, np.float32(0), np.where(given >= 10, given, looked_up)))


def _unsure_of(values: Any, error: Any) -> Any:
    """Which values, off by `error`, may round to the next float16 number; near zero that changes next to nothing."""
    here = values.astype(np.float16)
    beside = [np.nextafter(here, np.float16(side)).astype(np.float64) for side in (-np.inf, np.inf)]
    return (np.abs(values) > 1 / 256) & (np.min([np.abs((here + one) / 2 - values) for one in beside], axis=0) < error)


@contextmanager
def emulated(family: str) -> Iterator[Table]:
    """While it lasts, networks of `family` take GELU from the table."""
    table, name = Table(), FAMILIES[family]
    own = getattr(nn, name)
    setattr(nn, name, table)
    try:
        yield table
    finally:
        setattr(nn, name, own)


def apart(family: str, network: nn.Module, reader: LlamaCpp) -> tuple[list[float], list[float]]:
    """How far the two are apart with the same table: where every value is sure, and where one step may lie between.

    Texts of two tokens, since a token is unsure if one before it is. Each number is the largest of the vocabulary.
    """
    sure, unsure = [], []
    with emulated(family) as table:
        for first in range(7, tiny.VOCABULARY, 16):
            tokens = [first, (3 * first) % tiny.VOCABULARY]
            table.unsure.clear()
            ours = log_probs(network, tokens)
            worst = np.abs(ours - reader.log_probs(tokens, ours.shape[-1])).max(axis=-1)
            touched = np.logical_or.accumulate(np.any(table.unsure, axis=0))
            sure += list(worst[~touched])
            unsure += list(worst[touched])
    return sure, unsure
