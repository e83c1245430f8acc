"""One call of attention: its arrays slab by slab of key heads, and the scores of a chunk of queries.

    B  rows      H  query heads      K  key/value heads      G  query heads of one key head (H / K)
    T  tokens    C  queries that attend at a time            N  keys that these may see

The queries of a key head lie side by side, [B, k, T · G, d], so that those of a chunk are one matrix without being
copied, and scores lie the other way round than usual, [.., N, C · G]: a CPU adds up rows faster than within a row.

On a CPU a pass over the scores takes a fifth of the time of the product that makes them, and an exponential as long as
four. So

- keys come in parts small enough for a product's operands to stay in the cache, one part at a time;
- scores are in base 2: queries are scaled by log₂ e besides, so that an exponential has less to do;
- as long as the exponentials of bare scores fit float32, which the sums show, no maximum is sought and taken away from
  them. What they are to be divided by is divided from the rows of the product that follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import mlx.core as mx

from mlxlora.engine.device import on_cpu, settles
from mlxlora.engine.exponential import power_of_two
from mlxlora.engine.pattern import Chunk, Cut, Part, Pattern

Heads = tuple[int, int]  # a range of key heads
SCORES_AT_A_TIME = 1 << 21  # numbers in one chunk of scores: 8 MiB in float32
KEYS_AT_A_TIME = 2048  # of a part, where parts are computed one after the other
NEAR = 60.0  # between 2 to this power and its inverse, float32 holds numbers with room to spare


class Call:
    """One call of `attend`, cut into slabs of key heads and chunks of queries."""

    def __init__(
        self, primals: Sequence[mx.array], segments: mx.array | None, scale: float, pattern: Pattern, *, bare: bool
    ) -> None:
        self.queries, self.keys, self.values, *sinks = primals
        self.sinks: mx.array | None = sinks[0] if sinks else None
        rows, heads, length, self.width = self.queries.shape
        self.key_heads = self.keys.shape[1]
        self.group = heads // self.key_heads
        self.scale, self.pattern = scale, pattern
        self.bare = bare
        self.unit = math.log2(math.e) if on_cpu() else 1.0  # of scores, and of their logarithms
        self.spread = 1.0 if pattern.softcap is not None else self.unit  # what queries are scaled by besides
        keys = KEYS_AT_A_TIME if settles() else length
        self.cut = Cut(pattern, segments, rows, length, SCORES_AT_A_TIME // (rows * self.group), keys)
        self.chunks = self.cut.chunks()
        one = rows * self.group * max(chunk.pairs for chunk in self.chunks)
        self._slab = max(1, min(self.key_heads, SCORES_AT_A_TIME // one))

    def slabs(self) -> Iterator[Heads]:
        """Ranges of key heads that are computed together."""
        for start in range(0, self.key_heads, self._slab):
            yield start, min(start + self._slab, self.key_heads)

    def beside(self, array: mx.array, heads: Heads, factor: float = 1.0) -> mx.array:
        """`factor` times the heads of [B, K · G, T, d], as [B, k, T · G, d]. (The factor as an array: so a CPU is
        fast.)"""
        array = array[:, heads[0] * self.group : heads[1] * self.group]
        rows, _, length, width = array.shape
        by_group = array.reshape(rows, heads[1] - heads[0], self.group, length, width).swapaxes(2, 3)
        product = by_group * mx.full((width,), factor, array.dtype)
        return product.reshape(rows, heads[1] - heads[0], length * self.group, width)

    def scaled(self, heads: Heads) -> mx.array:
        """The queries, whose products with the keys are scores."""
        return self.beside(self.queries, heads, self.scale * self.spread)

    def dense(self, array: mx.array, heads: Heads) -> mx.array:
        """The heads of keys or values [B, K, T, d], contiguous: a single head is so already, of several a CPU makes a
        copy faster by multiplying."""
        if self.key_heads == 1:
            return mx.contiguous(array)
        return array[:, slice(*heads)] * mx.ones((array.shape[-1],), array.dtype)

    def apart(self, array: mx.array) -> mx.array:
        """[B, k, C · G, d] → [B, C, k, G, d], a view: tokens first, as models go on with them."""
        rows, heads, _, width = array.shape
        return array.reshape(rows, heads, -1, self.group, width).swapaxes(1, 2)

    def of(self, array: mx.array, chunk: Chunk) -> mx.array:
        """What of [B, k, T · G, d] belongs to a chunk's queries."""
        return array[:, :, chunk.start * self.group : chunk.end * self.group]

    def scores(self, queries: mx.array, keys: mx.array, chunk: Chunk, part: Part) -> tuple[mx.array, mx.array | None]:
        """Masked scores [B, k, N, C · G] of scaled queries [B, k, C · G, d] for a part of their keys, and the tanh of a
        soft-cap."""
        scores = (keys @ queries.swapaxes(-1, -2)).astype(mx.float32)
        capped = None
        if self.pattern.softcap is not None:
            capped = mx.tanh(scores * (1 / self.pattern.softcap))
            scores = capped * (self.pattern.softcap * self.unit)
        return (scores + self.cut.penalty(chunk, part, self.group) if part.masked else scores), capped

    def sink(self, heads: Heads, chunk: Chunk) -> mx.array | None:
        """The sinks of a slab's heads, once for each query: [1, k, 1, C · G]."""
        if self.sinks is None:
            return None
        sinks = self.sinks[heads[0] * self.group : heads[1] * self.group].astype(mx.float32) * self.unit
        return mx.tile(sinks.reshape(1, heads[1] - heads[0], 1, self.group), (1, 1, 1, chunk.end - chunk.start))

    def power(self, scores: mx.array) -> mx.array:
        """The exponential of scores."""
        return power_of_two(scores) if on_cpu() else mx.exp(scores)

    def log(self, powers: mx.array) -> mx.array:
        """Its inverse."""
        return mx.log(powers) * self.unit


def near(logs: mx.array) -> bool:
    """Whether, by the logarithms of their sums, the exponentials of bare scores will do: none is near ∞, and what
    float32 takes for 0 is less than 2^−50 of a sum. Computes them."""
    return bool((mx.abs(logs) <= NEAR).all().item())


def joined(parts: list[mx.array], axis: int) -> mx.array:
    """Arrays one after the other along an axis."""
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)


def heads_first(slabs: list[mx.array]) -> mx.array:
    """[B, T, k, G, d] of each slab → [B, H, T, d], a view."""
    whole = joined(slabs, 2)
    return whole.reshape(*whole.shape[:2], -1, whole.shape[-1]).swapaxes(1, 2)
