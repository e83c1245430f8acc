"""Private-use characters around pieces of text, to see where a template puts them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["thinking", "answer", "call", "other"]

BLOCKS = (0xF0000, 0xF8000, 0x100000)  # where the private-use characters lie that mark pieces
BLOCK = 0x7000  # how many of them

PATTERNS = {base: re.compile(f"[{chr(base)}-{chr(base + BLOCK)}]") for base in BLOCKS}


@dataclass(slots=True)
class Piece:
    """A stretch of text that a message holds, and where the template wrote it.

    lead:   what stands before it in the same content
    places: (start, end) in the rendered text; none where the template leaves it out
    """

    message: int
    kind: Kind
    lead: str = ""
    places: list[tuple[int, int]] = field(default_factory=list)


class Marker:
    """Puts private-use characters around pieces of text and remembers what they are."""

    def __init__(self, base: int, only: set[int] | None = None) -> None:
        self.base = base
        self.only = only
        self.pieces: list[tuple[int, Kind, str]] = []

    def mark(self, text: str, message: int, kind: Kind, before: str = "") -> str:
        """`text` with its first and last visible character marked; white space outside can still be trimmed."""
        core = text.strip()
        if not core:
            return text
        number = len(self.pieces)
        begin = text.index(core)
        self.pieces.append((message, kind, before + text[:begin]))
        if not self.base or (self.only is not None and number not in self.only):
            return text
        opened, closed = chr(self.base + 2 * number), chr(self.base + 2 * number + 1)
        return f"{text[:begin]}{opened}{core}{closed}{text[begin + len(core) :]}"


def unmarked(text: str, message: int, kind: Kind, before: str = "") -> str:
    """The text as it is: the marker that marks nothing."""
    return text
