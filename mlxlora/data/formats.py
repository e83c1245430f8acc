"""A row of any known format into a record: one function a format, one table.

The format of a file is told from the keys of its first row; a file that mixes formats is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mlxlora.data.problems import kind_of
from mlxlora.data.records import (
    ROLES,
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

Row = Mapping[str, Any]


class RowError(Exception):
    """What is wrong with a row, and what to do about it."""

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.advice = advice


class Format(NamedTuple):
    """One line of the table: which keys tell the format, how a row is read, what it looks like."""

    keys: tuple[str, ...]
    read: Callable[[Row], Record]
    looks: str


def detect(row: Row) -> str | None:
    """The format of a row by its keys, or None."""
    return next((name for name, form in FORMATS.items() if all(row.get(key) is not None for key in form.keys)), None)


def known_format(name: str) -> Format:
    """The format of this name. Raises ConfigError."""
    if name not in FORMATS:
        raise ConfigError(f"format '{name}' is not known ({', '.join(FORMATS)}).{nearest(name, list(FORMATS))}")
    return FORMATS[name]


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
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


# -- messages ---------------------------------------------------------------------------------------------------------


def read_messages(row: Row) -> Conversation:
    """`messages`: role and content, as OpenAI and Hugging Face write them; `tools` beside them."""
    return Conversation(messages_of(row["messages"], "messages"), tools_of(row))


def messages_of(value: Any, field: str) -> list[Message]:
    """A list of messages. Raises RowError."""
    if not isinstance(value, list):
        raise RowError(f"'{field}' must be an array of messages, not {kind_of(value)}", _MESSAGE)
    if not value:
        raise RowError(f"'{field}' is empty", "Give at least one message, or remove the row.")
    return [message_of(item, f"{field}[{index}]") for index, item in enumerate(value)]


def message_of(item: Any, where: str) -> Message:
    """One message. Raises RowError."""
    if not isinstance(item, dict):
        raise RowError(f"{where} must be an object, not {kind_of(item)}", _MESSAGE)
    if "role" not in item:
        raise RowError(f"{where} has no 'role'.{nearest('role', list(item))}", _MESSAGE)
    role = item["role"]
    if not isinstance(role, str):
        raise RowError(f"{where}.role must be a string, not {kind_of(role)}", _MESSAGE)
    role = {"function": "tool", "ipython": "tool"}.get(role, role)
    if role not in ROLES:
        raise RowError(
            f"{where}.role is '{role}', which is not known.{nearest(role, ROLES)}",
            f"Known are {', '.join(ROLES)}; `mlxlora data convert --roles coerce` turns others into these.",
        )
    calls = tool_calls_of(item.get("tool_calls"), f"{where}.tool_calls")
    if not calls and item.get("function_call") is not None:
        calls = tool_calls_of([item["function_call"]], f"{where}.function_call")
    thinking = next((item[key] for key in ("reasoning_content", "thinking", "reasoning") if item.get(key)), None)
    if thinking is not None and not isinstance(thinking, str):
        raise RowError(f"{where}: reasoning must be a string, not {kind_of(thinking)}")
    content = content_of(item.get("content"), where, needed=not calls and thinking is None)
    return Message(
        role=role,
        content=content,
        thinking=thinking,
        tool_calls=calls,
        name=_optional_text(item, "name", where),
        tool_call_id=_optional_text(item, "tool_call_id", where),
        weight=weight_of(item, where),
    )


def content_of(value: Any, where: str, *, needed: bool) -> str:
    """The text of a message: a string, or a list of text parts. Raises RowError."""
    if isinstance(value, str):
        return value
    if value is None and not needed:
        return ""
    if value is None:
        raise RowError(f"{where}.content is missing or null", "Give its text; only tool calls may go without.")
    if isinstance(value, list):
        return "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(value))
    raise RowError(f"{where}.content must be a string, not {kind_of(value)}", _MESSAGE)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type", "an object without a type") if isinstance(part, dict) else kind_of(part)
    raise RowError(f"{where} is {kind}, not text", "Only text can be learned from; remove the part.")


def weight_of(item: Row, where: str) -> float | None:
    """`train: false` or `weight: 0.5` of a message. Raises RowError."""
    train, weight = item.get("train"), item.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"{where}.train must be true or false, not {kind_of(train)}")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float)):
        raise RowError(f"{where}.weight must be a number, not {kind_of(weight)}")
    if weight is not None and not 0 <= weight <= 100:
        raise RowError(f"{where}.weight is {weight}", "Give 0 to 100; 0 leaves the message out, 1 is usual.")
    if train is False:
        return 0.0
    return None if weight is None or not math.isfinite(weight) else float(weight)


def tool_calls_of(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's shape, arguments as an object. Raises RowError."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError(f"{where} must be an array, not {kind_of(value)}", _CALL)
    calls = []
    for index, item in enumerate(value):
        call = item.get("function", item) if isinstance(item, dict) else item
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise RowError(f"{where}[{index}] has no function name", _CALL)
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _decoded(arguments, f"{where}[{index}].arguments")
        if not isinstance(arguments, dict):
            raise RowError(f"{where}[{index}].arguments must be an object, not {kind_of(arguments)}", _CALL)
        made = {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
        calls.append(made | ({"id": item["id"]} if isinstance(item.get("id"), str) else {}))
    return calls


def _decoded(text: str, where: str) -> Any:
    try:
        return json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        raise RowError(f"{where} is a string that is not JSON", _CALL) from None


def tools_of(row: Row) -> list[dict[str, Any]] | None:
    """`tools`: JSON schemas, as an array or as JSON text. Raises RowError."""
    tools = row.get("tools", row.get("functions"))
    if isinstance(tools, str):
        tools = _decoded(tools, "tools") if tools.strip() else None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(
            "'tools' must be an array of JSON schemas", 'Like [{"type": "function", "function": {"name": …}}].'
        )
    for index, tool in enumerate(tools):
        if not isinstance(tool.get("function", tool).get("name"), str):
            raise RowError(f"tools[{index}] has no name", 'Like {"type": "function", "function": {"name": …}}.')
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


# -- the other formats ------------------------------------------------------------------------------------------------

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "call", "tool_call": "call",
}  # fmt: skip


def read_sharegpt(row: Row) -> Conversation:
    """`conversations`: from and value (or role and content under this name)."""
    turns = row.get("conversations", row.get("conversation"))
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
            call = _decoded(text, f"{where}.value")
            calls = tool_calls_of(call if isinstance(call, list) else [call], f"{where}.value")
            messages.append(Message("assistant", tool_calls=calls, weight=weight_of(turn, where)))
        else:
            messages.append(Message(role, text, weight=weight_of(turn, where)))
    return Conversation(messages, tools_of(row))


def read_alpaca(row: Row) -> Conversation:
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


def read_completion(row: Row) -> Record:
    """`prompt` and `completion`, as text or as messages."""
    return _ending(row, "completion")


def read_preference(row: Row) -> Record:
    """`chosen` and `rejected`, as text or messages, after a `prompt` or whole."""
    return Preference(_ending(row, "chosen"), _ending(row, "rejected"))


def read_judged(row: Row) -> Record:
    """KTO: `prompt`, `completion` and a `label` that is true or false."""
    label = row["label"]
    if isinstance(label, str) and label.lower() in ("true", "false"):
        label = label.lower() == "true"
    if label not in (True, False):
        raise RowError(f"'label' must be true or false, not {label!r}", "true: a good completion; false: a bad one.")
    return Judged(_ending(row, "completion"), bool(label))


def read_question(row: Row) -> Record:
    """`prompt` and `answer`, for rewards."""
    prompt = row["prompt"]
    asked = (
        _text(row, "prompt") if isinstance(prompt, str) else Conversation(messages_of(prompt, "prompt"), tools_of(row))
    )
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise RowError(f"'answer' must be a string or a number, not {kind_of(answer)}")
    return Question(asked, str(answer))


def _ending(row: Row, key: str) -> Conversation | Completion:
    """A prompt with one of its endings."""
    prompt, ending = row.get("prompt"), row[key]
    if isinstance(prompt, str) and isinstance(ending, str):
        if not ending:
            raise RowError(f"'{key}' is empty", "There is nothing to learn; remove the row.")
        return Completion(prompt, ending)
    if isinstance(ending, str) and prompt is None:
        return Completion("", ending)
    before = (
        []
        if prompt is None
        else [Message("user", prompt)]
        if isinstance(prompt, str)
        else messages_of(prompt, "prompt")
    )
    after = [Message("assistant", ending)] if isinstance(ending, str) else messages_of(ending, key)
    for message in before:
        message.weight = 0.0 if message.role == "assistant" else None
    return Conversation([*before, *after], tools_of(row))


def read_document(row: Row) -> Document:
    """`text`."""
    return Document(_text(row, "text"))


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise RowError(f"'{key}' must be a string, not {kind_of(value)}", f"Give the text of '{key}'.")
    return value


def _optional_text(item: Row, key: str, where: str) -> str | None:
    value = item.get(key)
    if value is not None and not isinstance(value, str):
        raise RowError(f"{where}.{key} must be a string, not {kind_of(value)}")
    return value


def _keys(row: Row) -> str:
    return ", ".join(repr(str(key)) for key in list(row)[:8]) or "no keys"


_MESSAGE = 'A message looks like {"role": "user", "content": "…"}.'
_CALL = 'A call looks like {"type": "function", "function": {"name": "…", "arguments": {…}}}.'
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


def unknown_format(row: Row) -> RowError:
    """What to say about a row whose keys match no format."""
    close = ""
    for form in FORMATS.values():
        for key in form.keys:
            if key not in row and not close:
                close = nearest(key, [str(name) for name in row]) and f" '{key}' is missing."
    return RowError(
        f"the keys {_keys(row)} are those of no known format.{close}",
        "Known: " + "; ".join(form.looks for form in FORMATS.values()) + ". Or map your keys with --samples.columns.",
    )
