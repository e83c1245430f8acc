"""Rows that stand in the data more than once, word for word or nearly.

Near-duplicates are found by MinHash over runs of words: rows whose signatures agree in a whole band are compared.
(Broder, "On the resemblance and containment of documents", 1997.)
"""

from __future__ import annotations

import hashlib
import re
import zlib

import numpy as np
import numpy.typing as npt

from mlxlora.data.findings import texts_of
from mlxlora.data.records import Completion, Conversation, Record

HASHES, BANDS = 16, 4
SHINGLE = 3  # words
ALIKE = 14  # of the 16 hashes that must agree: about 0.87 of the shingles in common
COMPARED = 200_000  # rows that are compared for near-duplicates
SHORTEST = 8  # words; shorter texts are alike too easily

_random = np.random.default_rng(1997)
_FACTORS = _random.integers(1, 2**31, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_SUMMANDS = _random.integers(0, 2**31, HASHES, dtype=np.uint64)
_WORD = re.compile(r"\w+")


class Duplicates:
    """Finds copies among the rows that it is given."""

    def __init__(self) -> None:
        self._exact: dict[bytes, str] = {}
        self._bands: dict[tuple[int, bytes], int] = {}
        self._signatures: list[npt.NDArray[np.uint64]] = []
        self._places: list[str] = []

    def copy_of(self, record: Record, where: str) -> tuple[str, str] | None:
        """("duplicate" or "near_duplicate", the place of the row that it repeats), or None for a new row."""
        text = "\n".join(texts_of(record))
        key = digest(text)
        if key in self._exact:
            return "duplicate", self._exact[key]
        self._exact[key] = where
        return self._near(text, where) if len(self._places) < COMPARED else None

    def _near(self, text: str, where: str) -> tuple[str, str] | None:
        signature = minhash(text)
        if signature is None:
            return None
        number, found = len(self._places), None
        width = HASHES // BANDS
        for band in range(BANDS):
            key = (band, signature[band * width : (band + 1) * width].tobytes())
            other = self._bands.setdefault(key, number)
            if found is None and other != number and int((self._signatures[other] == signature).sum()) >= ALIKE:
                found = ("near_duplicate", self._places[other])
        self._signatures.append(signature)
        self._places.append(where)
        return found


def minhash(text: str) -> npt.NDArray[np.uint64] | None:
    """uint64 [16]: the smallest of 16 hashes over all runs of three words; None for short texts."""
    words = _WORD.findall(text.lower())
    if len(words) < SHORTEST:
        return None
    runs = {" ".join(words[i : i + SHINGLE]) for i in range(min(len(words), 2000) - SHINGLE + 1)}
    hashes = np.array([zlib.crc32(run.encode("utf-8", "surrogatepass")) for run in runs], np.uint64)
    mixed = (hashes[:, None] * _FACTORS + _SUMMANDS) & np.uint64(0xFFFFFFFF)
    return np.asarray(mixed.min(axis=0), np.uint64)


def digest(text: str) -> bytes:
    """A hash of text that is blind to case and white space."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def prompt_of(record: Record) -> str | None:
    """What is asked last in a record, with what came before; None where nothing is asked."""
    if isinstance(record, Completion):
        return record.prompt
    if isinstance(record, Conversation):
        asked = [index for index, message in enumerate(record.messages) if message.role == "user"]
        if asked:
            return "\n".join(f"{m.role}: {m.content}" for m in record.messages[: asked[-1] + 1])
    return None
