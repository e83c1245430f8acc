"""What a chat template is like, found out by trying it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlxlora.data.control import ControlTokens
from mlxlora.data.template import ChatTemplate, TemplateRefusal
from mlxlora.data.thinking import DELIMITERS, Style

Probe = list[dict[str, Any]]
MARK = "QZQ"


@dataclass(frozen=True, slots=True)
class Traits:
    """How a template wants to be given messages, and what it writes before an answer.

    style:          how it wants reasoning
    headers:        what stands before the assistant's words: the generation prompt, and the same without an opened
                    reasoning
    text_arguments: it wants the arguments of a tool call as text (DeepSeek), not as an object
    parts:          it wants content as a list of parts (models that also see images)
    developer:      it knows the role of that name
    """

    style: Style
    headers: tuple[str, ...]
    text_arguments: bool
    parts: bool
    developer: bool

    @classmethod
    def of(cls, template: ChatTemplate, control: ControlTokens) -> Traits:
        """Try a template."""
        parts = _wants_parts(template)
        return cls(
            style=Style.of(template.source),
            headers=_headers(template, control, _content("x", parts)),
            text_arguments=_wants_text_arguments(template),
            parts=parts,
            developer=template.reads("developer"),
        )

    def content(self, text: str) -> str | list[dict[str, str]]:
        """A message's content in the shape that the template wants."""
        return _content(text, self.parts)


def _content(text: str, parts: bool) -> str | list[dict[str, str]]:
    return [{"type": "text", "text": text}] if parts else text


def _wants_parts(template: ChatTemplate) -> bool:
    for parts in (False, True):
        if MARK in _rendered(template, [{"role": "user", "content": _content(MARK, parts)}]):
            return parts
    return False


def _headers(template: ChatTemplate, control: ControlTokens, content: Any) -> tuple[str, ...]:
    asked = [{"role": "user", "content": content}]
    prompted = _rendered(template, asked, add_generation_prompt=True)
    plain = _rendered(template, asked)
    # some templates end a text that has no generation prompt with another token: compare up to there
    pairs = enumerate(zip(prompted, plain, strict=False))
    common = next((place for place, (a, b) in pairs if a != b), min(len(prompted), len(plain)))
    for token in control.pattern.finditer(prompted) if control.pattern else ():
        if token.start() < common < token.end():
            common = token.start()
    prompt = prompted[common:]
    found = [prompt, *(prompt.partition(opener)[0] for opener, _ in DELIMITERS)]
    return tuple(text for text in dict.fromkeys(found) if text.strip())


def _wants_text_arguments(template: ChatTemplate) -> bool:
    as_object, as_text = (_rendered(template, _call(arguments)) for arguments in ({"k": "v"}, '{"k": "v"}'))
    return '"k"' not in as_object and '"k"' in as_text


def _call(arguments: Any) -> Probe:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]


def _rendered(template: ChatTemplate, messages: Probe, **variables: Any) -> str:
    """What the template makes of some messages; nothing when it refuses them."""
    try:
        return template.render(messages, **variables)
    except TemplateRefusal:
        return ""
