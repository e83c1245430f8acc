"""What is suspicious about rows that can be read: one rule a function, one table.

A rule looks at one record and yields what it found. It warns; it never refuses.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mlxlora.data.records import Completion, Conversation, Document, Judged, Message, Preference, Question, Record

PLACES = 5  # places that a warning names


@dataclass(slots=True)
class Finding:
    """A warning: what was found how often, where first, and what to do.

    kind:   a short name, the same in every version
    what:   in words, for the first of them
    places: `file:line` of the first few
    """

    kind: str
    what: str
    advice: str
    count: int = 0
    places: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        more = f" and {self.count - len(self.places):,} more" if self.count > len(self.places) else ""
        where = f" ({', '.join(self.places)}{more})" if self.places else ""
        return f"{self.what}{where}. {self.advice}"


class Findings:
    """Warnings by kind, in the order in which they came up."""

    def __init__(self) -> None:
        self._found: dict[str, Finding] = {}

    def add(self, kind: str, what: str, where: str = "", *, count: int = 1) -> None:
        """Note something; `kind` is a key of `ADVICE`."""
        finding = self._found.setdefault(kind, Finding(kind, what, ADVICE[kind]))
        finding.count += count
        if where and len(finding.places) < PLACES and where not in finding.places:
            finding.places.append(where)

    def raise_count(self, kind: str, least: int) -> None:
        """Places are kept of the first thousand only; say how many there are in truth."""
        if kind in self._found:
            self._found[kind].count = max(self._found[kind].count, least)

    def look(self, record: Record, where: str) -> None:
        """Try every rule on a record."""
        for rule in RULES:
            for kind, what in rule(record):
                self.add(kind, what, where)

    @property
    def all(self) -> tuple[Finding, ...]:
        """What was found."""
        return tuple(self._found.values())


Found = Iterator[tuple[str, str]]


def conversations_of(record: Record) -> list[Conversation]:
    """The conversations inside a record."""
    match record:
        case Conversation():
            return [record]
        case Preference(chosen, rejected):
            return [part for part in (chosen, rejected) if isinstance(part, Conversation)]
        case Judged(inner, _):
            return [inner] if isinstance(inner, Conversation) else []
        case Question(Conversation() as prompt, _):
            return [prompt]
        case _:
            return []


def texts_of(record: Record) -> list[str]:
    """All text of a record."""
    match record:
        case Conversation():
            return [text for message in record.messages for text in (message.thinking, message.content) if text]
        case Completion(prompt, completion):
            return [prompt, completion]
        case Document(text):
            return [text]
        case Preference(chosen, rejected):
            return texts_of(chosen) + texts_of(rejected)
        case Judged(inner, _):
            return texts_of(inner)
        case Question(prompt, answer):
            return [*([prompt] if isinstance(prompt, str) else texts_of(prompt)), answer]
        case _:
            return []


def answers_of(record: Record) -> list[str]:
    """What a record teaches to say."""
    match record:
        case Conversation():
            return [message.content for message in record.messages if message.role == "assistant" and message.content]
        case Completion(_, completion):
            return [completion]
        case Preference(chosen, _):
            return answers_of(chosen)
        case _:
            return []


# -- rules ------------------------------------------------------------------------------------------------------------


def roles_out_of_order(record: Record) -> Found:
    """A system message in the middle, two questions in a row, an answer to nothing, a question without an answer."""
    for conversation in conversations_of(record):
        messages = conversation.messages
        for before, message in itertools.pairwise(messages):
            problem = _order(before, message)
            if problem:
                yield "roles", problem
                return
        spoken = [message for message in messages if message.role not in ("system", "developer")]
        if spoken and spoken[0].role == "assistant":
            yield "roles", "a conversation begins with the assistant"
        elif spoken and spoken[-1].role != "assistant" and not isinstance(record, Question):
            yield "roles", f"a conversation ends with the {spoken[-1].role}, so its last part is not learned"


def _order(before: Message, message: Message) -> str:
    if message.role in ("system", "developer") and before.role not in ("system", "developer"):
        return f"a {message.role} message after the {before.role}'s"
    if message.role == before.role and message.role in ("user", "assistant") and not before.tool_calls:
        return f"two {message.role} messages in a row"
    if message.role == "tool" and before.role not in ("tool", "assistant"):
        return f"a tool message after the {before.role}'s"
    return ""


def empty_answers(record: Record) -> Found:
    """Answers of white space."""
    for conversation in conversations_of(record):
        for message in conversation.messages:
            if message.role == "assistant" and not message.content.strip() and not message.tool_calls:
                yield "empty", "an answer is empty"
    if isinstance(record, Completion) and not record.completion.strip():
        yield "empty", "a completion is empty"


_OPEN_END = re.compile(r"(?:[\w,(\[{]|\b(?:and|or|the|a|an|to|of|with|und|oder|die|der))\s*$")


def cut_answers(record: Record) -> Found:
    """Long answers that stop in the middle: an open code block, or no end of a sentence."""
    for answer in answers_of(record):
        if answer.count("```") % 2:
            yield "cut", "an answer ends inside a code block"
        elif len(answer) > 400 and "\n" not in answer[-80:] and _OPEN_END.search(answer[-40:]):
            yield "cut", f"a long answer stops in the middle of a sentence (…{answer[-30:]!r})"


SECRETS = {
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})\b",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an OpenAI or Anthropic key": r"\bsk-(?:ant-|proj-)?[A-Za-z0-9_-]{24,}",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}\b",
    "a Google key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "a signed web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a password": r"(?i)\bpass(?:word|wd)\s*[:=]\s*['\"]?[^\s'\"]{8,}",
}
_SECRETS = {name: re.compile(pattern) for name, pattern in SECRETS.items()}


def secrets(record: Record) -> Found:
    """Text that looks like a key or a password; only its beginning is shown."""
    for text in texts_of(record):
        for name, pattern in _SECRETS.items():
            if found := pattern.search(text):
                yield "secret", f"what looks like {name} ({found.group()[:8]}…)"


_MOJIBAKE = re.compile("Ã[\u0080-\u00bf]|â€[\u0080-\u00bfœ\u2122™]|\ufffd")
_BINARY = re.compile("[\x00-\x08\x0e-\x1b\x7f]")
_EMBEDDED = re.compile(r"data:(?:image|audio|video)/[\w.+-]+;base64,|[A-Za-z0-9+/]{2000,}={0,2}")


def no_text(record: Record) -> Found:
    """Content that is no text: embedded pictures, control characters, broken encodings."""
    for text in texts_of(record):
        if _EMBEDDED.search(text):
            yield "not_text", "embedded data (base64)"
        elif _BINARY.search(text):
            yield "not_text", "control characters"
        elif found := _MOJIBAKE.search(text):
            yield "encoding", f"broken characters ({text[max(0, found.start() - 5) : found.end() + 5]!r})"


RULES: tuple[Callable[[Record], Found], ...] = (roles_out_of_order, empty_answers, cut_answers, secrets, no_text)

ADVICE = {
    "objective": "Training refuses them; the figures are for their good endings alone, as --samples.preference chosen "
    "learns them.",
    "roles": "Most templates want an optional system message, then user and assistant in turns.",
    "empty": "Remove these rows: they teach to say nothing.",
    "cut": "Generate or copy them whole, or the model learns to stop in the middle.",
    "secret": "Replace it: a model can repeat what it was trained on.",
    "not_text": "Remove it: it costs tokens and teaches nothing.",
    "encoding": "The file was read in a wrong encoding once; write it again as UTF-8.",
    "duplicate": "Remove the copies, or each counts several times.",
    "near_duplicate": "Look at them: they count several times, too.",
    "overlap": "Remove them from one side, or the validation loss says nothing.",
    "same_prompt": "The validation loss is too good when its questions are trained on.",
    "no_end": "The model would not learn to stop: use a template that ends each turn, or --samples.end_turns.",
    "double_bos": "Remove the token from the data or from the template; models are trained with one.",
    "history": "What is trained as history differs from what the model wrote; keep only the last turn "
    "(--samples.loss_on last) or use another template if that matters.",
    "thinking": "Reasoning of earlier turns is not learned; split the conversation into one row for each turn if it "
    "should be.",
    "unlocated": "They are left out.",
    "untrained": "They are left out.",
    "long": "Raise --samples.max_length, or shorten them.",
    "dropped": "Raise --samples.max_length, shorten them, or cut them with --samples.too_long truncate.",
    "short": "Lower --samples.min_length if they are to be learned.",
    "few": "A few hundred good rows are a start.",
    "mostly_prompt": "That is fine for long documents; otherwise look whether the answers are complete.",
}
