"""Log-probabilities of chosen tokens, without ever holding the logits of all of them.

    P  positions that are scored      D  width of the hidden states      V  vocabulary      C  positions in a chunk

log p(y | h) = l_y − log Σ exp(l), with l = head(h). A chunk of C positions has its logits made, turned into
log-probabilities and given up before the next one starts. While the logits of a chunk are there, the gradient of each
log-probability by its own hidden state is taken too, [C, D]: rows are independent, so whatever an objective later
asks of position p is this row times a number, and nothing of size P × V is kept or made twice (the idea of Liger
Kernel, https://arxiv.org/abs/2410.10989, per token). Where the head itself learns, the backward pass makes the logits
of a chunk again instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlxlora.engine.compiled import by_shape
from mlxlora.engine.device import settle
from mlxlora.engine.exponential import exponential, one_operation

# (hidden [C, D], learned arrays of the head, number of the chunk) → logits [C, V]
Head = Callable[[mx.array, Sequence[mx.array], int], mx.array]
Bounds = list[tuple[int, int]]  # of the chunks
Known = tuple[mx.array, mx.array]  # log-probabilities, and the gradient of each by its hidden state
LOGITS_AT_A_TIME = 1 << 23  # floats of one chunk's logits: 32 MiB
INSIDE = 14  # arrays as large as its hidden states that the backward pass of a block takes at least


@by_shape
def _slope(powers: mx.array, targets: mx.array, token: mx.array, share: mx.array, slope: mx.array) -> mx.array:
    return mx.where(token == targets, slope, 0) - powers * share


def _parts(
    logits: mx.array, targets: mx.array, exp: Callable[[mx.array], mx.array]
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """logits[targets] [C, 1]; exp(logits) below their maximum [C, V], and its sums [C]; log softmax(logits)[targets]
    [C]."""
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1).astype(mx.float32)
    top = logits.max(axis=-1, keepdims=True).astype(mx.float32)
    settle(picked, top)
    below = logits.astype(mx.float32) - top
    del logits  # each of these arrays [C, V] takes the place of the one before where nobody follows a gradient
    powers = exp(below)
    del below
    settle(powers)
    total = powers.sum(axis=-1)
    return picked, powers, total, (picked - top)[:, 0] - mx.log(total)


@mx.custom_function
def _chosen(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """log softmax(logits)[targets] [C]; and exp(logits) below their maximum [C, V], and its sums [C], all float32."""
    _, powers, total, values = _parts(logits, targets, one_operation)
    return values, powers, total


@_chosen.vjp
def _chosen_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
    logits, targets = primals
    _, powers, total = outputs
    slope = cotangents[0][:, None]
    tokens = mx.arange(logits.shape[-1])[None]
    by_logits = _slope(powers, targets[:, None], tokens, slope / total[:, None], slope)
    return by_logits.astype(logits.dtype), mx.zeros_like(targets)


def chunk_length(positions: int, vocabulary: int, wanted: int = 0, linear: bool = False, inside: int = 0) -> int:
    """Positions whose logits exist at a time; at most `wanted`, if that is given.

    Few enough that the chunk's few arrays stay below 2 bytes per logit of all positions where the vocabulary is large,
    many enough for a full product. A `linear` head needs two such arrays, another one up to five. What they may take
    in any case: little memory, and as much as the backward pass of a block takes later, of whose hidden states there
    are `inside` numbers. Chunks are of one size, for each reads all of the head's weight; rather than one more, each
    may be a quarter longer.
    """
    most, spare = wanted, 0
    if not wanted:
        arrays = 2 if linear else 4
        free = INSIDE * inside // arrays // vocabulary
        most = max(16, LOGITS_AT_A_TIME // vocabulary // 16 * 16)
        cheap = LOGITS_AT_A_TIME // arrays // vocabulary // 16 * 16
        most = max(1, free, min(most, max(24, cheap, -(-positions // (5 if linear else 11)))))
        spare = most // 4
    count = max(1, -(-(positions - spare) // most))
    return max(1, -(-positions // count))


def token_log_probs(
    hidden: mx.array,
    targets: mx.array,
    head: Head,
    learned: Sequence[mx.array],
    chunk: int,
    gradients: bool = True,
    linear: bool = False,
    known: Known | None = None,
) -> mx.array:
    """Differentiable log-probabilities of `targets` [P] from `hidden` [P, D]: float32 [P].

    `learned` are the arrays of the head that may have a gradient; empty for a frozen head. `gradients=False` computes
    the values alone. The gradient of a `linear` head does not depend on its logits, which are then given up sooner.
    `known` is what `with_slopes` gave for these states.
    """
    if not gradients:
        bounds = _bounds(targets, chunk)

        def values_of(index: int, rows: mx.array) -> list[mx.array]:
            return [_parts(head(rows, learned, index), targets[slice(*bounds[index])], exponential)[-1]]

        return _in_turn(bounds, hidden, values_of)[0]
    if learned:
        return _learning(hidden, targets, head, list(learned), _bounds(targets, chunk))

    @mx.custom_function
    def scored(hidden: mx.array) -> Known:
        return known or with_slopes(hidden, targets, head, chunk, linear)

    @scored.vjp
    def backward(primals: mx.array, cotangents: Any, outputs: Any) -> mx.array:
        slopes: mx.array = outputs[1]
        out: mx.array = (cotangents[0][:, None] * slopes.astype(mx.float32)).astype(slopes.dtype)
        return out

    both: Any = scored(hidden)
    values: mx.array = both[0]
    return values


def with_slopes(hidden: mx.array, targets: mx.array, head: Head, chunk: int, linear: bool) -> Known:
    """Log-probabilities [P] under a frozen head, and the gradient of each by its own hidden state [P, D].

    Of a `linear` head they are best made where no gradient is followed.
    """
    bounds = _bounds(targets, chunk)

    def one(index: int, rows: mx.array) -> list[mx.array]:
        if linear:
            return _at_once(rows, targets[slice(*bounds[index])], lambda rows: head(rows, (), index))

        def total(rows: mx.array) -> tuple[mx.array, mx.array]:
            values = _log_probs(rows, targets, head, (), bounds, index)
            return values.sum(), values

        (_, values), slope = mx.value_and_grad(total)(rows)
        return [values, slope]

    values, slopes = _in_turn(bounds, hidden, one)
    return values, slopes


def _bounds(targets: mx.array, chunk: int) -> Bounds:
    return [(start, min(start + chunk, targets.size)) for start in range(0, targets.size, chunk)]


def _log_probs(
    rows: mx.array, targets: mx.array, head: Head, learned: Sequence[mx.array], bounds: Bounds, index: int
) -> mx.array:
    start, end = bounds[index]
    values: Any = _chosen(head(rows, learned, index), targets[start:end])
    out: mx.array = values[0]
    return out


def _at_once(rows: mx.array, targets: mx.array, head: Callable[[mx.array], mx.array]) -> list[mx.array]:
    """Log-probabilities [C] and their gradients by `rows` [C, D], of a linear head: each array [C, V] in the place of
    the one before."""
    picked, powers, total, values = _parts(head(rows), targets, exponential)
    settle(total, values)
    tokens = mx.arange(powers.shape[-1])[None]
    by_logits = _slope(powers, targets[:, None], tokens, 1 / total[:, None], mx.ones_like(picked))
    settle(by_logits)
    return [values, mx.vjp(head, [rows], [by_logits.astype(rows.dtype)])[1][0]]


def _in_turn(bounds: Bounds, hidden: mx.array, one: Callable[[int, mx.array], list[mx.array]]) -> list[mx.array]:
    """`one(index, rows)` for each chunk, each starting when the one before is done; the results joined."""
    parts: list[list[mx.array]] = []
    for index, (start, end) in enumerate(bounds):
        rows = hidden[start:end]
        if parts:
            rows = mx.depends(rows, parts[-1])
        parts.append(one(index, rows))
        settle(*parts[-1])
    return [mx.concatenate(list(part)) if len(part) > 1 else part[0] for part in zip(*parts, strict=True)]


def _learning(hidden: mx.array, targets: mx.array, head: Head, learned: list[mx.array], bounds: Bounds) -> mx.array:
    """The same where the head has something to learn: its gradient needs the logits again, chunk by chunk."""

    @mx.custom_function
    def scored(hidden: mx.array, *arrays: mx.array) -> mx.array:
        return _in_turn(bounds, hidden, lambda i, rows: [_log_probs(rows, targets, head, arrays, bounds, i)])[0]

    @scored.vjp
    def backward(primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        rows_of_all, *arrays = primals
        slopes: list[mx.array] = []
        totals: list[mx.array] = []
        for index, (start, end) in enumerate(bounds):
            rows = rows_of_all[start:end]
            if totals:
                waited: Any = mx.depends(rows, [slopes[-1], *totals])
                rows = waited
            grads: list[mx.array] = mx.vjp(
                lambda rows, *arrays, index=index: _log_probs(rows, targets, head, arrays, bounds, index),
                [rows, *arrays],
                [cotangent[start:end]],
            )[1]
            slopes.append(grads[0])
            parts = grads[1:]
            settle(slopes[-1], *parts)
            totals = [total + part for total, part in zip(totals, parts, strict=True)] if totals else parts
        return (mx.concatenate(slopes), *totals)

    value: Any = scored(hidden, *learned)
    out: mx.array = value
    return out
