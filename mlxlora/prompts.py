"""From a conversation to the tokens that a model answers."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from mlxlora import mlxlm
from mlxlora.data.config import SamplesConfig
from mlxlora.data.control import ControlTokens, Reserved
from mlxlora.data.formats import SHAREGPT_ROLES, read_messages
from mlxlora.data.known_templates import template_source
from mlxlora.data.problems import RowError
from mlxlora.data.records import ROLES, Conversation
from mlxlora.data.records import Message as RecordMessage
from mlxlora.data.rendering import ChatRenderer
from mlxlora.data.sample import Sample
from mlxlora.data.template import ChatTemplate, TemplateRefusal
from mlxlora.errors import DataError
from mlxlora.model import LanguageModel
from mlxlora.tokenizer import Tokenizer

Message = Mapping[str, Any]
BEGINNING = 32  # tokens of a text that are enough to go on from
ROLE_NAMES = {*ROLES, *SHAREGPT_ROLES, "ipython"}  # as templates write them


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
    """Renders conversations with a model's chat template: the same way, in the same sandbox, as for training.

    Control tokens that a message merely spells are encoded as plain text: what a user types cannot end his turn.
    """

    def __init__(self, tokenizer: Tokenizer, *, template: str | None = None) -> None:
        """template: a known name or a Jinja file, instead of the model's own.

        Raises DataError when the model has no template and none is given.
        """
        self._tokenizer = tokenizer
        self._config = SamplesConfig(template=template)
        self._control = ControlTokens(list(tokenizer.control_tokens))
        self._renderers: dict[str, ChatRenderer] = {}
        self.stops = self._turn_ends()

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> Prompt:
        """The prompt for the next assistant turn.

        messages, tools: as in a training row (OpenAI's shape)
        add_generation_prompt: end with what stands before an answer; without, end with the last message
        variables: handed to the template (`enable_thinking=False`)

        Raises DataError when a message is not valid, or the template refuses the conversation.
        """
        try:
            row = {"messages": [dict(message) for message in messages], "tools": list(tools) if tools else None}
            conversation, _ = self._control.escaped(read_messages(row))
        except RowError as error:
            raise DataError(f"{error.what[:1].upper()}{error.what[1:]}. {error.advice}".rstrip()) from None
        except Reserved as error:
            raise DataError(f"A message cannot be encoded: {error}.") from None
        renderer = self._renderer(tools=bool(conversation.tools))
        try:
            text = renderer.text(conversation, add_generation_prompt=add_generation_prompt, **variables)
        except TemplateRefusal as refusal:
            raise DataError(f"The chat template refuses this conversation: {refusal}") from None
        shown, _ = self._control.unescaped(text, str)
        spelled, _ = self._control.unescaped(text, self._tokenizer.alias)
        return Prompt(shown, self._tokenizer.encode_aliased([spelled])[0].ids.tolist(), self.stops)

    def _renderer(self, *, tools: bool = False) -> ChatRenderer:
        """The model's template (some have one of its own for tools), with today's date."""
        source = template_source(self._tokenizer, self._config, tools=tools)
        if source not in self._renderers:
            template = ChatTemplate(source, self._tokenizer.special_variables, date=datetime.date.today())
            self._renderers[source] = ChatRenderer(template, self._control)
        return self._renderers[source]

    def _turn_ends(self) -> tuple[int, ...]:
        """The control token that the template writes after an assistant's words: not always the model's EOS."""
        pattern = self._control.pattern
        marker = "mlxlora answer"
        renderer = self._renderer()
        try:
            asked = Conversation([RecordMessage("user", "x"), RecordMessage("assistant", marker)])
            after = renderer.text(asked).rpartition(marker)[2]
        except TemplateRefusal:
            return ()
        found = pattern.match(after.lstrip()) if pattern is not None else None
        return (self._tokenizer.control_tokens[found.group()],) if found else ()


def chat_tokenizer(model: LanguageModel) -> Any:
    """mlx-lm's wrapper of a model's tokenizer, for its server and its harness, with conversations rendered by us.

    The wrapper's own `apply_chat_template` runs the model's template in transformers: as long, and as large, as it
    likes. A model without a template keeps what mlx-lm does for it.
    """
    wrapper = model.generation_tokenizer
    if not model.tokenizer.chat_templates:
        return wrapper
    prompts = ChatPrompts(model.tokenizer)

    def render(
        messages: Sequence[Message],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **options: Any,
    ) -> Any:
        made = prompts(messages, add_generation_prompt=add_generation_prompt, **options)
        if tokenize:
            return made.tokens
        last = str(messages[-1].get("content") or "").strip()
        cut = made.text.rfind(last) + len(last) if continue_final_message and last else len(made.text)
        return made.text[:cut]

    return mlxlm.with_stops(mlxlm.with_chats(wrapper, render), prompts.stops)


def plain_prompt(tokenizer: Tokenizer, text: str) -> Prompt:
    """A text to go on from, with the beginning-of-text token where the tokenizer adds one."""
    ids = [int(token) for token in tokenizer.encode(text).ids]
    if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    return Prompt(text, ids)


def sample_prompt(tokenizer: Tokenizer, sample: Sample) -> tuple[Prompt, str]:
    """What stands before the last learned stretch of a sample, as a prompt, and that stretch as text.

    Where a control token ends the stretch, it ends an answer too. A text that is learned as a whole has nothing before
    it: there its beginning is the prompt.
    """
    learned = np.flatnonzero(sample.weights > 0)
    breaks = np.flatnonzero(np.diff(learned) > 1)
    begin, end = int(learned[breaks[-1] + 1] if len(breaks) else learned[0]), int(learned[-1]) + 1
    if begin == 1:
        begin = max(1, min(BEGINNING, end // 2))
    final = int(sample.tokens[end - 1])
    stops = (final,) if final in tokenizer.control_tokens.values() else ()
    ids = sample.tokens[:begin].tolist()
    expected = tokenizer.decode(sample.tokens[begin:end], skip_special=True).strip()
    return Prompt(_spoken(tokenizer, ids), ids, stops), expected


def _spoken(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """A prompt for people to read: no control tokens, and a role only where there are several turns."""
    control = {number: text.strip("<|>") for text, number in tokenizer.control_tokens.items()}
    turns: list[tuple[str, str]] = []
    role = ""
    for marks, piece in groupby(ids, key=control.__contains__):
        if marks:  # <|user|>
            role = next((control[number] for number in piece if control[number] in ROLE_NAMES), role)
            continue
        text = tokenizer.decode(list(piece)).strip()
        first, _, rest = text.partition("\n")
        if first.strip() in ROLE_NAMES:  # between two control tokens, or in the first line after one
            role, text = first.strip(), rest.strip()
        if text:
            turns.append((role, text))
            role = ""
    if len(turns) == 1:
        return turns[0][1]
    return "\n".join(f"{role}: {text}" if role else text for role, text in turns)
