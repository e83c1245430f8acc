"""Attention whose memory grows with the number of tokens, not with its square.

    B  rows      H  query heads      K  key/value heads      G  query heads of one key head (H / K)
    T  tokens    C  queries that attend at a time            N  keys that these may see

out = softmax(scale · q kᵀ) v under a causal mask, with a sliding window, attention sinks, soft-capped scores and
packed documents as mlx-lm's models ask for them. MLX keeps the T × T probabilities of every head for the backward
pass; here they are made again from q and k, C rows at a time, so nothing of size T × T exists. A chunk needs no key
behind it, none before its window, and, in packed rows, none before the documents it belongs to: a causal mask costs
half of the full square, packed rows a small part. (FlashAttention's idea, https://arxiv.org/abs/2205.14135, in MLX's
own operations: the same code runs on Metal, CUDA and CPUs. Forward, MLX's fused kernel does it where there is one.)

The queries of a key head lie side by side, [B, K, T · G, d], so that those of a chunk are one matrix without being
copied, and scores lie the other way round than usual, [.., N, C · G]: a CPU adds up rows faster than within a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any

import mlx.core as mx

from mlxlora.engine.device import aside, on_cpu, settle
from mlxlora.engine.exponential import exponential
from mlxlora.engine.pattern import Chunk, Cut, Part, Pattern

Result = tuple[mx.array, mx.array]
Heads = tuple[int, int]  # a range of key heads
SCORES_AT_A_TIME = 1 << 22  # numbers in one chunk of scores: 16 MiB in float32
FUSED_WIDTH = 128  # of heads; for wider ones MLX itself takes products rather than its fused kernel


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    pattern: Pattern,
    sinks: mx.array | None = None,
    segments: mx.array | None = None,
    result: Result | None = None,
) -> tuple[mx.array, Result]:
    """Attention of queries [B, H, T, d] over keys [B, K, T, d] and values [B, K, T, e]: [B, H, T, e], and its result.

    sinks:    [H], one more score in each softmax that takes probability and gives nothing
    segments: int [B, T]; tokens of different numbers do not see each other
    result:   what this call gave in an earlier forward pass, to be taken instead of computed again: the output, and
              the logarithm of each softmax's sum [B, K, 1, T · G] (empty where a fused kernel does not give it)
    """

    narrow = queries.dtype
    if on_cpu() and narrow != mx.float32:
        queries, keys, values = (array.astype(mx.float32) for array in (queries, keys, values))

    # integers have no gradient, so the segments are no argument of the function that has one
    @mx.custom_function
    def attention(*primals: mx.array) -> tuple[mx.array, mx.array]:
        return _forward(_Call(primals, segments, scale, pattern)) if result is None else result

    @attention.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return aside(_backward, _Call(primals, segments, scale, pattern), cotangents[0], *outputs)

    both: Any = attention(queries, keys, values, *([] if sinks is None else [sinks]))
    out: mx.array = both[0].astype(narrow)
    return out, (both[0], both[1])


class _Call:
    """One call of `attend`, cut into slabs of key heads and chunks of queries."""

    def __init__(self, primals: Sequence[mx.array], segments: mx.array | None, scale: float, pattern: Pattern) -> None:
        self.queries, self.keys, self.values, *sinks = primals
        self.sinks: mx.array | None = sinks[0] if sinks else None
        rows, heads, length, self.width = self.queries.shape
        self.key_heads = self.keys.shape[1]
        self.group = heads // self.key_heads
        self.scale, self.pattern = scale, pattern
        self.cut = Cut(pattern, segments, rows, length, SCORES_AT_A_TIME // (rows * self.group))
        self.chunks = self.cut.chunks()
        one = rows * self.group * max(chunk.pairs for chunk in self.chunks)
        self._slab = max(1, min(self.key_heads, SCORES_AT_A_TIME // one))

    def slabs(self) -> Iterator[Heads]:
        """Ranges of key heads that are computed together."""
        for start in range(0, self.key_heads, self._slab):
            yield start, min(start + self._slab, self.key_heads)

    def beside(self, array: mx.array, factor: float = 1.0) -> mx.array:
        """`factor` times [B, K · G, T, d], as [B, K, T · G, d]. (The factor as an array: so a CPU is fast.)"""
        rows, _, length, width = array.shape
        by_group = array.reshape(rows, self.key_heads, self.group, length, width).swapaxes(2, 3)
        product = by_group * mx.full((width,), factor, array.dtype)
        return product.reshape(rows, self.key_heads, length * self.group, width)

    def apart(self, array: mx.array) -> mx.array:
        """[B, k, C · G, d] → [B, C, k, G, d], a view: tokens first, as models go on with them."""
        rows, heads, _, width = array.shape
        return array.reshape(rows, heads, -1, self.group, width).swapaxes(1, 2)

    def of(self, array: mx.array, heads: Heads, chunk: Chunk) -> mx.array:
        """What of [B, K, T · G, d] belongs to a chunk's queries."""
        return array[:, heads[0] : heads[1], chunk.start * self.group : chunk.end * self.group]

    def scores(self, queries: mx.array, keys: mx.array, chunk: Chunk, part: Part) -> tuple[mx.array, mx.array | None]:
        """Masked scores [B, k, N, C · G] of scaled queries [B, k, C · G, d] for a part of their keys, and the tanh of a
        soft-cap."""
        scores = (keys @ queries.swapaxes(-1, -2)).astype(mx.float32)
        capped = None
        if self.pattern.softcap is not None:
            capped = mx.tanh(scores * (1 / self.pattern.softcap))
            scores = capped * self.pattern.softcap
        return (scores + self.cut.penalty(chunk, part, self.group) if part.masked else scores), capped

    def sink(self, heads: Heads, chunk: Chunk) -> mx.array | None:
        """The sinks of a slab's heads, once for each query: [1, k, 1, C · G]."""
        if self.sinks is None:
            return None
        sinks = self.sinks[heads[0] * self.group : heads[1] * self.group].astype(mx.float32)
        return mx.tile(sinks.reshape(1, heads[1] - heads[0], 1, self.group), (1, 1, 1, chunk.end - chunk.start))


