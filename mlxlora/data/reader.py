"""Rows into samples: formats told apart, records encoded in chunks, lengths fitted, everything counted."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from mlxlora.data import formats
from mlxlora.data.chat import ChatEncoder, Encoded, encode_completions
from mlxlora.data.config import SamplesConfig
from mlxlora.data.counts import Counts
from mlxlora.data.json_rows import Row
from mlxlora.data.known_templates import template_source
from mlxlora.data.messages import Fields
from mlxlora.data.problems import Problems, RowError, flag
from mlxlora.data.records import (
    Completion,
    Conversation,
    Document,
    History,
    Judged,
    Message,
    Preference,
    Question,
    Record,
    TextRun,
)
from mlxlora.data.sample import Sample
from mlxlora.data.store import Writer
from mlxlora.data.template import ChatTemplate
from mlxlora.data.text import TextEncoder, joined, truncated
from mlxlora.errors import UnsupportedError
from mlxlora.tokenizer import Tokenizer

CHUNK = 1024  # records encoded together
CHUNK_CHARACTERS = 8_000_000  # and as much text as that at most


class FormatReader:
    """The rows of one file as records; all of them have one format."""

    def __init__(
        self,
        name: str,
        config: SamplesConfig,
        problems: Problems,
        *,
        mended: Callable[[Fields], Fields] = lambda row: row,
    ) -> None:
        """name: of the file, for messages; mended: what becomes of a row under our keys, before it is read."""
        self.name = name
        self.mended = mended
        self.config = config
        self.problems = problems
        self.format = config.format
        self._form = formats.known_format(config.format) if config.format else None
        self._first = self._strangers = 0

    def records(self, rows: Iterable[Row]) -> Iterator[tuple[Record, int]]:
        """Records and their lines; what is wrong with a row is noted among the problems."""
        for row in rows:
            try:
                yield self._record(row), row.line
            except RowError as error:
                self.problems.add(self.name, row.line, error.what, error.advice)
            if self.problems.enough:
                return
        if self.format is None and not self.problems.count:
            self.problems.add(self.name, 0, "there are no rows in it", "Add rows, or leave the file out.")

    def _record(self, row: Row) -> Record:
        value = self.mended(formats.renamed(row.value, self.config.columns))
        if not self.config.format:
            found = formats.detect(value)
            if found is None:
                # a row of the known format with a null where there should be a value says more by itself
                if self._form is None or not all(key in value for key in self._form.keys):
                    self._strangers += 1
                    raise formats.unknown_format(value, known=self._strangers == 1)
            elif self.format is None:
                self.format, self._first, self._form = found, row.line, formats.FORMATS[found]
            elif found != self.format:
                raise RowError(
                    f"this row has the format '{found}', but line {self._first} has '{self.format}'",
                    f"A file holds one format; split it into two, or say which one with {flag('format')}.",
                )
        assert self._form is not None
        missing = [key for key in self._form.keys if key not in value]
        if missing:
            raise RowError(f"'{missing[0]}' is missing", f"A row looks like {self._form.looks}.")
        return self._form.read(value)


class Encoder:
    """Records into samples, with one tokenizer and one set of options."""

    def __init__(self, tokenizer: Tokenizer, config: SamplesConfig) -> None:
        """Prepare; the chat template is compiled when the first chat row comes."""
        self.tokenizer = tokenizer
        self.config = config
        self.text = TextEncoder(tokenizer, config)
        self.chats: dict[str, ChatEncoder] = {}

    def write(
        self,
        records: Iterable[tuple[Record, int]],
        writer: Writer,
        counts: Counts,
        *,
        source: int,
        name: str,
        on_chunk: Callable[[], None] | None = None,
    ) -> None:
        """Encode the records of one file and append their samples."""
        filler = self.text.filler() if self.config.fill else None
        for chunk in _chunks(records):
            if self.config.preference == "refuse":
                _refuse_others(chunk, name)
            encoded = self.encode([record for record, _ in chunk])
            for (record, line), items in zip(chunk, encoded, strict=True):
                counts.rows += 1
                counts.rejected += isinstance(record, Judged) and not record.good
                origin = f"{name}:{line}" if line else name
                for item in items:
                    if filler is not None and isinstance(record, Document) and item.sample is not None:
                        for sample, first in filler.add(item.sample, line):
                            self._keep(sample, writer, counts, source, first, origin)
                    else:
                        self._take(item, writer, counts, source, line, origin)
            if on_chunk:
                on_chunk()
        if filler is not None:
            for sample, first in filler.rest():
                self._keep(sample, writer, counts, source, first, f"{name}:{first}")

    def _take(self, item: Encoded, writer: Writer, counts: Counts, source: int, line: int, origin: str) -> None:
        if item.sample is None:
            counts.unlocated += 1
            counts.leave_out(origin, item.reason)
            return
        counts.dropped_thinking += item.dropped_thinking
        counts.unended += bool(item.unended)
        self._keep(item.sample, writer, counts, source, line, origin)

    def _keep(self, sample: Sample, writer: Writer, counts: Counts, source: int, line: int, origin: str) -> None:
        """Append a sample at a length that is allowed, if anything of it is learned."""
        limit, least = self.config.max_length, self.config.min_length
        if not sample.weights[1:].any():
            counts.untrained += 1
            counts.leave_out(origin, "no token of it is learned")
            return
        if len(sample.tokens) < least:
            counts.short += 1
            counts.leave_out(origin, f"{len(sample.tokens)} tokens are fewer than min_length {least}")
            return
        if len(sample.tokens) > limit and self.config.too_long == "drop":
            counts.dropped += 1
            counts.leave_out(origin, f"{len(sample.tokens)} tokens are more than max_length {limit}")
            return
        if len(sample.tokens) > limit:
            counts.cut_down(origin, len(sample.tokens), limit)
            sample = truncated(sample, limit, self.tokenizer.bos_id)
        counts.samples += 1
        writer.add(sample, source, line)

    # -- by kind ------------------------------------------------------------------------------------------------------

    def encode(self, records: Sequence[Record]) -> list[list[Encoded]]:
        """The samples of each record."""
        result: list[list[Encoded]] = [[] for _ in records]
        records = [_good_ending(record) for record in records]
        documents = _those(records, Document)
        for index, group in zip(documents, self.text.encode([records[i].text for i in documents]), strict=True):  # type: ignore[union-attr]
            result[index] = [Encoded(window) for sample in group for window in self.text.fitted(sample)]
        plain = [] if self._as_chat() else _those(records, Completion)
        completions = [record for i in plain if isinstance(record := records[i], Completion)]
        for index, item in zip(plain, encode_completions(self.tokenizer, completions, self.config), strict=True):
            result[index] = [item]
        for index in _those(records, History):
            result[index] = [self._history(records[index])]  # type: ignore[arg-type]
        done = {*documents, *plain, *_those(records, History), *_those(records, Judged)}
        self._encode_chats([i for i in range(len(records)) if i not in done], records, result)
        return result

    def _encode_chats(self, indices: Sequence[int], records: Sequence[Record], result: list[list[Encoded]]) -> None:
        chats = {index: _conversation(records[index]) for index in indices}
        for tools in (False, True):
            chosen = [index for index in indices if bool(chats[index].tools) == tools]
            if chosen:
                encoded = self.chat(tools=tools).encode([chats[index] for index in chosen])
                for index, item in zip(chosen, encoded, strict=True):
                    result[index] = [item]

    def _history(self, history: History) -> Encoded:
        """Conversations and raw text in a row: encoded one by one, and put together."""
        parts = [
            self.text.run(part) if isinstance(part, TextRun) else self.encode([part])[0][0] for part in history.parts
        ]
        lost = next((part for part in parts if part.sample is None), None)
        if lost is not None:
            return lost
        return Encoded(
            joined([part.sample for part in parts if part.sample is not None]),
            dropped_thinking=sum(part.dropped_thinking for part in parts),
            unended=sum(part.unended for part in parts),
        )

    def _as_chat(self) -> bool:
        if self.config.prompts == "auto":
            return self.config.template is not None or bool(self.tokenizer.chat_templates)
        return self.config.prompts == "chat"

    def chat(self, *, tools: bool = False) -> ChatEncoder:
        """The encoder for conversations (with tools: some models have a template of its own for these)."""
        source = template_source(self.tokenizer, self.config, tools=tools)
        if source not in self.chats:
            date = datetime.date.fromisoformat(self.config.date)
            template = ChatTemplate(source, self.tokenizer.special_variables, date=date)
            self.chats[source] = ChatEncoder(self.tokenizer, template, self.config)
        return self.chats[source]


def _those(records: Sequence[Record], kind: type[Record]) -> list[int]:
    return [index for index, record in enumerate(records) if isinstance(record, kind)]


def _conversation(record: Record) -> Conversation:
    if isinstance(record, Completion):
        asked = [Message("user", record.prompt)] if record.prompt else []
        return Conversation([*asked, Message("assistant", record.completion)])
    assert isinstance(record, Conversation)
    return record


def _good_ending(record: Record) -> Record:
    """What is learned of a row for another objective; a bad ending stays `Judged`, and nothing of it is learned."""
    match record:
        case Preference(chosen, _):
            return chosen
        case Judged(inner, True):
            return inner
        case Question(str() as prompt, answer):
            return Completion(prompt, answer)
        case Question(Conversation() as prompt, answer):
            asked = [replace(message, weight=0.0) for message in prompt.messages]
            return Conversation([*asked, Message("assistant", answer)], prompt.tools)
        case _:
            return record


OTHER_OBJECTIVES = {
    "preference": (Preference, "a chosen and a rejected ending"),
    "kto": (Judged, "a label (KTO)"),
    "answer": (Question, "an answer"),
}
"""Formats that supervised fine-tuning refuses: what their rows become, and what they have."""


def _refuse_others(chunk: Sequence[tuple[Record, int]], name: str) -> None:
    """Raise UnsupportedError for rows that are for another objective."""
    for record, line in chunk:
        for kind, (other, _) in OTHER_OBJECTIVES.items():
            if isinstance(record, other):
                refuse_format(kind, f"{name}:{line}")


def refuse_format(kind: str | None, where: str) -> None:
    """Raise UnsupportedError when a format is for another objective."""
    if kind in OTHER_OBJECTIVES:
        raise UnsupportedError(
            f"{where}: rows with {OTHER_OBJECTIVES[kind][1]} are for another objective; supervised fine-tuning wants "
            "messages, prompt/completion or text. To learn the good endings alone, give --samples.preference chosen."
        )


def _chunks(records: Iterable[tuple[Record, int]]) -> Iterator[list[tuple[Record, int]]]:
    """Records in chunks of bounded size."""
    chunk: list[tuple[Record, int]] = []
    size = 0
    for item in records:
        chunk.append(item)
        size += _size(item[0])
        if len(chunk) >= CHUNK or size > CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _size(record: Record) -> int:
    """Characters, about."""
    match record:
        case Conversation(messages):
            return sum(len(message.content) + len(message.thinking or "") for message in messages)
        case Document(text):
            return len(text)
        case Completion(prompt, completion):
            return len(prompt) + len(completion)
        case Preference(chosen, rejected):
            return _size(chosen) + _size(rejected)
        case Judged(inner):
            return _size(inner)
        case Question(prompt, answer):
            return (len(prompt) if isinstance(prompt, str) else _size(prompt)) + len(answer)
        case History(parts):
            return sum(len(part.text) if isinstance(part, TextRun) else _size(part) for part in parts)
