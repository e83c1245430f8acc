"""Problems found while data is read: collected as they come, raised once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from mlxlora.errors import SHOWN, DataError, Problem

KEPT = 1000  # problems kept; beyond, they are only counted


_group: ContextVar[str] = ContextVar("group", default="samples.")


def flag(name: str) -> str:
    """The flag of an option of SamplesConfig as the verb at work has it: `--samples.columns`, or `--columns`."""
    return f"--{_group.get()}{name}"


@contextmanager
def flags_by_themselves() -> Iterator[None]:
    """The verb at work has these options in no group."""
    token = _group.set("")
    try:
        yield
    finally:
        _group.reset(token)


class RowError(Exception):
    """What is wrong with a row, and what to do about it."""

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.advice = advice


class Problems:
    """What is wrong with the data, in the order in which it was found.

    >>> problems = Problems()
    >>> problems.add("train.jsonl", 3, "'messages' is empty", "Give at least one message.")
    >>> problems.count
    1
    """

    def __init__(self) -> None:
        self.items: list[Problem] = []
        self.count = 0

    def add(self, name: str, line: int, what: str, advice: str = "") -> None:
        """Note one problem at `name:line` (line 0: the file as a whole)."""
        self.count += 1
        if len(self.items) < KEPT:
            self.items.append(Problem(f"{name}:{line}" if line else name, what, advice))

    @property
    def enough(self) -> bool:
        """Whether more problems were found than one message shows: reading on would tell nothing new."""
        return self.count > SHOWN

    def raise_any(self, headline: str) -> None:
        """Raise DataError when there is anything to raise it for."""
        if self.items:
            raise DataError.of(headline, self.items)


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def reason_of(error: BaseException | str) -> str:
    """An error's message, to go on with after a colon."""
    text = str(error) or type(error).__name__
    return text[0].lower() + text[1:]
