"""Attention whose memory grows with the number of tokens, not with its square.

    B  rows      H  query heads      K  key/value heads      G  query heads of one key head (H / K)
    T  tokens    C  queries that attend at a time            N  keys that these may see

out = softmax(scale · q kᵀ) v under a causal mask, with a sliding window, attention sinks, soft-capped scores and
packed documents as mlx-lm's models ask for them. MLX keeps the T × T probabilities of every head for the backward
pass; here they are made again from q and k, C rows at a time, so nothing of size T × T exists. A chunk needs no key
behind it, none before its window, and, in packed rows, none before the documents it belongs to: a causal mask costs
half of the full square, packed rows a small part. (FlashAttention's idea, https://arxiv.org/abs/2205.14135, in MLX's
own operations: the same code runs on Metal, CUDA and CPUs. Forward, MLX's fused kernel does it where there is one.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any

import mlx.core as mx

from mlxlora.engine.device import aside, on_cpu, settle
from mlxlora.engine.exponential import exponential

Result = tuple[mx.array, mx.array]
SCORES_AT_A_TIME = 1 << 22  # numbers in one chunk of scores: 16 MiB in float32
CHUNK = 256
LEAST = 16  # queries of a chunk: what would be left over goes with the chunk before
FUSED_WIDTH = 128  # of heads; for wider ones MLX itself takes products rather than its fused kernel


@dataclass(frozen=True, slots=True)
class CausalMask:
    """Stands for the mask of a layer without being one: causal, and within `window` where that is set.

    Models hand it from `create_attention_mask` to the attention function without looking into it.
    """

    window: int | None = None


@dataclass(frozen=True, slots=True)
class Pattern:
    """Who may attend to whom, beyond causality: all that is known when the step is traced.

    window:   a query sees itself and window − 1 tokens before it
    lookback: no document reaches further back than this many tokens before the first query of a chunk; None: any
    firsts:   for each token, the first that it may see in any row; None: not known when the step is traced
    softcap:  scores become softcap · tanh(score / softcap)
    chunk:    queries that attend at a time; 0 chooses by shape
    """

    window: int | None = None
    lookback: int | None = None
    firsts: Sequence[int] | None = None
    softcap: float | None = None
    chunk: int = 0


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
              the logarithm of each softmax's sum [B, H, T, 1] (empty where a fused kernel does not give it)
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
        queries, keys, values, *sinks = primals
        self.rows, self.heads, self.length, self.width = queries.shape
        self.key_heads = keys.shape[1]
        self.group = self.heads // self.key_heads
        self.scale, self.pattern, self.segments = scale, pattern, segments
        self.dtype = queries.dtype
        self.queries, self.keys, self.values = queries, keys, mx.contiguous(values)
        self.scaled_keys = mx.contiguous(keys * scale)
        self.sinks = sinks[0] if sinks else None
        firsts = pattern.firsts
        reach = self.length if firsts is None else max(at + 1 - first for at, first in enumerate(firsts))
        self.chunk = min(self.length, pattern.chunk or self._chunk(reach))
        one = self.rows * self.group * self.chunk * (self.length if firsts is None else reach + self.chunk)
        self.slab = max(1, min(self.key_heads, SCORES_AT_A_TIME // one))

    def _chunk(self, reach: int) -> int:
        """A quarter of the queries in a short document (the triangle above the diagonal is saved), fewer where they
        are long."""
        room = SCORES_AT_A_TIME // (self.rows * self.group * reach)
        return max(32, min(CHUNK, room, -(-reach // 4)) // 16 * 16)

    def slabs(self) -> Iterator[tuple[int, int]]:
        """Ranges of key heads that are computed together."""
        for start in range(0, self.key_heads, self.slab):
            yield start, min(start + self.slab, self.key_heads)

    def chunks(self) -> list[tuple[int, int, int]]:
        """(first key, first query, end of both) of each chunk."""
        found = []
        start = 0
        while start < self.length:
            end = self._end(start)
            back = [start]
            if self.pattern.window is not None:
                back.append(self.pattern.window - 1)
            if self.pattern.firsts is not None:
                back.append(start - self.pattern.firsts[start])
            elif self.pattern.lookback is not None and self.segments is not None:
                back.append(self.pattern.lookback)
            found.append((start - min(back), start, end))
            start = end
        return found

    def _end(self, start: int) -> int:
        """Where the chunk that begins at `start` ends: rather with a document than in the middle of the next."""
        end = min(start + self.chunk, self.length)
        firsts = self.pattern.firsts
        if firsts is not None and end < self.length and firsts[end] > start + self.chunk // 2:
            end = firsts[end]
        return end if self.length - end >= LEAST else self.length

    def folded(self, queries: mx.array) -> mx.array:
        """[B, k·G, C, d] → [B, k, G·C, d]: the heads of a group are more rows of one product."""
        rows, heads, length, width = queries.shape
        return queries.reshape(rows, heads // self.group, self.group * length, width)

    def unfolded(self, folded: mx.array) -> mx.array:
        """The inverse of `folded`."""
        rows, heads, length, width = folded.shape
        return folded.reshape(rows, heads * self.group, length // self.group, width)

    def parts(self, chunk: tuple[int, int, int]) -> list[tuple[int, int, bool]]:
        """The keys of a chunk in ranges, in order: (first, end, whether some of them are hidden from some queries)."""
        first, start, end = chunk
        free = first if self.pattern.window is None else max(first, end - self.pattern.window)
        known = self.segments is None or self._one_document(start, end)
        if not known or start - free < end - start:
            return [(first, end, True)]
        edge = [(first, free, True)] if first < free else []
        return [*edge, (free, start, False), (start, end, True)]

    def allowed(self, first: int, last: int, start: int, end: int) -> mx.array:
        """Which of the keys [first, last) the queries [start, end) may see: bool, broadcasts with [B, 1, C, N]."""
        query, key = mx.arange(start, end)[:, None], mx.arange(first, last)[None]
        seen = query >= key
        window = self.pattern.window
        if window is not None and end - first > window:
            seen = seen & (query < key + window)
        if self.segments is not None and not self._one_document(start, end):
            same = self.segments[:, None, start:end, None] == self.segments[:, None, None, first:last]
            seen = seen & same
        return seen

    def _one_document(self, start: int, end: int) -> bool:
        """Whether the queries [start, end) are known to be of one document (their keys are then of it too)."""
        firsts = self.pattern.firsts
        return firsts is not None and self.rows == 1 and firsts[start] == firsts[end - 1]

    def scores(
        self, queries: mx.array, heads: tuple[int, int], chunk: tuple[int, int, int], part: tuple[int, int, bool]
    ) -> tuple[mx.array, mx.array | None]:
        """Masked scores [B, k, G·C, N] of queries [B, k, G·C, d] for a part of their keys, and the tanh of a
        soft-cap."""
        first, last, masked = part
        scores = (queries @ self.scaled_keys[:, heads[0] : heads[1], first:last].swapaxes(-1, -2)).astype(mx.float32)
        rows, count, folded, seen = scores.shape
        capped = None
        if self.pattern.softcap is not None:
            capped = mx.tanh(scores * (1 / self.pattern.softcap))
            scores = capped * self.pattern.softcap
        if not masked:
            return scores, capped
        mask = mx.where(self.allowed(first, last, *chunk[1:]), 0.0, -mx.inf)
        mask = mask[:, :, None] if mask.ndim == 4 else mask
        by_head = scores.reshape(rows, count, self.group, folded // self.group, seen)
        return (by_head + mask).reshape(scores.shape), capped

    def sink(self, heads: tuple[int, int], like: mx.array) -> mx.array | None:
        """The sinks of a slab's heads: [1, k, G·C, 1]."""
        if self.sinks is None:
            return None
        sinks = self.sinks[heads[0] * self.group : heads[1] * self.group].astype(mx.float32)
        each = mx.repeat(sinks[:, None], like.shape[2] // self.group, axis=1)
        return each.reshape(1, heads[1] - heads[0], -1, 1)

    def normalizer(
        self, scores: Sequence[mx.array], sink: mx.array | None
    ) -> tuple[list[mx.array], mx.array, mx.array]:
        """(exponentials of the scores above their maximum, their sum, logarithm of the sum of all) of each row, whose
        scores come in parts."""
        tops = [part.max(axis=-1, keepdims=True) for part in scores]
        top = reduce(mx.maximum, tops if sink is None else [*tops, sink])
        powers = [exponential(part - top) for part in scores]
        total = reduce(mx.add, [part.sum(axis=-1, keepdims=True) for part in powers])
        total = total if sink is None else total + exponential(sink - top)
        return powers, total, top + mx.log(total)


def _forward(call: _Call) -> Result:
    fused = _fused(call)
    if fused is not None:
        return fused, mx.zeros((0,))
    before: list[mx.array] = []
    slabs: list[mx.array] = []
    logs: list[mx.array] = []
    for heads in call.slabs():
        parts: list[tuple[mx.array, mx.array]] = []
        for chunk in call.chunks():
            queries = call.queries[:, heads[0] * call.group : heads[1] * call.group, chunk[1] : chunk[2]]
            queries = mx.depends(queries, before) if before else queries
            parts.append(_chunk(call, queries, heads, chunk))
            settle(*parts[-1])
            before = [parts[-1][0]]
        slabs.append(_joined([out for out, _ in parts], 2))
        logs.append(_joined([log for _, log in parts], 2))
    return _joined(slabs, 1), _joined(logs, 1)


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
        if call.segments is None and call.pattern.window is None:
            return kernel(call.queries, call.keys, call.values, "causal")
        parts: list[mx.array] = []
        for first, start, end in call.chunks():
            queries = call.queries[:, :, start:end]
            queries = mx.depends(queries, parts[-1:]) if parts else queries
            keys, values = call.keys[:, :, first:end], call.values[:, :, first:end]
            parts.append(kernel(queries, keys, values, call.allowed(first, end, start, end)))
        return _joined(parts, 2)
    except ValueError:  # no kernel
        return None


def _chunk(
    call: _Call, queries: mx.array, heads: tuple[int, int], chunk: tuple[int, int, int]
) -> tuple[mx.array, mx.array]:
    queries, parts = call.folded(queries), call.parts(chunk)
    scores = [call.scores(queries, heads, chunk, part)[0] for part in parts]
    powers, total, log = call.normalizer(scores, call.sink(heads, scores[0]))
    del scores
    values = [call.values[:, heads[0] : heads[1], first:last] for first, last, _ in parts]
    out = reduce(mx.add, [power.astype(value.dtype) @ value for power, value in zip(powers, values, strict=True)])
    return call.unfolded(out / total.astype(out.dtype)), call.unfolded(log)


def _backward(call: _Call, cotangent: mx.array, output: mx.array, logs: mx.array) -> tuple[mx.array, ...]:
    cotangent = mx.contiguous(cotangent)
    # Σ p · dp of each row, which the softmax's gradient takes away, is the product of the output and its gradient
    shares = (cotangent.astype(mx.float32) * output.astype(mx.float32)).sum(axis=-1, keepdims=True)
    before: list[mx.array] = []
    slabs = []
    for low, high in call.slabs():
        grads = _SlabGradients(call, low, high, cotangent, shares, logs if logs.size else None)
        for chunk in reversed(call.chunks()):
            before = grads.add(chunk, before)
            settle(*before)
        slabs.append(grads.joined())
    joined = [_joined([slab[index] for slab in slabs], 1) for index in range(3)]
    if call.sinks is not None:
        joined.append(mx.concatenate([slab[3] for slab in slabs]).astype(call.sinks.dtype))
    settle(*joined)
    return tuple(joined)


class _SlabGradients:
    """Gradients of one slab of key heads, gathered from the last chunk of queries to the first.

    Keys behind a chunk's end are done when the chunk is: they are set aside, and what is still open shrinks.
    """

    def __init__(
        self, call: _Call, low: int, high: int, cotangent: mx.array, shares: mx.array, logs: mx.array | None
    ) -> None:
        self._call, self._low, self._high = call, low, high
        self._cotangent, self._shares, self._logs = cotangent, shares, logs
        self._queries: list[mx.array] = []
        self._keys, self._values = _Open(), _Open()
        self._sinks: mx.array | None = None

    def add(self, chunk: tuple[int, int, int], before: list[mx.array]) -> list[mx.array]:
        """Add what the queries of `chunk` give; returns the arrays that the next chunk is to wait for."""
        call, (_, start, end) = self._call, chunk

        def mine(array: mx.array) -> mx.array:
            return call.folded(array[:, self._low * call.group : self._high * call.group, start:end])

        heads = self._low, self._high
        queries = call.queries if not before else mx.depends(call.queries, before)
        queries, slope, share = mine(queries), mine(self._cotangent), mine(self._shares)
        parts = call.parts(chunk)
        scored = [call.scores(queries, heads, chunk, part) for part in parts]
        sink = call.sink(heads, scored[0][0])
        log = call.normalizer([scores for scores, _ in scored], sink)[2] if self._logs is None else mine(self._logs)
        by_queries: list[mx.array] = []
        by_keys: list[mx.array] = []
        by_values: list[mx.array] = []
        for (low, high, _), (scores, capped) in zip(parts, scored, strict=True):
            values = call.values[:, self._low : self._high, low:high]
            chances = exponential(scores - log)
            inner = chances * ((slope @ values.swapaxes(-1, -2)).astype(mx.float32) - share)
            if capped is not None:
                inner = inner * (1 - capped * capped)
            inner, chances = inner.astype(call.dtype), chances.astype(call.dtype)
            by_queries.append(inner @ call.scaled_keys[:, self._low : self._high, low:high])
            by_keys.append(inner.swapaxes(-1, -2) @ queries)
            by_values.append(chances.swapaxes(-1, -2) @ slope)
        self._queries.append(call.unfolded(reduce(mx.add, by_queries)))
        waits = [self._queries[-1], *self._keys.add(chunk, by_keys), *self._values.add(chunk, by_values)]
        if sink is not None:
            lost = -(exponential(sink - log) * share).reshape(call.rows, -1, end - start).sum(axis=(0, 2))
            self._sinks = lost if self._sinks is None else self._sinks + lost
            waits.append(self._sinks)
        return waits

    def joined(self) -> list[mx.array]:
        """The gradients of queries, keys and values of these heads, and of their sinks."""
        found = [_joined(self._queries[::-1], 2), self._keys.joined() * self._call.scale, self._values.joined()]
        return found if self._sinks is None else [*found, self._sinks]


class _Open:
    """A sum over [.., T, d] to which parts are added from the end of T to its start.

    What is done and what is still open are arrays of their own: a slice of one would keep all of it in memory.
    """

    def __init__(self) -> None:
        self._done: list[mx.array] = []
        self._sum: mx.array | None = None  # of the keys from `_first` to the start of the part before
        self._first = 0

    def add(self, chunk: tuple[int, int, int], parts: Sequence[mx.array]) -> list[mx.array]:
        """Add what the queries of `chunk` give to its keys, in `parts` of these keys; chunks come without gaps. Returns
        what is new."""
        first, start, end = chunk
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
