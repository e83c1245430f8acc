"""What a row of data means, once its format is known: a conversation, a completion, a document, a comparison.

Everything after `formats.py` sees only these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(slots=True)
class Message:
    """One message of a conversation.

    weight: loss weight of an assistant message; None lets `loss_on` decide, 0 leaves it out
    thinking: reasoning that stands before the answer, when the row gives it apart from the content
    tool_calls: in OpenAI's shape, `{"type": "function", "function": {"name": …, "arguments": {…}}}`
    """

    role: str
    content: str = ""
    thinking: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    name: str | None = None
    tool_call_id: str | None = None
    weight: float | None = None


@dataclass(slots=True)
class Conversation:
    """Messages in order, and the tools that the assistant may call (JSON schemas)."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(slots=True)
class Completion:
    """A prompt and the text that is to follow it."""

    prompt: str
    completion: str


@dataclass(slots=True)
class Document:
    """Plain text, learned from its first token to its last."""

    text: str


@dataclass(slots=True)
class Preference:
    """Two endings of one conversation, the better one first."""

    chosen: Conversation | Completion
    rejected: Conversation | Completion


@dataclass(slots=True)
class Judged:
    """An ending that was found good or bad (KTO)."""

    record: Conversation | Completion
    good: bool


@dataclass(slots=True)
class Question:
    """A prompt and the answer that a reward compares with; nothing to imitate (GRPO)."""

    prompt: Conversation | str
    answer: str


@dataclass(frozen=True, slots=True)
class TextRun:
    """Raw text as it stands: no template, control tokens recognised. `train`: whether it is learned."""

    text: str
    train: bool = True


@dataclass(slots=True)
class History:
    """Conversations and raw text one after the other, in one sample."""

    parts: list[Conversation | TextRun]


Record = Conversation | Completion | Document | Preference | Judged | Question | History
