"""The backward pass of attention: chunks of queries make their scores again, from the last to the first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate, pairwise

import mlx.core as mx

from mlxlora.engine.attention_call import Call, Heads, heads_first, joined
from mlxlora.engine.device import settle
from mlxlora.engine.pattern import Chunk


def gradients(call: Call, cotangent: mx.array, output: mx.array, logs: mx.array) -> tuple[mx.array, ...]:
    """By queries, keys, values, and by the sinks where there are some."""
    found = _Gradients(call, cotangent, output, logs if logs.size else None)
    before: list[mx.array] = []
    for heads in call.slabs():
        found.begin(heads)
        for chunk in reversed(call.chunks):
            before = found.add(chunk, before)
            settle(*before)
        found.end()
    whole = found.joined()
    settle(*whole)
    return whole


class _Gradients:
    """Gradients gathered slab by slab of key heads, and in each from the last chunk of queries to the first.

    Keys behind a chunk's end are done when the chunk is: they are set aside, and what is still open shrinks.
    """

    def __init__(self, call: Call, cotangent: mx.array, output: mx.array, logs: mx.array | None) -> None:
        self._call, self._cotangent, self._output, self._logs = call, cotangent, output, logs
        self._slabs: list[list[mx.array]] = []

    def begin(self, heads: Heads) -> None:
        """What follows belongs to these key heads."""
        call, of_heads = self._call, slice(heads[0] * self._call.group, heads[1] * self._call.group)
        self._heads = heads
        self._all_queries, self._slopes = call.scaled(heads), call.beside(self._cotangent, heads)
        self._all_keys, self._all_values = call.dense(call.keys, heads), call.dense(call.values, heads)
        # Σ p · dp of each query, which the softmax's gradient takes away, is the product of the output and its gradient
        slopes, output = (array[:, of_heads].astype(mx.float32) for array in (self._cotangent, self._output))
        shares = (slopes * output).sum(axis=-1, keepdims=True)
        self._shares = call.beside(shares, (0, heads[1] - heads[0])).swapaxes(-1, -2)
        settle(self._all_queries, self._slopes, self._all_keys, self._all_values, self._shares)
        self._queries: list[mx.array] = []
        self._keys, self._values = _Open(), _Open()
        self._sinks: mx.array | None = None

    def add(self, chunk: Chunk, before: list[mx.array]) -> list[mx.array]:
        """Add what the queries of `chunk` give; returns the arrays that the next chunk is to wait for."""
        call, heads = self._call, self._heads
        queries = mx.depends(self._all_queries, before) if before else self._all_queries
        queries, slope, share = call.of(queries, chunk), call.of(self._slopes, chunk), self._of(self._shares, chunk)
        keys, values = (
            [array[:, :, part.first : part.end] for part in chunk.parts] for array in (self._all_keys, self._all_values)
        )
        sink = call.sink(heads, chunk)
        scored: list[tuple[mx.array, mx.array | None]] = []
        if self._logs is not None:
            log = self._of(self._logs[:, slice(*heads)], chunk)
        else:
            scored = [call.scores(queries, key, chunk, part) for key, part in zip(keys, chunk.parts, strict=True)]
            sums = [mx.logsumexp(scores, axis=-2, keepdims=True) for scores, _ in scored]
            log = reduce(mx.logaddexp, sums if sink is None else [*sums, sink])
        if call.bare:  # what the exponentials lack, the rows that they are multiplied with have
            lacking = call.power(-log)
            slope, share = slope * lacking.swapaxes(-1, -2), share * lacking
        plain = queries * mx.full((call.width,), 1 / call.spread, queries.dtype)
        by_keys: list[mx.array] = []
        by_values: list[mx.array] = []
        by_query: mx.array | None = None
        for key, value, part in zip(keys, values, chunk.parts, strict=True):
            scores, capped = scored.pop(0) if scored else call.scores(queries, key, chunk, part)
            chances = call.power(scores if call.bare else scores - log)
            del scores
            settle(chances)
            inner = chances * ((value @ slope.swapaxes(-1, -2)).astype(mx.float32) - share)
            if capped is not None:
                inner = inner * (1 - capped * capped)
            inner, chances = inner.astype(key.dtype), chances.astype(key.dtype)
            by_part = inner.swapaxes(-1, -2) @ key
            by_query = by_part if by_query is None else by_query + by_part
            by_keys.append(inner @ plain)
            by_values.append(chances @ slope)
            settle(by_query, by_keys[-1], by_values[-1])
        assert by_query is not None
        by_query = call.apart(by_query)
        self._queries.append(by_query * mx.full((call.width,), call.scale, by_query.dtype))
        waits = [self._queries[-1], *self._keys.add(chunk, by_keys), *self._values.add(chunk, by_values)]
        if sink is not None:
            taken = call.power(sink if call.bare else sink - log) * share
            lost = -taken.reshape(*share.shape[:2], -1, call.group).sum(axis=(0, 2)).reshape(-1)
            self._sinks = lost if self._sinks is None else self._sinks + lost
            waits.append(self._sinks)
        return waits

    def _of(self, array: mx.array, chunk: Chunk) -> mx.array:
        """What of [B, k, 1, T · G] belongs to the chunk's queries."""
        group = self._call.group
        return array[..., chunk.start * group : chunk.end * group]

    def end(self) -> None:
        """The key heads in hand are done."""
        found = [joined(self._queries[::-1], 1), self._keys.joined(), self._values.joined()]
        settle(*found)
        self._slabs.append(found if self._sinks is None else [*found, self._sinks])

    def joined(self) -> tuple[mx.array, ...]:
        """The gradients of queries, keys and values, and of the sinks."""
        queries, keys, values, *sinks = (list(parts) for parts in zip(*self._slabs, strict=True))
        by_sink = [joined(parts, 0).astype(self._call.queries.dtype) for parts in sinks]
        return heads_first(queries), joined(keys, 1), joined(values, 1), *by_sink


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
            return joined(cuts, -2)

        def between(low: int, high: int) -> mx.array:
            """The sum over the keys [low, high) with this chunk in it."""
            known = high if self._sum is None else min(max(low, self._first), high)  # where the sum so far begins
            pieces = [given(low, known)] if known > low else []
            if known < high:
                assert self._sum is not None
                pieces.append(given(known, high) + self._sum[..., known - self._first : high - self._first, :])
            return joined(pieces, -2)

        self._done.append(between(start, end))
        self._sum, self._first = between(first, start) if first < start else None, first
        return [self._done[-1], *([] if self._sum is None else [self._sum])]

    def joined(self) -> mx.array:
        return joined(self._done[::-1], -2)
