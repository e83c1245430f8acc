"""Rows that stand in the data more than once, word for word or nearly, and rows that train and validation share.

Near-duplicates are found by MinHash over runs of words: rows whose signatures agree in a whole band are compared.
(Broder, "On the resemblance and containment of documents", 1997.) All rows are compared; a row takes 28 bytes of memory
while the data is read, and 64 bytes on the disk.

N  rows of a split
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import zlib
from collections.abc import Iterator
from typing import IO

import numpy as np
import numpy.typing as npt

from mlxlora.data.findings import conversations_of, texts_of
from mlxlora.data.records import Completion, Conversation, Record

HASHES, BANDS = 16, 4
WIDTH = HASHES // BANDS
_ORDER = (1, 0x9E3779B1, 0xC2B2AE3D27D4EB4F)  # what the words of a run are multiplied with: their order counts
SHINGLE = len(_ORDER)  # words of a run
ALIKE = 14  # of the 16 hashes that must agree: about 0.87 of the shingles in common
SHORTEST = 8  # words; shorter texts are alike too easily
LONGEST = 2000  # words that are looked at
CHUNK = 4096  # rows that are kept as Python values before they become arrays

LongArray = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint32]

_random = np.random.default_rng(1997)
_FACTORS = _random.integers(1, 2**31, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_SUMMANDS = _random.integers(0, 2**31, HASHES, dtype=np.uint64)
_MIX = _random.integers(1, 2**63, WIDTH, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_WORD = re.compile(r"\w+")


class Rows:
    """What is remembered of the rows of one split; complete at the end of its `with` block.

    whole:  uint64 [N]: a hash of all text
    asked:  uint64 [N]: a hash of what is asked; 0 where nothing is
    places: int64 [N, 2]: the number of the source, and the line in it
    """

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="mlxlora-rows-")  # noqa: SIM115 - closed by `__exit__`
        self._pending: list[tuple[int, int, int, int]] = []
        self._signatures: list[Signatures] = []
        self._parts: list[npt.NDArray[np.uint64]] = []
        self._names: list[str] = []

    def source(self, name: str) -> None:
        """What is added from now on comes from there."""
        self._names.append(name)

    def add(self, record: Record, line: int) -> None:
        """Remember a row."""
        text = all_of(record)
        prompt = prompt_of(record)
        asked = digest(prompt) if prompt else 0
        self._pending.append((digest(text), asked, len(self._names) - 1, line))
        self._signatures.append(minhash(text))
        if len(self._pending) == CHUNK:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._parts.append(np.array(self._pending, np.uint64))
            self._file.write(np.stack(self._signatures).tobytes())
            self._pending.clear()
            self._signatures.clear()

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        """All rows are there: make the arrays."""
        with self._file:
            self._close()

    def _close(self) -> None:
        self._flush()
        self._file.flush()
        table = np.concatenate([np.zeros((0, 4), np.uint64), *self._parts])
        self._parts.clear()
        self.whole, self.asked = table[:, 0].copy(), table[:, 1].copy()
        self.places = table[:, 2:].astype(np.int64)
        shape = (len(table), HASHES)
        self.signatures: Signatures = (
            np.memmap(self._file, np.uint32, "r", shape=shape) if len(table) else np.zeros(shape, np.uint32)
        )

    def place(self, row: int) -> str:
        """`file:line` of a row."""
        source, line = self.places[row].tolist()
        return f"{self._names[source]}:{line}"

    # -- copies within the split --------------------------------------------------------------------------------------

    def copies(self) -> LongArray:
        """int64 [N]: the first row with the same text; a row that is no copy names itself."""
        return _first_with(self.whole)

    def near_copies(self, copies: LongArray) -> tuple[LongArray, LongArray]:
        """Rows that nearly repeat an earlier one, and that one, for rows that are no copies word for word."""
        own = np.flatnonzero(copies == np.arange(len(copies)))
        own = own[self.signatures[own, 0] > 0]  # short texts have none
        found = np.full(len(own), -1, np.int64)
        for band in range(BANDS):
            for others in _earlier_with(self._band(own, band)):
                for part in _pieces(np.flatnonzero((found < 0) & (others != np.arange(len(own))))):
                    alike = self.signatures[own[part]] == self.signatures[own[others[part]]]
                    same = part[alike.sum(axis=1) >= ALIKE]
                    found[same] = others[same]
        hits = np.flatnonzero(found >= 0)
        return own[hits], own[found[hits]]

    def _band(self, rows: LongArray, band: int) -> Hashes:
        """One number for the hashes of a band, row by row."""
        columns = slice(band * WIDTH, (band + 1) * WIDTH)
        parts = [(self.signatures[part, columns].astype(np.uint64) * _MIX).sum(axis=1) for part in _pieces(rows)]
        return np.concatenate([np.zeros(0, np.uint64), *parts])


def shared(train: Rows, valid: Rows) -> Iterator[tuple[str, int, int]]:
    """("overlap" or "same_prompt", row of `valid`, row of `train`) for validation rows that training sees, too."""
    whole = _found_in(train.whole, valid.whole)
    asked = _found_in(train.asked, valid.asked)
    for row in np.flatnonzero((whole >= 0) | ((asked >= 0) & (valid.asked > 0))).tolist():
        if whole[row] >= 0:
            yield "overlap", row, int(whole[row])
        else:
            yield "same_prompt", row, int(asked[row])


def _pieces(rows: LongArray) -> Iterator[LongArray]:
    return (rows[begin : begin + CHUNK] for begin in range(0, len(rows), CHUNK))


def _first_with(keys: Hashes) -> LongArray:
    """int64 [N]: for each key, where the same stands first."""
    order = np.argsort(keys, kind="stable")
    begins = _groups(keys[order])
    first = np.empty(len(keys), np.int64)
    first[order] = order[np.flatnonzero(begins)[np.cumsum(begins) - 1]] if len(keys) else order
    return first


def _earlier_with(keys: Hashes) -> tuple[LongArray, LongArray]:
    """int64 [N], twice: where the same key stands first, and where it stands last before; else the key's own place."""
    order = np.argsort(keys, kind="stable")
    before = np.concatenate([order[:1], order[:-1]])
    last = np.empty(len(keys), np.int64)
    last[order] = np.where(_groups(keys[order]), order, before)
    return _first_with(keys), last


