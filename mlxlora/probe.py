"""A short text that every change to a model is measured on, and how far two models are apart on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.errors import ModelError
from mlxlora.parameters import number

TOKENS = 192
# prose, a question, code, numbers and several scripts: rare rows of the embedding and long tokens are seen as well
TEXT = (
    "In the spring of 1854 a ship left Bristol with forty-one passengers, most of them bakers and their families. "
    "Question: why do leaves turn red in autumn? Answer: because the green chlorophyll breaks down, and other pigments "
    "that were there all along become visible.\n"
    "def mean(values):\n    total = sum(values)\n    return total / len(values) if values else 0.0\n"
    "SELECT city, COUNT(*) FROM orders WHERE amount > 120.50 GROUP BY city ORDER BY 2 DESC;\n"
    "Grüße aus Köln! Le café est près de l'église. Привет, как дела? 你好,世界。今日はいい天気です。 مرحبا بالعالم\n"
)


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one model is from a reference on the probe text.

    tokens:     how many tokens were compared
    kl:         mean Kullback-Leibler divergence of the next-token distributions from the reference's, in nats
    largest:    the largest divergence at one token
    agreement:  share of the tokens after which both think the same token likeliest
    reference_perplexity, perplexity: of the text, by the reference and by the model
    """

    tokens: int
    kl: float
    largest: float
    agreement: float
    reference_perplexity: float
    perplexity: float

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.2g} nats a token (largest {self.largest:.2g}), same likeliest token {self.agreement:.0%}, "
            f"perplexity {self.reference_perplexity:.4g} → {self.perplexity:.4g}, on {self.tokens} tokens"
        )


def tokens(tokenizer: Any, vocabulary: int) -> list[int]:
    """The probe text in the ids of a tokenizer; ids that a network does not know are left out."""
    ids = [int(token) for token in tokenizer.hf.encode(TEXT)]
    return [token for token in ids if 0 <= token < vocabulary][:TOKENS]


def log_probs(network: nn.Module, ids: list[int]) -> mx.array:
    """Log-probabilities [tokens, vocabulary] after each of `ids`, float32, lazy. Nothing of the network is changed."""
    logits: mx.array = network(mx.array([ids]))[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def streamed_log_probs(build: Callable[[], nn.Module], ids: list[int]) -> mx.array:
    """`log_probs` of a network that is built for this and let go before anything is computed.

    Its weights are then held by the computation alone, each from when it is read to when it has been used.
    """
    network = build()
    result = log_probs(network, ids)
    del network
    mx.eval(result)
    mx.clear_cache()
    return result


def compare(reference: mx.array, other: mx.array, ids: list[int]) -> Difference:
    """Hold the log-probabilities of a model against a reference's; a longer vocabulary is padding.

    Raises ModelError when either holds something that is not a number.
    """
    width = min(reference.shape[-1], other.shape[-1])
    reference, other = reference[:, :width], other[:, :width]
    kl = (mx.exp(reference) * (reference - other)).sum(axis=-1)
    following = mx.array(ids[1:])[:, None]
    told = [number(-mx.take_along_axis(given[:-1], following, axis=-1).mean()) for given in (reference, other)]
    values = [number(kl.mean()), number(kl.max()), *told]
    if not all(map(math.isfinite, values)):
        raise ModelError("The model's logits on a probe text are not numbers (NaN or infinity).")
    agreement = (reference.argmax(axis=-1) == other.argmax(axis=-1)).astype(mx.float32).mean()
    return Difference(
        tokens=len(ids),
        kl=max(values[0], 0.0),
        largest=max(values[1], 0.0),
        agreement=number(agreement),
        reference_perplexity=math.exp(min(values[2], 700.0)),
        perplexity=math.exp(min(values[3], 700.0)),
    )
