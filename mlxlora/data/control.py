"""Control tokens that content merely spells: kept apart from those that a chat template writes.

Before a conversation is rendered, every control token that its content spells is written as a number between two
private-use characters. In the rendered text, what still looks like a control token is the template's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from mlxlora.data.records import Conversation, Message
from mlxlora.data.thinking import DELIMITERS

ESCAPE_OPEN, ESCAPE_CLOSE = "\U0010fffb", "\U0010fffa"


class Reserved(Exception):
    """A text holds the characters that are reserved for escapes."""


class ControlTokens:
    """The special tokens of one vocabulary.

    pattern: finds the spelling of any of them; None when there are none
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        """tokens: their spellings."""
        self._known = sorted(tokens, key=len, reverse=True)
        self._numbers = {token: number for number, token in enumerate(self._known)}
        self.pattern = re.compile("|".join(re.escape(token) for token in self._known)) if self._known else None
        suspicious = [ESCAPE_OPEN, ESCAPE_CLOSE, *self._known]
        self._suspicious = re.compile("|".join(re.escape(text) for text in suspicious))
        # a model may think between control tokens; the assistant's content may then spell them
        self._exempt = {delimiter for pair in DELIMITERS for delimiter in pair} & set(self._known)

    def escaped(self, conversation: Conversation) -> tuple[Conversation, bool]:
        """The conversation with control tokens in its content spelled by private-use characters, if it has any.

        Raises Reserved when the content holds these characters itself.
        """
        if self.pattern is None or not self._spells_control(conversation):
            return conversation, False
        count = 0

        def substitute(found: re.Match[str]) -> str:
            nonlocal count
            count += 1
            return f"{ESCAPE_OPEN}{self._numbers[found.group()]}{ESCAPE_CLOSE}"

        def keep_thinking(found: re.Match[str]) -> str:
            return found.group() if found.group() in self._exempt else substitute(found)

        def walk(value: Any, replace_with: Any = substitute) -> Any:
            if isinstance(value, str):
                if ESCAPE_OPEN in value or ESCAPE_CLOSE in value:
                    raise Reserved("it holds the private-use characters U+10FFFA or U+10FFFB")
                return self.pattern.sub(replace_with, value) if self.pattern else value
            if isinstance(value, list):
                return [walk(item) for item in value]
            if isinstance(value, dict):
                return {walk(key): walk(item) for key, item in value.items()}
            return value

        messages = [
            Message(
                message.role,
                walk(message.content, keep_thinking if message.role == "assistant" else substitute),
                walk(message.thinking),
                walk(message.tool_calls),
                walk(message.name),
                walk(message.tool_call_id),
                message.weight,
            )
            for message in conversation.messages
        ]
        tools = walk(conversation.tools)
        return (Conversation(messages, tools), True) if count else (conversation, False)

    def _spells_control(self, conversation: Conversation) -> bool:
        """Whether any string of the conversation may need escaping."""
        assert self.pattern is not None
        found = self._suspicious.search
        for message in conversation.messages:
            if found(message.content) or message.thinking or message.tool_calls or message.name:
                return True
        return conversation.tools is not None

    def without_end(self, text: str) -> str:
        """A text without the control tokens and white space at its end."""
        while self.pattern is not None:
            text = text.rstrip()
            last = next((token for token in self._known if text.endswith(token)), None)
            if last is None:
                break
            text = text[: -len(last)]
        return text

    def unescaped(self, text: str, alias: Callable[[str], str]) -> tuple[str, list[tuple[int, int]]]:
        """The text with the template's control tokens under their aliases and the content's spelled as they were.

        Returns it with the places, in the old and in the new text, from which on they run in parallel.
        """
        if self.pattern is None:
            return text, [(0, 0)]
        both = re.compile(f"{ESCAPE_OPEN}(\\d+){ESCAPE_CLOSE}|{self.pattern.pattern}")
        parts, places = [], [(0, 0)]
        begin = size = 0
        for found in both.finditer(text):
            plain = text[begin : found.start()]
            new = self._known[int(found.group(1))] if found.group(1) else alias(found.group())
            parts += [plain, new]
            places.append((found.start(), size + len(plain)))
            size += len(plain) + len(new)
            begin = found.end()
            places.append((begin, size))
        parts.append(text[begin:])
        return "".join(parts), places
