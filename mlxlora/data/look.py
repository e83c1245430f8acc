"""The rows of a data set as people wrote them, looked at for what is suspicious."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mlxlora.data.chat import ChatEncoder
from mlxlora.data.config import SamplesConfig
from mlxlora.data.duplicates import Rows, shared
from mlxlora.data.findings import PLACES, Findings
from mlxlora.data.places import Place, find
from mlxlora.data.problems import Problems
from mlxlora.data.reader import Encoder, FormatReader
from mlxlora.data.records import Conversation, Record
from mlxlora.data.spans import Unusable
from mlxlora.progress import Progress
from mlxlora.tokenizer import Tokenizer

LOOKED_AT = 50  # conversations on which the template's treatment of history is tried
READING = "looking at the rows"


class Looker:
    """Reads the rows again, and notes what it finds."""

    def __init__(self, tokenizer: Tokenizer, config: SamplesConfig, findings: Findings) -> None:
        self.config = config
        self.findings = findings
        self.encoder = Encoder(tokenizer, config)
        self._tried = 0

    def look(self, data: list[str], on_progress: Progress | None) -> None:
        """Rows of all splits; validation rows are compared with training rows."""
        places = find(data, self.config.cache)
        if self.config.validation is not None:
            places["valid"] = find([self.config.validation], self.config.cache)["train"]
        done, total = 0, sum(place.size for found in places.values() for place in found)
        looked: list[Rows] = []
        for split in ("train", "valid"):
            with Rows() as rows:
                for place in places.get(split, []):
                    self._look_at_place(place, rows, _from(on_progress, done, total))
                    done += place.size
            self._look_at_copies(rows)
            looked.append(rows)
        if on_progress:
            on_progress(READING, total, total)
        self._look_at_overlap(*looked)

    def _look_at_place(self, place: Place, rows: Rows, on_bytes: Callable[[int], None] | None) -> None:
        rows.source(place.name)
        reader = FormatReader(place.name, self.config, Problems())
        for record, line in reader.records(place.rows(reader.problems, on_bytes)):
            where = f"{place.name}:{line}"
            self.findings.look(record, where)
            self._look_at_history(record, where)
            rows.add(record, line)

    def _look_at_copies(self, rows: Rows) -> None:
        copies = rows.copies()
        repeated = np.flatnonzero(copies != np.arange(len(copies)))
        self._add_all("duplicate", "is the same as", rows, repeated.tolist(), copies[repeated].tolist())
        near, others = rows.near_copies(copies)
        self._add_all("near_duplicate", "is nearly the same as", rows, near.tolist(), others.tolist())

    def _add_all(self, kind: str, like: str, rows: Rows, copies: list[int], others: list[int]) -> None:
        for copy, other in zip(copies[:PLACES], others, strict=False):
            where = rows.place(copy)
            self.findings.add(kind, f"a row {like} another ({where} {like} {rows.place(other)})", where)
        self.findings.raise_count(kind, len(copies))

    def _look_at_overlap(self, train: Rows, valid: Rows) -> None:
        said = {
            "overlap": "a validation row is also trained on ({})",
            "same_prompt": "a validation row asks what {} asks",
        }
        for kind, row, other in shared(train, valid):
            self.findings.add(kind, said[kind].format(train.place(other)), valid.place(row))

    def _look_at_history(self, record: Record, where: str) -> None:
        """Does an answer read the same as history as it did when it was the last turn?"""
        if not isinstance(record, Conversation) or self._tried >= LOOKED_AT:
            return
        said = [index for index, message in enumerate(record.messages) if message.role == "assistant"]
        if len(said) < 2:
            return
        self._tried += 1
        encoder = self.encoder.chat(tools=bool(record.tools))
        if _changes_history(encoder, record, said[0]):
            self.findings.add("history", "the template writes an answer differently once it is history", where)


def _from(on_progress: Progress | None, done: int, total: int) -> Callable[[int], None] | None:
    """Tells how far one file of several has been read."""
    return None if on_progress is None else lambda position: on_progress(READING, done + position, total)


def _changes_history(encoder: ChatEncoder, conversation: Conversation, first: int) -> bool:
    try:
        whole = encoder.finder.find(conversation)
        early = encoder.finder.find(replace(conversation, messages=conversation.messages[: first + 1]))
    except Unusable:
        return False
    if not early.turns or not whole.turns:
        return False
    end = early.turns[-1].end
    # how the turn ends may differ (<|return|> and <|end|>): that is no change of what was said
    said = encoder.finder.control.without_end(early.text[:end])
    return not whole.text.startswith(said)
