"""JSON rows: one value of a line, or the elements of an array that may be larger than memory.

Stricter than Python's own reader: a key twice in one object, NaN, and half a surrogate pair are refused.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NamedTuple, TextIO

from mlxlora.data.problems import Problems, kind_of, reason_of

LONGEST_LINE = 32 * 1024 * 1024  # bytes of one row


class Row(NamedTuple):
    """One row and its line (or number, counted from 1)."""

    value: dict[str, Any]
    line: int


BAD = object()
ROW_ADVICE = 'A row looks like {"messages": [{"role": "user", "content": "…"}, …]}.'


class _Refused(ValueError):
    pass


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"the key '{twice}' stands twice in one object")
    return value


def _constant(text: str) -> Any:
    raise _Refused(f"{text} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)


def parse_json(text: str, name: str, number: int, problems: Problems) -> Any:
    """One JSON value, or `BAD` after noting why not: syntax, duplicate keys, NaN, half a surrogate pair, nesting."""
    try:
        value = _DECODER.decode(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except _Refused as error:
        problems.add(
            name, number, str(error), "Keep one of them." if "twice" in str(error) else "Write null or a number."
        )
    except json.JSONDecodeError as error:
        advice = "The file may have been cut off." if error.pos >= len(text) - 1 else "Write one JSON object a line."
        where = (
            f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno} of the row"
        )
        problems.add(name, number, f"not valid JSON at {where}: {reason_of(error.msg)}", advice)
    except UnicodeEncodeError:
        problems.add(name, number, "a \\u escape is half of a surrogate pair", "Write the character itself, as UTF-8.")
    except RecursionError:
        problems.add(name, number, "nested too deeply", "Rows are a few levels deep.")
    except ValueError as error:
        problems.add(name, number, f"not valid JSON: {reason_of(error)}", "Write one JSON object a line.")
    return BAD


def read_json(file: BinaryIO, name: str, problems: Problems) -> Iterator[Row]:
    """A JSON array of objects, read element by element. An object that holds one such array is accepted too."""
    with decoded(file) as decoded_file:
        yield from _array_rows(_Window(decoded_file), name, problems)


@contextmanager
def decoded(file: BinaryIO) -> Iterator[TextIO]:
    """The file as UTF-8 text, a byte order mark left out; the file itself stays open."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        yield text
    finally:
        with suppress(ValueError):  # closed already
            text.detach()


def _array_rows(text: _Window, name: str, problems: Problems) -> Iterator[Row]:
    try:
        first = text.peek()
        if first == "{":
            yield from _object_rows(text, name, problems)
            return
        if first != "[":
            what = "the file is empty" if not first else f"expected a JSON array, found {first!r}"
            problems.add(
                name, 1, what, "Write [ row, row, … ], or name the file *.jsonl when it has one object a line."
            )
            return
        text.take(1)
        number = 0
        while text.peek() not in ("]", ""):
            number += 1
            line = text.line
            value = text.value(_DECODER)
            if isinstance(value, dict):
                yield Row(value, line)
            else:
                problems.add(name, line, f"element {number} must be an object, not {kind_of(value)}", ROW_ADVICE)
            separator = text.peek()
            if separator == ",":
                text.take(1)
            elif separator != "]":
                raise json.JSONDecodeError("expected , or ]", "", 0)
        if text.peek() == "":
            problems.add(name, text.line, "the array is not closed", "The file may have been cut off.")
    except _Refused as error:
        problems.add(name, text.line, str(error), "Keep one of them.")
    except json.JSONDecodeError as error:
        problems.add(name, text.line, f"not valid JSON: {reason_of(error.msg)}", "The file may have been cut off.")
    except UnicodeDecodeError:
        problems.add(name, text.line, "the file is not UTF-8 text", "Save it as UTF-8.")
    except UnicodeEncodeError:
        problems.add(
            name, text.line, "a \\u escape is half of a surrogate pair", "Write the character itself, as UTF-8."
        )
    except RecursionError:
        problems.add(name, text.line, "nested too deeply", "Rows are a few levels deep.")
    except ValueError as error:
        problems.add(name, text.line, f"not valid JSON: {reason_of(error)}", "Write [ row, row, … ].")


def _object_rows(text: _Window, name: str, problems: Problems) -> Iterator[Row]:
    """An object in a .json file: a data set under one key ({"data": [ … ]}), or JSONL by another name."""
    line = text.line
    value = text.value(_DECODER)
    arrays = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if text.peek() == "{" or set(value) & {"messages", "conversations", "prompt", "text", "instruction"}:
        yield Row(value, line)
        while text.peek() == "{":
            line = text.line
            yield Row(text.value(_DECODER), line)
        if text.peek():
            problems.add(name, text.line, f"expected another row, found {text.peek()!r}", "Write [ row, row, … ].")
    elif len(arrays) == 1:
        for row in value[arrays[0]]:
            if isinstance(row, dict):
                yield Row(row, line)
            else:
                problems.add(name, line, f"'{arrays[0]}' holds {kind_of(row)}", ROW_ADVICE)
    else:
        named = f"several arrays of rows ({', '.join(map(repr, arrays))})" if arrays else "no array of rows"
        advice = "Write one file for each, such as train.json and valid.json." if arrays else "Write [ row, row, … ]."
        problems.add(name, line, f"an object that is no row and holds {named}", advice)


class _Window:
    """A JSON text read piece by piece: what was parsed is dropped."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._at = 0
        self._ended = False
        self.line = 1

    def _more(self) -> bool:
        piece = "" if self._ended else self._file.read(1 << 20)
        if not piece:
            self._ended = True
            return False
        self._text, self._at = self._text[self._at :] + piece, 0
        return True

    def peek(self) -> str:
        """The next character that is no white space, or an empty string at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self.line += self._text[self._at] == "\n"
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, count: int) -> None:
        """Step over `count` characters."""
        self._at += count

    def value(self, decoder: json.JSONDecoder) -> Any:
        """The next JSON value."""
        self.peek()
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
                if end == len(self._text) and self._more():
                    continue  # a number may go on in the next piece
                break
            except json.JSONDecodeError as error:
                size = len(self._text) - self._at
                inside = error.pos < len(self._text) - 28 and not error.msg.startswith("Unterm")
                if size > LONGEST_LINE or inside:
                    raise
                if not self._more():
                    raise
        part = self._text[self._at : end]
        if "\\u" in part:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        self.line += part.count("\n")
        self._at = end
        return value
