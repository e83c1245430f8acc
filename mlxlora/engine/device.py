"""What is dear on the device in use, and what to do instead.

On Metal and CUDA, MLX has fused kernels and compiles well: nothing to do. On a CPU

- an evaluation allocates the results of its whole graph before much of it has run, so a block's insides all exist at
once:
  what is large is computed at once (`settle`), and nothing is compiled, since a compiled graph is evaluated as one;
- `exp` and what is built on it take as long as sixty multiplications, powers of two a third of that (`EXP`);
- only float32 products are BLAS calls; others are 40 times slower, so they are made in float32 (`products.py`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx


def on_cpu() -> bool:
    """Whether MLX computes on a CPU."""
    return bool(mx.default_device().type == mx.cpu)


_settled: ContextVar[Callable[..., None] | None] = ContextVar("settled", default=None)


@contextmanager
def settling() -> Iterator[None]:
    """Let `settle` compute while the block runs, on a CPU. Not for what is compiled: its arrays have no values yet."""
    token = _settled.set(mx.eval if on_cpu() else None)
    try:
        yield
    finally:
        _settled.reset(token)


@contextmanager
def settling_afterwards() -> Iterator[None]:
    """The same for a block that takes gradients: all that was to be settled is, in its order, when the block is over.

    What is computed while MLX follows a gradient keeps everything that it was made of.
    """
    waiting: deque[tuple[mx.array, ...]] = deque()
    token = _settled.set((lambda *arrays: waiting.append(arrays)) if on_cpu() else None)
    try:
        yield
    finally:
        _settled.reset(token)
    while waiting:
        mx.eval(*waiting.popleft())


def settle(*arrays: mx.array) -> None:
    """On a CPU, compute these now (see `settling`), so that what they were made of can go. Elsewhere nothing."""
    how = _settled.get()
    if how is not None:
        how(*arrays)


def unit() -> float:
    """The number of units of `power` in one of the natural exponential: scores are best scaled by it from the start."""
    return math.log2(math.e) if on_cpu() else 1.0


def power(x: mx.array) -> mx.array:
    """exp(x / unit()): powers of two on a CPU, exp elsewhere."""
    return mx.power(mx.array(2.0, x.dtype), x) if on_cpu() else mx.exp(x)
