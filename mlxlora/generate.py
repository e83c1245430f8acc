"""Text from a model: sampling on mlx-lm's generator, with any number of adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlxlora import mlxlm
from mlxlora.errors import ConfigError
from mlxlora.model import LanguageModel, load
from mlxlora.prompts import ChatPrompts, Message, Prompt, plain_prompt


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen, and when to stop."""

    max_tokens: int = 512
    """at most so many tokens"""
    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples from the model's own distribution"""
    top_p: float = 1.0
    """sample from the likeliest tokens that have this probability together"""
    top_k: int = 0
    """sample from so many tokens; 0 for all"""
    min_p: float = 0.0
    """leave out tokens less likely than this share of the likeliest"""
    repetition_penalty: float | None = None
    """above 1 makes tokens of the last 64 less likely"""
    seed: int = 0
    """of the sampling: the same seed, the same text"""
    stop: list[str] = field(default_factory=list)
    """texts that end the answer; they are not part of it"""

    def __post_init__(self) -> None:
        def demand(good: bool, name: str, rule: str) -> None:
            if not good:
                raise ConfigError(f"sampling.{name} is {getattr(self, name)!r}, but must be {rule}.")

        demand(self.max_tokens >= 1, "max_tokens", "1 or more")
        demand(math.isfinite(self.temperature) and 0 <= self.temperature <= 100, "temperature", "0 or more")
        demand(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        demand(self.top_k >= 0, "top_k", "0 or more")
        demand(0 <= self.min_p <= 1, "min_p", "from 0 to 1")
        penalty = self.repetition_penalty
        demand(penalty is None or (math.isfinite(penalty) and penalty > 0), "repetition_penalty", "above 0")
        demand(all(self.stop), "stop", "texts with something in them")


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model said.

    finish_reason:     "stop" (it ended its answer, or said a stop text) or "length" (max_tokens were reached)
    tokens:            of the answer, with the token that ends it
    tokens_per_second: of the answer, the reading of the prompt not counted
    """

    text: str
    tokens: int
    prompt_tokens: int
    finish_reason: str
    tokens_per_second: float
    peak_memory: int

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer while it comes; the last one has a finish_reason.

    token: the token that was just said, the one that ends the answer included; `count` of them so far
    """

    text: str
    token: int
    count: int
    finish_reason: str | None = None
    tokens_per_second: float = 0.0


def generate(
    model: str,
    prompt: str,
    *,
    adapter: list[str] | None = None,
    system: str | None = None,
    chat: bool | None = None,
    sampling: SamplingConfig = SamplingConfig(),
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Let a model answer a prompt.

    Args:
        model: a model directory, or a name on the hub
        prompt: what to answer, or to go on from
        adapter: `PATH` or `PATH=SCALE`, any number; a run directory will do
        system: a system prompt
        chat: use the chat template (default: where the model has one)
        sampling: how tokens are chosen
        revision: branch, tag or commit on the hub
        trust_remote_code: allow the model to run Python files of its own
        on_text: called with each piece of the answer as it comes

    Raises:
        ModelError, AdapterError: something is wrong with the model or an adapter
        ConfigError: a system prompt without a chat template
    """
    if not prompt.strip():
        raise ConfigError("The prompt is empty. Say something to answer: --prompt 'What is …?'")
    loaded = load(model, revision=revision, trust_remote_code=trust_remote_code, adapter=adapter or ())
    use_chat = bool(loaded.tokenizer.chat_templates) if chat is None else chat
    if system is not None and not use_chat:
        raise ConfigError("--system needs a chat template, and this model has none or --chat is false.")
    asked = prompt_of(loaded, _conversation(system, prompt) if use_chat else prompt)
    return complete(loaded, asked, sampling, on_text=on_text)


def _conversation(system: str | None, prompt: str) -> list[Message]:
    said = [{"role": "system", "content": system}] if system is not None else []
    return [*said, {"role": "user", "content": prompt}]


def prompt_of(model: LanguageModel, prompt: str | Sequence[Message] | Prompt) -> Prompt:
    """Tokens of a prompt: a text as it stands, a conversation by the model's chat template."""
    if isinstance(prompt, Prompt):
        return prompt
    return plain_prompt(model.tokenizer, prompt) if isinstance(prompt, str) else ChatPrompts(model.tokenizer)(prompt)


def complete(
    model: LanguageModel,
    prompt: str | Sequence[Message] | Prompt,
    sampling: SamplingConfig = SamplingConfig(),
    *,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """The whole answer of a loaded model to a text or a conversation.

    >>> model = load("models/Qwen3-0.6B")                                        # doctest: +SKIP
    >>> print(complete(model, [{"role": "user", "content": "Say hello."}]))      # doctest: +SKIP
    Hello!
    """
    asked = prompt_of(model, prompt)
    text: list[str] = []
    last: Piece | None = None
    for last in stream(model, asked, sampling):
        text.append(last.text)
        if on_text is not None and last.text:
            on_text(last.text)
    assert last is not None  # a stream ends with a piece that says why
    return Generation(
        text="".join(text),
        tokens=last.count,
        prompt_tokens=len(asked.tokens),
        finish_reason=last.finish_reason or "stop",
        tokens_per_second=last.tokens_per_second,
        peak_memory=mx.get_peak_memory(),
    )


def stream(
    model: LanguageModel,
    prompt: str | Sequence[Message] | Prompt,
    sampling: SamplingConfig = SamplingConfig(),
    *,
    cache: list[Any] | None = None,
) -> Iterator[Piece]:
    """The answer piece by piece, as soon as a piece of text is certain.

    cache: the key/value cache of what stands before the prompt (`mlxlm.prompt_cache(model.network)` for an empty one);
           it is extended by prompt and answer, for the next turn
    """
    asked = prompt_of(model, prompt)
    if not asked.tokens:
        raise ConfigError("The prompt is empty: there is nothing to go on from.")
    tokenizer = mlxlm.with_stops(model.generation_tokenizer, asked.stops)
    responses = mlxlm.stream_generate(model.network, tokenizer, asked.tokens, **_options(sampling, cache))
    try:
        yield from _until_stop(responses, sampling.stop)
    finally:
        close = getattr(responses, "close", None)
        if close is not None:
            close()


def sampler(sampling: SamplingConfig) -> Callable[[mx.array], mx.array]:
    """What picks a token from log-probabilities, with a random state of its own: the process's stays as it is."""
    if sampling.temperature == 0:
        return lambda log_probs: mx.argmax(log_probs, axis=-1)
    keep = mlxlm.sampling_filters(top_p=sampling.top_p, min_p=sampling.min_p, top_k=sampling.top_k)
    key = mx.random.key(sampling.seed)

    def pick(log_probs: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        return mx.random.categorical(keep(log_probs) / sampling.temperature, key=now)

    return pick


def _options(sampling: SamplingConfig, cache: list[Any] | None) -> dict[str, Any]:
    options: dict[str, Any] = {"max_tokens": sampling.max_tokens, "sampler": sampler(sampling)}
    if sampling.repetition_penalty is not None:
        options["logits_processors"] = mlxlm.make_logits_processors(
            repetition_penalty=sampling.repetition_penalty, repetition_context_size=64
        )
    if cache is not None:
        options["prompt_cache"] = cache
    return options


def _until_stop(responses: Iterator[Any], stops: Sequence[str]) -> Iterator[Piece]:
    """Pieces up to the end or a stop text. Text that may be the beginning of a stop text is held back."""
    held = ""
    keep = max((len(stop) for stop in stops), default=1) - 1
    for response in responses:
        count, speed = int(response.generation_tokens), float(response.generation_tps)
        held += response.text
        at = min((place for stop in stops if (place := held.find(stop)) >= 0), default=-1)
        if at >= 0:
            yield Piece(held[:at], response.token, count, "stop", speed)
            return
        if response.finish_reason is not None:
            yield Piece(held, response.token, count, response.finish_reason, speed)
            return
        cut = max(len(held) - keep, 0)
        yield Piece(held[:cut], response.token, count, None, speed)
        held = held[cut:]
