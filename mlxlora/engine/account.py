"""What a step takes, part by part: measured on a few of its blocks, counted for all of them.

A step is a chain of parts (see `chain.py`): each block forward, the loss, each block backward. A part needs some memory
while it runs (`over`) and leaves some behind (`left`: what it keeps for the backward pass, gradients; below zero where
it lets go). Blocks of one structure, called in one way, take the same; so a step over one block of each kind, in which
every part is waited for, says what all parts of the whole step take, and the peak is found by adding up in their order.

What the first of the blocks makes for all of them (tables of rotary positions) lies there from then on; it is counted
apart, so that no other block stands for it a second time.

A real step does not wait between its parts, and how far the device lags behind costs memory, too. That is measured as
the difference between a real step over the same few blocks and its account.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxlora.data.sample import Batch
from mlxlora.engine.chain import END, FINISH, Chain, Part
from mlxlora.engine.masks import Layout
from mlxlora.engine.scores import Objective


@dataclass(frozen=True, slots=True)
class Taken:
    """What one part of a step took: bytes at its peak above what lay there before, bytes left behind, seconds."""

    over: int
    left: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Account:
    """What a whole step takes.

    peak:    bytes beside what lies there already
    few:     the same for the step over a few blocks
    by_loss: what of the peak is the loss alone, where the loss is where the peak is; else 0
    seconds: how long a step takes
    frozen:  what of that the blocks take that make the same of a text in every epoch
    """

    peak: int
    few: int
    by_loss: int
    seconds: float
    frozen: float = 0.0


def account(
    chain: Chain,
    kept: int,
    objective: Objective,
    batch: Batch,
    layout: Layout,
    key: mx.array | None,
    gradients: bool = True,
) -> Account:
    """The account of a step of `chain` for such a batch, or without `gradients` of an evaluation.

    kept: see `Chain.run`
    """
    kinds = _kinds(chain, kept, batch, layout, key)
    few = _few(kinds)

    def step() -> Any:
        return chain.run(objective, batch, layout, key, gradients, kept)

    with _only(chain, few):
        _measured(step)  # traced, and what is made once is made: no step of a run will be the first
        taken = _observed(chain, step)
        shared = layout.kept
        layout.tables.clear()  # the next batch of a run makes its own
        real = _measured(step)

    def order(blocks: Sequence[int]) -> list[Taken]:
        parts = _parts(blocks, chain.lowest) if gradients else [*(("forward", index) for index in blocks), FINISH]
        return [taken[_stands_for(part, few, kinds)] for part in parts]

    small, whole = order(few), order(range(len(kinds)))
    top = peak(whole)
    level = sum(part.left for part in whole[: len(kinds)])
    loss = taken[FINISH].over
    slower = real.seconds / max(sum(part.seconds for part in small), 1e-9)
    return Account(
        peak=top + shared + max(real.over - shared - peak(small), 0),
        few=real.over,
        by_loss=loss if level + loss >= top else 0,
        seconds=slower * sum(part.seconds for part in whole),
        frozen=slower * sum(part.seconds for part in whole[: chain.frozen]),
    )


def peak(parts: Iterable[Taken]) -> int:
    """The most that lies there at a time when these parts follow each other."""
    level = top = 0
    for part in parts:
        top = max(top, level + part.over)
        level += part.left
    return top


def _kinds(chain: Chain, kept: int, batch: Batch, layout: Layout, key: mx.array | None) -> list[Any]:
    """For each block something that is equal for two that take the same."""
    _, calls = chain.ends.start(batch.tokens, layout, key)
    return [
        (block.structure, call.key(), index >= chain.lowest, chain.further(index), chain.keeps(index, kept))
        for index, (block, (call, _)) in enumerate(zip(chain.blocks, calls, strict=True))
    ]


def _few(kinds: Sequence[Any]) -> list[int]:
    """The first and the last block, which begin and end a step, and one of each kind in between."""
    between = {kind: index for index, kind in reversed(list(enumerate(kinds[:-1]))) if index}
    return sorted({0, len(kinds) - 1, *between.values()})


def _stands_for(part: Part, few: Sequence[int], kinds: Sequence[Any]) -> Part:
    """The measured part that takes what `part` takes."""
    name, index = part
    if index in few or index < 0:
        return part
    return name, next(one for one in few[1:-1] if kinds[one] == kinds[index])


def _parts(blocks: Sequence[int], lowest: int) -> Iterator[Part]:
    yield from (("forward", index) for index in blocks)
    yield FINISH
    yield from (("backward", index) for index in reversed(blocks) if index >= lowest)
    yield END


def _measured(work: Callable[[], Any]) -> Taken:
    mx.synchronize()
    mx.reset_peak_memory()
    before, begun = mx.get_active_memory(), time.perf_counter()
    mx.eval(work())
    mx.synchronize()
    return Taken(mx.get_peak_memory() - before, mx.get_active_memory() - before, time.perf_counter() - begun)


def _observed(chain: Chain, work: Callable[[], Any]) -> dict[Part, Taken]:
    """What each part of `work`, a step, takes when the next does not begin before it is done."""
    taken: dict[Part, Taken] = {}
    before, begun = 0, 0.0

    def restart() -> None:
        nonlocal before, begun
        mx.reset_peak_memory()
        before, begun = mx.get_active_memory(), time.perf_counter()

    def done(*arrays: Any) -> None:
        mx.eval(*arrays)
        mx.synchronize()
        now = time.perf_counter()
        taken[chain.part] = Taken(mx.get_peak_memory() - before, mx.get_active_memory() - before, now - begun)
        restart()

    send, chain.send = chain.send, done
    mx.synchronize()
    restart()
    try:
        done(work())
    finally:
        chain.send = send
    return taken


@contextmanager
def _only(chain: Chain, blocks: Sequence[int]) -> Iterator[None]:
    """A step runs these blocks alone, and computes what the frozen ones make of a text, while the block runs."""
    running, frozen = chain.running, chain._frozen
    chain.running, chain._frozen = blocks, None
    try:
        yield
    finally:
        chain.running, chain._frozen = running, frozen
