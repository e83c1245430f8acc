"""Where data lies: files, directories, ZIP archives and hub data sets, with their splits and weights."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from mlxlora.data.hub_data import HubData, find_hub_data
from mlxlora.data.json_rows import Row
from mlxlora.data.problems import Problems, reason_of
from mlxlora.data.sources import READERS
from mlxlora.data.store import Store
from mlxlora.errors import DataError, FormatError, nearest
from mlxlora.files import zip_members

PLAIN_TEXT = (".txt", ".md")
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of the datasets library
SPLITS = {
    "train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
    "test": "test", "eval": "test",
}  # fmt: skip


class Archive:
    """A ZIP archive whose members are opened one after the other: in their order, one pass over it serves them all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: Iterator[tuple[str, BinaryIO]] = iter(())

    def open(self, member: str) -> BinaryIO:
        """A member, open until the next one is. Raises FormatError."""
        for _ in range(2):
            for name, file in self._members:
                if name == member:
                    return file
            self._members = zip_members(self.path)  # it stands further up: once more from the beginning
        raise FormatError(f"{self.path}: {member} is not there any more.")


@dataclass(frozen=True)
class File:
    """One readable file: on disk, or a member of a ZIP archive.

    name: what to call it in messages
    suffix: decides the reader
    weight: how often its rows are seen in an epoch
    """

    path: Path
    name: str
    suffix: str
    member: str | None = None
    weight: float = 1.0
    archive: Archive | None = field(default=None, compare=False)

    @property
    def size(self) -> int:
        """Bytes, for progress; 0 when not known."""
        return self.path.stat().st_size if self.member is None else 0

    def identity(self, hash_of: Callable[[Path], str]) -> list[str | None]:
        """What decides the rows; `hash_of` gives the hash of a file's bytes."""
        return [hash_of(self.path), self.member, self.suffix]

    def rows(self, problems: Problems, on_bytes: Callable[[int], None] | None = None) -> Iterator[Row]:
        """Read the file row by row; `on_bytes` is told now and then how far the reader is."""
        try:
            with self._open() as file:
                for number, row in enumerate(READERS[self.suffix](file, self.name, problems)):
                    yield row
                    if on_bytes and number % 1000 == 0 and self.member is None and not file.closed:
                        on_bytes(file.tell())
        except (OSError, FormatError) as error:
            problems.add(self.name, 0, f"cannot be read: {reason_of(error)}", "Check that the file is whole.")

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        if self.archive is None or self.member is None:
            with self.path.open("rb") as file:
                yield file
        else:
            yield self.archive.open(self.member)


Place = File | HubData


def find(sources: Sequence[str | Path], cache: Path | None = None) -> dict[str, list[Place]]:
    """The places behind some sources, by split (`train`, `valid`, `test`).

    sources: paths (see `find_files`) or `hub:owner/name[@config][#revision]`, each optionally with `=WEIGHT`: how often
        its rows are seen in an epoch
    cache: the store's directory, where is kept what hub data sets there are

    Raises DataError.
    """
    found: dict[str, list[Place]] = {}
    for source in sources:
        text, weight = weighted(source)
        if text.startswith("hub:"):
            places: dict[str, list[Place]] = {}
            found_here = find_hub_data(text, Store(cache).directory / "hub", weight=weight)
            for data in found_here:
                role = SPLITS.get(data.split.split("_")[0].lower())
                if role:
                    places.setdefault(role, []).append(data)
            if "train" not in places:
                have = ", ".join(data.split for data in found_here)
                raise DataError(f"{text}: the data set has no split named train, only {have or 'none'}.")
        else:
            places = {role: [*files] for role, files in find_files(Path(text), weight=weight).items()}
        for role, items in places.items():
            found.setdefault(role, []).extend(items)
    return found


def weighted(source: str | Path) -> tuple[str, float]:
    """`PATH=2.5` as path and weight; without one the weight is 1. Raises DataError."""
    text = str(source)
    path, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not 0 < weight <= 1000:
        raise DataError(f"{text}: the weight is {number}; give more than 0, and at most 1000.")
    return path, weight


def find_files(path: Path, *, weight: float = 1.0) -> dict[str, list[File]]:
    """The files behind a path, by split (`train`, `valid`, `test`).

    A file, a ZIP archive, or a directory. Names like `train.jsonl` or `valid-00001.parquet` say the split; in a
    directory without them everything is training data. Raises DataError.
    """
    if not path.exists():
        near = _siblings(path)
        raise DataError(f"{path} does not exist.{near}")
    if path.is_dir():
        files = []
        for item in sorted(path.rglob("*")):
            inside = item.relative_to(path)
            if any(part.startswith(".") for part in inside.parts) or not item.is_file():
                continue
            if item.suffix.lower() in READERS:
                files.append(File(item, str(item), item.suffix.lower(), weight=weight))
            elif item.suffix.lower() == ".zip":
                files += _archive(item, weight)
        if not files:
            raise DataError(f"{path}: the directory holds no file that can be read ({_known()}).")
        return _by_split(files, path)
    if path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        return _by_split(_archive(path, weight), path)
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: files named *{path.suffix} are not known. Known are {_known()}.")
    return {"train": [File(path, str(path), path.suffix.lower(), weight=weight)]}


def _known() -> str:
    return ", ".join(f"*{suffix}" for suffix in [*READERS, ".zip"])


def _siblings(path: Path) -> str:
    try:
        # by what stands before the ending: that alone makes no two files alike
        alike = [item.name for item in path.parent.iterdir() if nearest(path.stem, [item.stem])]
        return nearest(path.name, alike)
    except OSError:
        return ""


def _archive(path: Path, weight: float) -> list[File]:
    """The members of a ZIP archive that can be read, once the archive is known to be harmless. Nothing is unpacked."""
    files, archive = [], Archive(path)
    for member, _ in zip_members(path):
        inside = PurePosixPath(member)
        if inside.suffix.lower() in READERS and not any(part.startswith((".", "__")) for part in inside.parts):
            files.append(File(path, f"{path}!{member}", inside.suffix.lower(), member, weight, archive))
    if not files:
        raise DataError(f"{path}: the archive holds no file that can be read ({_known()}).")
    return files


def _by_split(files: list[File], path: Path) -> dict[str, list[File]]:
    found: dict[str, list[File]] = {}
    rows = [file for file in files if file.suffix not in PLAIN_TEXT and file.path.name not in ABOUT]
    files = rows or files  # beside rows, a README is no data
    named = [file for file in files if _split_of(file)]
    for file in named or files:
        found.setdefault(_split_of(file) or "train", []).append(file)
    if "train" not in found:
        have = ", ".join(sorted(found))
        raise DataError(f"{path}: there are files for {have}, but none for training (train.jsonl, …).")
    return found


def _split_of(file: File) -> str | None:
    inside = PurePosixPath((file.member or file.path.name).replace("\\", "/"))
    for word in (inside.name, *reversed(inside.parts[:-1])):
        for part in (word.split(".")[0], word.split("-")[0].split(".")[0], word.split("_")[0].split(".")[0]):
            if part.lower() in SPLITS:
                return SPLITS[part.lower()]
    return None