def _normalizer(scores: Sequence[mx.array], sink: mx.array | None) -> tuple[list[mx.array], mx.array, mx.array]:
    """(exponentials of the scores above their maximum, their sum, logarithm of the sum of all) of each query, whose
    scores come in parts."""
    tops = [part.max(axis=-2, keepdims=True) for part in scores]
    top = reduce(mx.maximum, tops if sink is None else [*tops, sink])
    powers = [exponential(part - top) for part in scores]
    total = reduce(mx.add, [part.sum(axis=-2, keepdims=True) for part in powers])
    total = total if sink is None else total + exponential(sink - top)
    return powers, total, top + mx.log(total)


def _forward(call: _Call) -> Result:
    fused = _fused(call)
    if fused is not None:
        return fused, mx.zeros((0,))
    all_queries, all_keys, all_values = call.beside(call.queries, call.scale), *_dense(call.keys, call.values)
    settle(all_queries, all_keys, all_values)
    before: list[mx.array] = []
    slabs: list[mx.array] = []
    logs: list[mx.array] = []
    for heads in call.slabs():
        found: list[tuple[mx.array, mx.array]] = []
        for chunk in call.chunks:
            queries = call.of(all_queries, heads, chunk)
            queries = mx.depends(queries, before) if before else queries
            scores, values = [], []
            for part in chunk.parts:
                keys, value = (array[:, slice(*heads), part.first : part.end] for array in (all_keys, all_values))
                scores.append(call.scores(queries, keys, chunk, part)[0])
                values.append(value)
            powers, total, log = _normalizer(scores, call.sink(heads, chunk))
            del scores
            parts = [power.swapaxes(-1, -2).astype(v.dtype) @ v for power, v in zip(powers, values, strict=True)]
            del powers
            out = reduce(mx.add, parts)
            out = call.apart(out) / call.apart(total.swapaxes(-1, -2)).astype(out.dtype)
            found.append((out, log))
            settle(*found[-1])
            before = [out]
        slabs.append(_joined([out for out, _ in found], 1))
        logs.append(_joined([log for _, log in found], -1))
    return _heads_first(slabs), _joined(logs, 1)


