"""Reasoning inside an assistant message: told apart from the answer, wherever the row put it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mlxlora.data.records import Message

DELIMITERS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""How models mark the beginning and the end of their reasoning."""

_FIELDS = re.compile(r"reasoning_content|(?:\.|['\"])(?:thinking|reasoning)\b")
_CLOSERS = re.compile("(?:" + "|".join(re.escape(closer) for _, closer in DELIMITERS) + r")\n*")


@dataclass(frozen=True, slots=True)
class Parts:
    """An assistant message's text: `before + thinking + between + answer`; without reasoning only the answer."""

    before: str
    thinking: str
    between: str
    answer: str


def parts_of(content: str) -> Parts:
    """Split content that holds its reasoning inline, as in `<think>why</think>answer`."""
    for opener, closer in DELIMITERS:
        head, found, answer = content.partition(closer)
        if not found:
            continue
        begin = head.find(opener)
        if begin < 0:  # the generation prompt already opened it
            return Parts("", head, closer, answer)
        if not head[:begin].strip():
            return Parts(head[: begin + len(opener)], head[begin + len(opener) :], closer, answer)
    return Parts("", "", "", content)


def stripped(message: Message) -> Message:
    """The message without its reasoning."""
    if message.role != "assistant":
        return message
    parts = parts_of(message.content)
    content = parts.answer.lstrip("\n") if parts.between else message.content
    return replace(message, thinking=None, content=content)


@dataclass(frozen=True, slots=True)
class Style:
    """How a template wants to be given reasoning.

    fields: it reads a field of the message (`reasoning_content` or `thinking`)
    inline: it looks for the delimiters in the content
    delimiters: how reasoning is written into content where the template knows nothing of it
    """

    fields: bool
    inline: bool
    delimiters: tuple[str, str]

    @classmethod
    def of(cls, source: str) -> Style:
        """Read from the template's source what it knows."""
        known = next((pair for pair in DELIMITERS if pair[1] in source), None)
        return cls(_FIELDS.search(source) is not None, known is not None, known or DELIMITERS[0])

    def arranged(self, message: Message) -> tuple[str | None, Parts]:
        """Reasoning for the field, or None, and the parts of the content."""
        parts = parts_of(message.content)
        if parts.between and self.fields and not self.inline:
            return parts.thinking.strip(), Parts("", "", "", parts.answer.lstrip("\n"))
        if not message.thinking:
            return None, parts
        if self.fields:
            return message.thinking, Parts("", "", "", message.content)
        opener, closer = self.delimiters
        return None, Parts(f"{opener}\n", message.thinking, f"\n{closer}\n\n", message.content)


def after_closer(text: str, begin: int, end: int) -> int | None:
    """Where the delimiter that closes the reasoning ends, if it stands between `begin` and `end`."""
    found = _CLOSERS.search(text, begin, end)
    return found.end() if found else None
