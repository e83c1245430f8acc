"""From files to samples: `load` reads, tokenises and checks everything before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from mlxlora.data.config import SamplesConfig
from mlxlora.data.counts import Counts
from mlxlora.data.dataset import Dataset, Tokens
from mlxlora.data.draw import Draw
from mlxlora.data.json_rows import Row
from mlxlora.data.known_templates import named_template
from mlxlora.data.messages import message_of
from mlxlora.data.places import Place, find
from mlxlora.data.problems import Problems, RowError
from mlxlora.data.reader import Encoder, FormatReader, refuse_format
from mlxlora.data.records import Completion, Conversation, Document, History, Message, Record, TextRun
from mlxlora.data.split import split_validation
from mlxlora.data.store import Store, Writer, key_of
from mlxlora.errors import DataError
from mlxlora.progress import Progress
from mlxlora.tokenizer import Tokenizer

ELSEWHERE = (
    "preference",
    "validation",
    "validation_split",
    "validation_rows",
    "packing",
    "allow_unusable",
    "cache",
    "template",
)
"""Options that do not change how a row becomes a sample (the template's source stands in the key itself)."""


Some = TypeVar("Some")
Rows: TypeAlias = list[Any]
"""Samples given in Python, each as `from_rows` takes it."""


@dataclass
class DataSplits:
    """Training, validation and test samples.

    formats: format of each file by its name
    counts: what became of the rows, by split
    """

    train: Dataset
    valid: Dataset | None = None
    test: Dataset | None = None
    formats: dict[str, str] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)


def load(
    data: Path | str | Sequence[Any],
    tokenizer: Tokenizer,
    config: SamplesConfig | None = None,
    *,
    seed: int = 0,
    vocabulary_size: int | None = None,
    most: int | None = None,
    on_progress: Progress | None = None,
) -> DataSplits:
    """Read, tokenise and check a data set.

    data: a file, a directory or archive with train/valid/test files, or `hub:owner/name`; a list of these, each with an
        optional `=WEIGHT` (how often its rows are seen in an epoch); or a list of rows, as for `from_rows`
    vocabulary_size: rows of the model's embedding; samples with larger token ids are refused
    most: at most this many rows of each split, drawn evenly from all of them; all are read, but only these tokenised
    on_progress: called with (what, done, total), in bytes

    Raises DataError with every problem of the rows (file:line), before anything is written.
    """
    config = config or SamplesConfig()
    loader = _Loader(tokenizer, config, vocabulary_size, on_progress, most)
    sources = places_of(data)
    if sources is None:
        assert not isinstance(data, str | Path)
        splits = {"train": loader.rows("train", data)}
    else:
        places = find(sources, config.cache)
        if config.validation is not None:
            places["valid"] = find([config.validation], config.cache)["train"]
        splits = {name: loader.places(name, found) for name, found in places.items()}
    if sources is None and config.validation is not None:
        splits["valid"] = loader.places("valid", find([config.validation], config.cache)["train"])
    train, valid = splits["train"], splits.get("valid")
    if valid is None and config.validation_split > 0:
        train, valid = split_validation(train, config.validation_split, config.validation_rows, seed)
    return DataSplits(train, valid, splits.get("test"), loader.formats, loader.counts)


def from_rows(rows: Iterable[Any], tokenizer: Tokenizer, config: SamplesConfig | None = None) -> Dataset:
    """A data set from Python: any iterable, read once, with flat memory.

    A row is a dictionary as in JSONL, a list of messages, a `TextRun` or text (raw text, learned as a whole), a record
    (`Conversation`, …), or a list in which messages and `TextRun`s stand one after the other.

    >>> data = from_rows([[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]], tokenizer)
    ... # doctest: +SKIP
    >>> data.samples, data.shortest, data.longest, data.unmasked     # doctest: +SKIP
    (1, 12, 12, 0)
    """
    return _Loader(tokenizer, config or SamplesConfig(), None, None).rows("train", rows)


