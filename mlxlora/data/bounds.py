"""Bounds on what a chat template makes: time, the size of any value, and the size of all of them together.

Whatever a template makes (a sum, a literal, a slice, the result of a call or of a filter) is measured when it is made,
so that nothing larger can come to stand behind one comparison or one name. What may grow beyond measure in one step is
measured before the step.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import ItemsView, Iterable, KeysView, Sequence, ValuesView
from typing import Any

import jinja2
import jinja2.exceptions

CHARACTERS = 4 * 1024 * 1024  # what is written, and any value on the way
ALTOGETHER = 64 * CHARACTERS  # made in one rendering
LARGEST_NUMBER = 100_000  # as an argument: widths, counts, repeats
LARGEST_BITS = 4096  # of a number that is computed
SIZED = (str, bytes, list, tuple)


class TooSlow(Exception):
    """The template has used up its time."""


class Bounds:
    """What one rendering may still use. Refusals are Jinja's own exceptions, but for TooSlow."""

    def __init__(self) -> None:
        self._earliest = self._until = self._left = float("inf")

    def begin(self, seconds: float) -> None:
        """From now on `seconds` of this thread's work may be used up: neither a busy machine nor Ctrl-Z counts."""
        self._earliest = time.monotonic() + seconds
        self._until = time.thread_time() + seconds
        self._left = ALTOGETHER

    def tick(self, _: Any = None) -> str:
        """Stop a rendering that takes too long."""
        if time.monotonic() > self._earliest and time.thread_time() > self._until:  # the first is asked quickly
            raise TooSlow
        return ""

    def seen(self, value: Any) -> Any:
        """`value`, after a look at the clock."""
        self.tick()
        return value

    def made(self, value: Any) -> Any:
        """`value`, made by the template, once it is known to be no larger than a value may be."""
        if isinstance(value, str):
            size = len(value)
        elif isinstance(value, list | tuple | dict):
            size = size_of(value, CHARACTERS + 1)
        elif isinstance(value, int) and value.bit_length() > LARGEST_BITS:
            raise jinja2.TemplateRuntimeError("the template computes a number beyond measure")
        elif isinstance(value, bytes | bytearray):
            raise jinja2.exceptions.SecurityError("a template works on text, not on bytes")
        else:
            return value
        self.check_size(size)
        self._left -= size if isinstance(value, str) else len(value)
        if self._left < 0:
            raise jinja2.TemplateRuntimeError(f"the template makes more than {ALTOGETHER:,} characters in all")
        return value

    def check_size(self, size: int) -> None:
        """Refuse a value of this size."""
        if size > CHARACTERS:
            raise jinja2.TemplateRuntimeError(f"the template writes more than {CHARACTERS:,} characters")

    def printable(self, value: Any) -> Any:
        """`value` as it is, once it is known that writing it out stays below the limit."""
        if isinstance(value, list | tuple | dict):
            self.check_size(size_of(value, CHARACTERS + 1))
        return value

    def bounded(self, parts: Iterable[str]) -> str:
        """Join strings, as long as they stay below the limit."""
        kept, size = [], 0
        for part in parts:
            size += len(part)
            if size > CHARACTERS:
                self.check_size(size)
            kept.append(part)
        return str(self.made("".join(kept)))

    def joined(self, *parts: Any) -> str:
        """`a ~ b`, bounded."""
        self.tick()
        return self.bounded(str(self.printable(part)) for part in parts)

    def added(self, first: Any, *rest: Any) -> Any:
        """`a + b + c`, bounded."""
        if isinstance(first, str) and all(isinstance(part, str) for part in rest):
            self.tick()
            self.check_size(len(first) + sum(map(len, rest)))
            return self.made("".join((first, *rest)))
        for part in rest:
            if isinstance(first, SIZED) and isinstance(part, SIZED):
                self.check_size(len(first) + len(part))
            first = first + part
        return self.made(first)

    def check_number(self, value: Any) -> None:
        """Refuse a number that could only be meant to exhaust the machine."""
        if isinstance(value, int | float) and abs(value) > LARGEST_NUMBER:
            raise jinja2.TemplateRuntimeError(f"the template passes the number {str(value)[:40]}")

    def check_format(self, pattern: str, sign: str, values: Sequence[Any]) -> None:
        """Refuse a format string whose fields may be filled with too much."""
        if _wide(pattern):
            raise jinja2.TemplateRuntimeError("the template formats text to a large width")
        largest = max((size_of(value, CHARACTERS + 1) for value in values), default=0)
        self.check_size(len(pattern) + pattern.count(sign) * (largest + (999 if _WIDTH.search(pattern) else 0)))

    def check_product(self, left: Any, right: Any) -> None:
        """Refuse `left * right` when it is too large."""
        for one, other in ((left, right), (right, left)):
            if isinstance(one, SIZED) and isinstance(other, int):
                self.check_number(other)
                self.check_size(len(one) * max(other, 0))
        numbers = isinstance(left, int) and isinstance(right, int)
        if numbers and left.bit_length() + right.bit_length() > LARGEST_BITS:
            raise jinja2.TemplateRuntimeError("the template computes a number beyond measure")

    def check_method(self, text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments for a method of a string. Refused: what would make, or look through, too much."""
        if name in ("expandtabs", "translate", "encode"):
            raise jinja2.exceptions.SecurityError(f"a template may not call {name}()")
        if name == "replace" and len(args) >= 2:
            old, new = str(args[0]), str(args[1])
            self.check_size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
        elif name == "join" and args:
            parts = self.made(list(args[0]))
            self.check_size(size_of(parts, CHARACTERS + 1) + len(text) * len(parts))
            return (parts,)
        elif name.endswith("strip") and args and len(str(args[0])) > 1000:
            raise jinja2.TemplateRuntimeError(f"{name}(): too many characters to take away")
        return args

    def tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """`value` as JSON, as transformers writes it."""
        if indent is not None and (not isinstance(indent, int | str) or len(str(indent)) > 3):
            raise jinja2.TemplateRuntimeError("tojson: the indent is too large")
        if separators is not None and any(len(str(part)) > 8 for part in separators):
            raise jinja2.TemplateRuntimeError("tojson: the separators are too long")
        self.printable(value)
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        # with an indent every line grows with its depth: written piece by piece
        return encoder.encode(value) if indent is None else self.bounded(encoder.iterencode(value))

    def strftime(self, moment: datetime.datetime, pattern: Any) -> str:
        """`moment` in words."""
        if len(str(pattern)) > 1000 or re.search(r"%[^a-zA-Z%]*\d{3}", str(pattern)):
            raise jinja2.TemplateRuntimeError("strftime_now: the format is too long")
        return moment.strftime(pattern)


_VIEWS = (KeysView, ValuesView, ItemsView)  # of dictionaries, which write out what they show
_WIDTH = re.compile(r"\d")


def size_of(value: Any, limit: int) -> int:
    """At least how many characters `value` takes when written out, counted no further than `limit`."""
    if isinstance(value, str):
        return len(value)
    size = 2
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair]
    elif isinstance(value, _VIEWS):
        value = list(value)
    if isinstance(value, list | tuple):
        for part in value:
            size += 2 + size_of(part, limit - size)
            if size > limit:
                break
    return size


def _wide(pattern: str) -> bool:
    """Whether a format string asks for a width of four digits or more, or takes it from an argument."""
    return re.search(r"%[^a-zA-Z%]*(\d{4,}|\*)|\{[^}]*(\d{4,}|\{)", pattern) is not None
