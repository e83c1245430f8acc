"""Samples tokenised once and kept on disk, where the next run maps them into memory.

An entry is a directory of flat arrays under a key of everything that decides its content: the bytes of the data, the
tokenizer, the chat template and the options. It appears by rename, whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mlxlora.data.dataset import Tokens, sample_hash
from mlxlora.data.sample import Sample
from mlxlora.errors import DataError, InputError
from mlxlora.files import new_directory, read_json, refuse_no_directory, remove_directory, write_json

VERSION = 3  # of what an entry holds; another version is another key
KEPT_DAYS = 60  # entries that were not used for so long are removed
LEVELS = 256  # distinct loss weights
NOTES = ("files", "hub")  # what stands beside the entries: hashes of files, commits of hub data sets

COLUMNS: dict[str, npt.DTypeLike] = {
    "tokens": np.int32, "codes": np.uint8, "offsets": np.int64, "trained": np.int32, "lines": np.int64,
    "sources": np.int32, "hashes": np.uint64,
}  # fmt: skip


class Writer:
    """Appends samples to flat arrays, in files: memory stays flat however many there are."""

    def __init__(self, directory: Path, *, narrow: bool) -> None:
        """Write below `directory`. narrow: every token id is below 65,536."""
        self.directory = directory
        self.types = COLUMNS | {"tokens": np.uint16 if narrow else np.int32}
        self._files: dict[str, IO[bytes]] = {name: (directory / f"{name}.bin").open("wb") for name in self.types}
        self._levels: dict[float, int] = {0.0: 0, 1.0: 1}
        self._pending: dict[str, list[Any]] = {name: [] for name in self.types}
        self.samples = 0
        self.largest = -1
        self._end = 0
        self._put("offsets", 0)

    def add(self, sample: Sample, source: int, line: int) -> None:
        """Take one sample from line `line` of the source numbered `source`."""
        weights = sample.weights
        self._end += len(sample.tokens)
        self.samples += 1
        self.largest = max(self.largest, int(sample.tokens.max(initial=-1)))
        self._put("tokens", sample.tokens)
        self._put("codes", self._codes(weights))
        self._put("offsets", self._end)
        self._put("trained", int(np.count_nonzero(weights)))
        self._put("lines", line)
        self._put("sources", source)
        self._put("hashes", sample_hash(sample.tokens, weights))
        if self.samples % 1024 == 0:
            self._flush()

    def _put(self, name: str, value: Any) -> None:
        self._pending[name].append(value)

    def _codes(self, weights: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        if ((weights == 0) | (weights == 1)).all():
            return weights.astype(np.uint8)
        levels, inverse = np.unique(weights, return_inverse=True)
        for level in levels.tolist():
            if level not in self._levels:
                if len(self._levels) == LEVELS:
                    raise DataError(f"the data has more than {LEVELS} distinct loss weights; round them.")
                self._levels[level] = len(self._levels)
        return np.array([self._levels[level] for level in levels.tolist()], np.uint8)[inverse]

    def _flush(self) -> None:
        for name, values in self._pending.items():
            if values:
                joined = np.concatenate(values) if name in ("tokens", "codes") else np.array(values)
                self._files[name].write(np.ascontiguousarray(joined, self.types[name]).tobytes())
                values.clear()

    def close(self, about: Mapping[str, Any]) -> None:
        """Finish the arrays and write the manifest: types, levels, counts, and `about`."""
        self._flush()
        for file in self._files.values():
            file.close()
        manifest = {
            "version": VERSION,
            "samples": self.samples,
            "largest": self.largest,
            "types": {name: np.dtype(kind).name for name, kind in self.types.items()},
            "sizes": {name: (self.directory / f"{name}.bin").stat().st_size for name in self.types},
            "levels": list(self._levels),
            **about,
        }
        write_json(self.directory / "manifest.json", manifest)

    def abandon(self) -> None:
        """Close the files of an entry that will not be finished."""
        for file in self._files.values():
            file.close()


def read(directory: Path) -> tuple[Tokens, dict[str, Any]]:
    """Map an entry into memory. Raises InputError when it is not whole."""
    manifest = read_json(directory / "manifest.json")
    arrays: dict[str, Any] = {}
    for name, kind in manifest["types"].items():
        path = directory / f"{name}.bin"
        if not path.is_file() or path.stat().st_size != manifest["sizes"][name]:
            raise InputError(f"{path} is not whole.")
        empty = manifest["sizes"][name] == 0
        arrays[name] = np.zeros(0, kind) if empty else np.memmap(path, dtype=kind, mode="r")
    levels = np.array(manifest["levels"], np.float32)
    return Tokens(levels=levels, names=tuple(manifest["names"]), **arrays), manifest


class Store:
    """The directory of entries."""

    def __init__(self, directory: Path | None = None) -> None:
        """directory: default $MLXLORA_CACHE/data, or ~/.cache/mlxlora/data."""
        self.directory = directory or cache_directory() / "data"

    def find(self, key: str) -> tuple[Tokens, dict[str, Any]] | None:
        """The entry under `key`, or None; one that is damaged is removed."""
        place = self.directory / key
        if not place.is_dir():
            return None
        try:
            found = read(place)
            with suppress(OSError):
                os.utime(place)
            return found
        except (InputError, KeyError, TypeError, ValueError):
            remove_directory(place)
            return None

    def build(self, key: str | None, fill: Callable[[Path], None]) -> tuple[Tokens, dict[str, Any]]:
        """The entry under `key`; made by `fill(directory)` when there is none.

        Without a key, or where the cache cannot be written, it is made in the system's temporary directory: the
        arrays stay mapped, their files go at once.
        """
        found = self.find(key) if key else None
        if found is not None:
            return found
        target = self.directory / key if key and self._writable() else None
        if target is None:
            with tempfile.TemporaryDirectory(prefix="mlxlora-data-") as scratch:
                fill(Path(scratch))
                return read(Path(scratch))
        try:
            with new_directory(target) as place:
                fill(place)
        except InputError:
            if key and (found := self.find(key)) is not None:  # another process was faster
                return found
            raise
        made = read(target)  # before old entries go: to a clock that has just leapt ahead this one is old, too
        self._prune()
        return made

    def _writable(self) -> bool:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError:
            return False
        return os.access(self.directory, os.W_OK)

    def _prune(self) -> None:
        limit = time.time() - KEPT_DAYS * 86_400
        for entry in self.directory.iterdir():
            with suppress(OSError):
                if entry.is_dir() and entry.name not in NOTES and entry.stat().st_mtime < limit:
                    remove_directory(entry)

    # -- hashes of files, so that a large file is not read again to find out that it is the same --------------------

    def file_hash(self, path: Path) -> str:
        """SHA-256 of a file's bytes; remembered by size and modification time."""
        state = path.stat()
        seen = f"{path.resolve()}\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ino}"
        note = self.directory / "files" / f"{hashlib.sha256(seen.encode('utf-8', 'surrogatepass')).hexdigest()}.txt"
        with suppress(OSError):
            known = note.read_text(encoding="ascii")
            if len(known) == 64:
                return known
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        # a file that changed a moment ago may change again within the clock's tick
        if time.time() - state.st_mtime > 2:
            with suppress(OSError):
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(digest, encoding="ascii")
        return digest


def cache_directory() -> Path:
    """$MLXLORA_CACHE, else mlxlora below $XDG_CACHE_HOME, else ~/.cache/mlxlora.

    Raises ConfigError where the first is no directory and cannot become one.
    """
    given = os.environ.get("MLXLORA_CACHE")
    if given:
        refuse_no_directory(Path(given), "$MLXLORA_CACHE")
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlxlora"


def key_of(parts: Mapping[str, Any]) -> str:
    """A key from everything that decides an entry's content."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40]
