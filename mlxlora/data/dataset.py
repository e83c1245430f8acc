"""Samples in flat arrays, in memory or mapped from disk; a row is read when it is asked for.

N  samples          T  tokens of one sample
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mlxlora.data.sample import Sample

IntArray = npt.NDArray[np.int32]
Some = TypeVar("Some", bound=np.generic)


@dataclass(frozen=True)
class Tokens:
    """The flat arrays behind a data set.

    tokens:  all tokens, sample after sample (uint16 where the vocabulary allows it, else int32)
    codes:   uint8, as long as `tokens`: which of `levels` is the loss weight of each token
    levels:  float32: the distinct loss weights
    offsets: int64 [N + 1]: where each sample begins
    trained: int32 [N]: tokens with a weight
    lines:   int64 [N]: line of each sample in its source
    sources: int32 [N]: which of `names` that is
    names:   names of the sources
    hashes:  uint64 [N]: a hash of tokens and weights, to find duplicates
    """

    tokens: npt.NDArray[np.uint16] | IntArray
    codes: npt.NDArray[np.uint8]
    levels: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.int64]
    trained: IntArray
    lines: npt.NDArray[np.int64]
    sources: IntArray
    hashes: npt.NDArray[np.uint64]
    names: tuple[str, ...]


class Dataset(Sequence[Sample]):
    """Samples with their lengths and counts.

    >>> dataset[0].tokens, dataset.lengths.max(), dataset.origin(0)     # doctest: +SKIP
    """

    def __init__(
        self,
        tokens: Tokens,
        index: npt.NDArray[np.int64] | None = None,
        *,
        repeats: npt.NDArray[np.float32] | None = None,
        unmasked: int = 0,
    ) -> None:
        """A view of `tokens`: all samples, or those numbered by `index`.

        repeats: float32 [N] or None: how often each sample is seen in an epoch (weighted sources)
        unmasked: rows whose answer could not be located, and which are left out
        """
        self._tokens = tokens
        self._index = index
        self.repeats = repeats
        self.unmasked = unmasked

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self._tokens.offsets) - 1 if self._index is None else len(self._index)

    def __getitem__(self, position: int) -> Sample:  # type: ignore[override]
        """The sample at `position`."""
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        row = self._row(position % len(self))
        begin, end = int(self._tokens.offsets[row]), int(self._tokens.offsets[row + 1])
        return Sample(
            np.asarray(self._tokens.tokens[begin:end], np.int32),
            self._tokens.levels[self._tokens.codes[begin:end]],
            self.origin(position),
        )

    def __iter__(self) -> Iterator[Sample]:
        """All samples in order."""
        return (self[position] for position in range(len(self)))

    def _row(self, position: int) -> int:
        return position if self._index is None else int(self._index[position])

    def _pick(self, values: npt.NDArray[Some]) -> npt.NDArray[Some]:
        return np.asarray(values) if self._index is None else np.asarray(values[self._index])

    @cached_property
    def lengths(self) -> IntArray:
        """int32 [N]: tokens of each sample."""
        return self._pick(np.diff(self._tokens.offsets)).astype(np.int32)

    @cached_property
    def trained(self) -> IntArray:
        """int32 [N]: tokens of each sample that carry a loss weight."""
        return self._pick(self._tokens.trained).astype(np.int32)

    @cached_property
    def hashes(self) -> npt.NDArray[np.uint64]:
        """uint64 [N]: equal for samples with the same tokens and weights."""
        return self._pick(self._tokens.hashes).astype(np.uint64)

    @property
    def heads(self) -> IntArray:
        """int32 [N, 2]: the first two tokens of each sample; -1 where there is none."""
        begins, ends = self._pick(self._tokens.offsets[:-1]), self._pick(self._tokens.offsets[1:])
        found = np.full((len(begins), 2), -1, np.int32)
        for place in range(2):
            there = begins + place < ends
            found[there, place] = self._tokens.tokens[begins[there] + place]
        return found

    def origin(self, position: int) -> str:
        """`file:line` of a sample."""
        row = self._row(position)
        name = self._tokens.names[int(self._tokens.sources[row])]
        line = int(self._tokens.lines[row])
        return f"{name}:{line}" if line > 0 else name

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over tokens, weights, order and repeats of all samples."""
        digest = hashlib.sha256(np.ascontiguousarray(self.hashes).tobytes())
        digest.update(np.ascontiguousarray(self.lengths).tobytes())
        if self.repeats is not None:
            digest.update(np.ascontiguousarray(self.repeats).tobytes())
        return digest.hexdigest()

    @property
    def samples(self) -> int:
        """How many samples there are (LM-Kit: SampleCount)."""
        return len(self)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest sample, 0 for an empty data set."""
        return int(self.lengths.min(initial=2**31 - 1)) if len(self) else 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sample, 0 for an empty data set."""
        return int(self.lengths.max(initial=0))

    def subset(self, positions: npt.NDArray[np.int64] | Sequence[int]) -> Dataset:
        """A view of some samples, in the given order."""
        chosen = np.asarray(positions, np.int64)
        rows = chosen if self._index is None else self._index[chosen]
        repeats = None if self.repeats is None else self.repeats[chosen]
        return Dataset(self._tokens, rows, repeats=repeats, unmasked=self.unmasked)


def sample_hash(tokens: IntArray, weights: npt.NDArray[np.float32]) -> int:
    """A 64-bit hash of a sample."""
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=8)
    digest.update(weights.tobytes())
    return int.from_bytes(digest.digest(), "little")
