"""Who may attend to whom, and in which chunks of queries that is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx

CHUNK, SHORT = 256, 64  # queries of a chunk, where its shape decides: at most, and not fewer
PARTS = 4  # chunks of a short document: the triangle above the diagonal is saved, all but a quarter
APART = 1024  # keys that all queries of a chunk see are worth products of their own, which need no mask
HIDDEN = 1e30  # taken from a score, it leaves no probability


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
    chunk:    queries that attend at a time, at most; 0 chooses by shape
    """

    window: int | None = None
    lookback: int | None = None
    firsts: Sequence[int] | None = None
    softcap: float | None = None
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """Keys of a chunk: [first, end), of which some may be hidden from some of its queries."""

    first: int
    end: int
    masked: bool


@dataclass(frozen=True, slots=True)
class Chunk:
    """The queries [start, end), which see keys of [first, end) alone, and these in parts."""

    first: int
    start: int
    end: int
    parts: tuple[Part, ...]

    @property
    def pairs(self) -> int:
        """Scores of one head in one row."""
        return (self.end - self.start) * (self.end - self.first)


@dataclass(frozen=True, slots=True)
class Cut:
    """Rows [B, T] that attend by a pattern, as chunks.

    segments: int [B, T]; tokens of different numbers do not see each other
    room:     scores of one head in one row that may exist at a time
    keys:     of a part that needs no mask, at most
    """

    pattern: Pattern
    segments: mx.array | None
    rows: int
    length: int
    room: int
    keys: int

    def chunks(self) -> list[Chunk]:
        """All of them, in order. None reaches into two documents unless these are short."""
        found = []
        for begin, end in self._stretches():
            count = -(-(end - begin) // self._size(end - begin))
            bounds = [begin + (end - begin) * number // count for number in range(count + 1)]
            found += [self._chunk(start, stop) for start, stop in pairwise(bounds)]
        return found

    def _stretches(self) -> Iterator[tuple[int, int]]:
        """Ranges of tokens that see none before their range: documents, the shortest of them together."""
        firsts = self.pattern.firsts
        bounds = [0, *(at for at, first in enumerate(firsts or ()) if at and at == first), self.length]
        begin = 0
        for end, following in pairwise([*bounds[1:], self.length + SHORT + 1]):
            if following - begin > SHORT:
                yield begin, end
                begin = end

    def _size(self, reach: int) -> int:
        return self.pattern.chunk or max(
            SHORT // 2, min(CHUNK, self.room // min(reach, self.keys), max(SHORT, -(-reach // PARTS)))
        )

    def _chunk(self, start: int, end: int) -> Chunk:
        pattern, back = self.pattern, start
        if pattern.window is not None:
            back = min(back, pattern.window - 1)
        if pattern.firsts is not None:
            back = min(back, start - pattern.firsts[start])
        elif pattern.lookback is not None and self.segments is not None:
            back = min(back, pattern.lookback)
        return Chunk(start - back, start, end, tuple(self._parts(start - back, start, end)))

    def _parts(self, first: int, start: int, end: int) -> Iterator[Part]:
        free = first if self.pattern.window is None else max(first, end - self.pattern.window)
        if start - free < APART or not self._one_document(start, end):
            yield Part(first, end, True)
            return
        if first < free:
            yield Part(first, free, True)
        count = -(-(start - free) // self.keys)
        bounds = [free + (start - free) * number // count for number in range(count + 1)]
        yield from (Part(begin, until, False) for begin, until in pairwise(bounds))
        yield Part(start, end, True)

    def _one_document(self, start: int, end: int) -> bool:
        """Whether the queries [start, end) are known to be of one document (their keys are then of it too)."""
        if self.segments is None:
            return True
        firsts = self.pattern.firsts
        return firsts is not None and self.rows == 1 and firsts[start] == firsts[end - 1]

    def penalty(self, chunk: Chunk, part: Part, times: int = 1) -> mx.array:
        """What is added to the scores of such keys and queries, each query `times` in a row: float32, broadcasts with
        [B, 1, N, times · C]. 0 where the query sees the key."""
        query = mx.repeat(mx.arange(chunk.start - part.first, chunk.end - part.first, dtype=mx.float32), times)
        key = mx.arange(part.end - part.first, dtype=mx.float32)[:, None]
        seen = mx.minimum(query - key, 0.0)
        window = self.pattern.window
        if window is not None and chunk.end - part.first > window:
            seen = seen + mx.minimum(key + (window - 1) - query, 0.0)
        if self.segments is not None and not self._one_document(chunk.start, chunk.end):
            queries = mx.repeat(self.segments[:, chunk.start : chunk.end], times, axis=1)[:, None, None]
            keys = self.segments[:, None, part.first : part.end, None]
            seen = seen - mx.abs(queries - keys).astype(mx.float32)
        return seen * HIDDEN
