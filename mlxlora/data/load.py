"""From files to samples: `load` reads, tokenises and checks everything before the first step."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlxlora.data import formats
from mlxlora.data.chat import ChatEncoder, Encoded, encode_completions
from mlxlora.data.config import SamplesConfig
from mlxlora.data.dataset import Collector, Dataset
from mlxlora.data.formats import RowError
from mlxlora.data.records import Completion, Conversation, Document, Message, Record
from mlxlora.data.report import Problems
from mlxlora.data.sample import Sample
from mlxlora.data.sources import File, Row, find_files
from mlxlora.data.template import ChatTemplate
from mlxlora.data.text import TextEncoder, truncated
from mlxlora.errors import ConfigError, DataError, InputError, Problem, UnsupportedError
from mlxlora.files import read_json
from mlxlora.tokenizer import Tokenizer

CHUNK = 512  # records encoded together
Progress = Callable[[str, int, int], None]


@dataclass
class Counts:
    """What became of the rows of one split.

    rows, samples: read and kept
    truncated, dropped: longer than max_length and cut, or left out
    unlocated: left out, because their answer could not be located in the rendered template
    untrained: left out, because no token of theirs is learned
    dropped_thinking: assistant turns whose reasoning the template leaves out
    unended: samples with a turn that no token ends
    listed: `file:line` and reason of the rows left out, of the first thousand
    """

    rows: int = 0
    samples: int = 0
    truncated: int = 0
    dropped: int = 0
    unlocated: int = 0
    untrained: int = 0
    dropped_thinking: int = 0
    unended: int = 0
    listed: list[Problem] = field(default_factory=list)

    def leave_out(self, origin: str, reason: str) -> None:
        """List a row that is left out."""
        if len(self.listed) < 1000:
            self.listed.append(Problem(origin, reason))


@dataclass
class DataSplits:
    """Training, validation and test samples.

    formats: format of each file by its name
    template: fingerprint of the chat template, if one was used
    counts: what became of the rows, by split
    """

    train: Dataset
    valid: Dataset | None = None
    test: Dataset | None = None
    formats: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    counts: dict[str, Counts] = field(default_factory=dict)


def load(
    data: Path | str | Sequence[Any],
    tokenizer: Tokenizer,
    config: SamplesConfig | None = None,
    *,
    seed: int = 0,
    vocabulary_size: int | None = None,
    on_progress: Progress | None = None,
) -> DataSplits:
    """Read, tokenise and check a data set.

    data: a file, a directory or archive with train/valid/test files, or rows (dictionaries as in JSONL)
    vocabulary_size: rows of the model's embedding; samples with larger token ids are refused
    on_progress: called with (what, done, total)

    Raises DataError with every problem of the rows (file:line), before anything is written.
    """
    config = config or SamplesConfig()
    reader = Reader(tokenizer, config, vocabulary_size, on_progress)
    if isinstance(data, str | Path):
        places = find_files(Path(data))
        if config.validation is not None:
            places["valid"] = find_files(config.validation)["train"]
        splits = {name: reader.read_files(name, files) for name, files in places.items()}
    else:
        splits = {"train": reader.read_rows("train", data)}
        if config.validation is not None:
            splits["valid"] = reader.read_files("valid", find_files(config.validation)["train"])
    return reader.finish(splits, seed)


class Reader:
    """Turns rows into samples, with one tokenizer and one set of options."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: SamplesConfig,
        vocabulary_size: int | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """Prepare; the chat template is compiled when the first chat row comes."""
        self.tokenizer = tokenizer
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.on_progress = on_progress
        self.formats: dict[str, str] = {}
        self.counts: dict[str, Counts] = {}
        self.text = TextEncoder(tokenizer, config)
        self._chat: dict[str, ChatEncoder] = {}

    # -- reading ------------------------------------------------------------------------------------------------------

    def read_files(self, split: str, files: Sequence[File]) -> Dataset:
        """The samples of some files."""
        problems = Problems()
        collector = Collector()
        counts = self.counts.setdefault(split, Counts())
        ends = []
        for number, file in enumerate(files):
            collector.names.append(file.name)
            records = self._records(file.name, file.rows(problems), problems)
            self._encode(number, file.name, records, collector, counts)
            ends.append(counts.samples)
        problems.raise_any(f"{problems.count} problem{'s' * (problems.count != 1)} in the data:")
        return self._dataset(collector, split, files, ends)

    def read_rows(self, split: str, rows: Iterable[Any], name: str = "row") -> Dataset:
        """The samples of rows given from Python: dictionaries, lists of messages, texts, or records."""
        problems = Problems()
        collector = Collector([name])
        counts = self.counts.setdefault(split, Counts())
        numbered = (Row(_as_row(row), number) for number, row in enumerate(rows, 1))
        self._encode(0, name, self._records(name, numbered, problems), collector, counts)
        problems.raise_any("Some rows cannot be used:")
        return self._dataset(collector, split, [], [])

    def _records(self, name: str, rows: Iterable[Row], problems: Problems) -> Iterator[tuple[Record, int]]:
        """Records of one file; all its rows must have one format."""
        form = formats.known_format(self.config.format) if self.config.format else None
        known, first = self.config.format, 0
        for row in rows:
            try:
                value = formats.renamed(row.value, self.config.columns)
                if not self.config.format:
                    found = formats.detect(value)
                    if found is None:
                        if known is None or not all(key in value for key in formats.FORMATS[known].keys):
                            raise formats.unknown_format(value)
                        found = known
                    if known is None:
                        known, first, form = found, row.line, formats.FORMATS[found]
                    elif found != known:
                        raise RowError(
                            f"this row has the format '{found}', but line {first} has '{known}'",
                            "A file holds one format; split it into two.",
                        )
                assert form is not None
                missing = [key for key in form.keys if key not in value]
                if missing:
                    raise RowError(f"'{missing[0]}' is missing", f"A row looks like {form.looks}.")
                yield form.read(value), row.line
            except RowError as error:
                problems.add(name, row.line, error.what, error.advice)
            if problems.enough:
                return
        if known is not None:
            self.formats[name] = known
        elif not problems.count:
            problems.add(name, 0, "there are no rows in it", "Add rows, or leave the file out.")

    # -- encoding -----------------------------------------------------------------------------------------------------

    def _encode(
        self, source: int, name: str, records: Iterable[tuple[Record, int]], collector: Collector, counts: Counts
    ) -> None:
        chunk: list[tuple[Record, int]] = []
        for record in records:
            chunk.append(record)
            if len(chunk) == CHUNK:
                self._encode_chunk(source, name, chunk, collector, counts)
                chunk = []
                if self.on_progress:
                    self.on_progress(f"tokenising {name}", counts.rows, 0)
        self._encode_chunk(source, name, chunk, collector, counts)

    def _encode_chunk(
        self, source: int, name: str, chunk: list[tuple[Record, int]], collector: Collector, counts: Counts
    ) -> None:
        for (_, line), samples in zip(chunk, self._samples([record for record, _ in chunk], counts), strict=True):
            counts.rows += 1
            origin = f"{name}:{line}" if line else name
            for item in samples:
                if item.sample is None:
                    counts.unlocated += 1
                    counts.leave_out(origin, item.reason)
                    continue
                counts.dropped_thinking += item.dropped_thinking
                counts.unended += bool(item.unended)
                for sample in self._fitted(item.sample, origin, counts):
                    if not sample.weights[1:].any():
                        counts.untrained += 1
                        counts.leave_out(origin, "no token of it is learned")
                        continue
                    self._check_ids(sample, origin)
                    counts.samples += 1
                    collector.add(sample, source, line)

    def _samples(self, records: list[Record], counts: Counts) -> list[list[Encoded]]:
        """Encode records of one kind (a file holds one format)."""
        if not records:
            return []
        if isinstance(records[0], Document):
            encoded = self.text.encode([record.text for record in records if isinstance(record, Document)])
            return [[Encoded(window) for s in group for window in self._windows(s)] for group in encoded]
        if isinstance(records[0], Completion) and not self._as_chat():
            plain = [record for record in records if isinstance(record, Completion)]
            return [[item] for item in encode_completions(self.tokenizer, plain, self.config)]
        chats = [_as_conversation(record) for record in records]
        unlike = next((record for record, chat in zip(records, chats, strict=True) if chat is None), None)
        if unlike is not None:
            kind = type(unlike).__name__.lower()
            raise UnsupportedError(
                f"these rows are for another objective ({kind} rows); supervised fine-tuning wants messages, "
                "prompt/completion or text."
            )
        groups: dict[bool, list[int]] = {}
        for index, chat in enumerate(chats):
            groups.setdefault(bool(chat and chat.tools), []).append(index)
        result: list[list[Encoded]] = [[] for _ in chats]
        for tools, indices in groups.items():
            encoder = self.chat_encoder(tools=tools)
            for index, item in zip(indices, encoder.encode([c for i in indices if (c := chats[i])]), strict=True):
                result[index] = [item]
        return result

    def _windows(self, sample: Sample) -> Iterator[Sample]:
        if self.config.too_long == "split" or self.config.window is not None or self.config.stride is not None:
            return self.text.windows(sample)
        return iter([sample])

    def _fitted(self, sample: Sample, origin: str, counts: Counts) -> Iterator[Sample]:
        """The sample at a length that is allowed, or nothing."""
        if len(sample.tokens) <= self.config.max_length:
            yield sample
        elif self.config.too_long == "drop":
            counts.dropped += 1
            counts.leave_out(origin, f"{len(sample.tokens)} tokens are more than max_length {self.config.max_length}")
        else:
            counts.truncated += 1
            yield truncated(sample, self.config.max_length, self.tokenizer.bos_id)

    def _check_ids(self, sample: Sample, origin: str) -> None:
        limit = self.vocabulary_size
        if limit is not None and len(sample.tokens) and int(sample.tokens.max()) >= limit:
            number = int(sample.tokens.max())
            raise DataError(
                f"{origin}: token {number} ({self.tokenizer.token(number)!r}) is outside the model's vocabulary of "
                f"{limit:,}. The tokenizer does not belong to this model, or tokens were added to it alone."
            )

    # -- templates ----------------------------------------------------------------------------------------------------

    def _as_chat(self) -> bool:
        if self.config.prompts == "auto":
            return self.config.template is not None or bool(self.tokenizer.chat_templates)
        return self.config.prompts == "chat"

    def chat_encoder(self, *, tools: bool = False) -> ChatEncoder:
        """The encoder for conversations (with tools: some models have a template of its own for these)."""
        source = template_source(self.tokenizer, self.config, tools=tools)
        if source not in self._chat:
            date = datetime.date.fromisoformat(self.config.date)
            template = ChatTemplate(source, self.tokenizer.special_variables, date=date)
            self._chat[source] = ChatEncoder(self.tokenizer, template, self.config)
        return self._chat[source]

    # -- the end ------------------------------------------------------------------------------------------------------

    def _dataset(self, collector: Collector, split: str, files: Sequence[File], ends: Sequence[int]) -> Dataset:
        counts = self.counts[split]
        self._refuse_unusable(counts, split)
        repeats = None
        if any(file.weight != 1 for file in files):
            sizes = np.diff([0, *ends])
            repeats = np.repeat([file.weight for file in files], sizes).astype(np.float32)
        return Dataset(collector.finish(), repeats=repeats, unmasked=counts.unlocated)

    def _refuse_unusable(self, counts: Counts, split: str) -> None:
        lost = counts.unlocated + counts.untrained
        everything = counts.samples + lost
        if not counts.samples:
            problems = counts.listed or [Problem("", "every row is longer than max_length")]
            raise DataError.of(f"no sample of the {split} data can be used:", problems)
        if lost > 0.01 * everything and not self.config.allow_unusable:
            raise DataError.of(
                f"{lost} of {everything} samples of the {split} data have nothing to learn from. Correct them, "
                "or leave them out with --samples.allow_unusable:",
                counts.listed,
            )

    def finish(self, splits: dict[str, Dataset], seed: int) -> DataSplits:
        """Split off validation data where none is given."""
        train, valid = splits["train"], splits.get("valid")
        if valid is None and self.config.validation_split > 0:
            train, valid = split_validation(train, self.config.validation_split, self.config.validation_rows, seed)
        used = next(iter(self._chat.values()), None)
        return DataSplits(
            train=train,
            valid=valid,
            test=splits.get("test"),
            formats=self.formats,
            template=used.finder.template.fingerprint if used else None,
            counts=self.counts,
        )


