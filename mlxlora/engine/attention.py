"""Attention whose memory grows with the number of tokens, not with its square.

    B  rows      H  query heads      K  key/value heads      G  query heads of one key head (H / K)
    T  tokens    C  queries that attend at a time            N  keys that these may see

out = softmax(scale · q kᵀ) v under a causal mask, with a sliding window, attention sinks, soft-capped scores and
packed documents as mlx-lm's models ask for them. MLX keeps the T × T probabilities of every head for the backward
pass; here they are made again from q and k, C rows at a time, so nothing of size T × T exists. A chunk needs no key
behind it, none before its window, and, in packed rows, none before the documents it belongs to: a causal mask costs
half of the full square, packed rows a small part. (FlashAttention's idea, https://arxiv.org/abs/2205.14135, in MLX's
own operations: the same code runs on Metal, CUDA and CPUs.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

SCORES_AT_A_TIME = 1 << 22  # numbers in one chunk of scores: 16 MiB in float32
CHUNK = 256


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
    softcap:  scores become softcap · tanh(score / softcap)
    chunk:    queries that attend at a time; 0 chooses by shape
    """

    window: int | None = None
    lookback: int | None = None
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
    result: mx.array | None = None,
) -> mx.array:
    """Attention of queries [B, H, T, d] over keys [B, K, T, d] and values [B, K, T, e]: [B, H, T, e].

    sinks:    [H], one more score in each softmax that takes probability and gives nothing
    segments: int [B, T]; tokens of different numbers do not see each other
    result:   what this call gave in an earlier forward pass, to be taken instead of computed again
    """

    # integers have no gradient, so the segments are no argument of the function that has one
    @mx.custom_function
    def attention(queries: mx.array, keys: mx.array, values: mx.array, sinks: mx.array | None = None) -> mx.array:
        return _forward(_Call(queries, keys, values, sinks, segments, scale, pattern)) if result is None else result

    @attention.vjp
    def backward(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
        queries, keys, values, *rest = primals
        call = _Call(queries, keys, values, rest[0] if rest else None, segments, scale, pattern)
        return _backward(call, cotangent, output)

    value: Any = attention(queries, keys, values) if sinks is None else attention(queries, keys, values, sinks)
    out: mx.array = value
    return out


def on_cpu() -> bool:
    """Whether MLX computes on a CPU, where no kernel is fused and products are BLAS calls."""
    return bool(mx.default_device().type == mx.cpu)


class _Call:
    """One call of `attend`, cut into slabs of key heads and chunks of queries."""

    def __init__(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        sinks: mx.array | None,
        segments: mx.array | None,
        scale: float,
        pattern: Pattern,
    ) -> None:
        self.rows, self.heads, self.length, self.width = queries.shape
        self.key_heads = keys.shape[1]
        self.group = self.heads // self.key_heads
        self.scale, self.pattern, self.segments = scale, pattern, segments
        self.dtype = queries.dtype
        self.queries, self.keys, self.values, self.sinks = queries, keys, values, sinks
        self.chunk = min(self.length, pattern.chunk or self._chunk())
        one = self.rows * self.group * self.chunk * self.length
        self.slab = max(1, min(self.key_heads, SCORES_AT_A_TIME // one))

    def _chunk(self) -> int:
        """A quarter of the queries in a short row (the triangle above the diagonal is saved), fewer where rows are
        long."""
        room = SCORES_AT_A_TIME // (self.rows * self.group * self.length)
        return max(32, min(CHUNK, room, -(-self.length // 4)) // 16 * 16)

    def slabs(self) -> Iterator[tuple[int, int]]:
        """Ranges of key heads that are computed together."""
        for start in range(0, self.key_heads, self.slab):
            yield start, min(start + self.slab, self.key_heads)

    def chunks(self) -> list[tuple[int, int, int]]:
        """(first key, first query, end of both) of each chunk."""
        found = []
        for start in range(0, self.length, self.chunk):
            back = [start]
            if self.pattern.window is not None:
                back.append(self.pattern.window - 1)
            if self.pattern.lookback is not None and self.segments is not None:
                back.append(self.pattern.lookback)
            found.append((start - min(back), start, min(start + self.chunk, self.length)))
        return found

    def folded(self, queries: mx.array) -> mx.array:
        """[B, k·G, C, d] → [B, k, G·C, d]: the heads of a group are more rows of one product."""
        rows, heads, length, width = queries.shape
        return queries.reshape(rows, heads // self.group, self.group * length, width)

    def unfolded(self, folded: mx.array) -> mx.array:
        """The inverse of `folded`."""
        rows, heads, length, width = folded.shape
        return folded.reshape(rows, heads * self.group, length // self.group, width)

    def allowed(self, first: int, start: int, end: int) -> mx.array:
        """Which of the keys [first, end) the queries [start, end) may see: bool, broadcasts with [B, 1, C, N]."""
        query, key = mx.arange(start, end)[:, None], mx.arange(first, end)[None]
        seen = query >= key
        window = self.pattern.window
        if window is not None and end - first > window:
            seen = seen & (query < key + window)
        if self.segments is not None:
            same = self.segments[:, None, start:end, None] == self.segments[:, None, None, first:end]
            seen = seen & same
        return seen

    def probabilities(
        self, queries: mx.array, keys: mx.array, head: int, chunk: tuple[int, int, int]
    ) -> tuple[mx.array, mx.array | None, mx.array | None]:
        """softmax [B, k, G·C, N] of folded queries, the capped scores (with a soft-cap), and the sinks' probability."""
        scores = (queries * self.scale) @ keys.swapaxes(-1, -2)
        rows, heads, folded, seen = scores.shape
        capped = None
        if self.pattern.softcap is not None:
            capped = mx.tanh(scores.astype(mx.float32) / self.pattern.softcap)
            scores = (capped * self.pattern.softcap).astype(scores.dtype)
        by_head = scores.reshape(rows, heads, self.group, folded // self.group, seen)
        mask = self.allowed(*chunk)
        mask = mask[:, :, None] if mask.ndim == 4 else mask
        by_head = mx.where(mask, by_head, mx.array(-mx.inf, scores.dtype))
        if self.sinks is None:
            return mx.softmax(by_head, axis=-1, precise=True).reshape(scores.shape), capped, None
        sinks = self.sinks[head * self.group : (head + heads) * self.group].astype(mx.float32)
        sinks = sinks.reshape(1, heads, self.group, 1, 1)
        wide = by_head.astype(mx.float32)
        top = mx.stop_gradient(mx.maximum(wide.max(axis=-1, keepdims=True), sinks))
        wide, sunk = mx.exp(wide - top), mx.exp(sinks - top)
        total = wide.sum(axis=-1, keepdims=True) + sunk
        return (wide / total).astype(scores.dtype).reshape(scores.shape), capped, sunk / total


def _forward(call: _Call) -> mx.array:
    plain = call.segments is None and call.pattern.window is None and call.pattern.softcap is None
    if plain and not on_cpu():  # one fused kernel does it all
        out: mx.array = mx.fast.scaled_dot_product_attention(
            call.queries, call.keys, call.values, scale=call.scale, mask="causal", sinks=call.sinks
        )
        return out
    fused = not on_cpu() and call.pattern.softcap is None
    one = _fused_chunk if fused else _plain_chunk
    before: list[mx.array] = []
    slabs = []
    for low, high in call.slabs() if not fused else [(0, call.key_heads)]:
        parts = []
        for chunk in call.chunks():
            queries = call.queries[:, low * call.group : high * call.group, chunk[1] : chunk[2]]
            queries = mx.depends(queries, before) if before else queries
            parts.append(one(call, queries, (low, high), chunk))
            before = [parts[-1]]
        slabs.append(_joined(parts, 2))
    return _joined(slabs, 1)


def _plain_chunk(call: _Call, queries: mx.array, heads: tuple[int, int], chunk: tuple[int, int, int]) -> mx.array:
    keys = call.keys[:, heads[0] : heads[1], chunk[0] : chunk[2]]
    values = call.values[:, heads[0] : heads[1], chunk[0] : chunk[2]]
    chances, _, _ = call.probabilities(call.folded(queries), keys, heads[0], chunk)
    return call.unfolded(chances @ values)


def _fused_chunk(call: _Call, queries: mx.array, heads: tuple[int, int], chunk: tuple[int, int, int]) -> mx.array:
    keys, values = call.keys[:, :, chunk[0] : chunk[2]], call.values[:, :, chunk[0] : chunk[2]]
    out: mx.array = mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=call.scale, mask=call.allowed(*chunk), sinks=call.sinks
    )
    return out


def _backward(call: _Call, cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
    # Σ p · dp of each row, which the softmax's gradient takes away, is the product of the output and its gradient
    shares = (cotangent.astype(mx.float32) * output.astype(mx.float32)).sum(axis=-1, keepdims=True)
    before: list[mx.array] = []
    slabs = []
    for low, high in call.slabs():
        grads = _SlabGradients(call, low, high)
        for chunk in reversed(call.chunks()):
            before = grads.add(chunk, cotangent, shares, before)
        slabs.append(grads.joined())
    joined = [_joined([slab[index] for slab in slabs], 1) for index in range(3)]
    if call.sinks is not None:
        joined.append(mx.concatenate([slab[3] for slab in slabs]).astype(call.sinks.dtype))
    return tuple(joined)


class _SlabGradients:
    """Gradients of one slab of key heads, gathered from the last chunk of queries to the first.

    Keys behind a chunk's end are done when the chunk is: they are set aside, and what is still open shrinks.
    """

    def __init__(self, call: _Call, low: int, high: int) -> None:
        self._call, self._low, self._high = call, low, high
        self._queries: list[mx.array] = []
        self._keys, self._values = _Open(), _Open()
        self._sinks: mx.array | None = None

    def add(
        self, chunk: tuple[int, int, int], cotangent: mx.array, shares: mx.array, before: list[mx.array]
    ) -> list[mx.array]:
        """Add what the queries of `chunk` give; returns the arrays that the next chunk is to wait for."""
        call, (first, start, end) = self._call, chunk
        of_heads = slice(self._low * call.group, self._high * call.group)
        queries = call.queries[:, of_heads, start:end]
        queries = mx.depends(queries, before) if before else queries
        queries, slope = call.folded(queries), call.folded(cotangent[:, of_heads, start:end])
        keys = call.keys[:, self._low : self._high, first:end]
        values = call.values[:, self._low : self._high, first:end]
        chances, capped, sunk = call.probabilities(queries, keys, self._low, chunk)
        share = call.folded(shares[:, of_heads, start:end])
        scores = chances.astype(mx.float32) * ((slope @ values.swapaxes(-1, -2)).astype(mx.float32) - share)
        if capped is not None:
            scores = scores * (1 - capped * capped)
        scores = (scores * call.scale).astype(call.dtype)
        self._queries.append(call.unfolded(scores @ keys))
        open_keys = self._keys.add(first, end, scores.swapaxes(-1, -2) @ queries)
        open_values = self._values.add(first, end, chances.swapaxes(-1, -2) @ slope)
        waits = [self._queries[-1], open_keys, open_values]
        if sunk is not None:
            lost = -(sunk * share.reshape(sunk.shape)).sum(axis=(0, 3, 4)).flatten()
            self._sinks = lost if self._sinks is None else self._sinks + lost
            waits.append(self._sinks)
        return waits

    def joined(self) -> list[mx.array]:
        """The gradients of queries, keys and values of these heads, and of their sinks."""
        found = [_joined(self._queries[::-1], 2), self._keys.joined(), self._values.joined()]
        return found if self._sinks is None else [*found, self._sinks]


class _Open:
    """A sum over [.., T, d] to which parts are added from the end of T to its start."""

    def __init__(self) -> None:
        self._done: list[mx.array] = []
        self._sum: mx.array | None = None
        self._first = self._end = 0

    def add(self, first: int, end: int, part: mx.array) -> mx.array:
        """Add `part` at [first, end); later parts end no later and begin no later."""
        if self._sum is None:
            self._sum, self._first, self._end = part, first, end
            return part
        if self._end > end:
            cut = max(end, self._first)
            self._done.append(self._sum[..., cut - self._first :, :])
            self._sum = self._sum[..., : cut - self._first, :]
        shared = self._sum.shape[-2]
        fresh = part.shape[-2] - shared
        total = part[..., fresh:, :] + self._sum if shared else None
        pieces = [part[..., :fresh, :]] if fresh else []
        self._sum = _joined([*pieces, *([] if total is None else [total])], -2)
        self._first, self._end = first, end
        return self._sum

    def joined(self) -> mx.array:
        assert self._sum is not None
        return _joined([self._sum, *self._done[::-1]], -2)


def _joined(parts: list[mx.array], axis: int) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)


Attention = Callable[..., mx.array]
