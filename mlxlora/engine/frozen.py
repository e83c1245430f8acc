"""What the frozen lower blocks make of a text, computed once.

Where only upper blocks learn, the hidden states that reach the first of them depend on the text alone and are the
same in every epoch. They are kept by content, so it does not matter in which batch, row or data set a text comes.
Each is computed by itself, at a length that depends on nothing but its own, whether it is kept or not: its numbers
are then the same to the bit in a run that starts with nothing kept, such as a resumed one.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxlora.data.sample import Batch
from mlxlora.files import free_space

LENGTHS = 64  # lengths are rounded up to multiples of this, so that few shapes are traced
ALONE = 1.25  # how much longer it takes, at most or so, to compute texts one by one rather than in batches


def pays(epochs: float, share: float) -> bool:
    """Whether it takes less time over `epochs` to compute each text once, if only a `share` of them can be kept."""
    return epochs - share * (epochs - 1) < epochs / ALONE


class FrozenStates:
    """Hidden states by text, in memory or in a file, up to a number of bytes (and half of what the disk has left)."""

    def __init__(self, compute: Callable[[mx.array], mx.array], limit: int, directory: Path | None = None) -> None:
        """`compute` turns tokens [1, T] into hidden states [1, T, hidden]; `limit` is in bytes."""
        self._compute, self._limit = compute, limit
        self._memory: dict[bytes, mx.array] = {}
        self._new: dict[bytes, tuple[mx.array, mx.array]] = {}  # on their way to the file: states, and their bytes
        self._places: dict[bytes, tuple[int, tuple[int, ...]]] = {}
        self._size = 0
        self._dtype = mx.float32
        self._file = None
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            self._limit = min(limit, free_space(directory) // 2)
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - open as long as the engine

    def close(self) -> None:
        """Forget everything."""
        self._memory.clear()
        self._new.clear()
        self._places.clear()
        if self._file is not None:
            self._file.close()

    def rows(self, batch: Batch) -> mx.array:
        """The hidden states of a batch [B, T, hidden], zero where nothing that is trained on can see.

        What is new is sent to the device, and written when the next batch comes: it is there by then, so that nobody
        waits for it.
        """
        self._write()
        tokens = np.array(batch.tokens)
        rows = []
        for number, row in enumerate(tokens):
            parts, at = [], 0
            for start, end in _texts(batch, number):
                states = self._of(row[start:end])
                if start > at:
                    parts.append(mx.zeros((start - at, states.shape[-1]), states.dtype))
                parts.append(states)
                at = end
            rows.append((parts, at))
        like = next(part for parts, _ in rows for part in parts)
        length = tokens.shape[1]
        blank = [mx.zeros((length - at, like.shape[-1]), like.dtype) for _, at in rows]
        return mx.stack([mx.concatenate([*parts, rest]) for (parts, _), rest in zip(rows, blank, strict=True)])

    def _of(self, text: npt.NDArray[np.int32]) -> mx.array:
        key = hashlib.blake2b(text.tobytes(), digest_size=16).digest()
        known = self._read(key)
        if known is not None:
            return known
        length = -(-len(text) // LENGTHS) * LENGTHS
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(text)] = text
        states = mx.contiguous(self._compute(mx.array(padded))[0, : len(text)])
        raw = states.flatten().view(mx.uint8)
        mx.async_eval(states, raw)
        if self._size + states.nbytes <= self._limit:
            self._size += states.nbytes
            if self._file is None:
                self._memory[key] = states
            else:
                self._new[key] = states, raw
        return states

    def _read(self, key: bytes) -> mx.array | None:
        if key in self._new:
            return self._new[key][0]
        if self._file is None or key not in self._places:
            return self._memory.get(key)
        offset, shape = self._places[key]
        raw = os.pread(self._file.fileno(), int(np.prod(shape)) * self._dtype.size, offset)
        return mx.array(np.frombuffer(raw, np.uint8)).view(self._dtype).reshape(shape)

    def _write(self) -> None:
        """Put what is new into the file; where the disk is full, nothing more is kept."""
        if self._file is None:
            return
        for key, (states, raw) in self._new.items():
            self._dtype = states.dtype
            try:
                offset = self._file.seek(0, os.SEEK_END)
                written = self._file.write(np.array(raw).tobytes())
            except OSError:
                written = None
            if written != states.nbytes:
                self._limit = 0
                break
            self._places[key] = (offset, states.shape)
        self._new.clear()


def _texts(batch: Batch, number: int) -> Iterator[tuple[int, int]]:
    """[start, end) of each text in a row, up to the last position that is scored: nothing behind that is seen."""
    length = batch.tokens.shape[1]
    places = np.array(batch.loss_positions)[np.array(batch.weights) != 0]
    places = places[(places >= number * length) & (places < (number + 1) * length)] - number * length
    if batch.segments is None:
        if places.size:
            yield 0, int(places.max()) + 1
        return
    segments = np.array(batch.segments)[number]
    for segment in np.unique(segments[segments >= 0]):
        inside = np.flatnonzero(segments == segment)
        scored = places[(places >= inside[0]) & (places <= inside[-1])]
        if scored.size:
            yield int(inside[0]), int(scored.max()) + 1
