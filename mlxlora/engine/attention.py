"""Attention whose memory grows with the number of tokens, not with its square.

out = softmax(scale · q kᵀ) v under a causal mask, with a sliding window, attention sinks, soft-capped scores and
packed documents as mlx-lm's models ask for them. MLX keeps the T × T probabilities of every head for the backward
pass; here they are made again from q and k, C rows at a time, so nothing of size T × T exists. A chunk needs no key
behind it, none before its window, and, in packed rows, none before the documents it belongs to: a causal mask costs
half of the full square, packed rows a small part. (FlashAttention's idea, https://arxiv.org/abs/2205.14135, in MLX's
own operations: the same code runs on Metal, CUDA and CPUs. Forward, MLX's fused kernel does it where there is one.)
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxlora.engine.attention_call import Call, Heads, heads_first, joined, near
from mlxlora.engine.attention_gradients import gradients
from mlxlora.engine.device import aside, on_cpu, settle, settles, settles_at_once
from mlxlora.engine.pattern import Chunk, Part, Pattern

Result = tuple[mx.array, mx.array]
Softmax = tuple[mx.array, mx.array, mx.array]  # weighted values, sum of the weights, logarithm of the sum as it was
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
        return _forward(Call(primals, segments, scale, pattern, bare=settles_at_once())) if result is None else result

    @attention.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        # (asked of the known logarithms: those among the outputs would have all that they are made from computed here)
        bare = result is not None and settles() and near(result[1])
        call = Call(primals, segments, scale, pattern, bare=bare)
        return aside(gradients, call, cotangents[0], *outputs)

    both: Any = attention(queries, keys, values, *([] if sinks is None else [sinks]))
    out: mx.array = both[0].astype(narrow)
    return out, (both[0], both[1])


def _forward(call: Call) -> Result:
    fused = _fused(call)
    if fused is not None:
        return fused, mx.zeros((0,))
    before: list[mx.array] = []
    outs: list[mx.array] = []
    logs: list[mx.array] = []
    for heads in call.slabs():
        slab = _Slab(call, heads)
        found: list[Result] = []
        for chunk in call.chunks:
            found.append(slab.result(chunk, before))
            settle(*found[-1])
            before = [found[-1][0]]
        outs.append(joined([out for out, _ in found], 1))
        logs.append(joined([log for _, log in found], -1))
    return heads_first(outs), joined(logs, 1)


class _Slab:
    """Some key heads, and the result of their chunks."""

    def __init__(self, call: Call, heads: Heads) -> None:
        self._call, self._heads = call, heads
        self._queries = call.scaled(heads)
        self._keys, self._values = call.dense(call.keys, heads), call.dense(call.values, heads)
        settle(self._queries, self._keys, self._values)

    def result(self, chunk: Chunk, before: list[mx.array]) -> Result:
        """Of a chunk of queries, when `before` has been computed: their outputs [B, C, k, G, e], their logarithms."""
        call = self._call
        queries = mx.depends(self._queries, before) if before else self._queries
        queries, sink = call.of(queries, chunk), call.sink(self._heads, chunk)
        found = self._bare(queries, sink, chunk) if call.bare else None
        weighted, total, log = found or self._held(queries, sink, chunk)
        return call.apart(weighted) / call.apart(total.swapaxes(-1, -2)).astype(weighted.dtype), log

    def _bare(self, queries: mx.array, sink: mx.array | None, chunk: Chunk) -> Softmax | None:
        """With the exponentials of scores as they are; None where these are too large or too small for that."""
        call = self._call
        total = None if sink is None else call.power(sink)
        weighted: mx.array | None = None
        for part in chunk.parts:
            powers = call.power(self._scores(queries, chunk, part))
            settle(powers)
            weighted, total = _plus(weighted, self._weighted(powers, part)), _plus(total, _sum(powers))
            del powers
            settle(weighted, total)
        assert weighted is not None and total is not None
        log = call.log(total)
        call.bare = near(log)
        return (weighted, total, log) if call.bare else None

    def _held(self, queries: mx.array, sink: mx.array | None, chunk: Chunk) -> Softmax:
        """With scores held against the highest so far, as softmax is computed usually."""
        call, top = self._call, sink
        total = None if sink is None else mx.ones_like(sink)
        weighted: mx.array | None = None
        for part in chunk.parts:
            scores = self._scores(queries, chunk, part)
            highest = scores.max(axis=-2, keepdims=True)
            if top is not None:
                highest = mx.maximum(highest, top)
                shrunk = call.power(top - highest)
                total = None if total is None else total * shrunk
                weighted = None if weighted is None else weighted * shrunk.swapaxes(-1, -2).astype(weighted.dtype)
            top = highest
            powers = call.power(scores - top)
            del scores
            weighted, total = _plus(weighted, self._weighted(powers, part)), _plus(total, _sum(powers))
            del powers
            settle(weighted, total, top)
        assert weighted is not None and total is not None and top is not None
        return weighted, total, top + call.log(total)

    def _scores(self, queries: mx.array, chunk: Chunk, part: Part) -> mx.array:
        return self._call.scores(queries, self._keys[:, :, part.first : part.end], chunk, part)[0]

    def _weighted(self, powers: mx.array, part: Part) -> mx.array:
        """The sum of a part's values, each as often as its query's power says."""
        return powers.swapaxes(-1, -2).astype(self._values.dtype) @ self._values[:, :, part.first : part.end]


def _plus(known: mx.array | None, more: mx.array) -> mx.array:
    return more if known is None else known + more


def _sum(powers: mx.array) -> mx.array:
    return powers.sum(axis=-2, keepdims=True)


def _fused(call: Call) -> mx.array | None:
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
        return joined(parts, 2)
    except ValueError:  # no kernel
        return None
