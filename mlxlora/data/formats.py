"""A row of any known format into a record: one function a format, one table.

The format of a file is told from the keys of its first row; a file that mixes formats is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from mlxlora.data.messages import Fields, decoded_json, message_of, messages_of, tool_calls_of, tools_of, weight_of
from mlxlora.data.problems import RowError, flag, kind_of
from mlxlora.data.records import (
    Completion,
    Conversation,
    Document,
    Judged,
    Message,
    Preference,
    Question,
    Record,
)
from mlxlora.errors import ConfigError, nearest


class Format(NamedTuple):
    """One line of the table: which keys tell the format, how a row is read, what it looks like."""

    keys: tuple[str, ...]
    read: Callable[[Fields], Record]
    looks: str


def detect(row: Fields) -> str | None:
    """The format of a row by its keys, or None."""
    return next((name for name, form in FORMATS.items() if all(row.get(key) is not None for key in form.keys)), None)


def known_format(name: str) -> Format:
    """The format of this name. Raises ConfigError."""
    if name not in FORMATS:
        raise ConfigError(f"format '{name}' is not known ({', '.join(FORMATS)}).{nearest(name, list(FORMATS))}")
    return FORMATS[name]


def renamed(row: Fields, columns: Mapping[str, str]) -> Fields:
    """The row with our keys in place of the user's. Raises RowError when a mapped key is missing."""
    if not columns:
        return row
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing and len(missing) == len(columns):
        raise RowError(
            f"the row has no '{missing[0]}'.{nearest(missing[0], [str(key) for key in row])}",
            f"columns names it; the row has {_keys(row)}.",
        )
    taken = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in taken and key not in columns}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def read_messages(row: Fields) -> Conversation:
    """`messages`: role and content, as OpenAI and Hugging Face write them; `tools` beside them."""
    return Conversation(messages_of(row["messages"], "messages"), tools_of(row))


SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "call", "tool_call": "call",
}  # fmt: skip


def read_sharegpt(row: Fields) -> Conversation:
    """`conversations`: from and value (or role and content under this name)."""
    turns = row.get("conversations", row.get("conversation"))
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = decoded_json(turns, "'conversations'", _SHAREGPT)
    if not isinstance(turns, list):
        raise RowError(f"'conversations' must be an array, not {kind_of(turns)}", _SHAREGPT)
    if not turns:
        raise RowError("'conversations' is empty", "Give at least one turn, or remove the row.")
    messages = []
    if isinstance(row.get("system"), str) and row["system"]:
        messages.append(Message("system", row["system"]))
    for index, turn in enumerate(turns):
        where = f"conversations[{index}]"
        if isinstance(turn, dict) and "role" in turn and "from" not in turn:
            messages.append(message_of(turn, where))
            continue
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
            raise RowError(f"{where} has no 'from'", _SHAREGPT)
        role = SHAREGPT_ROLES.get(turn["from"])
        if role is None:
            raise RowError(
                f"{where}.from is '{turn['from']}', which is not known.{nearest(turn['from'], list(SHAREGPT_ROLES))}",
                "Known are human, gpt, system, tool; `mlxlora data convert --roles coerce` turns others into these.",
            )
        text = turn.get("value")
        if not isinstance(text, str):
            raise RowError(f"{where}.value must be a string, not {kind_of(text)}", _SHAREGPT)
        if role == "call":
            call = decoded_json(text, f"{where}.value")
            calls = tool_calls_of(call if isinstance(call, list) else [call], f"{where}.value")
            messages.append(Message("assistant", tool_calls=calls, weight=weight_of(turn, where)))
        else:
            messages.append(Message(role, text, weight=weight_of(turn, where)))
    return Conversation(messages, tools_of(row))


def read_alpaca(row: Fields) -> Conversation:
    """`instruction`, optional `input`, `output`, optional `system` and `history`."""
    instruction, output = _text(row, "instruction"), _text(row, "output")
    extra = _text(row, "input") if row.get("input") is not None else ""
    messages = [Message("system", _text(row, "system"))] if row.get("system") else []
    for index, pair in enumerate(row.get("history") or []):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RowError(f"history[{index}] must be a pair of strings", 'Like ["question", "answer"].')
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    asked = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return Conversation([*messages, Message("user", asked), Message("assistant", output)])


def read_completion(row: Fields) -> Record:
    """`prompt` and `completion`, as text or as messages."""
    return _ending(row, "completion")


def read_preference(row: Fields) -> Record:
    """`chosen` and `rejected`, as text or messages, after a `prompt` or whole."""
    return Preference(_ending(row, "chosen"), _ending(row, "rejected"))


