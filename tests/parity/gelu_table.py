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


def table(x: mx.array) -> mx.array:
    """GELU as it is looked up."""
    given = np.array(x)
    rounded = given.astype(np.float16).astype(np.float32)
    inner = np.float32(0.7978845608028654) * rounded * (1 + np.float32(0.044715) * rounded * rounded)
    value = np.float32(0.5) * rounded * (1 + np.tanh(inner))
    looked_up = value.astype(np.float16).astype(np.float32)
    return mx.array(np.where(given <= -10, np.float32(0), np.where(given >= 10, given, looked_up)))


@contextmanager
def emulated(family: str) -> Iterator[None]:
    """While it lasts, networks of `family` take GELU from the table."""
    name = FAMILIES[family]
    own = getattr(nn, name)
    setattr(nn, name, table)
    try:
        yield
    finally:
        setattr(nn, name, own)


def apart(family: str, network: nn.Module, reader: LlamaCpp) -> Any:
    """How far the two are apart with the same table, token by token: the largest of the vocabulary for each.

    Where an argument lies on the border between two float16 numbers, rounding errors of float32 decide on which side
    the two programs look, and they differ from one processor to another: so a few tokens are a step of the table apart.
    """
    found = []
    with emulated(family):
        for first in range(7, tiny.VOCABULARY, 16):
            tokens = [first, (3 * first) % tiny.VOCABULARY]
            ours = log_probs(network, tokens)
            found += list(np.abs(ours - reader.log_probs(tokens, ours.shape[-1])).max(axis=-1))
    return np.array(found)
