"""A chat template in Jinja as the Go template that Ollama wants, found by what it does.

A few conversations are rendered with the Jinja template. Where the text around the messages is always the same, the
template is known: what opens a conversation, what stands between question and answer, between answer and question, and
before the next answer. That is written in Go, rendered, and held against Jinja on other conversations. What does not
follow this pattern is refused, not approximated.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlxlora.data.template import ChatTemplate, TemplateRefusal
from mlxlora.errors import UnsupportedError
from mlxlora_convert import go_template

Messages = list[dict[str, str]]
SYSTEM, USERS, ANSWERS = "Sys7x", ("Ask1q", "Ask2w", "Ask3e"), ("Say1a", "Say2s")
FREE = "Leave the template to Ollama, which reads the one inside the GGUF file: --ollama.template gguf"
TRIED = (
    "What is 2 + 2?\n\nThink twice.",
    "It is 4.\n- really\n- so",
    "Grüße, 你好! <b>{{ x }}</b> 'quoted' \"twice\"",
    "Ok",
    "And then?",
)


@dataclass(frozen=True, slots=True)
class Pattern:
    """The text around messages.

    opening:   before the first question, without a system prompt
    system:    before and after a system prompt, up to the question that it precedes; None: there is no place for it
    late:      the system prompt stands before the last question instead of the first
    answer:    between a question and its answer in the past
    question:  between an answer and the next question
    generate:  after the last question
    """

    opening: str
    system: tuple[str, str] | None
    late: bool
    answer: str
    question: str
    generate: str


def conversation(count: int, *, system: bool = False, texts: Sequence[str] = ()) -> Messages:
    """Questions and answers in turn, `count` messages, with a system prompt before them if asked for."""
    said = texts or [text for pair in zip(USERS, (*ANSWERS, ""), strict=True) for text in pair]
    turns = [{"role": ("user", "assistant")[n % 2], "content": said[n]} for n in range(count)]
    return [{"role": "system", "content": SYSTEM}, *turns] if system else turns


class Jinja:
    """A model's template, rendered for Ollama: without the BOS that the reader of the GGUF file adds by itself."""

    def __init__(self, source: str, variables: Mapping[str, str], bos: str, date: datetime.date) -> None:
        self.template, self.bos = ChatTemplate(source, variables, date=date), bos

    def __call__(self, messages: Messages) -> str:
        text = self.template.render(messages, add_generation_prompt=True)
        return text.removeprefix(self.bos) if self.bos else text


def translate(
    source: str, variables: Mapping[str, str], *, bos: str = "", date: datetime.date | None = None
) -> tuple[str, Pattern]:
    """The Go template for a Jinja template, and the pattern behind it.

    bos:  what the reader of the GGUF file puts before every text; the Go template must not say it again
    date: the date that a template which asks for it shall always be told

    Raises UnsupportedError for a template that follows no such pattern.
    """
    jinja = Jinja(source, variables, bos, date or datetime.date(2024, 7, 26))
    later = Jinja(source, variables, bos, (date or datetime.date(2024, 7, 26)) + datetime.timedelta(days=500))
    try:
        dated = jinja(conversation(1)) != later(conversation(1))
        if dated and date is None:
            raise UnsupportedError(
                "The chat template writes today's date, which a template of Ollama cannot. Say which date it shall "
                f"always write with --ollama.date 2026-01-31. Or: {FREE}"
            )
        pattern = learn(jinja)
        text = write(pattern)
        wrong = first_difference(jinja, text, pattern)
    except TemplateRefusal as error:
        raise UnsupportedError(f"The chat template refuses a plain conversation ({error}). {FREE}") from None
    except (ValueError, KeyError) as error:
        raise UnsupportedError(
            f"The chat template follows no pattern that Ollama can be told ({error}). {FREE}"
        ) from None
    if wrong:
        raise UnsupportedError(f"The chat template follows no pattern that Ollama can be told: {wrong}. {FREE}")
    return text, pattern


