"""Whether two ways of computing the same agree, where half precision hides it.

Rounding grows from block to block: a step through many of them may come out some tenths apart, however right. So what
seems too far apart in half precision is compared once more in float32, where there is room for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from mlxlora.engine.slots import Slots
from mlxlora.memory import recommended


def tolerance(dtype: mx.Dtype) -> float:
    """How far two orders of computing the same may differ."""
    return 1e-4 if dtype == mx.float32 else 5e-2


def beyond_rounding(network: nn.Module, dtype: mx.Dtype, compare: Callable[[], float]) -> float | None:
    """How far apart `compare` finds two ways through `network`, where that is more than rounding makes of it."""
    error, allowed = compare(), tolerance(dtype)
    if not error <= allowed and math.isfinite(error) and _fits_in_float32(network):
        with _in_float32(network):
            error, allowed = compare(), tolerance(mx.float32)
    return None if error <= allowed else error


def _fits_in_float32(network: nn.Module) -> bool:
    """Whether anything is kept in half precision, and there is room for the same in float32 beside it."""
    more = sum(array.size * mx.float32.size for array in Slots(network).get() if _is_half(array))
    return 0 < more <= min(recommended(), mx.get_memory_limit()) - mx.get_active_memory()


@contextmanager
def _in_float32(network: nn.Module) -> Iterator[None]:
    slots = Slots(network)
    with slots.holding([array.astype(mx.float32) if _is_half(array) else array for array in slots.get()]):
        yield
    mx.clear_cache()


def _is_half(array: mx.array) -> bool:
    return array.dtype in (mx.bfloat16, mx.float16)