def _fused(call: _Call) -> mx.array | None:
    """The output by MLX's fused kernel; None where there is none for such heads, or products are faster.

    The kernel is asked for by force: within a gradient MLX would rather make the scores of all pairs at once.
    """
    if on_cpu() or call.pattern.softcap is not None or call.width > FUSED_WIDTH:
        return None

    def kernel(queries: mx.array, keys: mx.array, values: mx.array, mask: str | mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=call.scale, mask=mask, sinks=call.sinks, force_fused=True
        )

    try:
        if call.cut.segments is None and call.pattern.window is None:
            return kernel(call.queries, call.keys, call.values, "causal")
        parts: list[mx.array] = []
        for chunk in call.chunks:
            queries = call.queries[:, :, chunk.start : chunk.end]
            queries = mx.depends(queries, parts[-1:]) if parts else queries
            keys, values = (array[:, :, chunk.first : chunk.end] for array in (call.keys, call.values))
            seen = call.cut.penalty(chunk, Part(chunk.first, chunk.end, True)).swapaxes(-1, -2) == 0
            parts.append(kernel(queries, keys, values, seen))
        return _joined(parts, 2)
    except ValueError:  # no kernel
        return None


def _backward(call: _Call, cotangent: mx.array, output: mx.array, logs: mx.array) -> tuple[mx.array, ...]:
    gradients = _Gradients(call, cotangent, output, logs if logs.size else None)
    before: list[mx.array] = []
    for heads in call.slabs():
        gradients.begin(heads)
        for chunk in reversed(call.chunks):
            before = gradients.add(chunk, before)
            settle(*before)
        gradients.end()
    joined = gradients.joined()
    settle(*joined)
    return joined


class _Gradients:
    """Gradients gathered slab by slab of key heads, and in each from the last chunk of queries to the first.

    Keys behind a chunk's end are done when the chunk is: they are set aside, and what is still open shrinks.
    """

    def __init__(self, call: _Call, cotangent: mx.array, output: mx.array, logs: mx.array | None) -> None:
        self._call, self._logs = call, logs
        self._all_queries, self._slopes = call.beside(call.queries, call.scale), call.beside(cotangent)
        self._all_keys, self._all_values = _dense(call.keys, call.values)
        # Σ p · dp of each query, which the softmax's gradient takes away, is the product of the output and its gradient
        shares = (cotangent.astype(mx.float32) * output.astype(mx.float32)).sum(axis=-1, keepdims=True)
        self._shares = call.beside(shares).swapaxes(-1, -2)
        settle(self._all_queries, self._all_keys, self._all_values)
        settle(self._slopes, self._shares)
        self._slabs: list[list[mx.array]] = []

    def begin(self, heads: Heads) -> None:
        """What follows belongs to these key heads."""
        self._heads = heads
        self._queries: list[mx.array] = []
        self._keys, self._values = _Open(), _Open()
        self._sinks: mx.array | None = None

    def add(self, chunk: Chunk, before: list[mx.array]) -> list[mx.array]:
        """Add what the queries of `chunk` give; returns the arrays that the next chunk is to wait for."""
        call, heads = self._call, self._heads
        queries = mx.depends(self._all_queries, before) if before else self._all_queries
        queries, slope = call.of(queries, heads, chunk), call.of(self._slopes, heads, chunk)
        share = self._rows_of(self._shares, chunk)
        keys, values = (
            [array[:, slice(*heads), part.first : part.end] for part in chunk.parts]
            for array in (self._all_keys, self._all_values)
        )
        scored = [call.scores(queries, key, chunk, part) for key, part in zip(keys, chunk.parts, strict=True)]
        sink = call.sink(heads, chunk)
        if self._logs is None:
            log = _normalizer([scores for scores, _ in scored], sink)[2]
        else:
            log = self._rows_of(self._logs, chunk)
        by_queries: list[mx.array] = []
        by_keys: list[mx.array] = []
        by_values: list[mx.array] = []
        for key, value, (scores, capped) in zip(keys, values, scored, strict=True):
            chances = exponential(scores - log)
            inner = chances * ((value @ slope.swapaxes(-1, -2)).astype(mx.float32) - share)
            if capped is not None:
                inner = inner * (1 - capped * capped)
            inner, chances = inner.astype(key.dtype), chances.astype(key.dtype)
            by_queries.append(inner.swapaxes(-1, -2) @ key)
            by_keys.append(inner @ queries)
            by_values.append(chances @ slope)
        by_query = call.apart(reduce(mx.add, by_queries))
        self._queries.append(by_query * mx.full((by_query.shape[-1],), call.scale, by_query.dtype))
        waits = [self._queries[-1], *self._keys.add(chunk, by_keys), *self._values.add(chunk, by_values)]
        if sink is not None:
            lost = -(exponential(sink - log) * share).reshape(share.shape[0], share.shape[1], -1, call.group)
            lost = lost.sum(axis=(0, 2)).reshape(-1)
            self._sinks = lost if self._sinks is None else self._sinks + lost
            waits.append(self._sinks)
        return waits

    def _rows_of(self, array: mx.array, chunk: Chunk) -> mx.array:
        """What of [B, K, 1, T · G] belongs to the chunk's queries."""
        group = self._call.group
        return array[:, slice(*self._heads), :, chunk.start * group : chunk.end * group]

    def end(self) -> None:
        """The key heads in hand are done."""
        found = [_joined(self._queries[::-1], 1), self._keys.joined(), self._values.joined()]
        self._slabs.append(found if self._sinks is None else [*found, self._sinks])

    def joined(self) -> tuple[mx.array, ...]:
        """The gradients of queries, keys and values, and of the sinks."""
        queries, keys, values, *sinks = (list(parts) for parts in zip(*self._slabs, strict=True))
        by_sink = [_joined(parts, 0).astype(self._call.queries.dtype) for parts in sinks]
        return _heads_first(queries), _joined(keys, 1), _joined(values, 1), *by_sink