def learn(jinja: Jinja) -> Pattern:
    """What stands around the messages. Raises ValueError where a message is missing from the text, or out of order."""
    opening, generate = around(jinja(conversation(1)), USERS[:1])
    _, answer, question, _ = around(jinja(conversation(3)), (USERS[0], ANSWERS[0], USERS[1]))
    try:
        alone, more = jinja(conversation(1, system=True)), jinja(conversation(3, system=True))
    except TemplateRefusal:
        return Pattern(opening, None, False, answer, question, generate)
    if SYSTEM not in alone:
        return Pattern(opening, None, False, answer, question, generate)
    before, after, _ = around(alone, (SYSTEM, USERS[0]))
    late = more.find(SYSTEM) > more.find(USERS[0])
    if late:  # what opens the last question stands before the system prompt then
        _, _, opened, after, _ = around(more, (USERS[0], ANSWERS[0], SYSTEM, USERS[1]))
        if opened != question:
            raise ValueError("a system prompt changes what stands before the last question")
    return Pattern(opening, (before, after), late, answer, question, generate)


def around(text: str, parts: Sequence[str]) -> list[str]:
    """The pieces of `text` before, between and after `parts`, each of which must be there once and in this order."""
    pieces, rest = [], text
    for part in parts:
        if text.count(part) != 1 or part not in rest:
            raise ValueError(f"a message stands {text.count(part)} times in the text, or out of order")
        before, _, rest = rest.partition(part)
        pieces.append(before)
    return [*pieces, rest]


def write(pattern: Pattern) -> str:
    """The pattern as a Go template. Text stands only beside actions that trim nothing."""
    opening, answer, question, generate = map(
        literal, (pattern.opening, pattern.answer, pattern.question, pattern.generate)
    )
    first, each = opening, ""
    if pattern.system is not None:
        before, after = map(literal, pattern.system)
        if pattern.late:
            each = f"{{{{ if and $last $.System }}}}{{{{ $.System }}}}{after}{{{{ end }}}}"
        else:
            first = f"{{{{ if $.System }}}}{before}{{{{ $.System }}}}{after}{{{{ else }}}}{opening}{{{{ end }}}}"
    return "\n".join(
        [
            "{{- $begun := false }}",
            "{{- range $i, $_ := .Messages }}",
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
            '{{- if eq .Role "user" }}',
            f"{{{{- if not $begun }}}}{{{{ $begun = true }}}}{first}{{{{ end }}}}{each}"
            f"{{{{ .Content }}}}{{{{ if $last }}}}{generate}{{{{ else }}}}{answer}{{{{ end }}}}",
            f'{{{{- else if eq .Role "assistant" }}}}{{{{ .Content }}}}{{{{ if not $last }}}}{question}{{{{ end }}}}',
            "{{- end }}",
            "{{- end }}",
        ]
    )


def literal(text: str) -> str:
    """Text in a Go template; braces that would be read as an action, alone or with what follows, are quoted."""
    return text if "{{" not in text and "}}" not in text and not text.endswith("{") else '{{ "' + escaped(text) + '" }}'


def escaped(text: str) -> str:
    """Text inside of a Go string."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")


def first_difference(jinja: Jinja, text: str, pattern: Pattern) -> str:
    """Where Go and Jinja disagree on a conversation, or an empty string."""
    for count in (1, 3, 5):
        for texts in ((), TRIED):
            for system in (False, True) if pattern.system is not None else (False,):
                messages = conversation(count, system=system, texts=texts)
                expected, found = jinja(messages), render(text, messages)
                if expected != found:
                    at = next((n for n, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
                    shown = expected[max(0, at - 20) : at + 20]
                    return f"after {count} messages{' and a system prompt' if system else ''} it writes {shown!r}"
    return ""


def render(text: str, messages: Messages) -> str:
    """A Go template as Ollama renders it: messages of one role in a row are one, system prompts are `.System`, too."""
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["Role"] == message["role"]:
            joined[-1]["Content"] += "\n\n" + message["content"]
        else:
            joined.append({"Role": message["role"], "Content": message["content"]})
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    return go_template.render(text, {"System": system, "Messages": joined})
