"""Plain text into samples: documents into windows, and samples that are too long into ones that are not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from mlxlora.data.chat import Encoded
from mlxlora.data.config import SamplesConfig
from mlxlora.data.records import TextRun
from mlxlora.data.sample import Sample
from mlxlora.tokenizer import Tokenizer

IntArray = npt.NDArray[np.int32]


def split_at_marker(text: str, config: SamplesConfig) -> list[str]:
    """The samples of one document: cut before every `sample_start`, or the whole document without one."""
    marker = config.sample_start
    if marker is None:
        return [text]
    first, *rest = text.split(marker)
    head = [first] if first.strip() else []
    return head + [(marker if config.keep_sample_start else "") + part for part in rest if part.strip()]


class TextEncoder:
    """Encodes documents: beginning-of-text and end-of-text tokens between them, windows over them."""

    def __init__(self, tokenizer: Tokenizer, config: SamplesConfig) -> None:
        """Prepare for many calls of `encode`."""
        bos = tokenizer.adds_bos if config.prepend_bos is None else config.prepend_bos
        self.tokenizer = tokenizer
        self.config = config
        self.window = min(config.window or config.max_length, config.max_length)
        self._before = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
        self._after = [tokenizer.eos_id] if config.append_eos and tokenizer.eos_id is not None else []

    def encode(self, texts: Sequence[str]) -> list[list[Sample]]:
        """Samples of each text, not yet cut to windows."""
        parts = [split_at_marker(text, self.config) for text in texts]
        ids = iter(self.tokenizer.encode_ids([part for group in parts for part in group]))
        return [[self._sample(next(ids)) for _ in group] for group in parts]

    def _sample(self, ids: IntArray) -> Sample:
        tokens = np.concatenate([self._before, ids, self._after]).astype(np.int32)
        weights = np.ones(len(tokens), np.float32)
        weights[:1] = 0.0
        return Sample(tokens, weights)

    def run(self, part: TextRun) -> Encoded:
        """Raw text inside a conversation: control tokens are recognised, nothing is added."""
        ids = self.tokenizer.encode_ids([part.text], control=True)[0]
        return Encoded(Sample(ids, np.full(len(ids), float(part.train), np.float32)))

    def fitted(self, sample: Sample) -> Iterator[Sample]:
        """Windows over a sample where windows are asked for, else the sample as it is."""
        config = self.config
        if config.fill or (config.too_long != "split" and config.window is None and config.stride is None):
            yield sample
        else:
            yield from self.windows(sample)

    def filler(self) -> Filler:
        """Puts documents together until a window is full."""
        return Filler(self.window, self.tokenizer.bos_id)

    def windows(self, sample: Sample) -> Iterator[Sample]:
        """Windows over a sample; what the window before has seen is not learned again, only read."""
        size = self.window
        if len(sample.tokens) <= size:
            yield sample
            return
        stride = self.config.stride or size
        begin = 0
        while True:
            # a window starts one token early, or its first token would be learned by nobody
            start = max(0, begin - 1) if stride == size else begin
            tokens = sample.tokens[start : start + size]
            weights = sample.weights[start : start + size].copy()
            if begin:
                weights[: 1 if stride == size else size - stride] = 0.0
            yield Sample(tokens, weights, sample.origin)
            if start + size >= len(sample.tokens):
                return
            begin = start + size if stride == size else begin + stride


class Filler:
    """Fills windows with one document after the other; every token is learned once."""

    def __init__(self, window: int, bos_id: int | None = None) -> None:
        """window: length in tokens; bos_id: the token that begins documents, which is never learned."""
        self.window = window
        self.bos_id = bos_id
        self._parts: list[Sample] = []
        self._size = 0
        self._line = 0

    def add(self, sample: Sample, line: int) -> Iterator[tuple[Sample, int]]:
        """Take a document of line `line`; yields the windows that are full, each with the line it begins in."""
        if not self._parts:
            self._line = line
        elif sample.tokens[0] != self.bos_id:
            # something stands before its first token now
            sample = Sample(sample.tokens, np.concatenate([np.ones(1, np.float32), sample.weights[1:]]))
        self._parts.append(sample)
        self._size += len(sample.tokens)
        while self._size > self.window:
            whole = joined(self._parts)
            yield Sample(whole.tokens[: self.window], _first_unlearned(whole.weights[: self.window])), self._line
            # the last token of a window stands at the beginning of the next, or the one after it had nothing before it
            rest = Sample(whole.tokens[self.window - 1 :], whole.weights[self.window - 1 :])
            self._parts, self._size, self._line = [rest], len(rest.tokens), line

    def rest(self) -> Iterator[tuple[Sample, int]]:
        """What is left at the end."""
        if self._size > 1:
            whole = joined(self._parts)
            yield Sample(whole.tokens, _first_unlearned(whole.weights)), self._line
        self._parts, self._size = [], 0


def _first_unlearned(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    weights = weights.copy()
    weights[:1] = 0.0
    return weights


def joined(samples: Sequence[Sample]) -> Sample:
    """Samples one after the other as one."""
    tokens = np.concatenate([np.zeros(0, np.int32), *(sample.tokens for sample in samples)])
    weights = np.concatenate([np.zeros(0, np.float32), *(sample.weights for sample in samples)])
    return Sample(tokens.astype(np.int32), _first_unlearned(weights.astype(np.float32)))


def truncated(sample: Sample, length: int, bos_id: int | None) -> Sample:
    """The sample cut to `length` tokens, so that something to learn is left.

    The end is cut off, as long as learned tokens are left; else the beginning of the prompt goes (its
    beginning-of-text token stays), and the answer is kept from its first token.
    """
    if len(sample.tokens) <= length:
        return sample
    if sample.weights[1:length].any() or not sample.weights.any():
        return Sample(sample.tokens[:length], sample.weights[:length], sample.origin)
    first = int(np.flatnonzero(sample.weights)[0])
    last = int(np.flatnonzero(sample.weights)[-1]) + 1
    # at least an eighth of the window is prompt, or all that fits beside the whole answer
    start = min(max(last - length, 0), first - max(1, length // 8))
    start = max(start, 0)
    tokens = sample.tokens[start : start + length].copy()
    weights = sample.weights[start : start + length].copy()
    if start and bos_id is not None and sample.tokens[0] == bos_id:
        tokens[0] = bos_id
    weights[0] = 0.0
    return Sample(tokens, weights, sample.origin)