def template_source(tokenizer: Tokenizer, config: SamplesConfig, *, tools: bool = False) -> str:
    """The chat template's source: the one asked for, else the model's own. Raises ConfigError or DataError."""
    if config.template is not None:
        return named_template(config.template)
    templates = tokenizer.chat_templates
    source = templates.get("tool_use") if tools else None
    source = source or templates.get("default")
    if source is None and templates:
        raise ConfigError(
            f"the model has several chat templates ({', '.join(templates)}) and no default. "
            "Save the one you want as a file and give it with --samples.template."
        )
    if source is None:
        raise DataError(
            "the rows are chats, but the model has no chat template. Give one with --samples.template "
            f"({', '.join(template_names())}, or a Jinja file), or train on 'text' or plain prompt/completion rows."
        )
    return source


def template_names() -> list[str]:
    """Names that `--samples.template` knows."""
    return sorted(path.stem for path in (Path(__file__).parent / "templates").glob("*.jinja"))


def named_template(name: str) -> str:
    """The source behind `--samples.template`: a known name, a Jinja file, or a model's tokenizer configuration."""
    if name in template_names():
        return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    path = Path(name)
    if path.is_dir() and (path / "chat_template.jinja").is_file():
        path = path / "chat_template.jinja"
    if not path.is_file():
        from mlxlora.errors import nearest

        known = template_names()
        raise ConfigError(f"template '{name}' is neither known ({', '.join(known)}) nor a file.{nearest(name, known)}")
    try:
        if path.suffix == ".json":
            value = read_json(path)
            source = value.get("chat_template") if isinstance(value, dict) else None
            if not isinstance(source, str):
                raise ConfigError(f"{path} holds no chat_template.")
            return source
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text.") from None


