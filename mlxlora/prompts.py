"""From a conversation to the tokens that a model answers."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxlora.data.config import SamplesConfig
from mlxlora.data.known_templates import template_source
from mlxlora.data.sample import Sample
from mlxlora.data.template import ChatTemplate, TemplateRefusal
from mlxlora.errors import DataError
from mlxlora.tokenizer import Tokenizer

Message = Mapping[str, Any]
_OPEN, _CLOSE = "\U0010fffb", "\U0010fffa"  # private-use characters around the number of a control token


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens for a model to go on from.

    text:   what they say
    tokens: their ids
    stops:  ids that end the answer, beside those that end a text
    """

    text: str
    tokens: list[int]
    stops: tuple[int, ...] = ()


class ChatPrompts:
    """Renders conversations with a model's chat template, in the sandbox that training renders them in.

    Control tokens that a message merely spells are encoded as plain text: what a user types cannot end his turn.
    """

    def __init__(self, tokenizer: Tokenizer, *, template: str | None = None) -> None:
        """template: a known name or a Jinja file, instead of the model's own.

        Raises DataError when the model has no template and none is given.
        """
        config = SamplesConfig(template=template)
        self._tokenizer = tokenizer
        self._plain = ChatTemplate(
            template_source(tokenizer, config), tokenizer.special_variables, date=datetime.date.today()
        )
        self._tools = ChatTemplate(
            template_source(tokenizer, config, tools=True), tokenizer.special_variables, date=datetime.date.today()
        )
        self._known = sorted(tokenizer.control_tokens)
        self._numbers = {token: number for number, token in enumerate(self._known)}
        self.stops = self._turn_ends()

    def __call__(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> Prompt:
        """The prompt for the next assistant turn. `variables` are handed to the template (`enable_thinking=False`).

        Raises DataError when the template refuses the conversation.
        """
        template = self._tools if tools else self._plain
        escaped = [self._escaped(message) for message in messages]
        try:
            text = template.render(escaped, tools, add_generation_prompt=True, **variables)
        except TemplateRefusal as refusal:
            raise DataError(f"The chat template refuses this conversation: {refusal}") from None
        return Prompt(self._shown(text), self._encoded(text), self.stops)

    def _escaped(self, message: Message) -> Message:
        pattern, content = self._tokenizer.control_pattern, message.get("content")
        if pattern is None or not isinstance(content, str) or message.get("role") == "assistant":
            return message
        return {**message, "content": pattern.sub(lambda m: f"{_OPEN}{self._numbers[m.group()]}{_CLOSE}", content)}

    def _shown(self, text: str) -> str:
        return re.sub(f"{_OPEN}(\\d+){_CLOSE}", lambda match: self._known[int(match.group(1))], text)

    def _encoded(self, text: str) -> list[int]:
        pattern = self._tokenizer.control_pattern
        if _OPEN not in text or pattern is None:
            return [int(token) for token in self._tokenizer.encode(text).ids]
        aliased = pattern.sub(lambda match: self._tokenizer.alias(match.group()), text)
        return [int(token) for token in self._tokenizer.encode_aliased([self._shown(aliased)])[0].ids]

    def _turn_ends(self) -> tuple[int, ...]:
        """The control token that the template writes after an assistant's words: not always the model's EOS."""
        pattern = self._tokenizer.control_pattern
        marker = "mlxlora answer"
        try:
            asked = [{"role": "user", "content": "x"}, {"role": "assistant", "content": marker}]
            after = self._plain.render(asked).rpartition(marker)[2]
        except TemplateRefusal:
            return ()
        found = pattern.match(after.lstrip()) if pattern is not None else None
        return (self._tokenizer.control_tokens[found.group()],) if found else ()


def plain_prompt(tokenizer: Tokenizer, text: str) -> Prompt:
    """A text to go on from, with the beginning-of-text token where the tokenizer adds one."""
    ids = [int(token) for token in tokenizer.encode(text).ids]
    if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    return Prompt(text, ids)


def sample_prompt(tokenizer: Tokenizer, sample: Sample) -> tuple[Prompt, str]:
    """What stands before the last learned stretch of a sample, as a prompt, and that stretch as text.

    Where a control token ends the stretch, it ends an answer too.
    """
    learned = np.flatnonzero(sample.weights > 0)
    breaks = np.flatnonzero(np.diff(learned) > 1)
    begin, end = int(learned[breaks[-1] + 1] if len(breaks) else learned[0]), int(learned[-1]) + 1
    final = int(sample.tokens[end - 1])
    stops = (final,) if final in tokenizer.control_tokens.values() else ()
    ids = sample.tokens[:begin].tolist()
    expected = tokenizer.decode(sample.tokens[begin:end], skip_special=True).strip()
    return Prompt(tokenizer.decode(ids, skip_special=True), ids, stops), expected
