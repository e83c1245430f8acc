"""Data sets of the Hugging Face hub, at one commit: what was fetched and tokenised once needs no network again.

A name stands for the commit that the hub has now. Commits and their splits are written down, so that without a way to
the hub a name stands for the commit that it stood for last.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora import hub
from mlxlora.data.json_rows import Row
from mlxlora.data.problems import Problems, reason_of
from mlxlora.errors import DataError, InputError
from mlxlora.files import read_json, write_json

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubSource:
    """What `hub:NAME[@CONFIG][#REVISION]` names: a data set, or a directory that the `datasets` library reads."""

    text: str
    path: str
    config: str | None
    revision: str | None

    @classmethod
    def of(cls, text: str) -> HubSource:
        """Read it. Raises DataError."""
        whole, _, revision = text.removeprefix("hub:").partition("#")
        path, _, config = whole.partition("@")
        source = cls(text, path, config or None, revision or None)
        if source.local and revision:
            raise DataError(f"{text}: a directory has no revisions.")
        if not source.local and not hub.is_name(path):
            raise DataError(f"{text}: neither a directory nor a name on the hub, such as hub:owner/name.")
        return source

    @property
    def local(self) -> bool:
        """Whether it is a directory on this machine."""
        return bool(self.path) and Path(self.path).is_dir()


class Notes:
    """What is known of one data set.

    commits: what a branch or tag stood for last ("" is the main branch)
    splits:  of each commit
    files:   where the rows of `commit:split` lie on this machine
    """

    def __init__(self, directory: Path, source: HubSource) -> None:
        key = hashlib.sha256(f"{source.path}\0{source.config}".encode("utf-8", "surrogatepass")).hexdigest()
        self._path = directory / f"{key}.json"
        self.commits: dict[str, str] = {}
        self.splits: dict[str, list[str]] = {}
        self.files: dict[str, list[str]] = {}
        with suppress(InputError, KeyError, TypeError, ValueError, AttributeError):
            kept = read_json(self._path)
            self.commits = {str(name): str(commit) for name, commit in kept["commits"].items()}
            self.splits = {str(commit): [str(name) for name in names] for commit, names in kept["splits"].items()}
            self.files = {str(split): [str(file) for file in files] for split, files in kept["files"].items()}

    def commit(self, source: HubSource) -> str:
        """The commit that is meant: as the hub says, or as it said last. Raises DataError."""
        found = self._complete(source.revision) or hub.dataset_commit(source.path, source.revision)
        found = found or self.commits.get(source.revision or "")
        if found is None:
            raise DataError(f"{source.text}: the hub cannot be reached, and no earlier run has fetched this data set.")
        return found

    def _complete(self, revision: str | None) -> str | None:
        """The whole commit that begins with `revision`: it stands for nothing else, so there is nothing to ask."""
        if revision is None or not re.fullmatch(r"[0-9a-f]{7,40}", revision):
            return None
        found = [commit for commit in self.splits if commit.startswith(revision)]
        return found[0] if len(found) == 1 else None

    def write(self) -> None:
        """Keep it, where that can be done."""
        with suppress(OSError, InputError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, {"commits": self.commits, "splits": self.splits, "files": self.files})


@dataclass(frozen=True)
class HubData:
    """One split of a data set at one commit.

    commit: of the hub; for a directory, a hash of its files
    """

    source: HubSource
    commit: str
    split: str
    notes: Notes
    weight: float = 1.0
    size: int = 0

    @property
    def name(self) -> str:
        """What to call it in messages: the commit is told, where it decides what the rows are."""
        at = "" if self.source.local else f"#{self.commit[:12]}"
        return f"{self.source.text.partition('#')[0]}{at}:{self.split}"

    def identity(self, _: Callable[[Path], str]) -> list[str | None]:
        """What decides the rows."""
        return ["hub", "" if self.source.local else self.source.path, self.source.config, self.commit, self.split]

    def rows(self, problems: Problems, on_bytes: Callable[[int], None] | None = None) -> Iterator[Row]:
        """The rows; a data set of the hub is fetched first, into the hub's own cache, where it is not yet there."""
        number = 0
        try:
            for part in self._parts():
                for value in part:
                    number += 1
                    yield Row({str(key): item for key, item in value.items() if item is not None}, number)
        except (OSError, ValueError) as error:
            problems.add(self.name, 0, f"cannot be read: {reason_of(error)}", "Fetch the data set again.")

    def _parts(self) -> list[Any]:
        if self.source.local:
            return [_tried(self.source, "load_dataset", split=self.split, streaming=True)]
        known = self.notes.files.get(f"{self.commit}:{self.split}", [])
        if known and all(Path(file).is_file() for file in known):
            from datasets import Dataset

            return [Dataset.from_file(file) for file in known]
        data = _tried(self.source, "load_dataset", split=self.split, revision=self.commit)
        files = [str(file["filename"]) for file in data.cache_files]
        self._check_commit(files)
        self.notes.files[f"{self.commit}:{self.split}"] = files
        self.notes.write()
        return [data]

    def _check_commit(self, files: list[str]) -> None:
        """Without a network the library takes any version that it finds."""
        for file in files:
            found = _COMMIT.search(file)
            if found and found.group() != self.commit:
                raise DataError(
                    f"{self.name}: the hub cannot be reached, and here the data set is at another commit: "
                    f"give hub:{self.source.path}#{found.group()} to take that one."
                )


def find_hub_data(text: str, notes: Path, *, weight: float = 1.0) -> list[HubData]:
    """The splits of a data set. notes: directory in which what is found out is kept.

    Raises DataError.
    """
    source = HubSource.of(text)
    known = Notes(notes, source)
    if source.local:
        commit = _hash_of(Path(source.path))
        splits = _splits(source)
    else:
        commit = known.commit(source)
        if commit not in known.splits:
            known.splits[commit] = _splits(source, revision=commit)
        splits = known.splits[commit]
        known.commits[source.revision or ""] = commit
        known.write()
    return [HubData(source, commit, split, known, weight) for split in splits]


def _splits(source: HubSource, **options: Any) -> list[str]:
    return [str(name) for name in _tried(source, "get_dataset_split_names", **options)]


def _tried(source: HubSource, function: str, **options: Any) -> Any:
    """Call a function of the `datasets` library. Raises DataError."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source.text}: data sets of the hub need the datasets library: `pip install 'mlxlora[datasets]'`."
        ) from None
    try:
        return getattr(datasets, function)(source.path, source.config, **options)
    except Exception as error:  # the library raises whatever its parts raise
        reason = " ".join(reason_of(error).split("\n")[:2])
        raise DataError(f"{source.text}: the data set cannot be opened: {reason}") from None


def _hash_of(directory: Path) -> str:
    """A hash of all files of a directory and their names."""
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(directory)).encode("utf-8", "surrogateescape") + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