def split_validation(data: Dataset, share: float, most: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """Keep a share of the samples for validation, at random but fixed by `seed`.

    Equal samples go to the same side. Sets of fewer than ten samples are not split.
    """
    if len(data) < 10:
        return data, None
    wanted = min(most, max(1, round(len(data) * share)))
    _, group = np.unique(data.hashes, return_inverse=True)
    order = np.random.default_rng([seed & 0xFFFFFFFF, 0x5641]).permutation(int(group.max()) + 1)
    sizes = np.bincount(group)
    taken = np.cumsum(sizes[order]) <= wanted
    if not taken.any():
        taken[np.argmin(sizes[order])] = True
    chosen = np.zeros(len(sizes), bool)
    chosen[order[taken]] = True
    inside = chosen[group]
    if inside.all():
        return data, None
    return data.subset(np.flatnonzero(~inside)), data.subset(np.flatnonzero(inside))


def _as_conversation(record: Record) -> Conversation | None:
    if isinstance(record, Conversation):
        return record
    if isinstance(record, Completion):
        asked = [Message("user", record.prompt)] if record.prompt else []
        return Conversation([*asked, Message("assistant", record.completion)])
    return None


def _as_row(row: Any) -> dict[str, Any]:
    """A row given from Python: a dictionary as in JSONL, a list of messages, or a text."""
    if isinstance(row, dict):
        return row
    if isinstance(row, str):
        return {"text": row}
    if isinstance(row, list | tuple):
        return {"messages": list(row)}
    raise DataError(f"a row must be a dictionary, a list of messages or a text, not {type(row).__name__}.")
