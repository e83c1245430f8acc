"""`mlxlora data convert`: any readable data set as messages JSONL or as ShareGPT."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlxlora.commands import command
from mlxlora.data.config import SamplesConfig
from mlxlora.data.formats import SHAREGPT_ROLES
from mlxlora.data.messages import Fields, decoded_json
from mlxlora.data.places import Place, find
from mlxlora.data.problems import Problems, RowError, flags_by_themselves
from mlxlora.data.reader import FormatReader
from mlxlora.data.records import ROLES, Completion, Conversation, Message, Question, Record
from mlxlora.errors import InputError
from mlxlora.files import new_directory, new_file, refuse_unmakeable
from mlxlora.progress import Progress

Form = Literal["messages", "sharegpt"]
Roles = Literal["strict", "coerce", "drop"]

ALIASES = {
    "human": "user", "person": "user", "customer": "user", "client": "user", "question": "user", "prompter": "user",
    "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant", "agent": "assistant",
    "chatgpt": "assistant", "answer": "assistant", "instruction": "system", "context": "system",
    "function": "tool", "observation": "tool", "ipython": "tool", "function_response": "tool",
}  # fmt: skip
"""What unknown roles are taken for by `--roles coerce`; any other becomes user."""

SHAREGPT_NAMES = {"user": "human", "assistant": "gpt", "system": "system", "developer": "system", "tool": "tool"}


@dataclass(frozen=True)
class DataConversion:
    """What `mlxlora data convert` wrote.

    rows: written, all files together
    coerced, dropped: messages whose unknown role was replaced, or that were left out
    """

    out: Path
    form: str
    rows: int
    files: tuple[Path, ...]
    coerced: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        lines = [f"{self.rows:,} rows as {self.form}: {', '.join(map(str, self.files))}"]
        if self.coerced:
            lines.append(f"messages of unknown roles that were given one of {', '.join(ROLES)}: {self.coerced:,}")
        if self.dropped:
            lines.append(f"messages of unknown roles that were left out: {self.dropped:,}")
        lines += ["", f"next: {command('data check', self.out, model='DIR')}"]
        return "\n".join(lines)


def convert(
    data: list[str],
    *,
    out: Path,
    to: Form = "messages",
    roles: Roles = "strict",
    columns: dict[str, str] | None = None,
    format: str | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> DataConversion:
    """Write a data set in one format, whatever it is in.

    Args:
        data: files, directories, archives or hub data sets
        out: a file (*.jsonl: one row a line; *.json: one array), or a directory, which gets a file for each split
        to: messages (OpenAI, Hugging Face) or sharegpt
        roles: what to do with messages of unknown roles: refuse them, coerce them to a known role, or drop them
        columns: keys of your rows by ours, such as {prompt: question, completion: answer}
        format: of the rows when it cannot be told from their keys (messages, sharegpt, alpaca, completion, …)
        overwrite: replace files that exist

    Raises DataError with every row that cannot be converted (file:line); then nothing is written.
    """
    places = find(data)
    targets = _targets(places, out)
    for path in targets.values():
        refuse_unmakeable(path)
    existing = [path for path in targets.values() if path.exists()]
    if existing and not overwrite:
        raise InputError(f"{existing[0]} exists already. Choose another place, or give --overwrite.")
    config = SamplesConfig(columns=columns or {}, format=format)
    policy = _RolePolicy(roles)
    problems = Problems()
    done, total, rows = 0, sum(place.size for found in places.values() for place in found), 0
    with _written(out, targets) as files, flags_by_themselves():
        for split, file in files.items():
            for place in places[split]:
                for record in _records(place, config, policy, problems):
                    file.write(as_messages(record) if to == "messages" else as_sharegpt(record))
                    rows += 1
                done += place.size
                if on_progress:
                    on_progress("converting", done, total)
        problems.raise_any("Some rows cannot be converted:")
    return DataConversion(out, to, rows, tuple(targets.values()), policy.coerced, policy.dropped)


def _targets(places: dict[str, list[Place]], out: Path) -> dict[str, Path]:
    """The file of each split."""
    if out.suffix in (".json", ".jsonl"):
        if len(places) > 1:
            raise InputError(f"the data has the splits {', '.join(places)}; give a directory with --out, not one file.")
        return {"train": out}
    if out.suffix and not out.is_dir():
        raise InputError(f"--out {out} must end in .jsonl or .json, or be a directory.")
    return {split: out / f"{split}.jsonl" for split in places}


# -- roles ------------------------------------------------------------------------------------------------------------


TURNS = ("messages", "conversations", "conversation", "prompt", "completion")
"""Keys under which turns may stand that are written."""


@dataclass
class _RolePolicy:
    """Replaces or drops messages of unknown roles before the row is read."""

    policy: Roles
    coerced: int = 0
    dropped: int = 0

    def __call__(self, row: Fields) -> Fields:
        if self.policy == "strict":
            return row
        changed = {}
        for key in TURNS:
            turns = row.get(key)
            if isinstance(turns, str) and key in TURNS[:3] and turns.lstrip().startswith("["):
                turns = decoded_json(turns, f"'{key}'", "Write an array of turns.")
            if isinstance(turns, list):
                changed[key] = [kept for turn in turns for kept in self._turn(turn)]
        return {**row, **changed}

    def _turn(self, turn: Any) -> list[Any]:
        if not isinstance(turn, dict):
            return [turn]
        name = "from" if "from" in turn else "role"
        role = turn.get(name)
        known = SHAREGPT_ROLES if name == "from" else {*ROLES, "function", "ipython"}
        if not isinstance(role, str) or role in known:
            return [turn]
        if self.policy == "drop":
            self.dropped += 1
            return []
        self.coerced += 1
        spelled = role.strip().lower()
        new = spelled if spelled in ROLES else ALIASES.get(spelled, "user")
        return [{**turn, name: SHAREGPT_NAMES[new] if name == "from" else new}]


# -- rows -------------------------------------------------------------------------------------------------------------


def _records(place: Place, config: SamplesConfig, policy: _RolePolicy, problems: Problems) -> Iterator[Conversation]:
    reader = FormatReader(place.name, config, problems, mended=policy)
    for record, line in reader.records(place.rows(problems)):
        try:
            yield conversation_of(record)
        except RowError as error:
            problems.add(place.name, line, error.what, error.advice)
        if problems.enough:
            return


def conversation_of(record: Record) -> Conversation:
    """A record as a conversation. Raises RowError for those that are none."""
    match record:
        case Conversation():
            return record
        case Completion(prompt, completion):
            return Conversation([*_asked(prompt), Message("assistant", completion)])
        case Question(str() as prompt, answer):
            return Conversation([*_asked(prompt), Message("assistant", answer)])
        case Question(Conversation() as prompt, answer):
            return Conversation([*prompt.messages, Message("assistant", answer)], prompt.tools)
        case _:
            kind = type(record).__name__.lower()
            raise RowError(f"a {kind} row is no conversation", "Messages and ShareGPT hold conversations alone.")


def _asked(prompt: str) -> list[Message]:
    return [Message("user", prompt)] if prompt else []


def as_messages(conversation: Conversation) -> dict[str, Any]:
    """A row with `messages`, as OpenAI and Hugging Face write them."""
    messages = []
    for message in conversation.messages:
        item: dict[str, Any] = {"role": message.role, "content": message.content}
        optional = {
            "reasoning_content": message.thinking,
            "tool_calls": message.tool_calls or None,
            "name": message.name,
            "tool_call_id": message.tool_call_id,
            "weight": message.weight,
        }
        messages.append(item | {key: value for key, value in optional.items() if value is not None})
    return {"messages": messages} | ({"tools": conversation.tools} if conversation.tools else {})


def as_sharegpt(conversation: Conversation) -> dict[str, Any]:
    """A row with `conversations`; tool calls become turns of their own, reasoning stands inside the answer."""
    turns: list[dict[str, Any]] = []
    for message in conversation.messages:
        weight = {} if message.weight is None else {"weight": message.weight}
        thinking = f"<think>\n{message.thinking}\n</think>\n\n" if message.thinking else ""
        if message.content or thinking or not message.tool_calls:
            turns.append({"from": SHAREGPT_NAMES[message.role], "value": thinking + message.content, **weight})
        for call in message.tool_calls:
            turns.append({"from": "function_call", "value": json.dumps(call["function"], ensure_ascii=False), **weight})
    tools = {"tools": json.dumps(conversation.tools, ensure_ascii=False)} if conversation.tools else {}
    return {"conversations": turns, **tools}


# -- files ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _written(out: Path, targets: dict[str, Path]) -> Iterator[dict[str, _Rows]]:
    """What takes the rows of each split; the files appear at the end, or none of them does."""
    with contextlib.ExitStack() as published, contextlib.ExitStack() as written:
        places = {}
        if out in targets.values() or out.is_dir():  # what else stands in that directory stays
            for split, target in targets.items():
                places[split] = published.enter_context(new_file(target, replace=True))
        else:
            folder = published.enter_context(new_directory(out))
            places = {split: folder / target.name for split, target in targets.items()}
        yield {split: written.enter_context(_Rows(path)) for split, path in places.items()}


class _Rows:
    """A file of rows: one a line, or (*.json) an array of them."""

    def __init__(self, path: Path) -> None:
        array = path.suffix == ".json"
        begin, self._between, self._after, self._end = ("[\n", ",\n", "", "\n]\n") if array else ("", "", "\n", "")
        self._file = path.open("w", encoding="utf-8", newline="\n")
        self._file.write(begin)
        self._empty = True

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            if kind is None:
                self._file.write(self._end)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        between = "" if self._empty else self._between
        self._file.write(between + json.dumps(row, ensure_ascii=False) + self._after)
        self._empty = False