class _Open:
    """A sum over [.., T, d] to which parts are added from the end of T to its start.

    What is done and what is still open are arrays of their own: a slice of one would keep all of it in memory.
    """

    def __init__(self) -> None:
        self._done: list[mx.array] = []
        self._sum: mx.array | None = None  # of the keys from `_first` to the start of the part before
        self._first = 0

    def add(self, chunk: Chunk, parts: Sequence[mx.array]) -> list[mx.array]:
        """Add what the queries of `chunk` give to its keys, in `parts` of these keys; chunks come without gaps. Returns
        what is new."""
        first, start, end = chunk.first, chunk.start, chunk.end
        ends = list(accumulate((part.shape[-2] for part in parts), initial=first))

        def given(low: int, high: int) -> mx.array:
            """What this chunk gives to the keys [low, high)."""
            cuts = [
                part[..., max(low, begin) - begin : min(high, until) - begin, :]
                for part, (begin, until) in zip(parts, pairwise(ends), strict=True)
                if begin < high and low < until
            ]
            return _joined(cuts, -2)

        def between(low: int, high: int) -> mx.array:
            """The sum over the keys [low, high) with this chunk in it."""
            known = high if self._sum is None else min(max(low, self._first), high)  # where the sum so far begins
            pieces = [given(low, known)] if known > low else []
            if known < high:
                assert self._sum is not None
                pieces.append(given(known, high) + self._sum[..., known - self._first : high - self._first, :])
            return _joined(pieces, -2)

        self._done.append(between(start, end))
        self._sum, self._first = between(first, start) if first < start else None, first
        return [self._done[-1], *([] if self._sum is None else [self._sum])]

    def joined(self) -> mx.array:
        return _joined(self._done[::-1], -2)


def _joined(parts: list[mx.array], axis: int) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)


def _heads_first(slabs: list[mx.array]) -> mx.array:
    """[B, T, k, G, d] of each slab → [B, H, T, d], a view."""
    joined = _joined(slabs, 2)
    return joined.reshape(*joined.shape[:2], -1, joined.shape[-1]).swapaxes(1, 2)


def _dense(*arrays: mx.array) -> list[mx.array]:
    return [mx.contiguous(array) for array in arrays]
