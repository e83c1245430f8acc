"""Messages of a row: role, content, reasoning, tool calls and weights, in the shapes in which people write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlxlora.data.problems import RowError, flag, kind_of
from mlxlora.data.records import ROLES, Message
from mlxlora.errors import nearest

Fields = Mapping[str, Any]
"""A row, or an object inside of one, by its keys."""

_MESSAGE = 'A message looks like {"role": "user", "content": "…"}.'
_CALL = 'A call looks like {"type": "function", "function": {"name": "…", "arguments": {…}}}.'


def messages_of(value: Any, field: str) -> list[Message]:
    """A list of messages. Raises RowError."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # JSON in a text column, as tables hold it
        value = decoded_json(value, f"'{field}'", _MESSAGE)
    if not isinstance(value, list):
        raise RowError(f"'{field}' must be an array of messages, not {kind_of(value)}", _MESSAGE)
    if not value:
        raise RowError(f"'{field}' is empty", "Give at least one message, or remove the row.")
    return [message_of(item, f"{field}[{index}]") for index, item in enumerate(value)]


def message_of(item: Any, where: str) -> Message:
    """One message. Raises RowError."""
    if not isinstance(item, dict):
        raise RowError(f"{where} must be an object, not {kind_of(item)}", _MESSAGE)
    if "role" not in item and "from" in item:
        advice = f"These are turns of ShareGPT: {flag('columns')} '{{conversations: {where.partition('[')[0]}}}'."
        raise RowError(f"{where} has no 'role'", advice)
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


def weight_of(item: Fields, where: str) -> float | None:
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
    return None if weight is None else float(weight)


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
            arguments = decoded_json(arguments, f"{where}[{index}].arguments")
        if not isinstance(arguments, dict):
            raise RowError(f"{where}[{index}].arguments must be an object, not {kind_of(arguments)}", _CALL)
        made = {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
        calls.append(made | ({"id": item["id"]} if isinstance(item.get("id"), str) else {}))
    return calls


def decoded_json(text: str, where: str, advice: str = _CALL) -> Any:
    """The value of JSON text inside a row; an empty object for none. Raises RowError."""
    try:
        return json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        raise RowError(f"{where} is a string that is not JSON", advice) from None


def tools_of(row: Fields) -> list[dict[str, Any]] | None:
    """`tools`: JSON schemas, as an array or as JSON text. Raises RowError."""
    tools = row.get("tools", row.get("functions"))
    if isinstance(tools, str):
        tools = decoded_json(tools, "tools") if tools.strip() else None
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


def _optional_text(item: Fields, key: str, where: str) -> str | None:
    value = item.get(key)
    if value is not None and not isinstance(value, str):
        raise RowError(f"{where}.{key} must be a string, not {kind_of(value)}")
    return value
