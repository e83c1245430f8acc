"""Conversations into samples: token ids and a loss weight for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mlxlora.data.config import SamplesConfig
from mlxlora.data.records import Completion, Conversation
from mlxlora.data.sample import Sample
from mlxlora.data.spans import Rendered, Turn, TurnFinder, Unusable
from mlxlora.data.template import ChatTemplate
from mlxlora.data.thinking import stripped
from mlxlora.errors import ConfigError
from mlxlora.tokenizer import Encoding, Tokenizer


@dataclass(frozen=True, slots=True)
class Weighted:
    """A stretch of characters and its loss weight; later stretches overrule earlier ones."""

    start: int
    end: int
    weight: float


@dataclass(slots=True)
class Encoded:
    """What became of one record: a sample, or the reason why there is none.

    dropped_thinking: assistant turns whose reasoning the template leaves out
    unended: trained turns that no token ends
    """

    sample: Sample | None
    reason: str = ""
    dropped_thinking: int = 0
    unended: int = 0


class ChatEncoder:
    """Encodes conversations with one template."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, config: SamplesConfig) -> None:
        """Prepare for many calls of `encode`."""
        self.tokenizer = tokenizer
        self.config = config
        eos = tokenizer.special_variables.get("eos_token")
        self.finder = TurnFinder(template, list(tokenizer.control_tokens), eos)
        self._control_ids = np.array(sorted(tokenizer.control_tokens.values()), np.int32)

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Encode many conversations at once, in order."""
        rendered: list[Rendered | str] = []
        for conversation in conversations:
            try:
                rendered.append(self.finder.find(self._prepared(conversation)))
            except Unusable as error:
                rendered.append(str(error))
        plain = [item.text for item in rendered if isinstance(item, Rendered) and not item.escaped]
        encodings = iter(self.tokenizer.encode_batch(plain))
        result = []
        for conversation, item in zip(conversations, rendered, strict=True):
            if isinstance(item, str):
                result.append(Encoded(None, item))
            else:
                result.append(self._encoded(conversation, item, None if item.escaped else next(encodings)))
        return result

    def _prepared(self, conversation: Conversation) -> Conversation:
        if self.config.thinking != "strip":
            return conversation
        return replace(conversation, messages=[stripped(message) for message in conversation.messages])

    def _encoded(self, conversation: Conversation, rendered: Rendered, encoding: Encoding | None) -> Encoded:
        spans = self._spans(conversation, rendered)
        if encoding is None:
            text, places = self.finder.control.unescaped(rendered.text, self.tokenizer.alias)
            encoding = self.tokenizer.encode_aliased([text])[0]
            spans = [Weighted(_moved(s.start, places), _moved(s.end, places), s.weight) for s in spans]
        weights = weigh(encoding, spans, self._control_ids)
        weights[:1] = 0.0  # nothing stands before it
        sample = Sample(encoding.ids, weights)
        unended = [turn for turn, weight in self._trained(conversation, rendered.turns) if weight and not turn.ended]
        if self.config.end_turns and unended and not rendered.text[rendered.turns[-1].end :].strip():
            sample = self._ended(sample)
            unended.pop()
        return Encoded(sample, dropped_thinking=rendered.dropped_thinking, unended=len(unended))

    def _ended(self, sample: Sample) -> Sample:
        """The sample with the end-of-text token as its last, learned."""
        eos = self.tokenizer.eos_id
        if eos is None:
            raise ConfigError("end_turns is set, but the tokenizer has no end-of-text token.")
        tokens = np.append(sample.tokens, np.int32(eos)).astype(np.int32)
        return Sample(tokens, np.append(sample.weights, np.float32(1)).astype(np.float32))

    def _trained(self, conversation: Conversation, turns: list[Turn]) -> list[tuple[Turn, float]]:
        """The assistant's turns, each with its loss weight."""
        messages = conversation.messages
        asked = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)
        last = turns[-1].message if turns else -1
        first = {"assistant": 0, "all": 0, "last": last, "completion": asked + 1}[self.config.loss_on]
        result = []
        for turn in turns:
            given = messages[turn.message].weight
            learned = 1.0 if given is None else given
            result.append((turn, learned if turn.message >= first else 0.0))
        return result

    def _spans(self, conversation: Conversation, rendered: Rendered) -> list[Weighted]:
        everything = self.config.loss_on == "all"
        spans = [Weighted(0, len(rendered.text), 1.0)] if everything else []
        for turn, weight in self._trained(conversation, rendered.turns):
            masked = self.config.thinking == "mask"
            if everything and masked:
                spans.append(Weighted(turn.start, turn.answer, 0.0))
            spans.append(Weighted(turn.answer if masked else turn.start, turn.end, weight))
        return spans


def weigh(encoding: Encoding, spans: Sequence[Weighted], control_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Loss weights of tokens: those that hold at least one character of a weighted stretch.

    A control token that begins before the stretch is the template's, even when it swallows white space inside it.
    """
    weights = np.zeros(len(encoding.ids), np.float32)
    for span in spans:
        if span.end <= span.start:
            continue
        first = int(np.searchsorted(encoding.ends, span.start, side="right"))
        last = int(np.searchsorted(encoding.starts, span.end, side="left"))
        while first < last and encoding.starts[first] < span.start and encoding.ids[first] in control_ids:
            first += 1
        weights[first:last] = span.weight
    return weights


def _moved(place: int, places: list[tuple[int, int]]) -> int:
    """A place in the old text, in the new one."""
    index = int(np.searchsorted([old for old, _ in places], place, side="right")) - 1
    old, new = places[index]
    return new + place - old


def encode_completions(tokenizer: Tokenizer, records: Sequence[Completion], config: SamplesConfig) -> list[Encoded]:
    """Prompts and completions as plain text: the completion and the end-of-text token are learned."""
    texts = [record.prompt + record.completion for record in records]
    bos = tokenizer.adds_bos if config.prepend_bos is None else config.prepend_bos
    before = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    after = [tokenizer.eos_id] if config.append_eos and tokenizer.eos_id is not None else []
    result = []
    for record, encoding in zip(records, plain_encodings(tokenizer, texts), strict=True):
        start = 0 if config.loss_on == "all" else len(record.prompt)
        weights = weigh(encoding, [Weighted(start, len(record.prompt) + len(record.completion), 1.0)], _NONE)
        ids = np.concatenate([before, encoding.ids, after]).astype(np.int32)
        weights = np.concatenate([np.zeros(len(before)), weights, np.ones(len(after))]).astype(np.float32)
        weights[:1] = 0.0
        result.append(Encoded(Sample(ids, weights), unended=int(not after)))
    return result


def plain_encodings(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
    """Encode texts in which nothing is a control token."""
    pattern = tokenizer.control_pattern
    marked = [pattern is not None and pattern.search(text) is not None for text in texts]
    plain = iter(tokenizer.encode_batch([text for text, is_marked in zip(texts, marked, strict=True) if not is_marked]))
    spelled = iter(tokenizer.encode_aliased([text for text, is_marked in zip(texts, marked, strict=True) if is_marked]))
    return [next(spelled if is_marked else plain) for is_marked in marked]


_NONE = np.zeros(0, np.int32)