class _Loader:
    def __init__(
        self,
        tokenizer: Tokenizer,
        config: SamplesConfig,
        vocabulary_size: int | None,
        on_progress: Progress | None,
        most: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.most = most
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.on_progress = on_progress
        self.encoder = Encoder(tokenizer, config)
        self.store = Store(config.cache)
        self.formats: dict[str, str] = {}
        self.counts: dict[str, Counts] = {}

    def places(self, split: str, found: Sequence[Place]) -> Dataset:
        """The samples of some files."""
        names = [place.name for place in found]

        def fill(directory: Path) -> None:
            problems, counts, kinds = Problems(), Counts(), {}
            writer = self._writer(directory)
            draw = Draw(self.most) if self.most is not None else None
            try:
                done, total = 0, sum(place.size for place in found)
                for number, place in enumerate(found):
                    reader = FormatReader(place.name, self.config, problems)
                    bar = _Bar(self.on_progress, f"tokenising {split} data", done, total)
                    records = reader.records(place.rows(problems, bar.at))
                    if draw is None:
                        self.encoder.write(records, writer, counts, source=number, name=place.name, on_chunk=bar.show)
                    else:
                        draw.take(number, bar.along(records))
                    done += place.size
                    kinds[place.name] = reader.format
                    if problems.enough:
                        break
                for number, place in enumerate(found if draw is not None and not problems.count else ()):
                    assert draw is not None
                    self.encoder.write(draw.of(number), writer, counts, source=number, name=place.name)
                problems.raise_any(f"{_number(problems.count)} in the data:")
                counts.refuse_unusable(split, allow=self.config.allow_unusable)
                bar.finish()
                writer.close({"names": names, "formats": kinds, "counts": counts.as_dict()})
            finally:
                writer.abandon()

        tokens, manifest = self.store.build(self._key(found), fill)
        named = dict(zip(manifest["names"], names, strict=True))  # the same bytes may stand under another name now
        self.formats |= {named[name]: kind for name, kind in manifest["formats"].items()}
        if self.config.preference == "refuse":  # an entry may come from a run that did not
            for name, kind in self.formats.items():
                refuse_format(kind, name)
        return self._dataset(split, _renamed(tokens, names), manifest, [place.weight for place in found])

    def rows(self, split: str, rows: Iterable[Any]) -> Dataset:
        """The samples of rows given from Python."""

        def fill(directory: Path) -> None:
            problems, counts = Problems(), Counts()
            writer = self._writer(directory)
            try:
                reader = FormatReader("row", self.config, problems)
                records = _records(rows, reader, problems)
                if self.most is not None:
                    draw = Draw(self.most)
                    draw.take(0, records)
                    records = draw.of(0)
                self.encoder.write(records, writer, counts, source=0, name="row")
                problems.raise_any(f"{_number(problems.count)} in the rows:")
                counts.refuse_unusable(split, allow=self.config.allow_unusable)
                writer.close({"names": ["row"], "formats": {}, "counts": counts.as_dict()})
            finally:
                writer.abandon()

        tokens, manifest = self.store.build(None, fill)
        return self._dataset(split, tokens, manifest, [1.0])

    def _writer(self, directory: Path) -> Writer:
        return Writer(directory, narrow=self.tokenizer.vocab_size <= 65_536)

    def _key(self, found: Sequence[Place]) -> str:
        """What decides the samples."""
        contents = [place.identity(self.store.file_hash) for place in found]
        options = {name: value for name, value in asdict(self.config).items() if name not in ELSEWHERE}
        named = self.config.template
        templates = {"default": named_template(named)} if named else self.tokenizer.chat_templates
        drawn = {} if self.most is None else {"most": self.most}
        return key_of(
            {"data": contents, "tokenizer": self.tokenizer.fingerprint, "templates": templates, "options": options}
            | drawn
        )

    def _dataset(self, split: str, tokens: Tokens, manifest: dict[str, Any], weights: Sequence[float]) -> Dataset:
        counts = self.counts[split] = Counts.from_dict(manifest["counts"])
        counts.refuse_unusable(split, allow=self.config.allow_unusable)
        repeats = None
        if any(weight != 1 for weight in weights):
            repeats = np.array(weights, np.float32)[tokens.sources]
        dataset = Dataset(tokens, repeats=repeats, unmasked=counts.unlocated)
        if self.vocabulary_size is not None and manifest["largest"] >= self.vocabulary_size:
            self._refuse_ids(dataset)
        return dataset

    def _refuse_ids(self, dataset: Dataset) -> None:
        assert self.vocabulary_size is not None
        for sample in dataset:
            number = int(sample.tokens.max(initial=-1))
            if number >= self.vocabulary_size:
                raise DataError(
                    f"{sample.origin}: token {number} ({self.tokenizer.token(number)!r}) is outside the model's "
                    f"vocabulary of {self.vocabulary_size:,}. The tokenizer does not belong to this model, or tokens "
                    "were added to it alone."
                )


class _Bar:
    """Progress through one file, in bytes."""

    def __init__(self, on_progress: Progress | None, what: str, done: int, total: int) -> None:
        self.on_progress, self.what, self.done, self.total = on_progress, what, done, total
        self.position = 0

    def at(self, position: int) -> None:
        """The reader is here."""
        self.position = position

    def show(self) -> None:
        """Tell it."""
        if self.on_progress:
            self.on_progress(self.what, min(self.done + self.position, self.total), self.total)

    def along(self, items: Iterable[Some]) -> Iterator[Some]:
        """The items, told now and then."""
        for number, item in enumerate(items):
            if number % 1024 == 0:
                self.show()
            yield item

    def finish(self) -> None:
        """All is read."""
        if self.on_progress:
            self.on_progress(self.what, self.total, self.total)


def places_of(data: Path | str | Sequence[Any]) -> list[str | Path] | None:
    """The places that `data` names, or None when it holds rows."""
    if isinstance(data, str | Path):
        return [data]
    if isinstance(data, list | tuple) and data and all(isinstance(item, str | Path) for item in data):
        return list(data)
    return None


def _records(rows: Iterable[Any], reader: FormatReader, problems: Problems) -> Iterator[tuple[Record, int]]:
    """Records from Python values; dictionaries go the way of JSONL rows."""
    for number, row in enumerate(rows, 1):
        try:
            record = _as_record(row)
        except RowError as error:
            problems.add("row", number, error.what, error.advice)
            continue
        if record is None:
            yield from reader.records([Row(row, number)])
        else:
            yield record, number
        if problems.enough:
            return


def _as_record(row: Any) -> Record | None:
    """The record that a Python value stands for; None for a dictionary, which has a format. Raises RowError."""
    if isinstance(row, dict):
        return None
    if isinstance(row, Conversation | Completion | Document | History):
        return row
    if isinstance(row, str):
        return Document(row)
    if isinstance(row, TextRun):
        return History([row])
    if not isinstance(row, list | tuple):
        raise RowError(
            f"a row must be a dictionary, a list of messages or text, not {type(row).__name__}",
            'Like [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}].',
        )
    parts: list[Conversation | TextRun] = []
    for index, item in enumerate(row):
        if isinstance(item, TextRun):
            parts.append(item)
            continue
        message = item if isinstance(item, Message) else message_of(item, f"messages[{index}]")
        last = parts[-1] if parts else None
        if isinstance(last, Conversation):
            last.messages.append(message)
        else:
            parts.append(Conversation([message]))
    if not parts:
        raise RowError("the conversation is empty", "Give at least one message.")
    only = parts[0]
    return only if len(parts) == 1 and isinstance(only, Conversation) else History(parts)


def _renamed(tokens: Tokens, names: Sequence[str]) -> Tokens:
    return replace(tokens, names=tuple(names))


def _number(count: int) -> str:
    return "1 problem" if count == 1 else f"{count} problems"