def read_judged(row: Fields) -> Record:
    """KTO: `prompt`, `completion` and a `label` that is true or false."""
    label = row["label"]
    if isinstance(label, str) and label.lower() in ("true", "false"):
        label = label.lower() == "true"
    if label not in (True, False):
        raise RowError(f"'label' must be true or false, not {label!r}", "true: a good completion; false: a bad one.")
    return Judged(_ending(row, "completion"), bool(label))


def read_question(row: Fields) -> Record:
    """`prompt` and `answer`, for rewards."""
    asked: Conversation | str
    if isinstance(row["prompt"], str):
        asked = row["prompt"]
    else:
        asked = Conversation(messages_of(row["prompt"], "prompt"), tools_of(row))
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise RowError(f"'answer' must be a string or a number, not {kind_of(answer)}")
    return Question(asked, str(answer))


def _ending(row: Fields, key: str) -> Conversation | Completion:
    """A prompt with one of its endings."""
    prompt, ending = row.get("prompt"), row[key]
    if isinstance(prompt, str) and isinstance(ending, str):
        if not ending:
            raise RowError(f"'{key}' is empty", "There is nothing to learn; remove the row.")
        return Completion(prompt, ending)
    if isinstance(ending, str) and prompt is None:
        return Completion("", ending)
    before = [] if prompt is None else _said(prompt, "user", "prompt")
    after = _said(ending, "assistant", key)
    for message in before:
        message.weight = 0.0 if message.role == "assistant" else None
    return Conversation([*before, *after], tools_of(row))


def _said(value: Any, role: str, key: str) -> list[Message]:
    """Text as a message of this role, or the messages that stand there."""
    return [Message(role, value)] if isinstance(value, str) else messages_of(value, key)


def read_document(row: Fields) -> Document:
    """`text`."""
    return Document(_text(row, "text"))


def _text(row: Fields, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise RowError(f"'{key}' must be a string, not {kind_of(value)}", f"Give the text of '{key}'.")
    return value


def _keys(row: Fields) -> str:
    return ", ".join(repr(str(key)) for key in list(row)[:8]) or "no keys"


_SHAREGPT = 'A turn looks like {"from": "human", "value": "…"}.'

FORMATS: dict[str, Format] = {
    "preference": Format(("chosen", "rejected"), read_preference, '{"prompt": …, "chosen": …, "rejected": …}'),
    "messages": Format(("messages",), read_messages, '{"messages": [{"role": …, "content": …}, …]}'),
    "sharegpt": Format(("conversations",), read_sharegpt, '{"conversations": [{"from": …, "value": …}, …]}'),
    "sharegpt-conversation": Format(("conversation",), read_sharegpt, '{"conversation": [{"from": …, "value": …}]}'),
    "kto": Format(("prompt", "completion", "label"), read_judged, '{"prompt": …, "completion": …, "label": true}'),
    "completion": Format(("prompt", "completion"), read_completion, '{"prompt": …, "completion": …}'),
    "answer": Format(("prompt", "answer"), read_question, '{"prompt": …, "answer": …}'),
    "alpaca": Format(("instruction", "output"), read_alpaca, '{"instruction": …, "input": …, "output": …}'),
    "text": Format(("text",), read_document, '{"text": …}'),
}


def unknown_format(row: Fields, *, known: bool = True) -> RowError:
    """What to say about a row whose keys match no format; `known`: with the formats that there are."""
    keys = [str(key) for key in row]
    close = ""
    for form in FORMATS.values():
        for key in form.keys:
            if key not in row and not close:
                close = f" '{key}' is missing." if get_close_matches(key, keys, n=1, cutoff=0.75) else ""
    asked, said = (next((key for key in keys if key.lower() in words), None) for words in (ASKED, SAID))
    mapped = f"Try {flag('columns')} '{{prompt: {asked}, completion: {said}}}'. " if asked and said else ""
    looks = "Known: " + "; ".join(form.looks for form in FORMATS.values()) + ". " if known else ""
    advice = mapped + looks + ("" if mapped else f"Map your keys with {flag('columns')}.")
    return RowError(f"the keys {_keys(row)} are those of no known format.{close}", advice.strip())


ASKED = ("prompt", "question", "query", "input", "instruction", "user", "human", "problem", "request", "source")
SAID = (
    "completion",
    "answer",
    "response",
    "output",
    "assistant",
    "reply",
    "target",
    "solution",
    "gpt",
    "bot",
    "chosen",
)
"""How others name what is asked and what is answered."""