def _groups(ordered: Hashes) -> npt.NDArray[np.bool_]:
    """Where a new key begins in sorted keys."""
    return np.concatenate([np.ones(min(1, len(ordered)), bool), ordered[1:] != ordered[:-1]])


def _found_in(known: Hashes, wanted: Hashes) -> LongArray:
    """int64: where each wanted key stands first among the known ones, or -1."""
    order = np.argsort(known, kind="stable")
    places = np.searchsorted(known[order], wanted)
    inside = places < len(known)
    found = np.full(len(wanted), -1, np.int64)
    candidates = order[places[inside]]
    found[inside] = np.where(known[candidates] == wanted[inside], candidates, -1)
    return found


# -- one row ----------------------------------------------------------------------------------------------------------

_NONE = np.zeros(HASHES, np.uint32)


def minhash(text: str) -> Signatures:
    """uint32 [16]: the smallest of 16 hashes over all runs of three words, at least 1; zeros for short texts."""
    words = _WORD.findall(text.lower())[:LONGEST]
    if len(words) < SHORTEST:
        return _NONE
    numbers = np.fromiter((zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words), np.uint64, len(words))
    count = len(numbers) - SHINGLE + 1
    runs = np.zeros(count, np.uint64)
    for place, factor in enumerate(_ORDER):
        runs += numbers[place : place + count] * np.uint64(factor)
    runs ^= runs >> np.uint64(29)
    runs = (runs * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(32)
    mixed = (runs[:, None] * _FACTORS + _SUMMANDS) & np.uint64(0xFFFFFFFF)
    return np.asarray(np.maximum(mixed.min(axis=0), 1), np.uint32)


def digest(text: str) -> int:
    """A 64-bit hash of text that is blind to case and white space; never 0."""
    plain = " ".join(text.lower().split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "little") or 1


def all_of(record: Record) -> str:
    """What a record says, the calls of tools included."""
    calls = [
        json.dumps(call["function"], sort_keys=True)
        for conversation in conversations_of(record)
        for message in conversation.messages
        for call in message.tool_calls
    ]
    return "\n".join([*texts_of(record), *calls])


def prompt_of(record: Record) -> str | None:
    """What is asked last in a record, with what came before; None where nothing is asked."""
    if isinstance(record, Completion):
        return record.prompt
    if isinstance(record, Conversation):
        asked = [index for index, message in enumerate(record.messages) if message.role == "user"]
        if asked:
            return "\n".join(f"{m.role}: {m.content}" for m in record.messages[: asked[-1] + 1])
    return None
