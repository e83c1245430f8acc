"""A probe: what our own forward pass says about a short text, to hold a foreign reader against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxlora import hub
from mlxlora.adapters import Adapters
from mlxlora.model import fingerprint, load_network, load_tokenizer

TOKENS = 64
# several scripts, digits and code, so that rare rows of the embedding and long tokens are seen as well
TEXT = (
    "The quick brown fox jumps over 13 lazy dogs. Grüße aus Köln! Привет, мир. 你好,世界。 مرحبا "
    "def area(r): return 3.14159 * r ** 2  # circle\n"
)


class Source(Protocol):
    """What a probe needs to know of an export."""

    @property
    def base(self) -> str: ...
    @property
    def adapter(self) -> tuple[str, ...]: ...
    @property
    def any_base(self) -> bool: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def trust_remote_code(self) -> bool: ...


class NotReadBack(Exception):
    """The result cannot be read back on this machine; the export goes on, and says so."""


class ReaderMissing(NotReadBack):
    """The format's real reader is not installed."""

    def __init__(self, reader: str, install: str) -> None:
        super().__init__(f"Not read back: {reader} is not installed ({install}).")


@dataclass(frozen=True, slots=True)
class ReadBack:
    """What the format's real reader saw.

    reader:     its name
    tokens:     length of the probe
    difference: max |Δ logprob| over all positions and tokens compared
    bound:      the largest difference at which the two are the same model, for the number format that was written
    """

    reader: str
    tokens: int
    difference: float
    bound: float

    def __str__(self) -> str:
        return f"read back by {self.reader}, {self.tokens} tokens, max |Δ logprob| {self.difference:.1e}"


class Probe:
    """Tokens of a fixed text and our log-probabilities after each of them, computed when first asked for.

    tokens:    at most 64 ids
    log_probs: float32 [tokens, vocabulary], of the model with its adapters, in float32 whatever the weights' dtype
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    @cached_property
    def _seen(self) -> tuple[list[int], npt.NDArray[np.float32]]:
        path = hub.find(self._source.base, revision=self._source.revision)
        tokenizer = load_tokenizer(path, trust_remote_code=self._source.trust_remote_code)
        ids = [int(token) for token in tokenizer.hf.encode(TEXT)]
        tokens = (ids * (TOKENS // max(len(ids), 1) + 1))[:TOKENS] if ids else list(range(TOKENS))
        return tokens, streamed(lambda: self._network(self._source.adapter), tokens)

    def _network(self, adapter: Sequence[str]) -> nn.Module:
        source = self._source
        path = hub.find(source.base, revision=source.revision)
        network, _ = load_network(path, trust_remote_code=source.trust_remote_code)
        adapters = Adapters(network, lambda: fingerprint(path))
        for spec in adapter:
            adapters.add_spec(spec, any_base=source.any_base)
        return network

    @cached_property
    def base_log_probs(self) -> npt.NDArray[np.float32]:
        """The same for the model without adapters."""
        return streamed(lambda: self._network(()), self.tokens)

    @property
    def tokens(self) -> list[int]:
        return self._seen[0]

    @property
    def log_probs(self) -> npt.NDArray[np.float32]:
        return self._seen[1]

    def compare(
        self, reader: str, theirs: npt.NDArray[np.float32], bound: float, positions: Sequence[int] | None = None
    ) -> ReadBack:
        """Hold their log-probabilities [positions, vocabulary] against ours; a longer vocabulary is padding."""
        ours = self.log_probs if positions is None else self.log_probs[list(positions)]
        width = min(ours.shape[-1], theirs.shape[-1])
        difference = float(np.abs(ours[:, :width] - theirs[:, :width]).max())
        return ReadBack(reader, len(ours), difference, bound)


def log_probs(network: Any, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Log-probabilities [tokens, vocabulary] of a network after each token, computed in float32.

    The network is changed to float32 (quantized weights keep their bits; their scales become float32).
    """
    return np.array(_lazy_log_probs(network, tokens))


def streamed(build: Callable[[], nn.Module], tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """`log_probs` of a network that is built for this and let go before anything is computed.

    Its weights in float32 are then held by the computation alone, each from when it is read to when it has been used.
    """
    result = _lazy_log_probs(build(), tokens)
    found = np.array(result)
    mx.clear_cache()
    return found


def _lazy_log_probs(network: Any, tokens: Sequence[int]) -> mx.array:
    network.set_dtype(mx.float32)
    network.eval()
    logits: mx.array = network(mx.array([list(tokens)]))[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
