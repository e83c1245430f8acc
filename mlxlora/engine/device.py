"""What is dear on the device in use, and what to do instead.

On Metal and CUDA, MLX has fused kernels and compiles well: nothing to do. On a CPU

- an evaluation allocates the results of its whole graph before much of it has run, so a block's insides all exist at
  once: what is large is computed at once (`settle`), and no whole block is compiled, since a compiled graph is
  evaluated as one;
- `exp` takes as long as sixty multiplications, a few compiled passes as long as four (`exponential.py`);
- within a gradient MLX compiles nothing, so what is to be compiled there is made elsewhere (`aside`);
- only float32 products are BLAS calls; others are 40 times slower, so they are made in float32 (`linear.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import mlx.core as mx

T = TypeVar("T")


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


def settles() -> bool:
    """Whether `settle` does something: a CPU that computes array after array."""
    return _settled.get() is not None


def settles_at_once() -> bool:
    """Whether what was settled has its values already."""
    return _settled.get() is mx.eval


_Answer = list[tuple[Any, BaseException | None]]  # one: the result, or why there is none


class _Beside:
    """A thread beside the one that takes gradients; it starts when it is first asked, and never ends.

    Never: what MLX keeps for a thread goes when the thread goes, and some of that are Python objects, which must not
    outlive the interpreter. A daemon that waits goes with the process.
    """

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[SimpleQueue[_Answer], Callable[[], Any]]] = SimpleQueue()
        self._thread: Thread | None = None

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)` in that thread, in the caller's context and on its stream."""
        if self._thread is None or not self._thread.is_alive():  # a forked process has no other threads
            self._tasks = SimpleQueue()
            self._thread = Thread(target=self._work, args=(self._tasks,), name="mlxlora-beside", daemon=True)
            self._thread.start()
        stream, context = mx.default_stream(mx.default_device()), copy_context()

        def call() -> T:
            with mx.stream(stream):
                return function(*args)

        answers: SimpleQueue[_Answer] = SimpleQueue()
        self._tasks.put((answers, lambda: context.run(call)))
        result, failure = answers.get().pop()
        try:
            if failure is not None:
                raise failure
            found: T = result
            return found
        finally:
            del failure  # which knows this frame

    @staticmethod
    def _work(tasks: SimpleQueue[tuple[SimpleQueue[_Answer], Callable[[], Any]]]) -> None:
        while True:
            answers, task = tasks.get()
            answer: _Answer = []
            try:
                answer.append((task(), None))
            except BaseException as failure:
                answer.append((None, failure))
            del task  # and what it holds, before anybody goes on: else the peak would hang on who is quicker
            answers.put(answer)  # which is empty as soon as it is read


_beside = _Beside()


def aside(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, within the gradient of a function: on a CPU where `mx.compile` does something.

    While MLX goes backward through a function, all arrays count as followed, and what is compiled is called as if it
    were not. That mark is one of the thread.
    """
    return _beside.run(function, *args) if settles() else function(*args)


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


@mx.custom_function
def stage(x: mx.array) -> mx.array:
    """`x`; in the backward pass, what comes back to here is settled before it goes on.

    Where nobody follows `x`, nothing comes back, and its gradient is not computed.
    """
    return x


@stage.vjp
def _stage_vjp(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
    settle(cotangent)
    return cotangent
