"""The head of a model as a function of hidden states, for the loss in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.adapters import weights
from mlxlora.data.sample import Batch
from mlxlora.engine.anatomy import Anatomy, relative_error
from mlxlora.engine.device import on_cpu, settle
from mlxlora.engine.dropout import set_keys
from mlxlora.engine.hold import Hold
from mlxlora.engine.precision import tolerance
from mlxlora.engine.slots import Slots
from mlxlora.engine.token_loss import Head, Known, chunk_length, token_log_probs, with_slopes


class HiddenScores:
    """Scores from the hidden states of the positions that count: [P, hidden]."""

    def __init__(
        self,
        hidden: mx.array,
        head: Head,
        learned: Sequence[mx.array],
        vocabulary: int,
        chunk: int,
        gradients: bool,
        linear: bool,
        known: Known | None = None,
        inside: int = 0,
    ) -> None:
        """`inside`: floats that the hidden state of a token takes in the blocks (see `chunk_length`); 0: not known."""
        self._hidden, self._head, self._learned = hidden, head, learned
        self._vocabulary, self._chunk, self._gradients, self._linear = vocabulary, chunk, gradients, linear
        self._known, self._inside = known, inside

    def token_log_probs(self, batch: Batch) -> mx.array:
        """Log-probability of each target: float32 [P], differentiable."""
        return token_log_probs(
            self._hidden,
            batch.targets,
            self._head,
            self._learned,
            self._length(batch),
            self._gradients,
            self._linear,
            self._known,
        )

    def ahead(self, batch: Batch) -> Known | None:
        """What these scores will be made of, if that is best computed where no gradient is followed."""
        if self._learned or not self._linear:
            return None
        return with_slopes(self._hidden, batch.targets, self._head, self._length(batch), self._linear)

    def _length(self, batch: Batch) -> int:
        inside = batch.tokens.size * self._inside
        return chunk_length(batch.targets.size, self._vocabulary, self._chunk, self._linear, inside)


class HeadView:
    """The head of a model as a function of hidden states and of the arrays in it that learn."""

    def __init__(self, anatomy: Anatomy, slots: Slots, chunk: int) -> None:
        """`slots` are those of the whole network or of what lies outside of the blocks; `chunk` tokens have logits at a
        time (0: as many as suit the vocabulary)."""
        self._anatomy, self._slots, self._vocabulary, self.chunk = anatomy, slots, anatomy.vocabulary, chunk
        self._indices = self._used()
        inside = {id(module) for block in anatomy.blocks for _, module in block.named_modules()}
        outside = [module for _, module in anatomy.network.named_modules() if id(module) not in inside]
        self._slow = [module for module in outside if _is_slow(module)]
        self._linear = not self._indices and self._is_linear()

    def _used(self) -> list[int]:
        """Which learned arrays the head reads: put "not a number" into one and see whether it comes out."""
        if self._anatomy.backbone is None:
            return []
        used = []
        now = self._slots.get()
        for index in self._slots.trainable:
            spoilt = mx.full(now[index].shape, mx.nan, now[index].dtype)
            with self._slots.holding([spoilt], [index]):
                out = self._anatomy.logits(mx.ones((1, 1, self._anatomy.width), self._anatomy.dtype))
            if mx.any(mx.isnan(out)).item():
                used.append(index)
        return used

    def _is_linear(self) -> bool:
        """Whether the logits are a product and no more: a soft-cap would show at a great length."""
        if self._anatomy.backbone is None:
            return False
        x = mx.random.normal((1, 3, self._anatomy.width), key=mx.random.key(0)).astype(self._anatomy.dtype)
        return relative_error(self._anatomy.logits(x * 1024), self._anatomy.logits(x) * 1024) <= tolerance(x.dtype)

    def scores(self, rows: mx.array, gradients: bool, key: mx.array | None, known: Known | None = None) -> HiddenScores:
        """Scores for the hidden states `rows` [P, hidden], with the arrays that stand in the slots now."""
        if self._anatomy.backbone is None:  # `rows` are logits
            return HiddenScores(rows, lambda rows, *_: rows, (), self._vocabulary, self.chunk, gradients, False)
        arrays = self._slots.get()
        unpacked = [_dense(module) for module in self._slow]

        def head(rows: mx.array, learned: Sequence[mx.array], index: int) -> mx.array:
            settle(*unpacked)  # what unpacking takes is gone before there are logits
            # the backward pass calls this when the slots hold other arrays again
            with self._slots.holding(arrays), self._slots.holding(learned, self._indices if learned else []):
                if key is not None and learned:  # every chunk its own dropout mask
                    set_keys(self._anatomy, [mx.random.split(key, index + 2)[index]])
                with _unpacked(self._slow, unpacked):
                    return self._anatomy.logits(rows[None]).squeeze(0)  # not [0]: its gradient would be a scatter

        learned = [arrays[index] for index in self._indices]
        inside = self._anatomy.width * self._anatomy.dtype.size // mx.float32.size
        return HiddenScores(rows, head, learned, self._vocabulary, self.chunk, gradients, self._linear, known, inside)


def _is_slow(module: nn.Module) -> bool:
    """Whether products with this layer's frozen weight are not BLAS calls as it is kept (see `device.py`)."""
    if not on_cpu() or not (weights.is_linear(module) or weights.is_embedding(module)):
        return False
    return ("scales" in module or module["weight"].dtype != mx.float32) and not module.trainable_parameters()


def _dense(module: nn.Module) -> mx.array:
    weight = weights.dense(module) if "scales" in module else module["weight"]
    return weight.astype(mx.float32)


@contextmanager
def _unpacked(modules: Sequence[nn.Module], dense: Sequence[mx.array]) -> Iterator[None]:
    """The products of `modules` with their weights in float32, for as long as the block runs."""
    hold, tables = Hold(), []
    for module, weight in zip(modules, dense, strict=True):
        product = _product(module, weight)
        if weights.is_embedding(module):
            tables.append(module)
            object.__setattr__(module, "as_linear", product)
        else:
            hold.on(module, product)
    try:
        with hold:
            yield
    finally:
        for module in tables:
            object.__delattr__(module, "as_linear")


def _product(module: nn.Module, weight: mx.array) -> Callable[..., Any]:
    def product(x: mx.array) -> mx.array:
        out = x.astype(mx.float32) @ weight.T
        return out + module["bias"].astype(mx.float32) if "bias" in module else out

    return product
